"""Scenes survive the journey: to this library's reader, to any reader of safetensors, and to the page's own."""

import json
import shutil
import struct
import subprocess

import pytest
import torch
from safetensors.torch import load

from palimpsest.explainer.scene_file import from_safetensors, to_safetensors
from palimpsest.explainer.server import STATIC

SCENE = {
    "name": "ä␣",
    "numbers": [1, 2.5, None, True],
    "nested": [{"x": torch.arange(6.0).view(2, 3)}, torch.tensor(3.0)],
    "double": torch.tensor([1 / 3, 0.1], dtype=torch.float64),
    "single": torch.tensor([1 / 3]),
    "empty": torch.zeros(0, 4),
    "turned": torch.arange(6.0).view(2, 3).T,
}
SCENE["again"] = SCENE["turned"]  # two names for one storage
SCRIPT = """
import { readFileSync } from "node:fs";
const { fromSafetensors } = await import(process.argv[1]);
const held = readFileSync(0);
const buffer = held.buffer.slice(held.byteOffset, held.byteOffset + held.byteLength);
console.log(JSON.stringify(fromSafetensors(buffer), (_, x) => ArrayBuffer.isView(x) ? [x.constructor.name, ...x] : x));
"""


def in_javascript(data: bytes) -> subprocess.CompletedProcess:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    command = [node, "--input-type=module", "-e", SCRIPT, (STATIC / "assets" / "safetensors.js").as_uri()]
    return subprocess.run(command, input=data, capture_output=True, check=False)


def test_what_is_sent_comes_back():
    back = from_safetensors(to_safetensors(SCENE))
    assert back["name"] == "ä␣"
    assert back["numbers"] == [1, 2.5, None, True]
    assert back["nested"][0]["x"].equal(SCENE["nested"][0]["x"])
    assert back["nested"][1].item() == 3
    assert back["double"].dtype == torch.float64
    assert back["double"].equal(SCENE["double"])
    assert back["empty"].shape == (0, 4)
    assert back["turned"].equal(SCENE["turned"])
    assert back["again"].equal(SCENE["turned"])


def test_any_reader_of_the_format_finds_its_tensors_by_their_places():
    tensors = load(to_safetensors(SCENE))
    assert set(tensors) == {"nested.0.x", "nested.1", "double", "single", "empty", "turned", "again"}
    assert tensors["nested.0.x"].equal(SCENE["nested"][0]["x"])


def test_the_pages_own_reader_reads_the_same():
    found = in_javascript(to_safetensors(SCENE))
    assert found.returncode == 0, found.stderr.decode()
    scene = json.loads(found.stdout)
    assert scene["name"] == "ä␣"
    assert scene["numbers"] == [1, 2.5, None, True]
    for name, kind in (("double", "Float64Array"), ("single", "Float32Array"), ("empty", "Float32Array")):
        assert scene[name] == {
            "shape": list(SCENE[name].shape),
            "data": [kind, *SCENE[name].double().flatten().tolist()],
        }
    assert scene["turned"]["data"][1:] == SCENE["turned"].flatten().tolist()
    assert scene["nested"][0]["x"]["shape"] == [2, 3]


@pytest.mark.parametrize("broken", ["short", "long", "half"])
def test_a_file_cut_short_is_not_drawn(broken):
    data = to_safetensors({"x": torch.ones(4)})
    cut = {"short": data[:5], "long": struct.pack("<Q", 1 << 40) + data[8:], "half": data[:-8]}[broken]
    found = in_javascript(cut)
    assert found.returncode != 0
    assert b"reload this page" in found.stderr


def test_the_same_scene_gives_the_same_bytes():
    assert to_safetensors(SCENE) == to_safetensors(SCENE)


def test_a_number_that_json_does_not_know_is_refused():
    with pytest.raises(ValueError, match="JSON"):
        to_safetensors({"x": float("nan")})
