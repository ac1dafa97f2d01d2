"""On a GPU: grouped products, short convolutions and the loss beside their laws; compiled and interpreted alike elsewhere."""

import pytest
import torch
import torch.nn.functional as F

from palimpsest.ops import cross_entropy, experts, short_conv
from palimpsest.testing import assert_within_budget

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
HALF = [torch.bfloat16, torch.float16]


def drawn(*shape, dtype=torch.float64, scale=1.0, seed=0):
    rng = torch.Generator("cuda").manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=rng, device="cuda") * scale).to(dtype)


def with_gradients(function, leaves, dtype):
    leaves = [x.to(dtype).requires_grad_() for x in leaves]
    results = function(*leaves)
    weights = [drawn(*(r.shape or (1,)), seed=7).view_as(r).bfloat16().to(r.dtype) for r in results]
    grads = torch.autograd.grad(sum((r * w).sum() for r, w in zip(results, weights)), leaves)
    return [r.detach() for r in results] + [*grads]


def assert_honest(function, law, leaves, dtype):
    leaves = [x.to(dtype).double() for x in leaves]
    truth, peer = (with_gradients(law, leaves, d) for d in (torch.float64, dtype))
    ours, again = (with_gradients(function, leaves, dtype) for _ in range(2))
    for i, (actual, true, honest) in enumerate(zip(ours, truth, peer)):
        assert_within_budget(f"result {i}", actual, true, honest)
    assert all(a.equal(b) for a, b in zip(ours, again)), "the same inputs give the same bits"


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("form", ["grouped", "triton"])
@pytest.mark.parametrize("case", ["mixed", "some idle", "all on two"])
def test_experts(monkeypatch, case, form, dtype):
    if form == "grouped" and (dtype != torch.bfloat16 or torch.cuda.get_device_capability() < (9, 0)):
        pytest.skip("torch's grouped product is for bfloat16 on compute capability 9.0 and later")
    monkeypatch.setattr(experts, "form", lambda x: "loop" if x.dtype == torch.float64 else form)
    N, D, I, E, k = 777, 96, 72, 8, 2
    scores = drawn(N, E)
    scores[:, 2:4] -= 99 * (case == "some idle")
    scores[:, :2] += 99 * (case == "all on two")
    chosen, weights = scores.topk(k).indices, drawn(N, k).sigmoid()

    def run(x, *matrices):
        return experts.run_experts(x, chosen, weights.to(torch.promote_types(x.dtype, torch.float32)), *matrices)[:1]

    def law(x, *matrices):
        return (experts.law(x, chosen, weights.to(torch.promote_types(x.dtype, torch.float32)), *matrices),)

    leaves = [drawn(N, D), *(drawn(E, *s, scale=0.2) for s in ((I, D), (I, D), (D, I)))]
    assert_honest(run, law, leaves, dtype)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("continued", [False, True])
def test_short_convolutions(monkeypatch, packed, continued, dtype):
    B, T, widths = (1, 301, (96, 96, 40)) if packed else (3, 77, (96, 96, 40))
    cu_seqlens = torch.tensor([0, 1, 1, 130, 301], device="cuda") if packed else None
    states = [drawn(4 if packed else B, D, 3) for D in widths] if continued else []
    has_kernel = short_conv._has_kernel

    def run(*leaves):
        held = leaves[6:] or None
        ys, after = short_conv.short_convs(leaves[:3], leaves[3:6], states=held, cu_seqlens=cu_seqlens)
        return [*ys, *after]

    def law(*leaves):
        with monkeypatch.context() as patch:
            patch.setattr(short_conv, "_has_kernel", lambda *x: False)
            return run(*leaves)

    leaves = [drawn(B, T, D) for D in widths] + [drawn(D, 1, 4) for D in widths] + states
    assert has_kernel([leaves[0].float()])
    assert_honest(run, law, leaves, dtype)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_loss(monkeypatch, dtype):
    monkeypatch.setitem(cross_entropy.CHUNK_BYTES, "cuda", 100 * 5001 * 2)
    N, D, V = 345, 64, 5001
    targets = torch.arange(N, device="cuda") * 7 % V
    targets[::9] = cross_entropy.IGNORED

    def law(hidden, head):
        logits = (hidden @ head.mT).to(torch.promote_types(hidden.dtype, torch.float32))
        return (F.cross_entropy(logits, targets, ignore_index=cross_entropy.IGNORED, reduction="sum"),)

    leaves = [drawn(N, D), drawn(V, D, scale=0.3)]
    assert_honest(lambda *x: (cross_entropy.cross_entropy_sum(*x, targets),), law, leaves, dtype)
