"""How a scene travels to the page: a JSON header that names arrays, then the arrays' bytes.

    4 bytes   length of the header, little-endian
    header    {"scene": ..., "arrays": [{"dtype": "f4" | "f8", "shape": [...], "offset": ...}, ...]} in UTF-8,
              padded with spaces so that what follows starts on a multiple of 8
    arrays    row by row, little-endian, each from its offset after the header, a multiple of 8

In the scene a tensor is written {"array": i}.
"""

import json
import struct
from typing import Any

from torch import Tensor, float32


def pack(scene: Any) -> bytes:
    """The bytes of a scene: dicts, lists, text, numbers, None and tensors (float32 stays, any other becomes float64).

    >>> import torch
    >>> unpack(pack({"name": "a", "x": torch.ones(2)}))["x"].tolist()
    [1.0, 1.0]
    """
    arrays: list[dict] = []
    chunks: list[bytes] = []
    end = 0

    def place(node: Any) -> Any:
        nonlocal end
        if isinstance(node, Tensor):
            kept = node.detach().cpu() if node.dtype == float32 else node.detach().cpu().double()
            chunk = kept.contiguous().numpy().tobytes()
            arrays.append({"dtype": f"f{kept.element_size()}", "shape": list(node.shape), "offset": end})
            chunks.append(chunk + b"\0" * (-len(chunk) % 8))
            end += len(chunks[-1])
            return {"array": len(arrays) - 1}
        if isinstance(node, dict):
            return {key: place(value) for key, value in node.items()}
        if isinstance(node, (list, tuple)):
            return [place(value) for value in node]
        return node

    scene = place(scene)
    header = json.dumps({"scene": scene, "arrays": arrays}, separators=(",", ":"), allow_nan=False).encode()
    header += b" " * (-(len(header) + 4) % 8)
    return struct.pack("<I", len(header)) + header + b"".join(chunks)


def unpack(data: bytes) -> Any:
    """The scene again, its arrays as tensors: what the page does, for tests."""
    import torch

    (length,) = struct.unpack_from("<I", data)
    header = json.loads(data[4 : 4 + length])
    dtypes = {"f4": torch.float32, "f8": torch.float64}

    def array(info: dict) -> Tensor:
        count = 1
        for size in info["shape"]:
            count *= size
        if not count:
            return torch.empty(info["shape"], dtype=dtypes[info["dtype"]])
        flat = torch.frombuffer(
            bytearray(data), dtype=dtypes[info["dtype"]], count=count, offset=4 + length + info["offset"]
        )
        return flat.view(info["shape"])

    def lift(node: Any) -> Any:
        if isinstance(node, dict):
            if set(node) == {"array"}:
                return array(header["arrays"][node["array"]])
            return {key: lift(value) for key, value in node.items()}
        return [lift(value) for value in node] if isinstance(node, list) else node

    return lift(header["scene"])
