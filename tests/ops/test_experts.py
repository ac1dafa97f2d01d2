"""Experts on stacked weights against their law, one expert at a time in float64."""

import pytest
import torch

from palimpsest.ops import experts as experts_module
from palimpsest.ops.experts import law, run_experts, sort_by_expert
from palimpsest.testing import assert_within_budget

N, D, INNER, E, TOP = 37, 24, 16, 6, 2


def draw(case="mixed", dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(N, D, generator=g, dtype=torch.float64)
    w1, w3, w2 = (
        torch.randn(E, *s, generator=g, dtype=torch.float64) / 4 for s in ((INNER, D), (INNER, D), (D, INNER))
    )
    scores = torch.rand(N, E, generator=g)
    if case == "some idle":
        scores[:, 2:4] = -1
    if case == "all on two":
        scores[:, :2] += 2
    experts = scores.topk(TOP).indices
    weights = torch.rand(N, TOP, generator=g, dtype=torch.float64)
    tensors = [t.to(dtype).double() for t in (x, w1, w3, w2)]  # the same numbers in every dtype
    return tensors[0], experts, weights, *tensors[1:]


def run(function, arguments, dtype):
    x, experts, weights, *matrices = arguments
    wide = dtype if dtype == torch.float64 else torch.float32
    leaves = [t.to(d).requires_grad_() for t, d in zip((x, weights, *matrices), (dtype, wide, *[dtype] * 3))]
    y = function(leaves[0], experts, leaves[1], *leaves[2:])
    y = y[0] if isinstance(y, tuple) else y
    coefficients = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).bfloat16().to(dtype).view_as(y)
    return y, *torch.autograd.grad((y * coefficients).sum(), leaves)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["mixed", "some idle", "all on two"])
def test_values_and_gradients_are_the_laws(case, dtype):
    arguments = draw(case, dtype)
    truth, ours, peer = (
        run(law, arguments, torch.float64),
        run(run_experts, arguments, dtype),
        run(law, arguments, dtype),
    )
    for name, actual, true, honest in zip("y x weights w1 w3 w2".split(), ours, truth, peer):
        if dtype == torch.float64:
            torch.testing.assert_close(actual, true)
        else:
            assert_within_budget(name, actual, true, honest)


MUTANTS = {
    "unweighted": lambda x, e, w, *m: run_experts(x, e, w * 0 + 1, *m),
    "gate and up exchanged": lambda x, e, w, w1, w3, w2: run_experts(x, e, w, w3, w1, w2),
    "the next expert": lambda x, e, w, *m: run_experts(x, (e + 1) % E, w, *m),
    "weights of the other choice": lambda x, e, w, *m: run_experts(x, e, w.flip(1), *m),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_wrong_experts_are_rejected(mutant):
    arguments = draw()
    (truth, *_), (wrong, *_) = run(law, arguments, torch.float64), run(MUTANTS[mutant], arguments, torch.float64)
    assert (truth - wrong).abs().max() > 1e-2


def test_rows_are_sorted_by_expert_and_find_their_way_back():
    experts = draw()[1]
    order, back, ends = sort_by_expert(experts, E)
    assert experts.flatten()[order].tolist() == sorted(experts.flatten().tolist())
    assert order[back.flatten()].tolist() == list(range(N * TOP))
    assert ends.tolist() == [int((experts <= e).sum()) for e in range(E)]
    assert run_experts(*draw())[1].equal(experts.flatten().bincount(minlength=E))


def test_no_token_at_all():
    x, experts, weights, *matrices = draw()
    y, load = run_experts(x[:0], experts[:0], weights[:0], *matrices)
    assert y.shape == (0, D)
    assert load.tolist() == [0] * E


def test_the_same_bits_twice():
    assert all(
        a.equal(b) for a, b in zip(run(run_experts, draw(), torch.float32), run(run_experts, draw(), torch.float32))
    )


@pytest.mark.parametrize(
    ("place", "change", "sentence"),
    [
        (0, lambda x: x[0], "x is torch.float64 of shape"),
        (1, lambda e: e[1:], "experts is torch.int64 of shape"),
        (1, lambda e: e + E, "experts names some beyond the 6 there are"),
        *[
            (1, lambda e, far=far: e.index_fill(0, e.new_tensor([5]), far), "experts names some beyond the 6 there are")
            for far in (-1, 2**15, 2**16, 2**16 + 1, 2**31, 2**32 + 3, -(2**63))
        ],
        (1, lambda e: e.bool(), "experts is torch.bool of shape .*; expected int32 or int64 of shape"),
        (1, lambda e: e.to(torch.int16), "experts is torch.int16 of shape"),
        (0, lambda x: x.int(), "x is torch.int32 of shape"),
        (2, lambda w: w[:, :1], "weights is torch.float64 of shape"),
        (3, lambda w: w.mT, "w1 is torch.float64 of shape .* D = 24"),
        (5, lambda w: w[1:], "w2 is torch.float64 of shape"),
        (4, lambda w: w.to("meta"), "w3 is on meta and x on cpu"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(place, change, sentence):
    arguments = list(draw())
    arguments[place] = change(arguments[place])
    with pytest.raises(ValueError, match=sentence):
        run_experts(*arguments)


def test_an_expert_named_twice_is_added_twice():
    x, experts, weights, *matrices = draw()
    experts[3] = 4
    y, load = run_experts(x, experts, weights, *matrices)
    torch.testing.assert_close(y, law(x, experts, weights, *matrices))
    once = run_experts(x[3:4], experts[3:4, :1], weights[3:4].sum(1, keepdim=True), *matrices)[0]
    torch.testing.assert_close(y[3:4], once)
    assert load.sum() == N * TOP


@pytest.mark.parametrize("far", [-1, E, 2**15, 2**16 + 1, 2**31, 2**63 - 1])
def test_where_the_host_is_not_asked_an_unknown_expert_gives_nan_to_its_token_alone(far, monkeypatch):
    """As on a GPU; the kernels run under Triton's interpreter here."""
    monkeypatch.setattr(experts_module, "form", lambda x: "triton")
    x, experts, weights, *matrices = (t if t.dtype == torch.int64 else t.float() for t in draw())
    honest = run_experts(x, experts, weights, *matrices)[0]
    experts = experts.clone()
    experts[5, 1] = far
    y, _ = run_experts(x, experts, weights, *matrices)
    assert y[5].isnan().all()
    others = torch.arange(N) != 5
    torch.testing.assert_close(y[others], honest[others])
