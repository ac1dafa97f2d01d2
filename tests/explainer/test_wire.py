"""Scenes survive the journey."""

import pytest
import torch

from palimpsest.explainer.wire import pack, unpack


def test_what_is_packed_comes_back():
    scene = {
        "name": "ä␣",
        "numbers": [1, 2.5, None, True],
        "nested": [{"x": torch.arange(6.0).view(2, 3)}, torch.tensor(3.0)],
        "double": torch.tensor([1 / 3], dtype=torch.float64),
        "empty": torch.zeros(0, 4),
        "turned": torch.arange(6.0).view(2, 3).T,
    }
    back = unpack(pack(scene))
    assert back["name"] == "ä␣"
    assert back["numbers"] == [1, 2.5, None, True]
    assert back["nested"][0]["x"].equal(scene["nested"][0]["x"])
    assert back["nested"][1].item() == 3
    assert back["double"].dtype == torch.float64
    assert back["double"].equal(scene["double"])
    assert back["empty"].shape == (0, 4)
    assert back["turned"].equal(scene["turned"])


def test_arrays_start_where_a_browser_can_view_them():
    data = pack({"a": torch.ones(3), "b": torch.ones(1, dtype=torch.float64), "c": "x" * 5})
    length = int.from_bytes(data[:4], "little")
    assert (4 + length) % 8 == 0
    assert len(data) == 4 + length + 16 + 8


def test_a_number_that_json_does_not_know_is_refused():
    with pytest.raises(ValueError, match="JSON"):
        pack({"x": float("nan")})
