"""Generation of whole models on one GPU: prompts, one token, and all of `generate`, against the bytes that must move.

    python -m benchmarks.model_decode [--fresh] [--only "one token"]

Random weights in bf16 made on the GPU, random prompts, medians. The floor of a token is what it must read, the weights at
work on some sequence, memories, windows and caches, memories written again, over 3.0 TB/s; its share is what of that
bandwidth a step reaches. "48B shapes" are the official sizes with 8 of the 27 layers, KKKMKKKM, and the whole vocabulary.
`generate` is the difference between two lengths, so that recording the graphs, given apart, does not count.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch

from benchmarks._timing import Results
from palimpsest.generate import Sampling, generate, prefill
from palimpsest.generate.session import DecodeSession
from palimpsest.layers.moe import MoE
from palimpsest.models.kimi_linear import KimiLinearConfig, KimiLinearForCausalLM
from palimpsest.models.kimi_linear.mixers import is_full_attention

BANDWIDTH = 3.0e12  # bytes a second, measured by a large copy on an H100
SECONDS = 240  # of one row
PROMPT = 2048
MODELS: dict[str, Callable[[], KimiLinearConfig]] = {
    "172M mixture": KimiLinearConfig.medium,
    "48B shapes, 8 layers": lambda: KimiLinearConfig(layer_types="KKKMKKKM"),  # type: ignore[arg-type]  # letters
}


class Decoding(NamedTuple):
    """One workload: B sequences that have read PROMPT tokens."""

    model: str
    B: int

    def __str__(self):
        return f"{self.model}, B = {self.B}"


WORK = {
    str(work): work
    for work in (
        Decoding("172M mixture", 1),
        Decoding("172M mixture", 32),
        Decoding("172M mixture", 128),
        Decoding("48B shapes, 8 layers", 1),
        Decoding("48B shapes, 8 layers", 16),
        Decoding("48B shapes, 8 layers", 128),
    )
}
COLUMNS = "prompt", "one token", "generate"


def build(name: str) -> KimiLinearForCausalLM:
    """The model with random weights, made where they stay."""
    with torch.device("meta"):
        model = KimiLinearForCausalLM(MODELS[name]()).to(torch.bfloat16)
    model = model.to_empty(device="cuda").eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if key.endswith("A_log"):
                weight.uniform_(0, 2.7)
            elif key.endswith("dt_bias"):
                weight.uniform_(-6, -2)
            elif "norm" in key:
                weight.fill_(1)
            else:
                weight.normal_(std=0.02)
        for buffer in model.buffers():
            buffer.zero_()
    return model


def floor_bytes(model: KimiLinearForCausalLM, B: int, context: int) -> float:
    """What a token must move, if each of B sequences chooses its experts on its own."""
    config = model.config
    weights = sum(p.nbytes for p in model.parameters())
    weights -= 0 if config.tie_word_embeddings else model.model.embed_tokens.weight.nbytes
    for moe in (m for m in model.modules() if isinstance(m, MoE)):
        E, k = config.num_experts, config.num_experts_per_token
        weights -= sum(p.nbytes for p in moe.experts.parameters()) * (1 - k / E) ** B
    state = 0
    for name in config.layer_types:
        if is_full_attention(name):
            state += context * (config.kv_lora_rank + config.qk_rope_head_dim) * 2
        else:
            D = config.linear_num_heads * config.linear_head_dim
            state += 2 * D * config.linear_head_dim * 4 + 3 * 2 * D * (config.short_conv_kernel_size - 1) * 2
    return weights + B * state


def seconds_of(run: Callable[[], object], times: int) -> float:
    """The median of three groups of runs, each group waited for once."""
    run()
    samples = []
    for _ in range(3):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(times):
            run()
        torch.cuda.synchronize()
        samples.append((time.perf_counter() - began) / times)
    return statistics.median(samples)


@torch.no_grad()
def row(work: Decoding) -> dict[str, dict]:
    """Its columns, by name."""
    model = build(work.model)
    prompts = torch.randint(model.config.vocab_size, (work.B, PROMPT), device="cuda")
    found: dict[str, dict] = {}
    torch.cuda.reset_peak_memory_stats()
    seconds = seconds_of(lambda: prefill(model, prompts), 1 if work.B > 16 else 3)
    found["prompt"] = {"ms": seconds * 1e3, "tokens_per_second": work.B * PROMPT / seconds}
    found["prompt"] |= {"peak_gib": torch.cuda.max_memory_allocated() / 2**30}
    start = prefill(model, prompts)
    began = time.perf_counter()
    session = DecodeSession(model, start, Sampling(), [0] * work.B, capacity=PROMPT + 1024, graph=True)
    recorded = time.perf_counter() - began
    step = seconds_of(session.step_, 100)
    del session
    floor = floor_bytes(model, work.B, PROMPT) / BANDWIDTH
    found["one token"] = {
        "ms": step * 1e3,
        "floor_ms": floor * 1e3,
        "share": floor / step,
        "recorded_seconds": recorded,
    }
    lengths = 64, 448
    took = []
    for length in lengths:
        samples = []
        for _ in range(3):
            torch.cuda.synchronize()
            began = time.perf_counter()
            generate(model, start, max_new_tokens=length, end_tokens=(), graph=True)
            torch.cuda.synchronize()
            samples.append(time.perf_counter() - began)
        took.append(min(samples))
    token = (took[1] - took[0]) / (lengths[1] - lengths[0])
    found["generate"] = {"ms": token * 1e3, "of_the_step": token / step, "first_64_ms": took[0] * 1e3}
    return found


@cache
def measured_row(name: str) -> dict[str, dict]:
    """One row, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.model_decode", "--row", name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no word"])[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])


def show(cell: dict) -> str:
    if "share" in cell:
        return f"{cell['ms']:.2f} ms, floor {cell['floor_ms']:.2f}, {cell['share']:.0%} of the bandwidth"
    if "of_the_step" in cell:
        return f"{cell['ms']:.2f} ms a token, {cell['of_the_step']:.2f} x the step"
    return f"{cell['ms']:.0f} ms, {cell['tokens_per_second'] / 1e3:.0f}k tok/s, {cell['peak_gib']:.1f} GiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument("--only", metavar="TEXT", default="", help="only the cells whose name holds this text")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print(json.dumps(row(WORK[options.row])))
        return
    results = Results("model_decode", options.fresh)
    cells = [f"{name} | {column}" for name in WORK for column in COLUMNS]

    def measure(key: str) -> dict:
        name, column = key.split(" | ")
        return measured_row(name)[column]

    results.fill([key for key in cells if options.only in key], measure)
    results.write(results.table(list(WORK), list(COLUMNS), show, f"After prompts of {PROMPT:,} tokens"))


if __name__ == "__main__":
    main()
