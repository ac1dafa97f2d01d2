"""One contestant learns one task: fresh sequences every step, accuracy on held-out ones along the way.

Letters  B sequences, T tokens, N answers asked for, D hidden channels, A vocabulary.
Standing on the optimiser and the schedule of `palimpsest.train`; the loop is the lab's own, because its data are made and
not read, its labels are answers and not next tokens, and its end is an accuracy and not a number of epochs.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from palimpsest.lab.contestants import Contestant, Size, build, config, count_parameters, state_numbers
from palimpsest.lab.experiment import Row, Tell
from palimpsest.lab.tasks.task import IGNORED, Batch, Key, Task, check, describe
from palimpsest.models.kimi_linear import KimiLinearForCausalLM

TEST_SEED = 0  # one test set for all
METRICS = ("accuracy", "exact", "loss", "bits")  # the last is of the same loss
AHEAD = 4  # batches made while the device works


@dataclass(frozen=True, kw_only=True)
class Training:
    """A point: who learns what, and how.

    Attributes:
        who, size: the model.
        train: tasks, one a step in turn; several make a mixture, all of one vocabulary.
        tests: tasks on held-out sequences; the first decides early stopping and the best step. () takes the first of train.
        seed: of weights and training data.
        lr, weight_decay, warmup, decay: AdamW, and shares of the run in which the rate rises and falls.
        steps, tokens_per_step: at most so many; sequences a step = tokens_per_step / length.
        evaluate_every, test_batches: steps; batches of a test, as large as those of training.
        stop_at: the accuracy on the first test at which the run has succeeded and ends.
    """

    who: Contestant
    train: tuple[Task, ...]
    tests: tuple[Task, ...] = ()
    size: Size = Size()  # noqa: RUF009 - frozen
    seed: int = 0
    lr: float = 1e-3
    weight_decay: float = 0.1
    warmup: float = 0.05
    decay: float = 0.2
    steps: int = 1000
    tokens_per_step: int = 4096
    evaluate_every: int = 100
    test_batches: int = 4
    stop_at: float = 0.995

    def label(self) -> Row:
        task = self.asked[0]
        return {
            "contestant": self.who.name,
            "task": task.name,
            "length": task.length,
            "lr": self.lr,
            "seed": self.seed,
        }

    @property
    def asked(self) -> tuple[Task, ...]:
        return self.tests or self.train[:1]

    def to_dict(self) -> Row:
        settings = {
            name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("who", "train", "tests")
        }
        tasks = {"train": [describe(t) for t in self.train], "tests": [describe(t) for t in self.asked]}
        return {"kind": "training", "who": self.who.to_dict(), **settings, **tasks, "size": asdict(self.size)}

    def prepare(self) -> None:
        check(len(self.train) >= 1, "training: train is empty; give at least one task")
        sizes = {t.vocab_size for t in (*self.train, *self.asked)}
        check(len(sizes) == 1, f"training: the tasks have vocabularies of {sorted(sizes)}; give them one")
        for name in ("lr", "steps", "evaluate_every", "test_batches", "stop_at"):
            check(getattr(self, name) > 0, f"training: {name} is {getattr(self, name)}; give more than 0")
        longest = max(t.length for t in self.train)
        check(
            self.tokens_per_step >= longest,
            f"training: tokens_per_step {self.tokens_per_step} is less than one sequence of {longest}; give at least that",
        )
        check(
            self.warmup + self.decay <= 1,
            f"training: warmup {self.warmup} and decay {self.decay} are more than the run",
        )
        for task in (*self.train, *self.asked):
            task.draw(1, Key("test", 0, 0))  # text that is missing or too short is told now
        config(self.who, self.size, self.vocab_size)

    @property
    def vocab_size(self) -> int:
        return self.train[0].vocab_size

    def work(self) -> float:
        return float(self.steps * self.tokens_per_step)

    def bytes_needed(self) -> int:
        """Weights with gradients and moments, activations of a step, logits where something is asked; from above."""
        s, tokens = self.size, self.tokens_per_step
        layer = 12 * s.hidden_size + 24 * s.heads * s.head_dim + 6 * s.mlp
        states = tokens / 64 * s.heads * s.head_dim**2 * 4
        weights = 16 * count_parameters(config(self.who, s, self.vocab_size))
        return int(weights + s.layers * (4 * tokens * layer + states) + 16 * tokens * self.vocab_size)

    def run(self, device: str, tell: Tell) -> Row:
        return learn(self, device, tell)[0]


def learn(point: Training, device: str, tell: Tell) -> tuple[Row, KimiLinearForCausalLM]:
    """Runs the point; its result, and the model as it was at the end."""
    from palimpsest.train.optim import build_optimizer, rate_factor  # not at import: accelerate comes with it
    from palimpsest.train.recipe import Optim, Schedule

    torch.manual_seed(point.seed)
    model = build(point.who, point.size, point.vocab_size).to(device)
    optimizer = build_optimizer(model, Optim(kind="adamw", lr=point.lr, weight_decay=point.weight_decay))
    schedule = Schedule(warmup=point.warmup, decay=point.decay)
    curve: list[Row] = []
    running, last = torch.zeros((), device=device), 0
    diverged = False
    for step, batch in enumerate(_ahead(lambda step: _train_batch(point, step), point.steps)):
        factor = rate_factor(schedule, (step + 0.5) / point.steps)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        loss = sum(part.mean() for part in answer_losses(model, batch, device)[0])
        assert isinstance(loss, Tensor)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        running += loss.detach()
        done = step + 1
        if done % point.evaluate_every and done != point.steps:
            tell(done / point.steps, "")
            continue
        found = evaluate(model, point, point.asked[0], device)
        mean_loss, running, last = float(running) / (done - last), torch.zeros((), device=device), done
        curve.append({"step": done, "train_loss": mean_loss, **{k: found[k] for k in METRICS}})
        tell(done / point.steps, f"step {done}, loss {mean_loss:.3f}, accuracy {found['accuracy']:.1%}")
        diverged = not math.isfinite(mean_loss)
        if diverged or found["accuracy"] >= point.stop_at:
            break
    tests = [evaluate(model, point, task, device) for task in point.asked]
    best = max(curve, key=lambda c: c["accuracy"])
    reached = next((c["step"] for c in curve if c["accuracy"] >= 0.99), None)
    shared = {
        "steps": curve[-1]["step"],
        "best_accuracy": best["accuracy"],
        "best_step": best["step"],
        "step_at_99": reached,
        "diverged": diverged,
        "parameters": count_parameters(model.config),
        "state_numbers": state_numbers(model.config, point.asked[0].length),
    }
    rows = [
        {"test": i, "test_task": task.name, "test_length": task.length} | {k: test[k] for k in METRICS} | shared
        for i, (task, test) in enumerate(zip(point.asked, tests))
    ]
    return {"rows": rows, "curve": curve, "slices": [t["slices"] for t in tests]}, model


@torch.no_grad()
def evaluate(
    model: KimiLinearForCausalLM,
    point: Training,
    task: Task,
    device: str,
    reader: Callable[[KimiLinearForCausalLM, Tensor], Tensor] | None = None,
) -> Row:
    """On held-out sequences: accuracy an answer, accuracy a sequence ("exact"), nats and bits an answer, accuracy by slice.

    reader: tokens [B, T] to hidden states [B, T, D], another way than the model's forward pass.
    """
    right = asked = whole = sequences = 0
    nats = 0.0
    slices: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(lambda: [0, 0]))
    for i in range(point.test_batches):
        batch = task.draw(max(point.tokens_per_step // task.length, 1), Key("test", TEST_SEED, i))
        losses, correct = answer_losses(model, batch, device, reader)
        correct, scored = correct.cpu(), batch.scored
        right, asked = right + int(correct[scored].sum()), asked + int(scored.sum())
        whole += int((correct | ~scored).all(1).sum())
        sequences += len(scored)
        nats += float(losses[0].sum())
        for name, values in batch.slices.items():
            for value, ok in zip(map(bucket, values[scored].tolist()), correct[scored].tolist()):
                slices[name][value][0] += ok
                slices[name][value][1] += 1
    cut = {name: {str(k): [ok / n, n] for k, (ok, n) in sorted(found.items())} for name, found in slices.items()}
    loss = nats / asked
    found = {"accuracy": right / asked, "exact": whole / sequences, "loss": loss, "bits": loss / math.log(2)}
    return found | {"slices": cut}


def answer_losses(
    model: KimiLinearForCausalLM,
    batch: Batch,
    device: str,
    reader: Callable[[KimiLinearForCausalLM, Tensor], Tensor] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Nats of every scored answer [N], then of every other label if there is one; and where the answer is right [B, T].

    Their means are added up to train: what is asked weighs as much as the rest of the text.
    """
    tokens = batch.tokens.to(device, non_blocking=True)
    half = torch.autocast("cuda", torch.bfloat16) if device.startswith("cuda") and reader is None else nullcontext()
    losses: list[Tensor] = []
    correct_BT = torch.zeros_like(tokens, dtype=torch.bool)
    with half:
        hidden_BTD = model.model(tokens)[0] if reader is None else reader(model, tokens)
        for where_BT in (batch.scored, (batch.labels != IGNORED) & ~batch.scored):
            index_N = where_BT.flatten().nonzero().flatten()  # here and not on the device, which need not wait for it
            if not len(index_N):
                continue
            target_N = batch.labels.flatten()[index_N].to(device, non_blocking=True)
            index_N = index_N.to(device, non_blocking=True)
            logits_NA = model.lm_head(hidden_BTD.flatten(0, 1)[index_N]).float()
            losses.append(F.cross_entropy(logits_NA, target_N, reduction="none"))
            correct_BT.view(-1)[index_N] = logits_NA.argmax(-1) == target_N
    return losses, correct_BT


def bucket(value: int) -> int:
    """Small values stay, larger ones are grouped by powers of two.

    >>> [bucket(v) for v in (0, 7, 15, 16, 31, 40, 64)]
    [0, 7, 15, 16, 16, 32, 64]
    """
    return value if value < 16 else 1 << (value.bit_length() - 1)


def _train_batch(point: Training, step: int) -> Batch:
    task = point.train[step % len(point.train)]
    return task.draw(point.tokens_per_step // task.length, Key("train", point.seed, step))


def _ahead(make: Callable[[int], Any], count: int) -> Iterator[Any]:
    """make(0), make(1), ..., a few of them made in another thread while the caller works."""
    with ThreadPoolExecutor(1) as pool:
        waiting = [pool.submit(make, i) for i in range(min(AHEAD, count))]
        try:
            for i in range(count):
                yield waiting.pop(0).result()
                if i + AHEAD < count:
                    waiting.append(pool.submit(make, i + AHEAD))
        finally:
            for later in waiting:
                later.cancel()
