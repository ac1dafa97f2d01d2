"""Many small models learn at once on one GPU: each step of each a CUDA graph, all of one material from the same batches.

A step of a small model is a thousand kernels of microseconds: one after another they leave a GPU idle, and the host that
launches them is the limit. Here a whole step (batch, forward, backward, clipping, AdamW, its learning rate) is recorded
once and replayed, on a stream of its own beside the steps of the others; a batch is drawn once for all who learn from it,
which also takes the luck of the draw out of the comparison. Nobody waits for anybody but where scores are read.

    learn_together(lessons, "cuda") -> (lesson, its result) as each ends

On a CPU the same steps are taken one after another, without graphs. What is learned differs from `training.learn` by
rounding alone: batches, weights, schedule and tests are the same.
"""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from palimpsest.checks import check
from palimpsest.files import replacing
from palimpsest.lab.framework.experiment import InterruptedSweep, Row
from palimpsest.lab.framework.results import SweepFolder
from palimpsest.lab.framework.tally import Tally
from palimpsest.lab.framework.worker import run_here
from palimpsest.train.optim import build_optimizer, rate_factor
from palimpsest.train.recipe import Optim, Schedule

LAPS = 2  # parts of the ring of batches: one is read while the next is filled
AHEAD = 6  # laps that are drawn before they are needed
MOST_A_LAP = 25  # steps between two looks at the host's list of things to do


class Lesson(Protocol):
    """One run that can be taken beside others: `Training` is one.

    Attributes:
        lr, weight_decay, warmup, decay: of AdamW, as of Training.
        steps, evaluate_every, seed, stop_at: as of Training.
    """

    @property
    def lr(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def warmup(self) -> float: ...
    @property
    def decay(self) -> float: ...
    @property
    def steps(self) -> int: ...
    @property
    def evaluate_every(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def stop_at(self) -> float: ...

    def material(self) -> str:
        """Names the batches, the tests and the length of the run: lessons of one material share them."""
        ...

    def make(self) -> nn.Module:
        """The model, fresh; torch's seed decides its weights."""
        ...

    def draw(self, step: int) -> tuple[Tensor, ...]:
        """The batch of a step, on the host; of one shape and kind at every step."""
        ...

    @property
    def loss(self) -> Callable[..., Tensor]:
        """A scalar to descend; never waits for the device."""
        ...

    def draw_tests(self, device: str) -> Any:
        """Held-out sequences, drawn once for a material."""
        ...

    def score_inputs(self, tests: Any) -> list[tuple[Tensor, ...]]:
        """What `score` is asked along the way, on the device."""
        ...

    @property
    def score(self) -> Callable[..., Tensor]:
        """[5]: answers right, of how many, the sum of their nats; sequences all right, of how many; without a wait."""
        ...

    def report(self, model: nn.Module, curve: list[Row], tests: Any, device: str) -> Row:
        """The point's result."""
        ...


class Learner:
    """One model with its optimiser, its place in the run, and on a GPU the graphs of a step and of a test.

    Args:
        lesson: what it learns.
        ring: of each tensor of a batch the last few, [slots, ...], on the device; filled by others.
        questions: of `score_inputs`.
        device: "cpu" or a GPU.
    """

    def __init__(self, lesson: Lesson, ring: Sequence[Tensor], questions: Sequence[tuple[Tensor, ...]], device: str):
        self.lesson, self.ring, self.questions, self.curve = lesson, ring, questions, []
        self.on_gpu = device.startswith("cuda")
        torch.manual_seed(lesson.seed)
        self.model = lesson.make().to(device)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        optim = Optim(kind="adamw", lr=lesson.lr, weight_decay=lesson.weight_decay)
        self.optimizer = build_optimizer(self.model, optim, fused=self.on_gpu)
        schedule = Schedule(warmup=lesson.warmup, decay=lesson.decay)
        rates = [lesson.lr * rate_factor(schedule, (i + 0.5) / lesson.steps) for i in range(lesson.steps)]
        self.rates = torch.tensor([*rates, 0.0], device=device)  # the last for a step too many, in warming up
        self.count = torch.zeros(1, dtype=torch.long, device=device)
        self.running = torch.zeros((), device=device)
        self.rate = torch.zeros((), device=device)
        for group in self.optimizer.param_groups:
            if self.on_gpu:
                group.update(capturable=True, lr=self.rate)
        self.stream = torch.cuda.Stream(device) if self.on_gpu else None
        self._step: Callable[[], object] = self._take_step
        self._score: Callable[[], object] = self._take_score
        self.scored = torch.zeros(5, device=device)
        if self.on_gpu:
            self._record()

    def step(self) -> None:
        """Take, or on a GPU begin, one step."""
        with torch.cuda.stream(self.stream):  # of None: the current one
            self._step()

    def begin_score(self) -> None:
        """Ask the tests; `end_score` has the answer."""
        with torch.cuda.stream(self.stream):
            self._score()

    def end_score(self, step: int) -> bool:
        """Adds to the curve; whether the run has ended by success or by a loss that is no number."""
        before = self.curve[-1]["step"] if self.curve else 0
        right, asked, nats, whole, rows = self.scored.tolist()
        loss = float(self.running) / (step - before)
        self.running.zero_()
        nats = nats / max(asked, 1)
        scores = {"accuracy": right / max(asked, 1), "exact": whole / rows, "loss": nats, "bits": nats / math.log(2)}
        self.curve.append({"step": step, "train_loss": loss, **scores})
        return not math.isfinite(loss) or self.curve[-1]["accuracy"] >= self.lesson.stop_at

    def keep(self, file: Path) -> None:
        """Writes everything that going on needs."""
        file.parent.mkdir(parents=True, exist_ok=True)
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "curve": self.curve}
        with replacing(file) as partial:
            torch.save(state | {"count": self.count, "running": self.running}, partial)

    @torch.no_grad()
    def take_up(self, file: Path) -> None:
        """Goes on from what was kept: into the tensors that the graphs know."""
        held = torch.load(file, map_location=self.running.device, weights_only=True)
        for name, x in self.model.state_dict().items():
            x.copy_(held["model"][name])
        if self.on_gpu:
            of = held["optimizer"]["state"]
            for i, p in enumerate(p for group in self.optimizer.param_groups for p in group["params"]):
                for name, x in self.optimizer.state[p].items():
                    x.copy_(of[i][name])
        else:
            self.optimizer.load_state_dict(held["optimizer"])
        self.count.copy_(held["count"])
        self.running.copy_(held["running"])
        self.curve = held["curve"]

    def _take_step(self) -> None:
        slot = self.count % len(self.ring[0])
        batch = [x.index_select(0, slot)[0] for x in self.ring]
        if self.on_gpu:
            self.rate.copy_(self.rates.index_select(0, self.count)[0])
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = float(self.rates[int(self.count)])
        for p in self.parameters:
            p.grad = None
        loss = self.lesson.loss(self.model, *batch)
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in self.parameters if p.grad is not None], 1.0)
        self.optimizer.step()
        self.running += loss.detach()
        self.count += 1

    @torch.no_grad()
    def _take_score(self) -> None:
        sums = [self.lesson.score(self.model, *batch) for batch in self.questions]
        self.scored.copy_(torch.stack(sums).sum(0))

    def _record(self) -> None:
        """Both graphs. What is compiled or allocated once happens before; the model is then put back as it began."""
        assert self.stream is not None
        kept = [*self.parameters, *self.model.buffers()]
        before = [x.detach().clone() for x in kept]
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self._take_step()
            self._take_score()
        self.stream.synchronize()
        with torch.no_grad():
            for x, old in zip(kept, before):
                x.copy_(old)
            moments = [x for state in self.optimizer.state.values() for x in state.values() if torch.is_tensor(x)]
            torch._foreach_zero_(moments)
            torch._foreach_zero_([self.count, self.running])
        torch.cuda.synchronize()
        step, score = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(step, stream=self.stream, capture_error_mode="thread_local"):
            self._take_step()
        with torch.cuda.graph(score, stream=self.stream, pool=step.pool(), capture_error_mode="thread_local"):
            self._take_score()
        self._step, self._score = step.replay, score.replay


class Ring:
    """The last batches of a material on the device, each tensor [slots, ...]; drawn ahead by another thread."""

    def __init__(self, lesson: Lesson, lap: int, device: str):
        self.lesson, self.lap, self.on_gpu = lesson, lap, device.startswith("cuda")
        first = lesson.draw(0)
        self.tensors = [torch.zeros(LAPS * lap, *x.shape, dtype=x.dtype, device=device) for x in first]
        for ring, x in zip(self.tensors, first):
            ring.copy_(x.expand_as(ring))  # something to warm up with

    def steps(self, first: int) -> range:
        """Of the lap from step `first` on."""
        return range(first, min(first + self.lap, self.lesson.steps))

    def fill(self, first: int, batches: Sequence[np.ndarray]) -> None:
        """Copies what was drawn for a lap into its half of the ring."""
        start = first % (LAPS * self.lap)
        for ring, x in zip(self.tensors, map(torch.from_numpy, batches)):
            ring[start : start + len(x)].copy_(x.pin_memory() if self.on_gpu else x, non_blocking=True)


def _draw(lesson: Lesson, steps: range) -> list[np.ndarray]:
    """The batches of these steps, stacked; perhaps in another process."""
    return [torch.stack(x).numpy() for x in zip(*(lesson.draw(i) for i in steps))]


@contextmanager
def drawers(count: int) -> Iterator[Executor]:
    """Those who draw batches ahead: a thread, or processes where one would be too slow for a GPU."""
    if not count:
        with ThreadPoolExecutor(1) as pool:
            yield pool
        return
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def learn_together(
    lessons: Sequence[Lesson],
    device: str,
    progress: Callable[[Lesson, float, str], None] = lambda lesson, share, word: None,
    *,
    tests: Any = None,
    pool: Executor | None = None,
    unfinished: Mapping[int, Path] | None = None,
) -> Iterator[tuple[Lesson, Row]]:
    """Takes lessons of one material side by side; yields each with its result as it ends.

    Args:
        lessons: of one `material()`.
        device: "cpu" or a GPU; all of them must fit it at once.
        progress: told the share that is done of a lesson, and a word, at each test; may raise to stop.
        tests: what their `draw_tests` gave before, if it was called.
        pool: of `drawers`; None takes a thread.
        unfinished: id(lesson) -> where a run that `progress` stops is kept, and taken up again if all of them have got as far.

    Raises:
        ValueError: the lessons are of several materials.
    """
    first = lessons[0]
    check(
        len({lesson.material() for lesson in lessons}) == 1,
        f"learn_together was given {len(lessons)} lessons of several materials; group them by material()",
    )
    lap = next(n for n in range(min(MOST_A_LAP, first.evaluate_every), 0, -1) if first.evaluate_every % n == 0)
    with ExitStack() as stack:
        pool = stack.enter_context(drawers(0)) if pool is None else pool
        files = [unfinished[id(lesson)] for lesson in lessons] if unfinished else []
        done = _steps_kept(files)
        laps = range(done, first.steps, lap)
        ring = Ring(first, lap, device)
        ahead = [pool.submit(_draw, first, ring.steps(step)) for step in laps[:AHEAD]]
        stack.callback(lambda: [future.cancel() for future in ahead])
        tests = first.draw_tests(device) if tests is None else tests
        questions = first.score_inputs(tests)
        learners = [Learner(lesson, ring.tensors, questions, device) for lesson in lessons]
        for learner, file in zip(learners, files if done else []):
            learner.take_up(file)
        home = torch.cuda.current_stream(device) if device.startswith("cuda") else None
        marks: list[list[torch.cuda.Event]] = []  # of each lap: that its readers are through
        for step in laps:
            batches = ahead.pop(0).result()
            if step + AHEAD * lap < first.steps:
                ahead.append(pool.submit(_draw, first, ring.steps(step + AHEAD * lap)))
            if home is not None:
                for mark in marks[-LAPS] if len(marks) >= LAPS else ():
                    home.wait_event(mark)
            ring.fill(step, batches)
            for learner in learners if home is not None else ():
                learner.stream.wait_stream(home)  # type: ignore[union-attr]  # on a GPU each has one
            end = min(step + lap, first.steps)
            for _ in range(step, end):
                for learner in learners:
                    learner.step()
            if home is not None:
                marks.append([learner.stream.record_event() for learner in learners])  # type: ignore[union-attr]
                if len(marks) > LAPS:  # the host stays near: what it has launched, it cannot take back
                    for mark in marks[-LAPS - 1]:
                        mark.synchronize()
            if end % first.evaluate_every and end != first.steps:
                continue
            for learner in learners:
                learner.begin_score()
            if home is not None:
                torch.cuda.synchronize(device)
            over = [learner for learner in learners if learner.end_score(end) or end == first.steps]
            learners = [learner for learner in learners if learner not in over]
            for learner in over:
                yield learner.lesson, learner.lesson.report(learner.model, learner.curve, tests, device)
            try:
                for learner in learners:
                    last = learner.curve[-1]
                    word = f"step {end}, loss {last['train_loss']:.3f}, accuracy {last['accuracy']:.1%}"
                    progress(learner.lesson, end / first.steps, word)
            except InterruptedSweep:
                for learner in learners if unfinished else ():
                    learner.keep(unfinished[id(learner.lesson)])  # type: ignore[index]  # just asked for
                raise
            if not learners:
                return


def _steps_kept(files: Sequence[Path]) -> int:
    """How far all of these runs had got when they were kept; 0 unless all are there and as far as each other."""
    if not files or not all(file.is_file() for file in files):
        return 0
    steps = {int(torch.load(file, map_location="cpu", weights_only=True, mmap=True)["count"]) for file in files}
    return steps.pop() if len(steps) == 1 else 0


class SideBySide(NamedTuple):
    """Runs points as `framework.worker.run_here` does, with many learning beside each other: a runner of `sweep.run`.

    Points that are no lessons are run one after another. An interrupt keeps what is learning at the next test, and the same
    call goes on from there.

    Attributes:
        at_once: at most so many points of one material.
        processes: that draw batches; 0 is a thread, enough on a CPU.
    """

    at_once: int = 16
    processes: int = 0

    def __call__(
        self, left: Mapping[str, Any], device: str, sweep: SweepFolder, tally: Tally, keep_on: Callable[[], None]
    ) -> None:
        materials: dict[str, list[str]] = {}
        for identity, point in left.items():
            if not hasattr(point, "material"):
                run_here({identity: point}, device, sweep, tally, keep_on)
            else:
                materials.setdefault(point.material(), []).append(identity)
        with drawers(self.processes if materials else 0) as pool:
            for alike in materials.values():
                tests = left[alike[0]].draw_tests(device)
                for together in (alike[i : i + self.at_once] for i in range(0, len(alike), self.at_once)):
                    keep_on()
                    lessons = {identity: left[identity] for identity in together}
                    _run_together(lessons, device, tests, pool, sweep, tally, keep_on)
                    if device.startswith("cuda"):
                        torch.cuda.empty_cache()


def _run_together(
    lessons: Mapping[str, Lesson],
    device: str,
    tests: Any,
    pool: Executor,
    sweep: SweepFolder,
    tally: Tally,
    keep_on: Callable[[], None],
) -> None:
    identities = {id(lesson): identity for identity, lesson in lessons.items()}
    kept = {id(lesson): sweep.unfinished(identity) for identity, lesson in lessons.items()}
    began = time.monotonic()

    def progress(lesson: Lesson, share: float, word: str) -> None:
        tally.progress(identities[id(lesson)], share, word)
        keep_on()

    for lesson, result in learn_together(
        list(lessons.values()), device, progress, tests=tests, pool=pool, unfinished=kept
    ):
        identity, outcome = identities[id(lesson)], {"result": result}
        seconds = (time.monotonic() - began) / len(lessons)  # its share of the device
        sweep.keep(identity, outcome, seconds)
        tally.point(identity, outcome, seconds)
