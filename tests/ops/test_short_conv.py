import pytest
import torch

from palimpsest.ops.short_conv import _state_gradient, short_conv, short_conv_step_

D, W = 6, 4


def by_hand(x, weight, state):
    """Each output as its own sum, from the definition."""
    whole = torch.cat((state.mT, x), 1)
    return torch.stack([(whole[:, t : t + W] * weight[:, 0].T).sum(1) for t in range(x.shape[1])], 1)


@pytest.mark.parametrize("T", [1, 2, 3, 4, 9])
def test_it_is_its_definition_and_carries_its_state(T):
    x, weight, state = torch.randn(2, T, D), torch.randn(D, 1, W), torch.randn(2, D, W - 1)
    y, after = short_conv(x, weight, state=state)
    torch.testing.assert_close(y, by_hand(x, weight, state))
    torch.testing.assert_close(after, torch.cat((state, x.mT), -1)[..., -(W - 1) :])


def test_steps_are_the_whole():
    x, weight, state = torch.randn(2, 7, D), torch.randn(D, 1, W), torch.randn(2, D, W - 1)
    y, after = short_conv(x, weight, state=state)
    moving = state.clone()
    torch.testing.assert_close(torch.stack([short_conv_step_(x[:, t], weight, moving) for t in range(7)], 1), y)
    torch.testing.assert_close(moving, after)


@pytest.mark.parametrize("W", [1, 2, 4])
def test_packed_is_separate(W):
    lengths = [2, 0, 1, 9, 3]
    borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    x = torch.randn(1, sum(lengths), D, dtype=torch.float64, requires_grad=True)
    weight, state = torch.randn(D, 1, W).double(), torch.randn(len(lengths), D, W - 1).double()
    y, after = short_conv(x, weight, state=state, cu_seqlens=borders)
    for n, length in enumerate(lengths):
        piece = slice(int(borders[n]), int(borders[n]) + length)
        alone, alone_after = short_conv(x[:, piece], weight, state=state[n : n + 1])
        torch.testing.assert_close(y[:, piece], alone)
        torch.testing.assert_close(after[n : n + 1], alone_after)
    assert torch.autograd.gradcheck(lambda x: short_conv(x, weight, state=state, cu_seqlens=borders), x)


@pytest.mark.parametrize("ends", [None, [0, 0, 1, 3, 12]], ids=["rows", "packed"])
def test_the_gradient_of_what_stands_before(ends):
    """The kernels' way to it, by the first W - 1 tokens alone, is what autograd finds."""
    borders = None if ends is None else torch.tensor(ends)
    B, T, N = (2, 6, 2) if borders is None else (1, 12, 4)
    x, weight, state, dy = torch.randn(B, T, 5), torch.randn(5, 1, 4), torch.randn(N, 5, 3), torch.randn(B, T, 5)
    leaf = state.clone().requires_grad_()
    y = torch.nn.functional.silu(short_conv(x, weight, state=leaf, cu_seqlens=borders)[0])
    truth = torch.autograd.grad(y, leaf, dy)[0]
    ours = _state_gradient(x, weight.flatten(1), state, dy, borders)
    torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-6)
