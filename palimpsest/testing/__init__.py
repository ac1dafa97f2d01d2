"""Judge an implementation, ours or yours, against the law.

    from palimpsest.testing import judge
    report = judge(lambda q, k, v, log_decay, beta, state: my_kernel(q, k, v, log_decay, beta, state))
    print(report)          # one line a case: error, budget, verdict; and which wrong memories would have passed
    assert report.passed

`my_kernel` takes q, k [B, T, H, K] (scaled and normalised), v [B, T, H, V], log_decay [B, T, H, K] (natural log),
beta [B, T, H], state [B, H, K, V] fp32, and returns (output, state).
"""

from palimpsest.testing.budget import FACTOR, assert_within_budget, budget, pooled, rms, rounded_products
from palimpsest.testing.cases import BETAS, CASES, DECAYS, KEYS, Case
from palimpsest.testing.judge import Report, judge
from palimpsest.testing.mutants import MARGINAL, MUTANTS, marginal

__all__ = [
    "BETAS",
    "CASES",
    "DECAYS",
    "FACTOR",
    "KEYS",
    "MARGINAL",
    "MUTANTS",
    "Case",
    "Report",
    "assert_within_budget",
    "budget",
    "judge",
    "marginal",
    "pooled",
    "rms",
    "rounded_products",
]
