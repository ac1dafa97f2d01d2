"""Functions on tensors: the family, its gates, its backends. Knows torch and nothing above it."""

from palimpsest.ops import backends, decode, torch_backends
from palimpsest.ops.cpu import decode_calls
from palimpsest.ops.cpu import register as cpu
from palimpsest.ops.gpu import decode_ops as decode_ops
from palimpsest.ops.gpu import neighbours as _neighbours  # noqa: F401  # registers its ops with torch
from palimpsest.ops.gpu import prefill_ops as _prefill_ops  # noqa: F401
from palimpsest.ops.gpu import register as gpu

for _backend in (gpu.HOPPER, gpu.TRITON, cpu.CPU, torch_backends.CHUNKED, torch_backends.REFERENCE):  # fastest first
    backends.register(_backend)
decode.ON_CPU |= decode_calls.ON_CPU
