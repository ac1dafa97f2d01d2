"""Rows of benchmarks/parallel.py: one sequence on several GPUs beside the same sequence on one of them.

The operator is KDA forward and backward; the model's row is a whole training step of one sequence, layers computed again in the
backward, in bf16 by autocast, without compiling. The one is measured by the first process on its card, in the same run; the
second process meanwhile times what a step is made of on its own. `context longest` runs only where it is asked for.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from palimpsest import KimiLinearConfig, KimiLinearForCausalLM, kda
from palimpsest.layers.split_attention import attend_fragment
from palimpsest.parallel.context import SequenceSplit, layout_of, share, split_sequence

TOKENS, HEADS = 131_072, 32
STEP, LONGEST = 262_144, 1_048_576


def rows(arguments: argparse.Namespace) -> dict[str, Callable[[], dict[str, Any]]]:
    """Name -> what measures it."""
    found = {
        "context kda": lambda: operator(arguments),
        "context 172M": lambda: training_step(arguments, 192 if arguments.tiny else STEP),
    }
    if "context longest" in arguments.rows:
        found["context longest"] = lambda: longest(arguments, 256 if arguments.tiny else LONGEST)
    return found


def milliseconds(run: Callable[[], object], device: str, repeats: int) -> float:
    """Median wall clock of one call, all processes together."""
    wait, samples = torch.cuda.synchronize if device == "cuda" else (lambda: None), []
    for _ in range(repeats):
        wait()
        dist.barrier()
        began = time.perf_counter()
        run()
        wait()
        samples.append((time.perf_counter() - began) * 1e3)
    return statistics.median(samples)


def ratio(one: float, many: float) -> dict[str, float]:
    return {"one_ms": round(one, 2), "many_ms": round(many, 2), "ratio": round(one / many, 3)}


def operator(arguments: argparse.Namespace) -> dict[str, Any]:
    """KDA of one sequence, forward and backward, slow gates; contiguous and zigzag."""
    device, T, H, K = ("cpu", 256, 2, 16) if arguments.tiny else ("cuda", TOKENS, HEADS, 128)
    rng = torch.Generator(device).manual_seed(0)
    normal = lambda *size: torch.randn(*size, generator=rng, device=device)
    q, k = (F.normalize(normal(1, T, H, K), dim=-1).bfloat16() for _ in range(2))
    whole = [
        q,
        k,
        normal(1, T, H, K).bfloat16(),
        -0.01 * torch.special.ndtr(normal(1, T, H, K)),
        normal(1, T, H).sigmoid(),
    ]
    whole[4] = whole[4].bfloat16()
    weight = normal(1, T, H, K).bfloat16()

    def step(tensors, weight, how):
        leaves = [x.detach().requires_grad_() for x in tensors]
        output = kda(*leaves, **how).output
        return [output.detach(), *torch.autograd.grad(output, leaves, weight)]

    alone = step(whole, weight, {})
    one, found = milliseconds(partial(step, whole, weight, {}), device, 5), {}
    for layout in ("contiguous", "zigzag"):
        split = split_sequence(T, dist.group.WORLD, layout=layout)
        mine, own_weight = [split.shard(x).contiguous() for x in whole], split.shard(weight).contiguous()
        ours = step(mine, own_weight, {"split": split})
        found[layout] = ratio(one, milliseconds(partial(step, mine, own_weight, {"split": split}), device, 5))
        found[layout]["off"] = [round(distance(x, split.shard(y)), 5) for x, y in zip(ours, alone)]
    return found


def distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """Relative, by the root of the mean square."""
    return ((x.float() - y.float()).square().mean() / y.float().square().mean()).sqrt().item()


class Step:
    """A training step of one sequence of random tokens: forward, backward, the gradients' mean, AdamW."""

    def __init__(self, arguments: argparse.Namespace, T: int):
        self.device = "cpu" if arguments.tiny else "cuda"
        torch.manual_seed(0)
        with torch.device(self.device):
            config = KimiLinearConfig.tiny("KM") if arguments.tiny else KimiLinearConfig.medium()
            self.model = KimiLinearForCausalLM(config).train()
        self.model.model.gradient_checkpointing = True
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=self.device == "cuda")
        rng = torch.Generator().manual_seed(0)
        self.ids = torch.randint(config.vocab_size, (1, T), generator=rng).to(self.device)

    def __call__(self, together: bool, T: int | None = None) -> float:
        tokens, more = self.ids[:, :T], {}
        labels = tokens
        if together:
            tokens, labels, split = share(
                tokens, tokens, dist.group.WORLD, layout=layout_of(self.model, dist.get_world_size())
            )
            more = {"split": split}
        with torch.autocast(self.device, torch.bfloat16):
            loss = self.model(tokens, labels=labels, **more).loss
        loss.backward()
        if together:
            for gradient in (p.grad for p in self.parameters if p.grad is not None):
                dist.all_reduce(gradient)
                gradient /= dist.get_world_size()
            loss = loss.detach().clone()
            dist.all_reduce(loss)
            loss /= dist.get_world_size()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def reset(self) -> None:
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def gibibytes(self) -> float:
        return round(torch.cuda.max_memory_allocated() / 2**30, 1) if self.device == "cuda" else 0.0


def training_step(arguments: argparse.Namespace, T: int) -> dict[str, Any]:
    """Of the 172M model: alone on the first card, then on all."""
    step, first = Step(arguments, T), dist.get_rank() == 0
    wait = torch.cuda.synchronize if step.device == "cuda" else (lambda: None)
    few = min(T, 16_384)
    for together in (False, True):
        step(together, few)  # loads what is loaded once
    wait()
    began, side, loss = time.perf_counter(), {}, 0.0
    if first:
        loss = step(False)
    else:
        side = of_a_step(arguments)
    wait()
    one, memory = (time.perf_counter() - began) * 1e3, step.gibibytes()
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, (one, memory, loss, side))
    step.reset()
    losses = [step(True)]
    many = milliseconds(lambda: losses.append(step(True)), step.device, 1)
    one, memory, loss, _ = said[0]
    return {
        "step": ratio(one, many) | {"loss_alone": loss, "losses": losses, "GiB_alone": memory, "GiB": step.gibibytes()},
        "parts": said[1][3],
    }


def of_a_step(arguments: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds on one card: attention of 32,768 tokens as a step calls it, whole and as the later half of a sequence; and
    KDA of long sequences with few heads, whole and in segments side by side."""
    device, T, H, dtype = ("cpu", 64, 2, torch.float32) if arguments.tiny else ("cuda", 32_768, 6, torch.bfloat16)
    wait, found = torch.cuda.synchronize if device == "cuda" else (lambda: None), {}

    def clock(run: Callable[[], object]) -> float:
        samples = []
        for _ in range(4):
            wait()
            began = time.perf_counter()
            run()
            wait()
            samples.append((time.perf_counter() - began) * 1e3)
        return round(statistics.median(samples[1:]), 2)

    def both(run: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> Callable[[], object]:
        leaves = [x.detach().requires_grad_() for x in tensors]
        return lambda: torch.autograd.grad(run(*leaves).float().sum(), leaves)

    draw = lambda tokens, channels: torch.randn(1, tokens, H, channels, device=device, dtype=dtype)
    q, k, v = draw(T, 192), draw(T, 192), draw(T, 128)
    for name, ranges in (("whole", ((0, T),)), ("later half", ((T // 2, T),))):
        before = () if name == "whole" else (((0, T // 2),),)
        fragment = SequenceSplit(T, (0, T), (*before, ranges), len(before)).mine[0]
        own = q[:, fragment.start :]
        attend = lambda q, k, v, fragment=fragment: attend_fragment(fragment, q, k, v, 0.1)
        found[f"attention, {name}"] = clock(lambda own=own, attend=attend: attend(own, k, v))
        found[f"attention, {name}, with gradients"] = clock(both(attend, own, k, v))
    for T, H in ((256, 1),) if arguments.tiny else ((131_072, 1), (131_072, 6), (65_536, 16), (16_384, 6)):
        normal = lambda *size: torch.randn(*size, device=device).to(dtype)
        q, k = (F.normalize(normal(1, T, H, 128), dim=-1) for _ in range(2))
        x = [q, k, normal(1, T, H, 128), -0.01 * torch.rand(1, T, H, 128, device=device), normal(1, T, H).sigmoid()]
        for segments in (1, 4, 8, 16):
            split = split_sequence(T, segments=segments)
            run = lambda *x, split=split: kda(*x, split=split).output
            found[f"kda 1x{T} H{H}, {segments} segments"] = clock(both(run, *x))
    return found


def longest(arguments: argparse.Namespace, T: int) -> dict[str, Any]:
    """One step of a sequence that one GPU alone could hardly hold."""
    step = Step(arguments, T)
    began = time.perf_counter()
    loss = step(True)
    return {
        "step": {
            "tokens": T,
            "seconds": round(time.perf_counter() - began, 1),
            "loss": loss,
            "memory_GiB": step.gibibytes(),
        }
    }
