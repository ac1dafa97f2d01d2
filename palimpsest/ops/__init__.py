"""Functions on tensors: the family, its gates, its backends. Knows torch and nothing above it."""

from palimpsest.ops import backends, plain
from palimpsest.ops.cpu import register as cpu
from palimpsest.ops.triton import register as gpu

for _backend in (gpu.HOPPER, gpu.TRITON, cpu.CPU, plain.CHUNKED, plain.REFERENCE):  # fastest first
    backends.register(_backend)
