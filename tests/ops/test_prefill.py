"""The passes between a prompt's products against their laws: under the interpreter without a GPU, compiled with one."""

import pytest
import torch

from palimpsest.ops import prefill
from palimpsest.testing import assert_within_budget

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32] + ([torch.bfloat16, torch.float16] if DEVICE == "cuda" else [])


def drawn(*shape):
    return torch.randn(*shape, device=DEVICE)


def assert_is_the_law(function, *inputs, dtype, **options):
    """The kernel against the plain lines in fp64, whose inputs were rounded alike; twice the same bits."""
    round_to = lambda x: x.to(dtype).double() if torch.is_tensor(x) and x.is_floating_point() else x
    convert = lambda x, to: x.to(to) if torch.is_tensor(x) and x.is_floating_point() else x
    inputs = [round_to(x) for x in inputs]
    truth = function(*inputs, form="torch", **options)
    narrow = [convert(x, dtype) for x in inputs]
    if function is prefill.swiglu and narrow[2:]:
        narrow[2] = convert(inputs[2], torch.float32)
    peer = function(*narrow, form="torch", **options)
    actual, again = (function(*narrow, form="triton", **options) for _ in range(2))
    assert actual.dtype == peer.dtype
    assert_within_budget(function.__name__, actual, truth, peer)
    assert actual.equal(again)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("B", "T", "H", "K", "silu"), [(2, 3, 2, 16, False), (1, 70, 3, 24, True), (1, 1, 1, 128, False)]
)
def test_gated_norm(B, T, H, K, silu, dtype):
    assert_is_the_law(prefill.gated_norm, drawn(B, T, H, K), drawn(B, T, H * K), drawn(K), 1e-2, silu=silu, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "I", "weighted"), [(3, 40, True), (1, 8, True), (70, 65, True), (5, 1000, False)])
def test_swiglu(N, I, weighted, dtype):
    assert_is_the_law(prefill.swiglu, drawn(N, I), drawn(N, I), *[drawn(N)] * weighted, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "k", "D"), [(1, 1, 8), (5, 3, 40), (3, 8, 600)])
def test_expert_sum(N, k, D, dtype):
    back = torch.randperm(N * k, device=DEVICE).view(N, k)
    assert_is_the_law(prefill.expert_sum, drawn(N * k, D), back, dtype=dtype)


def test_no_row_no_launch():
    empty = torch.zeros(0, 8, device=DEVICE)
    assert prefill.swiglu(empty, empty, form="triton").shape == (0, 8)
    assert prefill.gated_norm(empty.view(0, 2, 4), empty, empty.new_ones(4), 0.0, form="triton").shape == (0, 8)
    assert prefill.expert_sum(empty, empty.new_zeros(0, 2, dtype=torch.long), form="triton").shape == (0, 8)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda x: prefill.swiglu(x, x[:1], form="triton"), "up is .* expected"),
        (lambda x: prefill.swiglu(x, x, x.new_ones(3), form="triton"), "weight is .* expected"),
        (lambda x: prefill.gated_norm(x.view(2, 2, 4), x, x.new_ones(5), 0.0, form="triton"), "weight is .* expected"),
        (
            lambda x: prefill.gated_norm(x.view(2, 2, 4), x[:1], x.new_ones(4), 0.0, form="triton"),
            "gate is .* expected",
        ),
        (lambda x: prefill.expert_sum(x, torch.zeros(2, 1, device=x.device), form="triton"), "back is .* expected"),
        (lambda x: prefill.expert_sum(x[:0], torch.zeros(2, 1, device=x.device), form="triton"), "rows has shape"),
    ],
)
def test_what_does_not_fit_never_reaches_a_kernel(call, says):
    with pytest.raises(ValueError, match=says):
        call(torch.ones(2, 8, device=DEVICE))
