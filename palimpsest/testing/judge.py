"""The verdict on a kernel: within budget on every case, and on cases that would have caught each wrong memory."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

from palimpsest.ops import chunked, reference
from palimpsest.testing.budget import budget, pooled, rms, rounded_products
from palimpsest.testing.cases import CASES, Case
from palimpsest.testing.mutants import MARGINAL, MUTANTS, marginal

DRAWINGS = 3  # of each case, pooled into one error


@dataclass(frozen=True)
class Line:
    """One case: the worse of output and state, as error over budget; up to 1 passes."""

    case: Case
    error: float  # root mean square over DRAWINGS drawings
    budget: float  # see palimpsest.testing.budget

    @property
    def passed(self) -> bool:
        return self.error <= self.budget  # False for NaN


@dataclass(frozen=True)
class Report:
    """What `judge` found.

    Attributes:
        lines: one a case.
        uncaught: wrong memories that no case of this run tells from the law.
    """

    lines: tuple[Line, ...]
    uncaught: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether every case is within budget, and the cases together would have caught every wrong memory."""
        return all(line.passed for line in self.lines) and not self.uncaught

    def __str__(self):
        rows = [f"{'pass' if x.passed else 'FAIL'}  {x.error:.1e} of {x.budget:.1e}  {x.case}" for x in self.lines]
        wrong = len(MUTANTS) + 1
        rows.append(
            f"{sum(x.passed for x in self.lines)} of {len(self.lines)} cases pass; these cases reject "
            f"{wrong - len(self.uncaught)} of {wrong} wrong memories"
            + (f", not {', '.join(self.uncaught)}" if self.uncaught else "")
        )
        return "\n".join(rows)  # fmt: skip


def judge(
    kernel: Callable, *, dtype: torch.dtype = torch.float32, device: str = "cpu", cases: Iterable[Case] = CASES
) -> Report:
    """Run `kernel` on three drawings of every case and compare it with the fp64 law.

    Args:
        kernel: (q, k, v, log_decay, beta, state) -> (output, state); see palimpsest.testing for shapes and units.
        dtype: of q, k and v. Gates and state stay in fp32.
        device: where the kernel runs; the law runs on the CPU.
        cases: what to try.

    Returns:
        A Report; print it, or assert report.passed.

    >>> from palimpsest.ops.variants import kda
    >>> report = judge(lambda *x: kda(*x[:5], state=x[5], scale=1.0), cases=CASES[:3])
    >>> all(line.passed for line in report.lines)
    True
    """
    lines, uncaught = [], {*MUTANTS, MARGINAL}
    for case in cases:
        drawings = [replace(case, seed=case.seed + n).kda(dtype) for n in range(DRAWINGS)]
        cores = [_core(*(x.double() for x in inputs)) for inputs in drawings]
        results = [kernel(*(x.to(device) for x in inputs)) for inputs in drawings]
        dtypes = [x.dtype for x in results[0]]
        truths = pooled(reference.delta_memory(*core) for core in cores)
        peers = pooled(_peer(_core(*(x.float() for x in inputs)), dtype) for inputs in drawings)
        budgets = [budget(t, p, kind) for t, p, kind in zip(truths, peers, dtypes)]
        lines.append(
            max((Line(case, rms(o - t), b) for o, t, b in zip(pooled(results), truths, budgets)), key=_badness)
        )
        for name in sorted(uncaught):
            if name == MARGINAL:
                wrong = [marginal(t, p) for t, p in zip(truths, peers)]
            else:
                wrong = pooled(MUTANTS[name](*core) for core in cores)
            if any(not rms(w - t) <= b for w, t, b in zip(wrong, truths, budgets)):
                uncaught.discard(name)
    return Report(tuple(lines), tuple(sorted(uncaught)))


def _badness(line: Line) -> float:
    return line.error / line.budget if line.error == line.error else math.inf  # NaN is the worst


def _core(q, k, v, log_decay, beta, state):
    return q, k, beta[..., None] * k, beta[..., None] * v, log_decay, state


def _peer(core, dtype):
    if dtype in (torch.float32, torch.float64):
        return reference.delta_memory(*(x.to(dtype) for x in core))
    with rounded_products(dtype):
        output, state = chunked.delta_memory(*core)
    return output.to(dtype), state
