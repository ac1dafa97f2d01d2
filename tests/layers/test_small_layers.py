"""Norm, MLP, convolution, padding and the float32 contract, each against its definition."""

import pytest
import torch
from torch import nn

from palimpsest.layers.mlp import GatedMLP
from palimpsest.layers.norms import RMSNorm
from palimpsest.layers.options import MixerOptions
from palimpsest.layers.padding import check_rows, pack, unpack
from palimpsest.layers.precision import Float32Tensors
from palimpsest.layers.short_conv import ShortConvolution
from palimpsest.ops.packing import borders
from palimpsest.testing import assert_within_budget

D, W = 6, 4


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


@pytest.mark.parametrize("eps", [1e-5, 1e-6, 0.1])
def test_norm_is_its_formula_with_eps_inside_the_root(eps):
    norm = RMSNorm(D, eps).double()
    nn.init.normal_(norm.weight)
    x = torch.randn(2, 3, D, dtype=torch.float64) * 1e-2  # small, so that eps counts
    truth = x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * norm.weight
    torch.testing.assert_close(norm(x), truth)


def test_norm_computes_in_float32_under_bfloat16():
    norm, x = RMSNorm(64), (torch.randn(8, 64) * 100 + 1000).bfloat16()
    nn.init.normal_(norm.weight)
    norm.bfloat16()
    x64, weight = x.double(), norm.weight.double()
    truth = x64 / torch.sqrt(x64.square().mean(-1, keepdim=True) + 1e-5) * weight
    honest = (x.float() / torch.sqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)).bfloat16() * norm.weight
    assert_within_budget("norm", norm(x), truth, honest)


def test_mlp_gates_with_silu():
    names = "gate_proj up_proj down_proj"
    mlp, x = GatedMLP(D, 10).double(), torch.randn(2, D, dtype=torch.float64)
    gate, up, down = (getattr(mlp, name).weight for name in names.split())
    h = x @ gate.T
    torch.testing.assert_close(mlp(x), (h * sigmoid(h) * (x @ up.T)) @ down.T)
    assert sorted(mlp.state_dict()) == sorted(f"{name}.weight" for name in names.split())


def convolve(x, weight, before):
    """One channel and token at a time, then SiLU."""
    y = torch.zeros_like(x)
    for b, t, d in torch.cartesian_prod(*(torch.arange(n) for n in x.shape)):
        line = torch.cat([before[b, d], x[b, :, d]])
        y[b, t, d] = (line[t : t + W] * weight[d, 0]).sum()
    return y * sigmoid(y)


@pytest.mark.parametrize("T", [1, 2, 3, 4, 7])
def test_convolution_is_its_definition_and_its_window_carries_on(T):
    conv = ShortConvolution(D, W).double()
    x, before = torch.randn(2, T, D, dtype=torch.float64), torch.randn(2, D, W - 1, dtype=torch.float64)
    y, window = conv(x, before)
    torch.testing.assert_close(y, convolve(x, conv.weight, before))
    torch.testing.assert_close(window, torch.cat([before, x.mT], -1)[..., -(W - 1) :])

    steps, moving = [], before.clone()
    with torch.no_grad():
        for t in range(T):
            steps.append(conv.step_(x[:, t], moving))
    torch.testing.assert_close(torch.stack(steps, 1), y)
    torch.testing.assert_close(moving, window)


def test_a_window_does_not_keep_the_sequence_alive():
    _, window = ShortConvolution(D, W)(torch.randn(1, 1000, D))
    assert window.untyped_storage().nbytes() == D * (W - 1) * 4


def test_packing_and_unpacking_are_inverse():
    mask = torch.tensor([[False, True, True, False], [False] * 4, [True, False, False, True]])
    x = torch.randn(3, 4, 2)
    packed, ends = pack(x, mask)
    assert ends.tolist() == [0, 2, 2, 4]
    torch.testing.assert_close(packed[0], torch.stack([x[0, 1], x[0, 2], x[2, 0], x[2, 3]]))
    torch.testing.assert_close(unpack(packed, mask), x * mask[..., None])


@pytest.mark.parametrize(
    ("mask", "cu_seqlens", "message"),
    [
        (torch.ones(2, 3), None, r"mask is torch.float32 of shape \(2, 3\); expected torch.bool of shape \(2, 3\)"),
        (torch.ones(2, 4, dtype=torch.bool), None, r"shape \(2, 4\); expected torch.bool of shape \(2, 3\)"),
        (torch.ones(2, 3, dtype=torch.bool), torch.tensor([0, 3]), "both given"),
        (None, torch.tensor([0, 3]), "with a batch of 2; .* in a batch of 1"),
    ],
)
def test_rows_that_do_not_fit_are_refused(mask, cu_seqlens, message):
    with pytest.raises(ValueError, match=message):
        check_rows(torch.zeros(2, 3), mask, cu_seqlens)


@pytest.mark.parametrize("ends", [[0], [1, 5], [0, 4], [0, 6], [0, 3, 2, 5]])
def test_borders_that_do_not_rise_to_the_end_are_refused(ends):
    with pytest.raises(ValueError, match="it must rise from 0 to the number of tokens, 5"):
        borders(torch.tensor(ends), 5)


class Kept(Float32Tensors):
    float32_names = ("rate", "bias")

    def __init__(self):
        super().__init__()
        self.rate, self.weight = nn.Parameter(torch.tensor([1 / 3])), nn.Parameter(torch.tensor([1 / 3]))
        self.register_buffer("bias", torch.tensor([1 / 3]))


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.bfloat16(),
        lambda m: m.half(),
        lambda m: m.bfloat16().float(),
        lambda m: m.to("meta", torch.bfloat16),
    ],
)
def test_named_tensors_stay_in_float32(cast):
    model = nn.Sequential(Kept())
    model[0].rate.grad = torch.tensor([1 / 3])
    cast(model)
    kept = model[0]
    assert kept.rate.dtype == kept.bias.dtype == kept.rate.grad.dtype == torch.float32
    assert isinstance(kept.rate, nn.Parameter)
    if kept.rate.device.type != "meta":
        assert kept.rate.item() == kept.bias.item() == torch.tensor(1 / 3).item()  # never rounded on the way
    assert Kept().double().rate.dtype == torch.float64
    assert Kept().bfloat16().weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_householder": 0}, "num_householder is 0; a token has at least 1 sub-step"),
        ({"conv": "no"}, "conv is 'no'; it must be True or False"),
        ({"floor": float("nan")}, "floor is nan; it must be a finite number"),
        ({"decay": "token"}, "decay is 'token'; choose one of 'channel'"),
        ({"gate": "relu"}, "gate is 'relu'; choose"),
        ({"output_gate": "tanh"}, "output_gate is 'tanh'; choose"),
        ({"gate_rank": 7}, "gate_rank is 7; it must be a text"),
        ({"floor": 0.0}, "floor is 0.0; a log decay is negative"),
        ({"beta_max": 3.0}, "beta_max is 3.0; beyond 2"),
    ],
)
def test_unknown_parts_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        MixerOptions(**change)
