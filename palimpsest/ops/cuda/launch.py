"""Compiled Hopper kernels: found, loaded and launched through the driver's own interface.

The machine code is shipped in `sm_90a.zip`, so a first call compiles nothing; `python -m palimpsest.ops.cuda.build` makes
it. A kernel takes one structure by value; `Kernel.launch` fills it in and hands it over, a few microseconds in all.
"""

import ctypes
import zipfile
from functools import cache
from pathlib import Path

import torch

ARCHIVE = Path(__file__).parent / "sm_90a.zip"
_MAX_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_float


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(status: int, what: str) -> None:
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"{what} failed: {(text.value or b'unknown error').decode()}")


@cache
def _module(file: str, device: int) -> ctypes.c_void_p:
    module = ctypes.c_void_p()
    with zipfile.ZipFile(ARCHIVE) as archive:
        code = archive.read(file)
    _check(_driver().cuModuleLoadData(ctypes.byref(module), code), f"loading {file}")
    return module


class Kernel:
    """One kernel of a compiled file on one device.

    `fields` names the members of its argument structure, with "p" pointer, "i" int or "f" float for each.
    """

    def __init__(self, file: str, name: str, fields: str, threads: int, shared: int, device: int):
        types = {"p": _POINTER, "i": _INT, "f": _FLOAT}
        self._type = type(
            "Arguments", (ctypes.Structure,), {"_fields_": [(f"a{i}", types[x]) for i, x in enumerate(fields)]}
        )
        self._function = ctypes.c_void_p()
        self._threads, self._shared, self._device = threads, shared, device
        torch.cuda.current_stream(device).query()  # the device's context exists and is current
        _check(
            _driver().cuModuleGetFunction(ctypes.byref(self._function), _module(file, device), name.encode()),
            f"finding {name}",
        )
        _check(_driver().cuFuncSetAttribute(self._function, _MAX_SHARED, shared), f"reserving shared memory for {name}")

    def launch(self, grid: tuple[int, int], *arguments) -> None:
        """Launch on the current stream. Pointers are addresses, 0 for null."""
        values = self._type(*arguments)
        parameters = ctypes.c_void_p(ctypes.addressof(values))
        stream = torch._C._cuda_getCurrentRawStream(self._device)
        status = _driver().cuLaunchKernel(
            self._function, grid[0], grid[1], 1, self._threads, 1, 1, self._shared, ctypes.c_void_p(stream),
            ctypes.byref(parameters), None,
        )  # fmt: skip
        if status:
            _check(status, "a kernel launch")


@cache
def kernel(file: str, name: str, fields: str, threads: int, shared: int, device: int) -> Kernel:
    return Kernel(file, name, fields, threads, shared, device)
