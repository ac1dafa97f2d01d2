"""The verdict on a kernel: within budget on every case, and on cases that would have caught each wrong memory."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from palimpsest.ops import chunked, reference
from palimpsest.testing.budget import budget, rounded_products
from palimpsest.testing.cases import CASES, Case
from palimpsest.testing.mutants import MUTANTS


@dataclass(frozen=True)
class Line:
    """One case: the worst of output and state, as error over budget; below 1 passes."""

    case: Case
    error: float
    budget: float

    @property
    def passed(self) -> bool:
        return self.error <= self.budget  # False for NaN


@dataclass(frozen=True)
class Report:
    lines: tuple[Line, ...]
    uncaught: tuple[str, ...]  # wrong memories that no case of this run tells from the law

    @property
    def passed(self) -> bool:
        return all(line.passed for line in self.lines) and not self.uncaught

    def __str__(self):
        rows = [f"{'pass' if x.passed else 'FAIL'}  {x.error:.1e} of {x.budget:.1e}  {x.case}" for x in self.lines]
        caught = len(MUTANTS) - len(self.uncaught)
        rows.append(
            f"{sum(x.passed for x in self.lines)} of {len(self.lines)} cases pass; these cases reject {caught} "
            f"of {len(MUTANTS)} wrong memories" + (f", not {', '.join(self.uncaught)}" if self.uncaught else "")
        )
        return "\n".join(rows)  # fmt: skip


def judge(
    kernel: Callable, *, dtype: torch.dtype = torch.float32, device: str = "cpu", cases: Iterable[Case] = CASES
) -> Report:
    """Run `kernel` on every case and compare it with the fp64 law.

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
    lines, uncaught = [], set(MUTANTS)
    for case in cases:
        inputs = case.kda(dtype)
        output, state = kernel(*(x.to(device) for x in inputs))
        core = _core(*(x.double() for x in inputs))
        truth = reference.delta_memory(*core)
        peer = _peer(_core(*(x.float() for x in inputs)), dtype)
        worst = Line(case, 0.0, 1.0)
        for actual, t, p in zip((output, state), truth, peer):
            error = (actual.cpu().double() - t).abs().max().item()
            line = Line(case, error, budget(t, p, actual.dtype))
            if not line.error / line.budget <= worst.error / worst.budget:
                worst = line
        lines.append(worst)
        uncaught -= {name for name in uncaught if _differs(MUTANTS[name](*core), truth, peer, dtype)}
    return Report(tuple(lines), tuple(sorted(uncaught)))


def _core(q, k, v, log_decay, beta, state):
    return q, k, beta[..., None] * k, beta[..., None] * v, log_decay, state


def _peer(core, dtype):
    if dtype in (torch.float32, torch.float64):
        return reference.delta_memory(*(x.to(dtype) for x in core))
    with rounded_products(dtype):
        output, state = chunked.delta_memory(*core)
    return output.to(dtype), state


def _differs(wrong, truth, peer, dtype) -> bool:
    return any(not (w - t).abs().max().item() <= budget(t, p, dtype) for w, t, p in zip(wrong, truth, peer))
