"""The vision transformer: scans that miss no patch, memories that read in their direction, and what is left of a write."""

import pytest
import torch

from palimpsest.models.vision import SCANS, VisionConfig, VisionTransformer, memory_left, scan_order
from palimpsest.models.vision.memory_left import left_of_writes
from palimpsest.models.vision.patch_mixers import ScannedMemory
from palimpsest.ops.variants import kda

CONFIG = {"image_size": 16, "patch_size": 4, "hidden_size": 16, "num_layers": 2, "num_heads": 4, "head_dim": 4}
CONFIG |= {"intermediate_size": 16, "num_classes": 5}


@pytest.mark.parametrize("direction", SCANS["four"])
def test_a_scan_visits_every_patch_once(direction):
    order = scan_order(direction, 3, 5)
    assert order.sort().values.tolist() == list(range(15))
    back = scan_order(direction.removesuffix(" back") if direction.endswith("back") else direction + " back", 3, 5)
    assert order.flip(0).equal(back)


@pytest.mark.parametrize("direction", SCANS["four"])
def test_a_patch_tells_only_those_that_are_read_after_it(direction):
    torch.manual_seed(0)
    mixer = ScannedMemory(VisionConfig(**CONFIG), (direction,)).double()
    x = torch.randn(1, 12, 16, dtype=torch.double, requires_grad=True)
    order = scan_order(direction, 3, 4).tolist()
    y = mixer(x, 3, 4)
    (grad,) = torch.autograd.grad(y[0, order[5]].sum(), x)
    touched = {i for i in range(12) if grad[0, i].abs().sum() > 0}
    assert touched == set(order[:6])


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("by_turns", [False, True])
def test_directions_share_the_heads_or_take_turns(scan, by_turns):
    model = VisionTransformer(VisionConfig(**CONFIG, scan=scan, by_turns=by_turns))
    read = [layer.mixer.directions for layer in model.layers]
    ways = SCANS[scan]
    assert read == ([(ways[0],), (ways[1 % len(ways)],)] if by_turns else [ways, ways])
    assert all(sum(m.num_heads for m in layer.mixer.mixers) == 4 for layer in model.layers)
    model(torch.rand(2, 3, 16, 16)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_read_four_ways_every_patch_reaches_every_other():
    torch.manual_seed(0)
    mixer = ScannedMemory(VisionConfig(**CONFIG), SCANS["four"])
    x = torch.randn(1, 12, 16, requires_grad=True)
    (grad,) = torch.autograd.grad(mixer(x, 3, 4)[0, 5].sum(), x)
    assert (grad[0].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("mixer", ["softmax", "gated_delta", "gated_linear_attention", "gdn2", "gated_delta_product"])
def test_any_memory_of_the_family_can_see_and_images_of_another_size_too(mixer):
    model = VisionTransformer(VisionConfig(**CONFIG, mixer=mixer, positions="learned"))
    assert model(torch.rand(2, 3, 16, 16)).shape == (2, 5)
    assert model(torch.rand(2, 3, 8, 24)).shape == (2, 5)


def test_bytes_and_floats_are_the_same_image():
    model = VisionTransformer(VisionConfig(**CONFIG))
    image = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    assert torch.allclose(model(image), model(image.float() / 255))


def test_without_positions_attention_cannot_tell_where_and_a_scan_can():
    torch.manual_seed(0)
    image = torch.rand(1, 3, 16, 16)
    swapped = torch.cat((image[..., 8:], image[..., :8]), -1)  # patches in other places
    tells = lambda **changes: (
        not torch.allclose(
            (model := VisionTransformer(VisionConfig(**CONFIG, **changes)))(image), model(swapped), atol=1e-6
        )
    )
    assert not tells(mixer="softmax")
    assert tells(mixer="softmax", positions="learned")
    assert tells(mixer="kda")


def test_what_is_left_of_the_writes_adds_up_to_the_memory():
    torch.manual_seed(0)
    B, T, H, K = 2, 9, 3, 4
    k = torch.nn.functional.normalize(torch.randn(B, T, H, K, dtype=torch.double), dim=-1)
    v, log_decay = torch.randn(B, T, H, K, dtype=torch.double), -torch.rand(B, T, H, K, dtype=torch.double)
    beta = torch.rand(B, T, H, dtype=torch.double)
    left = left_of_writes(k, v, log_decay, beta)
    whole = kda(k, k, v, log_decay, beta).state
    for t in range(T):  # without write t nothing else changes but what it wrote: the difference of two memories
        u = v.clone()
        states = kda(k[:, : t + 1], k[:, : t + 1], v[:, : t + 1], log_decay[:, : t + 1], beta[:, : t + 1]).state
        before = log_decay[:, t].exp()[..., None] * (
            kda(k[:, :t], k[:, :t], v[:, :t], log_decay[:, :t], beta[:, :t]).state if t else torch.zeros_like(states)
        )
        rest = slice(t + 1, T)
        go_on = lambda state, u=u, rest=rest: (
            kda(k[:, rest], k[:, rest], u[:, rest], log_decay[:, rest], beta[:, rest], state=state).state
        )
        without = go_on(before) if t + 1 < T else before
        assert (whole - without).flatten(1).norm(dim=1).tolist() == pytest.approx(left[:, t].tolist(), rel=1e-4)


def test_a_map_lies_where_its_patches_do():
    torch.manual_seed(0)
    model = VisionTransformer(VisionConfig(**CONFIG, scan="four"))
    left = memory_left(model, torch.rand(2, 3, 8, 16))
    assert {name: tuple(x.shape) for name, x in left.items()} == {name: (2, 2, 4) for name in SCANS["four"]}
    assert left["rows"][0, -1, -1] > left["rows"][0, 0, 0]  # the last that was read is best remembered
    assert left["rows back"][0, 0, 0] > left["rows back"][0, -1, -1]
    with pytest.raises(ValueError, match="mixer is 'softmax'"):
        memory_left(VisionTransformer(VisionConfig(**CONFIG, mixer="softmax")), torch.rand(1, 3, 16, 16))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"mixer": "mamba9"}, "mixer is 'mamba9'"),
        ({"scan": "spiral"}, "scan is 'spiral'"),
        ({"positions": "rope"}, "positions is 'rope'"),
        ({"num_heads": 3, "scan": "four"}, "cannot be shared by the 4 directions"),
        ({"image_size": 18}, "no multiple of patch_size 4"),
        ({"num_layers": 0}, "num_layers is 0"),
    ],
)
def test_impossible_models_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        VisionConfig(**{**CONFIG, **changes})


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 1, 16, 16), (1, 3, 15, 16), (0, 3, 16, 16)])
def test_what_is_no_image_is_refused(shape):
    with pytest.raises(ValueError, match=r"expected \[B, 3, height, width\]"):
        VisionTransformer(VisionConfig(**CONFIG))(torch.rand(shape))


def test_an_unknown_direction_is_refused():
    with pytest.raises(ValueError, match="direction is 'diagonal'"):
        scan_order("diagonal", 2, 2)
