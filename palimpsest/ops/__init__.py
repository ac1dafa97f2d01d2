"""Functions on tensors: the family, its gates, its backends. Knows torch and nothing above it."""

from palimpsest.ops import backends, plain

for _backend in (plain.CHUNKED, plain.REFERENCE):  # fastest first
    backends.register(_backend)
