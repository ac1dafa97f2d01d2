"""The delta memory on a GPU, in two tiers: `triton` (portable) and `hopper` (CUDA C++, compiled beforehand).

register    both tiers as torch custom ops and backends; knows torch alone, and is all that may be imported early
workspace   what both tiers make for a call
warmup      pays for compiling and loading before the first request
"""
