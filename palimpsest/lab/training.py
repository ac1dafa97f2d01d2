"""One contestant learns one task: fresh sequences every step, accuracy on held-out ones along the way.

Letters  B sequences, T tokens, N answers asked for, D hidden channels, A vocabulary.
Standing on the optimiser and the schedule of `palimpsest.train`; the loop is the lab's own, because its data are made and
not read, its labels are answers and not next tokens, and its end is an accuracy and not a number of epochs.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palimpsest.checks import check, check_fields
from palimpsest.files import replacing
from palimpsest.lab.framework.experiment import InterruptedSweep, Progress, Row
from palimpsest.lab.model_variants import ModelVariant, Size, build, config, count_parameters, state_numbers
from palimpsest.lab.tasks.task import IGNORED, Batch, Key, Task, describe
from palimpsest.models.kimi_linear import KimiLinearForCausalLM
from palimpsest.train.optim import build_optimizer, rate_factor
from palimpsest.train.recipe import Optim, Schedule

TEST_SEED = 0  # one test set for all
METRICS = ("accuracy", "exact", "loss", "bits")  # the last is of the same loss
AHEAD = 4  # batches made while the device works
KEEP_EVERY = 300.0  # seconds between two copies of a run that is not finished


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

    who: ModelVariant
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
        check(
            isinstance(self.who, ModelVariant),
            f"training: who is {self.who!r}; give a ModelVariant, as model_variant('kda')",
        )
        for name in ("train", "tests"):
            tasks = getattr(self, name)
            fits = isinstance(tasks, tuple) and all(isinstance(task, Task) for task in tasks)
            check(fits, f"training: {name} is {tasks!r:.60}; give a tuple of tasks")
        check(len(self.train) >= 1, "training: train is empty; give at least one task")
        sizes = {t.vocab_size for t in (*self.train, *self.asked)}
        check(len(sizes) == 1, f"training: the tasks have vocabularies of {sorted(sizes)}; give them one")
        check_fields(self, "training: ")
        for name in ("lr", "steps", "evaluate_every", "test_batches", "stop_at"):
            check(getattr(self, name) > 0, f"training: {name} is {getattr(self, name)}; give more than 0")
        for name in ("seed", "weight_decay", "warmup", "decay"):
            check(getattr(self, name) >= 0, f"training: {name} is {getattr(self, name)}; give 0 or more")
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

    def run(self, device: str, progress: Progress, unfinished: Path | None = None) -> Row:
        return learn(self, device, progress, unfinished)[0]

    # What follows makes it a Lesson of side_by_side.py.

    def material(self) -> str:
        """Those who share it see the same batches and tests, for as many steps."""
        shared = {
            k: v
            for k, v in self.to_dict().items()
            if k not in ("who", "size", "lr", "weight_decay", "warmup", "decay", "stop_at")
        }
        return json.dumps(shared, sort_keys=True)

    def make(self) -> nn.Module:
        return build(self.who, self.size, self.vocab_size)

    def draw(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """tokens, labels, scored: [B, T] each."""
        return _train_batch(self, step)[:3]

    def loss(self, model: Any, tokens: Tensor, labels: Tensor, scored: Tensor) -> Tensor:
        """As `learn` descends: scored answers and other labels averaged apart."""
        losses, _ = label_losses(model, tokens, labels)
        others = (labels != IGNORED) & ~scored
        return sum((losses * part).sum() / part.sum().clamp(min=1) for part in (scored, others))  # type: ignore[return-value]

    def draw_tests(self, device: str) -> list[Test]:
        return draw_tests(self, device)

    def score_inputs(self, tests: list[Test]) -> list[tuple[Tensor, ...]]:
        device = tests[0].questions[0].tokens.device
        return [tuple(x.to(device) for x in batch[:3]) for batch in tests[0].batches]

    def score(self, model: Any, tokens: Tensor, labels: Tensor, scored: Tensor) -> Tensor:
        losses, right = label_losses(model, tokens, labels)
        whole, rows = (right | ~scored).all(1).sum(), torch.full_like(scored.sum(), len(scored))
        return torch.stack([(right & scored).sum(), scored.sum(), (losses * scored).sum(), whole, rows]).float()

    def report(self, model: Any, curve: list[Row], tests: list[Test], device: str) -> Row:
        return outcome(self, model, curve, tests, device)


class Question(NamedTuple):
    """A batch as a device takes it: tokens, and which of its hidden states are asked for what."""

    tokens: Tensor  # [B, T]
    place: Tensor  # [N], in the flattened batch: of the scored answers first, then of all other labels
    target: Tensor  # [N]
    num_scored: int

    def to(self, device: str) -> Question:
        tokens, place, target = (x.to(device, non_blocking=True) for x in self[:3])
        return Question(tokens, place, target, self.num_scored)


def question(batch: Batch, device: str) -> Question:
    """On the host, in memory from which a GPU copies by itself, so that nobody waits for it."""
    scored_N = batch.scored.flatten().nonzero().flatten()
    others_N = ((batch.labels != IGNORED) & ~batch.scored).flatten().nonzero().flatten()
    place_N = torch.cat((scored_N, others_N))
    pinned = (lambda x: x.pin_memory()) if device.startswith("cuda") else (lambda x: x)
    return Question(pinned(batch.tokens), pinned(place_N), pinned(batch.labels.flatten()[place_N]), len(scored_N))


class Test(NamedTuple):
    """Held-out sequences, drawn once."""

    batches: list[Batch]
    questions: list[Question]  # on the device


def draw_test(task: Task, rows: int, count: int, device: str) -> Test:
    """`count` batches of `rows` sequences, the same in every run."""
    batches = [task.draw(rows, Key("test", TEST_SEED, i)) for i in range(count)]
    return Test(batches, [question(batch, device).to(device) for batch in batches])


def learn(
    point: Training, device: str, progress: Progress, unfinished: Path | None = None
) -> tuple[Row, KimiLinearForCausalLM]:
    """Runs the point; its result, and the model as it was at the end.

    unfinished: where a run that is interrupted is kept, and taken up again: to the bit on a CPU.
    """
    torch.manual_seed(point.seed)
    model = build(point.who, point.size, point.vocab_size).to(device)
    optimizer = build_optimizer(model, Optim(kind="adamw", lr=point.lr, weight_decay=point.weight_decay))
    for group in optimizer.param_groups:
        group["fused"] = True  # one launch instead of a dozen
    schedule = Schedule(warmup=point.warmup, decay=point.decay)
    parameters = list(model.parameters())
    tests = draw_tests(point, device)
    step, curve, running = _take_up(unfinished, model, optimizer, device)
    kept = time.monotonic()
    with closing(_ahead(lambda i: question(_train_batch(point, i), device), step, point.steps)) as questions:
        while step < point.steps and not _over(point, curve):
            factor = rate_factor(schedule, (step + 0.5) / point.steps)
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            asked = next(questions).to(device)
            losses = answer_losses(model, asked, device)[0]
            parts = [
                part.mean() for part in losses.split([asked.num_scored, len(losses) - asked.num_scored]) if len(part)
            ]
            if parts:  # a batch may happen to ask nothing
                loss = torch.stack(parts).sum()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                running += loss.detach()
            step, word = step + 1, ""
            if step % point.evaluate_every == 0 or step == point.steps:
                score = evaluate(model, tests[0], device)
                mean_loss = float(running) / (step - (curve[-1]["step"] if curve else 0))
                running.zero_()
                curve.append({"step": step, "train_loss": mean_loss, **{k: score[k] for k in METRICS}})
                word = f"step {step}, loss {mean_loss:.3f}, accuracy {score['accuracy']:.1%}"
            try:
                progress(step / point.steps, word)
            except InterruptedSweep:
                _keep(unfinished, model, optimizer, step, curve, running)
                raise
            if time.monotonic() - kept > KEEP_EVERY:
                _keep(unfinished, model, optimizer, step, curve, running)
                kept = time.monotonic()
    return outcome(point, model, curve, tests, device), model


def draw_tests(point: Training, device: str) -> list[Test]:
    """The held-out sequences of everything that is asked."""
    rows = {task: max(point.tokens_per_step // task.length, 1) for task in point.asked}
    return [draw_test(task, rows[task], point.test_batches, device) for task in point.asked]


def outcome(point: Training, model: Any, curve: list[Row], tests: list[Test], device: str) -> Row:
    """The result of a run that has ended: a row a test, the curve, and accuracy by slice."""
    scores = [evaluate(model, test, device) for test in tests]
    best = max(curve, key=lambda c: c["accuracy"])
    reached = next((c["step"] for c in curve if c["accuracy"] >= 0.99), None)
    shared = {
        "steps": curve[-1]["step"],
        "best_accuracy": best["accuracy"],
        "best_step": best["step"],
        "step_at_99": reached,
        "diverged": not math.isfinite(curve[-1]["train_loss"]),
        "parameters": count_parameters(model.config),
        "state_numbers": state_numbers(model.config, point.asked[0].length),
    }
    table = [
        {"test": i, "test_task": task.name, "test_length": task.length} | {k: test[k] for k in METRICS} | shared
        for i, (task, test) in enumerate(zip(point.asked, scores))
    ]
    return {"rows": table, "curve": curve, "slices": [test["slices"] for test in scores]}


def _over(point: Training, curve: list[Row]) -> bool:
    """The run has diverged, or succeeded."""
    return bool(curve) and (not math.isfinite(curve[-1]["train_loss"]) or curve[-1]["accuracy"] >= point.stop_at)


def _keep(place: Path | None, model, optimizer, step: int, curve: list[Row], running: Tensor) -> None:
    if place is None:
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    whole = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "curve": curve}
    with replacing(place) as partial:
        torch.save(whole | {"running": running}, partial)


def _take_up(place: Path | None, model, optimizer, device: str) -> tuple[int, list[Row], Tensor]:
    """Steps done, their curve and the sum of losses since its last point; from nothing, or from what was kept."""
    if place is None or not place.is_file():
        return 0, [], torch.zeros((), device=device)
    held = torch.load(place, map_location=device, weights_only=True)
    model.load_state_dict(held["model"])
    optimizer.load_state_dict(held["optimizer"])
    return held["step"], held["curve"], held["running"]


@torch.no_grad()
def evaluate(
    model: KimiLinearForCausalLM,
    test: Test,
    device: str,
    reader: Callable[[KimiLinearForCausalLM, Tensor], Tensor] | None = None,
) -> Row:
    """On held-out sequences: accuracy an answer, accuracy a sequence ("exact"), nats and bits an answer, accuracy by slice.

    reader: tokens [B, T] to hidden states [B, T, D], another way than the model's forward pass.
    """
    nats, right = [], []
    for asked in test.questions:
        losses, correct = answer_losses(model, asked, device, reader)
        nats.append(losses[: asked.num_scored].double().sum())
        right.append(correct[: asked.num_scored])
    right_N = torch.cat(right).cpu().numpy()  # the device is waited for here, and not before
    places = [asked.place[: asked.num_scored].cpu().numpy() for asked in test.questions]
    lengths = [batch.tokens.shape[1] for batch in test.batches]
    wrong = [
        np.unique(place[~ok] // T)
        for place, ok, T in zip(places, np.split(right_N, np.cumsum([len(p) for p in places])[:-1]), lengths)
    ]
    sequences = sum(len(batch.tokens) for batch in test.batches)
    names = dict.fromkeys(name for batch in test.batches for name in batch.slices)
    cut = {
        name: _cut(
            np.concatenate([b.slices[name].flatten().numpy()[place] for b, place in zip(test.batches, places)]), right_N
        )
        for name in names
    }
    loss = float(torch.stack(nats).sum()) / max(len(right_N), 1)
    accuracy = float(right_N.mean()) if len(right_N) else 0.0
    exact = 1 - sum(map(len, wrong)) / sequences
    return {"accuracy": accuracy, "exact": exact, "loss": loss, "bits": loss / math.log(2), "slices": cut}


def _cut(values: np.ndarray, right: np.ndarray) -> dict[str, list[float]]:
    """value (small ones, or their bucket) -> accuracy there, and of how many."""
    kinds, which = np.unique(buckets(values), return_inverse=True)
    counts, ok = np.bincount(which, minlength=len(kinds)), np.bincount(which, right, len(kinds))
    return {str(kind): [float(o / n), int(n)] for kind, o, n in zip(kinds, ok, counts)}


def answer_losses(
    model: KimiLinearForCausalLM,
    asked: Question,
    device: str,
    reader: Callable[[KimiLinearForCausalLM, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Nats of every label [N], those of scored answers first, and whether the model's first choice is right [N].

    Scored and other labels are averaged apart to train: what is asked weighs as much as the rest of the text.
    """
    half = torch.autocast("cuda", torch.bfloat16) if device.startswith("cuda") and reader is None else nullcontext()
    with half:
        hidden_BTD = model.model(asked.tokens)[0] if reader is None else reader(model, asked.tokens)
        logits_NA = model.lm_head(hidden_BTD.flatten(0, 1).index_select(0, asked.place)).float()
        losses_N = F.cross_entropy(logits_NA, asked.target, reduction="none")
    return losses_N, logits_NA.detach().argmax(-1) == asked.target


def label_losses(model: Any, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Nats of every label [B, T], 0 where nothing is asked, and whether the first choice is right. Never waits for a GPU."""
    half = torch.autocast("cuda", torch.bfloat16) if tokens.is_cuda else nullcontext()
    with half:
        logits_BTA = model.lm_head(model.model.without_state(tokens)).float()
        losses_N = F.cross_entropy(logits_BTA.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED)
    return losses_N.view_as(labels), logits_BTA.detach().argmax(-1) == labels


def buckets(values: np.ndarray | Sequence[int]) -> np.ndarray:
    """Small values stay, larger ones are grouped by powers of two.

    >>> buckets([0, 7, 15, 16, 31, 40, 64]).tolist()
    [0, 7, 15, 16, 16, 32, 64]
    """
    values = np.asarray(values)
    return np.where(values < 16, values, 1 << np.log2(np.maximum(values, 1)).astype(int))


def _train_batch(point: Training, step: int) -> Batch:
    task = point.train[step % len(point.train)]
    return task.draw(point.tokens_per_step // task.length, Key("train", point.seed, step))


def _ahead(make: Callable[[int], Any], first: int, end: int) -> Generator[Any, None, None]:
    """make(first), ..., make(end - 1), a few of them made in another thread while the caller works."""
    with ThreadPoolExecutor(1) as pool:
        waiting = [pool.submit(make, i) for i in range(first, min(first + AHEAD, end))]
        try:
            for i in range(first, end):
                yield waiting.pop(0).result()
                if i + AHEAD < end:
                    waiting.append(pool.submit(make, i + AHEAD))
        finally:
            for later in waiting:
                later.cancel()
