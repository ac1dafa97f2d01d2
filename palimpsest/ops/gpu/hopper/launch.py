"""Compiled Hopper kernels: found, loaded and launched through the driver's own interface.

The machine code is shipped in `sm_90a.zip`, so a first call compiles nothing; precompile.py makes it. A kernel
takes one structure by value; `Kernel.launch` packs it and hands it over, a few microseconds in all.
"""

import ctypes
import struct
import threading
import zipfile
from functools import cache
from pathlib import Path

import torch

ARCHIVE = Path(__file__).parent / "sm_90a.zip"
_NO_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT
_MAX_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


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
    if not ARCHIVE.exists():
        raise RuntimeError(
            f"{ARCHIVE} is missing; `python -m palimpsest.ops.gpu.hopper.precompile` makes it, with nvcc 12.8 or later"
        )
    with zipfile.ZipFile(ARCHIVE) as archive:
        code = archive.read(file)
    _check(_driver().cuModuleLoadData(ctypes.byref(module), code), f"loading {file}")
    return module


class _Arguments(threading.local):
    """Room for one launch's arguments, a thread its own; the driver reads it before a launch returns."""

    def __init__(self):
        self.bytes = ctypes.create_string_buffer(512)
        self.pointers = (ctypes.c_void_p * 1)(ctypes.addressof(self.bytes))


_arguments = _Arguments()


class Kernel:
    """One kernel of a compiled file on one device.

    `fields` is the argument structure in the notation of Python's struct: "2P3if" is two pointers, three ints, a float.
    """

    def __init__(self, file: str, name: str, fields: str, threads: int, shared: int, device: int):
        self._pack_into = struct.Struct(fields).pack_into
        self._threads, self._shared, self._device = threads, shared, device
        torch.zeros(1, device=torch.device("cuda", device))  # now the device's context exists and is this thread's
        function = ctypes.c_void_p()
        _check(
            _driver().cuModuleGetFunction(ctypes.byref(function), _module(file, device), name.encode()),
            f"finding {name}",
        )
        _check(_driver().cuFuncSetAttribute(function, _MAX_SHARED, shared), f"reserving shared memory for {name}")
        self._function, self._launch = function, _driver().cuLaunchKernel

    def launch(self, grid: tuple[int, int], *arguments) -> None:
        """Launch on the current stream. Pointers are addresses, 0 for null."""
        self._pack_into(_arguments.bytes, 0, *arguments)
        stream = ctypes.c_void_p(torch._C._cuda_getCurrentRawStream(self._device))
        shape = (grid[0], grid[1], 1, self._threads, 1, 1, self._shared, stream, _arguments.pointers, None)
        status = self._launch(self._function, *shape)
        if status == _NO_CONTEXT:  # a thread that has not used the device before
            torch.zeros(1, device=torch.device("cuda", self._device))
            status = self._launch(self._function, *shape)
        if status:
            _check(status, "a kernel launch")


@cache
def kernel(file: str, name: str, fields: str, threads: int, shared: int, device: int) -> Kernel:
    return Kernel(file, name, fields, threads, shared, device)
