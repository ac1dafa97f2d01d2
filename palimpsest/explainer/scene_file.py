"""How a scene travels to the page: as safetensors, which any reader of that format opens.

Tensors are named by their place in the scene, "members.kda.memory"; the scene itself is JSON in the file's metadata, under
"scene", where {"tensor": NAME} stands for each of them.
"""

import json
from typing import Any

import torch
from torch import Tensor


def to_safetensors(scene: Any) -> bytes:
    """The bytes of a scene.

    Args:
        scene: dicts, lists, text, finite numbers, None and tensors; float32 stays, any other dtype becomes float64.

    Raises:
        ValueError: a number is not finite, which JSON has no word for.

    >>> scene = from_safetensors(to_safetensors({"name": "a", "x": torch.ones(2)}))
    >>> scene["name"], scene["x"].tolist()
    ('a', [1.0, 1.0])
    """
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}

    def place(node: Any, path: str) -> Any:
        if isinstance(node, Tensor):
            dtype = torch.float32 if node.dtype == torch.float32 else torch.float64
            tensors[path] = torch.empty(node.shape, dtype=dtype).copy_(node.detach())  # its own storage, row by row
            return {"tensor": path}
        inside = lambda key: f"{path}.{key}" if path else str(key)
        if isinstance(node, dict):
            return {key: place(value, inside(key)) for key, value in node.items()}
        if isinstance(node, (list, tuple)):
            return [place(value, inside(i)) for i, value in enumerate(node)]
        return node

    words = json.dumps(place(scene, ""), separators=(",", ":"), allow_nan=False)
    return save(tensors, {"scene": words})


def from_safetensors(data: bytes) -> Any:
    """The scene again: what the page does, for tests."""
    from safetensors.torch import load

    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    tensors = load(data)

    def lift(node: Any) -> Any:
        if isinstance(node, dict):
            return tensors[node["tensor"]] if set(node) == {"tensor"} else {k: lift(v) for k, v in node.items()}
        return [lift(value) for value in node] if isinstance(node, list) else node

    return lift(json.loads(header["__metadata__"]["scene"]))
