"""A memory that is kept in few bits, against one that is not: alone, and inside a model that learned something."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from palimpsest.checks import check, check_fields
from palimpsest.lab.framework.experiment import Progress, Row
from palimpsest.lab.measure.state_formats import FORMATS, Format
from palimpsest.lab.tasks.task import Task
from palimpsest.lab.training import Training, draw_test, evaluate, learn
from palimpsest.layers.layer_state import KDAState
from palimpsest.models.kimi_linear import KimiLinearForCausalLM
from palimpsest.models.kimi_linear.model_state import ModelState
from palimpsest.ops.gates import l2norm
from palimpsest.ops.variants import kda, kda_step_


class Timescale(NamedTuple):
    """How long a memory remembers: tokens until its channels have faded to 1/e, and the largest beta."""

    shortest: float
    longest: float
    beta: float = 1.0


TIMESCALES = {
    "short": Timescale(4, 64),
    "long": Timescale(64, 4096),
    "endless": Timescale(math.inf, math.inf),
    "long, gentle": Timescale(64, 4096, 0.02),
    "endless, gentle": Timescale(math.inf, math.inf, 0.02),
}


@dataclass(frozen=True, kw_only=True)
class Drift:
    """A point: random tokens through memories of one format, against the law in float64.

    Attributes:
        format: a name of FORMATS.
        timescale: a name of TIMESCALES: how long channels remember, spread evenly on a logarithmic scale, and how much a
            token edits.
        tokens: to read. heads, channels: of the memory. seed: of everything.
    """

    format: str
    timescale: str = "long"
    tokens: int = 1024
    heads: int = 4
    channels: int = 32
    seed: int = 0

    def label(self) -> Row:
        return {"format": self.format, "timescale": self.timescale, "seed": self.seed}

    def to_dict(self) -> Row:
        return {"kind": "drift", **vars(self)}

    def prepare(self) -> None:
        check_fields(self, "drift: ")
        check(self.format in FORMATS, f"format {self.format!r} is unknown; choose one of {', '.join(FORMATS)}")
        check(
            self.timescale in TIMESCALES,
            f"timescale {self.timescale!r} is unknown; choose one of {', '.join(TIMESCALES)}",
        )
        check(self.tokens >= 16, f"drift: tokens is {self.tokens}; give at least 16")
        check(self.heads >= 1, f"drift: heads is {self.heads}; give at least 1")
        even = self.channels >= 2 and self.channels % 2 == 0
        check(even, f"drift: channels is {self.channels}; give an even number of at least 2")
        check(self.seed >= 0, f"drift: seed is {self.seed}; give 0 or more")

    def work(self) -> float:
        return self.tokens / 2000

    def bytes_needed(self) -> int:
        return 96 * self.tokens * self.heads * self.channels + 64 * self.heads * self.channels**2

    @torch.no_grad()
    def run(self, device: str, progress: Progress, unfinished: Path | None = None) -> Row:
        inputs = [x.to(device) for x in self._inputs()]
        truth = kda(*inputs).output
        rng = torch.Generator(device).manual_seed(self.seed)
        how = FORMATS[self.format]
        stored = how.pack(torch.zeros(1, self.heads, self.channels, self.channels, device=device), rng)
        error, size = [], []
        singles = [x.float().unbind(1) for x in inputs]
        for t, (q, k, v, log_decay, beta) in enumerate(zip(*singles)):
            memory = how.unpack(stored).contiguous()
            output = kda_step_(q, k, v, log_decay, beta, memory)
            stored = how.pack(memory, rng)
            error.append((output.double() - truth[:, t]).square().sum())
            size.append(truth[:, t].square().sum())
            if t % 64 == 63:
                progress((t + 1) / self.tokens, "")
        error_T, size_T = torch.stack(error), torch.stack(size)
        rows, end = [], 16
        while end <= self.tokens:  # over the second half of ever longer prefixes
            part = slice(end // 2, end)
            rows.append(
                {"tokens": end, "relative_error": float((error_T[part].sum() / size_T[part].sum()).sqrt())}
                | {"bytes_per_number": stored.nbytes / stored.codes.numel()}
            )
            end *= 2
        return {"rows": rows}

    def _inputs(self) -> tuple[Tensor, ...]:
        """q, k, v, log_decay, beta in float64; keys and queries of unit length."""
        rng = torch.Generator().manual_seed(self.seed)
        T, H, K = self.tokens, self.heads, self.channels
        q, k, v = (torch.randn(1, T, H, K, generator=rng, dtype=torch.float64) for _ in range(3))
        shortest, longest, largest_beta = TIMESCALES[self.timescale]
        if math.isinf(shortest):
            log_decay = torch.zeros(1, T, H, K, dtype=torch.float64)
        else:
            spread = torch.linspace(0, 1, K, dtype=torch.float64)
            timescale = shortest * (longest / shortest) ** spread
            log_decay = -(torch.rand(1, T, H, K, generator=rng, dtype=torch.float64) * 2) / timescale
        beta = largest_beta * torch.rand(1, T, H, generator=rng, dtype=torch.float64)
        return l2norm(q), l2norm(k), v, log_decay, beta


@dataclass(frozen=True, kw_only=True)
class StoredState:
    """A point: a contestant learns a task, then answers with its memories in each format, rounded after every token.

    Attributes:
        training: what is learned.
        tests: what is asked then; sequences of batch_size at once.
    """

    training: Training
    tests: tuple[Task, ...]
    batch_size: int = 16

    def label(self) -> Row:
        label = self.training.label()
        return {name: label[name] for name in ("contestant", "task", "seed")}

    def to_dict(self) -> Row:
        tests = replace(self.training, tests=self.tests).to_dict()["tests"]
        return {
            "kind": "stored state",
            "training": self.training.to_dict(),
            "tests": tests,
            "batch_size": self.batch_size,
        }

    def prepare(self) -> None:
        check_fields(self, "stored state: ")
        check(self.batch_size >= 1, f"stored state: batch_size is {self.batch_size}; give at least 1")
        replace(self.training, tests=self.tests).prepare()

    def work(self) -> float:
        return self.training.work() / 15000 + len(FORMATS) * sum(t.length for t in self.tests) / 100

    def bytes_needed(self) -> int:
        return self.training.bytes_needed()

    def run(self, device: str, progress: Progress, unfinished: Path | None = None) -> Row:
        learned, model = learn(self.training, device, lambda share, word: progress(share / 2, word), unfinished)
        model.eval()
        rows, count = [], self.training.test_batches
        tests = [draw_test(task, self.batch_size, count, device) for task in self.tests]
        for i, (name, how) in enumerate(FORMATS.items()):
            reader = StepReader(how, device, progress=lambda i=i: progress(0.5 + i / 2 / len(FORMATS), ""))
            for task, test in zip(self.tests, tests):
                score = evaluate(model, test, device, reader)
                rows.append(
                    {"format": name, "test_task": task.name, "test_length": task.length, "bits": score["bits"]}
                    | {"accuracy": score["accuracy"], "bytes_per_number": reader.bytes_per_number}
                )
                progress(0.5 + (i + 1) / 2 / len(FORMATS), f"{name}, {task.name}: accuracy {score['accuracy']:.1%}")
        return {"rows": rows, "curve": learned["curve"]}


class StepReader:
    """Reads token after token, as in decoding, and rounds every memory after each."""

    def __init__(self, how: Format, device: str, progress: Any = lambda: None):
        self.how, self.progress = how, progress
        self.rng = torch.Generator(device).manual_seed(0)
        self.bytes_per_number = 0.0

    def __call__(self, model: KimiLinearForCausalLM, tokens: Tensor) -> Tensor:
        state = ModelState.empty(model.config, len(tokens), device=tokens.device, dtype=model.dtype)
        hidden = []
        for t in range(tokens.shape[1]):
            x, state = model.model.step_(tokens[:, t], state)
            hidden.append(x)
            state = replace(state, layers=tuple(self._rounded(layer) for layer in state.layers))
            if t % 64 == 0:
                self.progress()
        return torch.stack(hidden, 1)

    def _rounded(self, layer: Any) -> Any:
        if not isinstance(layer, KDAState):
            return layer
        stored = self.how.pack(layer.memory, self.rng)
        self.bytes_per_number = stored.nbytes / stored.codes.numel()
        return KDAState(self.how.unpack(stored).contiguous(), layer.conv)
