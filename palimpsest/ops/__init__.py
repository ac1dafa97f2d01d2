"""Functions on tensors: the family, its gates, its backends. Knows torch and nothing above it."""

from palimpsest.ops import backends, decode, torch_backends
from palimpsest.ops.cpu import register as cpu
from palimpsest.ops.cpu import register_decode as register_cpu_decode
from palimpsest.ops.gpu import neighbours as _neighbours  # noqa: F401  # registers its ops with torch
from palimpsest.ops.gpu import register as gpu
from palimpsest.ops.gpu import register_decode as register_decode

for _backend in (gpu.HOPPER, gpu.TRITON, cpu.CPU, torch_backends.CHUNKED, torch_backends.REFERENCE):  # fastest first
    backends.register(_backend)
decode.ON_CPU |= register_cpu_decode.ON_CPU
