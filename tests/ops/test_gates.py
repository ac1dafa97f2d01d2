import math

import pytest
import torch

from palimpsest import gates
from palimpsest.ops.gates import l2norm
from palimpsest.ops.variants import kda, kda_from_logits


def test_softplus_decay_is_the_official_formula():
    logits, A_log, bias = torch.randn(2, 3, 4, 8), torch.rand(1, 1, 4, 1), torch.randn(32)
    decay = gates.softplus_decay(logits, A_log, bias)
    by_hand = -math.exp(A_log[0, 0, 2, 0]) * math.log1p(math.exp(logits[1, 2, 2, 5] + bias[2 * 8 + 5]))
    assert decay[1, 2, 2, 5].item() == pytest.approx(by_hand, rel=1e-5)


def test_softplus_decay_survives_the_far_ends():
    decay = gates.softplus_decay(torch.tensor([-40.0, 5e3]).view(1, 1, 1, 2), torch.zeros(1), torch.zeros(2))
    assert decay.flatten()[0].item() == pytest.approx(-math.exp(-40))  # log(1 + exp x) would round this to 0
    assert decay.flatten()[1].item() == -5e3


def test_sigmoid_decay_stays_above_its_floor():
    decay = gates.sigmoid_decay(
        torch.linspace(-90, 90, 32).view(1, 1, 4, 8), torch.ones(4), torch.zeros(32), floor=-3.0
    )
    assert decay.min() == -3.0
    assert decay.max() <= 0


def test_gates_are_computed_in_fp32():
    logits = torch.full((1, 1, 1, 1), -7.0, dtype=torch.bfloat16)
    decay = gates.softplus_decay(logits, torch.zeros(1), torch.zeros(1))
    assert decay.dtype == torch.float32
    assert decay.item() == pytest.approx(-math.log1p(math.exp(-7)), rel=1e-6)


def test_l2norm_has_its_eps_inside_the_root():
    x = torch.full((4,), 1e-3)
    assert l2norm(x).tolist() == pytest.approx([1e-3 / math.sqrt(4e-6 + 1e-6)] * 4)
    assert l2norm(torch.zeros(4)).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("kind", ["softplus", "sigmoid", "function"])
def test_from_logits_is_normalise_gate_kda(kind):
    q, k, v, logits, beta_logits = (torch.randn(2, 20, 2, 8, dtype=torch.float64) for _ in range(5))
    A_log, bias = torch.rand(2, dtype=torch.float64), torch.randn(2, 8, dtype=torch.float64)
    gate = {
        "softplus": gates.SoftplusDecay(A_log, bias),
        "sigmoid": gates.SigmoidDecay(A_log, bias, floor=-2.0),
        "function": lambda x: -x.abs(),
    }[kind]
    whole = kda_from_logits(q, k, v, logits, beta_logits[..., 0], gate=gate)
    parts = kda(l2norm(q), l2norm(k), v, gate(logits), beta_logits[..., 0].sigmoid())
    for a, b in zip(whole, parts):
        torch.testing.assert_close(a, b)
    wide = kda_from_logits(q, k, v, logits, beta_logits[..., 0], gate=gate, beta_max=2.0)
    parts = kda(l2norm(q), l2norm(k), v, gate(logits), 2 * beta_logits[..., 0].sigmoid())
    torch.testing.assert_close(wide.output, parts.output)


def test_bad_parameters_are_named():
    with pytest.raises(ValueError, match=r"dt_bias has 7 elements; logits of shape \(1, 1, 2, 4\) ask for 8"):
        gates.softplus_decay(torch.zeros(1, 1, 2, 4), torch.zeros(2), torch.zeros(7))
    with pytest.raises(ValueError, match="floor is 5.0; a log-decay bound must be a negative number"):
        gates.SigmoidDecay(torch.zeros(1), torch.zeros(1), floor=5.0)
