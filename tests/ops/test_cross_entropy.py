"""The loss in pieces against all logits at once in float64."""

import pytest
import torch

from palimpsest.ops import cross_entropy
from palimpsest.ops.cross_entropy import IGNORED, cross_entropy_sum, law
from palimpsest.testing import assert_within_budget

N, D, V = 53, 24, 301


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setitem(cross_entropy.CHUNK_BYTES, "cpu", 20 * V * 4)  # three pieces, the last not whole


def draw(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(N, D, generator=g), torch.randn(V, D, generator=g)
    targets = torch.randint(V, (N,), generator=g)
    targets[[0, 7, 52]] = IGNORED
    return hidden.to(dtype).double(), head.to(dtype).double(), targets


def run(function, hidden, head, targets, dtype):
    hidden, head = (x.to(dtype).requires_grad_() for x in (hidden, head))
    loss = function(hidden, head, targets)
    return loss, *torch.autograd.grad(loss * 0.5, (hidden, head))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_loss_and_gradients_are_the_laws(dtype):
    inputs = draw(dtype)
    truth, ours, peer = (
        run(law, *inputs, torch.float64),
        run(cross_entropy_sum, *inputs, dtype),
        run(law, *inputs, dtype),
    )
    for name, actual, true, honest in zip(("loss", "hidden", "head"), ours, truth, peer):
        if dtype == torch.float64:
            torch.testing.assert_close(actual, true)
        else:
            assert_within_budget(name, actual, true, honest)


MUTANTS = {
    "ignored rows count": lambda h, w, t: cross_entropy_sum(h, w, t.clamp(min=0)),
    "a word late": lambda h, w, t: cross_entropy_sum(h, w, torch.where(t == IGNORED, t, (t + 1) % V)),
    "the last piece left out": lambda h, w, t: cross_entropy_sum(h[:40], w, t[:40]),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_wrong_losses_are_rejected(mutant):
    (truth, *grads), (wrong, *others) = (run(f, *draw(), torch.float64) for f in (law, MUTANTS[mutant]))
    assert (truth - wrong).abs() > 1e-3 * truth
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(grads, others))


def test_logits_beyond_exp_are_finite_and_nothing_to_predict_is_zero():
    hidden, head, targets = draw()
    torch.testing.assert_close(cross_entropy_sum(hidden * 1e4, head, targets), law(hidden * 1e4, head, targets))
    loss, d_hidden, d_head = run(cross_entropy_sum, hidden, head, torch.full_like(targets, IGNORED), torch.float64)
    assert loss == 0
    assert not d_hidden.any()
    assert not d_head.any()
    assert cross_entropy_sum(hidden[:0], head, targets[:0]) == 0


def test_memory_does_not_grow_with_the_words():
    """What is allocated at once, measured by torch's profiler: pieces of logits and the head's own gradient."""
    hidden, head = torch.randn(512, 8, requires_grad=True), torch.randn(8192, 8, requires_grad=True)
    targets = torch.randint(8192, (512,))
    cross_entropy.CHUNK_BYTES["cpu"] = 1 << 20
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            largest = max(
                [
                    largest,
                    *(x.nbytes for x in (out if isinstance(out, tuple) else [out]) if isinstance(x, torch.Tensor)),
                ]
            )
            return out

    with Watch():
        cross_entropy_sum(hidden, head, targets).backward()
    assert largest <= 2 << 20  # all logits would be 16 MiB
    assert head.grad is not None


@pytest.mark.parametrize(
    ("place", "change", "sentence"),
    [
        (0, lambda h: h[0], "hidden is torch.float64 of shape"),
        (1, lambda w: w[:, 1:], "head is torch.float64 of shape .* D = 24"),
        (2, lambda t: t[1:], "targets is torch.int64 of shape"),
        (2, lambda t: t.float(), "targets is torch.float32"),
        (2, lambda t: t + V, "the head has 0 to 300"),
        (1, lambda w: w.to("meta"), "head is on meta"),
        (0, lambda h: h.int(), "hidden is torch.int32 of shape .*; expected bfloat16"),
        (0, lambda h: h.to(torch.complex64), "hidden is torch.complex64 of shape .*; expected bfloat16"),
        (1, lambda w: w.to(torch.complex64), "head is torch.complex64 of shape .*; expected bfloat16"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(place, change, sentence):
    arguments = list(draw())
    arguments[place] = change(arguments[place])
    with pytest.raises(ValueError, match=sentence):
        cross_entropy_sum(*arguments)
