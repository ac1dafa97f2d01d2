"""The kernels of short convolutions under Triton's interpreter, against the plain form; compiled ones: test_gpu_neighbours.py."""

import pytest
import torch

from palimpsest.ops import short_conv
from palimpsest.testing import assert_within_budget

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
WIDTHS = 40, 40, 24


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("taps", [4, 3])
@pytest.mark.parametrize("continued", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_both_ways(packed, continued, taps, monkeypatch):
    from palimpsest.ops.gpu.triton import short_conv as kernels

    monkeypatch.setattr(kernels, "WALK_T", 8)  # several walks, and one that ends early
    monkeypatch.setattr(kernels, "WALK_D", 32)
    torch.manual_seed(0)
    B, T = (1, 21) if packed else (2, 13)
    borders = torch.tensor([0, 1, 1, 7, 9, 21]) if packed else None
    N = 5 if packed else B
    xs, dys = [drawn(B, T, D) for D in WIDTHS], [drawn(B, T, D) for D in WIDTHS]
    weights = [drawn(D, 1, taps) for D in WIDTHS]
    states = [drawn(N, D, taps - 1) for D in WIDTHS] if continued else None

    def plainly(dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (*xs, *weights)]
        held = None if states is None else [x.to(dtype) for x in states]
        ys, _ = short_conv.short_convs(leaves[:3], leaves[3:], states=held, cu_seqlens=borders)
        gradients = torch.autograd.grad(ys, leaves, [dy.to(dtype) for dy in dys])
        return [*(y.detach() for y in ys), *gradients[:3], *(g.flatten(1) for g in gradients[3:])]

    ages, rows = (None, None) if borders is None else (x.int() for x in short_conv._places(borders, T))
    narrow = lambda tensors: [x.float() for x in tensors]
    call = narrow(xs), [w.float().flatten(1) for w in weights], narrow(states or []), ages, rows
    ys = torch.ops.palimpsest_gpu.short_conv(*call)
    dxs, d_weights = torch.ops.palimpsest_gpu.short_conv_backward(*call, narrow(dys))
    for i, (actual, truth, peer) in enumerate(
        zip([*ys, *dxs, *d_weights], plainly(torch.float64), plainly(torch.float32), strict=True)
    ):
        assert_within_budget(f"result {i}", actual, truth, peer)
