"""Tokens of a block in one product: both sides of the switch against the law, and what a looser switch would do.

Half precision takes that path. Its logic is tested in fp32, which the interpreter has, with bounds that one_sided.py proves.
"""

import pytest
import torch

from palimpsest.ops import reference
from palimpsest.ops.gpu.register import TRITON
from palimpsest.testing import Case

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from palimpsest.ops.gpu.triton import delta_memory, gradient, intra_chunk  # noqa: E402
from palimpsest.ops.gpu.triton.one_sided import BLOCK, LOWEST  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = "output state d_q d_k d_v d_log_decay d_beta d_state".split()
BORDER = LOWEST.value / (BLOCK.value - 1)  # a token's log-decay at which a block of equal ones stands on the border
OFF = 1e-4  # of the largest entry: two exponents of 80, summed in fp32 (one_sided.py)


@pytest.fixture(autouse=True)
def by_blocks(monkeypatch):
    monkeypatch.setattr(delta_memory, "by_blocks", lambda x: True)


def law(q, k, v, g, beta, state):
    return reference.delta_memory(q, k, beta[..., None] * k, beta[..., None] * v, g, state)


def ours(q, k, v, g, beta, state):
    return TRITON.kda(q, k, v, g, beta, state, 1.0, None)


def drawn(decay="slow", T=36):
    return list(Case("correlated", "sigmoid", decay, T, 1, 1, 16, 16).kda(torch.float32, DEVICE))


def with_gradients(function, inputs):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    results = function(*leaves)
    return [*results, *torch.autograd.grad(sum(x.square().sum() for x in results), leaves)]


def off(inputs) -> dict[str, float]:
    """The largest error of each result, in units of its largest entry."""
    truth = with_gradients(law, [x.double() for x in inputs])
    found = with_gradients(ours, inputs)
    return {n: ((a - t).abs().max() / t.abs().max()).nan_to_num(1e9).item() for n, a, t in zip(NAMES, found, truth)}


def assert_is_the_law(inputs):
    errors = off(inputs)
    assert max(errors.values()) < OFF, errors


def after_a_drop(inputs, drop):
    """Half the channels fall by `drop` at the third token of each block and fade slowly before and after."""
    inputs[3] = torch.full_like(inputs[3], -0.3)
    inputs[3][:, 2 :: BLOCK.value, :, ::2] = drop
    return inputs


@pytest.mark.parametrize("beside", [0.999, 1.001])
def test_the_border(beside):
    inputs = drawn()
    inputs[3] = torch.full_like(inputs[3], BORDER * beside)
    inputs[3][..., 1:] = -0.1  # one channel decides for all
    assert_is_the_law(inputs)


@pytest.mark.parametrize("decay", ["half_slow", "rotating", "bottomless"])
def test_gates_of_all_kinds(decay):
    assert_is_the_law(drawn(decay))


def test_what_fell_far_before_is_still_told_apart():
    assert_is_the_law(after_a_drop(drawn(), -100.0))


@pytest.mark.parametrize(("module", "wrong"), [(intra_chunk, "output"), (gradient, "d_k")])
def test_a_looser_switch_is_caught(monkeypatch, module, wrong):
    monkeypatch.setattr(module, "LOWEST", tl.constexpr(-400.0))
    assert off(after_a_drop(drawn(), -100.0))[wrong] > 100 * OFF


def test_a_later_token_that_turns_the_switch_changes_no_earlier_bit():
    inputs = drawn()
    before, _ = ours(*inputs)
    inputs[3][:, 21:] = -50.0  # within the second block
    after, _ = ours(*inputs)
    torch.testing.assert_close(before[:, :21], after[:, :21], rtol=0, atol=0)
    assert not torch.equal(before[:, 21:], after[:, 21:])
