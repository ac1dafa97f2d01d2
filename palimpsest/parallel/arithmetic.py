"""What a plan costs, on paper: memory of a GPU, and what it hears from others for each token that it computes.

Letters  P parameters, D hidden channels, L layers, k experts a token, n processes, T tokens that a GPU computes in a step.

    weights, gradients    4 + 4 bytes a parameter held
    optimiser             4 bytes a parameter under Muon, 8 under AdamW
    activations           24 D + 6 (inner channels at work) + 4 k D bytes a token and layer, fitted to three models on an
                          H100; recomputed: 4 D a layer, and one layer whole
    copies                2 (n - 1) / n 4 P bytes a step for gradients, (n - 1) / n 2 P for Muon's share of work
    shards                3 (n - 1) / n 4 P bytes a step: weights before each pass, gradients after
    experts               a row of 2 D bytes for each other process that a token wants, four times a mixture
    context               a memory of K K + K V numbers a head, for each other process and way; latents in attention
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch

from palimpsest.models.kimi_linear import KimiLinearConfig, KimiLinearForCausalLM
from palimpsest.parallel.plan import Plan

PEAK, SHARE = 790e12, 0.35  # bf16 operations a second of an H100, and how much of it the models measured on one reach
NEAR, FAR, HOST = 300e9, 40e9, 8  # bytes a second and GPU within a host and between hosts; GPUs of a host
RESERVE = 6e9  # bytes that the driver, kernels' work space and fragmentation take


@dataclass(frozen=True)
class Cost:
    """What one plan costs a GPU.

    Attributes:
        plan: which.
        recompute: whether activations are computed again.
        states: bytes of weights, gradients, optimiser, and what shards are whole of at once.
        activations: bytes.
        traffic: bytes heard from other GPUs a token computed here, by what they are.
        compute: seconds a token, of a GPU that hears nothing.
        exchange: seconds a token, of a GPU that computes nothing: none of it hidden behind the other.
    """

    plan: Plan
    recompute: bool
    states: float
    activations: float
    traffic: dict[str, float]
    compute: float
    exchange: float

    @property
    def memory(self) -> float:
        """Bytes of a GPU."""
        return self.states + self.activations + RESERVE

    @property
    def tokens_per_second(self) -> float:
        """Of a GPU, where nothing is hidden."""
        return 1 / (self.compute + self.exchange)


@dataclass(frozen=True)
class Sizes:
    """The parameters of a model, by how they are spread and trained.

    Attributes:
        alike: those of no expert.
        experts: those of all experts.
        rest: those among the first that AdamW trains, whatever the optimiser.
        active: those at work on one token.
        layer: the most of one layer, experts apart.
        outside: of no layer: embedding, head.
    """

    alike: int
    experts: int
    rest: int
    active: int
    layer: int
    outside: int


def sizes_of(config: KimiLinearConfig) -> Sizes:
    """The parameters of a model; nothing of its size is made.

    >>> sizes_of(KimiLinearConfig.tiny()).experts
    73728
    """
    with torch.device("meta"):
        model = KimiLinearForCausalLM(config)
    named = {name: p.numel() for name, p in model.named_parameters()}
    experts = sum(n for name, n in named.items() if ".experts." in name)
    rest = sum(p.numel() for name, p in model.named_parameters() if p.ndim < 2 or "embed" in name or "lm_head" in name)
    layers = [sum(n for name, n in named.items() if name.startswith(f"model.layers.{i}.") and ".experts." not in name)
              for i in range(config.num_hidden_layers)]  # fmt: skip
    share = config.num_experts_per_token / config.num_experts if config.num_experts else 0
    alike = sum(named.values()) - experts
    return Sizes(alike, experts, rest, int(alike + experts * share), max(layers), alike - sum(layers))


def cost(
    config: KimiLinearConfig,
    sizes: Sizes,
    plan: Plan,
    num_gpus: int,
    *,
    tokens: int,
    recompute: bool,
    optimiser: Literal["muon", "adamw"] = "muon",
) -> Cost:
    """What a plan costs one of num_gpus GPUs that computes so many tokens a step.

    Args:
        config, sizes: the model.
        plan: fits the number of GPUs.
        num_gpus: of the job.
        tokens: that a GPU computes in a step.
        recompute: activations are computed again.
        optimiser: of the hidden matrices.
    """
    n, ep, cp = num_gpus, plan.expert, plan.context
    shard = plan.shard_size(n)
    same = min(shard, n // ep)  # processes that one copy of the same experts is spread over
    state = 12 if optimiser == "muon" else 16
    states = (sizes.alike * state + sizes.rest * (16 - state)) / shard + sizes.experts / ep * state / same
    if shard > 1:  # whole at once: a layer, the next one, and what is of no layer, weights and gradients
        states += 8 * (2 * sizes.layer + sizes.outside) + 8 * sizes.experts / ep / max(config.num_hidden_layers, 1)
    D, L = config.hidden_size, config.num_hidden_layers
    sparse = sum(map(config.is_sparse, range(L)))
    k = config.num_experts_per_token if sparse else 0
    inner_sparse = config.moe_intermediate_size * (k + config.num_shared_experts)
    layer = 24 * D + 6 * max(config.intermediate_size * (sparse < L), inner_sparse * (sparse > 0)) + 4 * k * D
    every = 24 * D * L + 6 * (config.intermediate_size * (L - sparse) + inner_sparse * sparse) + 4 * k * D * sparse
    activations = tokens * (4 * D * L + layer if recompute else every)
    hidden = sizes.alike + sizes.experts - sizes.rest
    traffic: dict[str, float] = {}
    exchange = 0.0

    def add(what: str, num_bytes: float, members: int) -> None:
        nonlocal exchange
        if num_bytes:
            traffic[what] = num_bytes / tokens
            exchange += num_bytes / tokens / (NEAR if members <= HOST else FAR)

    if plan.kind == "ddp":
        add("gradients", 2 * (n - 1) / n * 4 * sizes.alike + 2 * (1 - ep / n) * 4 * sizes.experts / ep, n)
        if optimiser == "muon":
            dense = (hidden - sizes.experts) * (n - 1) / n
            add("Muon's work", 2 * (dense + sizes.experts / ep * (1 - ep / n)), n)
    else:
        add("shards", 3 * 4 * (shard - 1) / shard * sizes.alike, shard)
        add(
            "shards of experts", 3 * 4 * (same - 1) / same * sizes.experts / ep, same * ep
        )  # they lie ep processes apart
        if optimiser == "muon":  # whole matrices there and back, of the share that each process holds
            add("Muon's work", 2 * 2 * (hidden - sizes.experts) / shard, shard)
        if shard < n:
            add("gradients of copies", 2 * 4 * (sizes.alike / shard + sizes.experts / ep / same), n)
    if ep > 1:
        others = (ep - 1) * (1 - (1 - 1 / ep) ** k)
        add("experts", 4 * tokens * sparse * others * (2 * D + 8 * k) * (1.5 if recompute else 1), ep * cp)
    if cp > 1:
        memories = sum(name not in ("mla", "mla_rope") for name in config.layer_types)
        head = 2 * 4 * config.linear_head_dim * config.linear_head_dim
        latents = (L - memories) * (config.kv_lora_rank + config.qk_rope_head_dim) * 2 * 2 * tokens
        add("context", (cp - 1) * (2 * memories * config.linear_num_heads * head + latents), cp)
    compute = 6 * sizes.active * (4 / 3 if recompute else 1) / (PEAK * SHARE)
    return Cost(plan, recompute, states, activations, traffic, compute, exchange)


def plans(
    config: KimiLinearConfig,
    num_gpus: int,
    *,
    length: int = 8192,
    rows: int = 1,
    memory: float = 80e9,
    optimiser: Literal["muon", "adamw"] = "muon",
) -> list[Cost]:
    """Every plan of num_gpus GPUs that fits their memory, the fastest on paper first.

    Args:
        config: the model.
        num_gpus: of the job.
        length: tokens of a row.
        rows: a GPU and step, before a context is dealt.
        memory: bytes of a GPU.
        optimiser: of the hidden matrices.

    >>> [found.plan.kind for found in plans(KimiLinearConfig.tiny(), 2)][:1]
    ['ddp']
    """
    sizes, found = sizes_of(config), []
    ways = [2**i for i in range(num_gpus.bit_length()) if num_gpus % 2**i == 0]
    for kind, expert, context, recompute in product(("ddp", "fsdp", "hsdp"), ways, ways, (False, True)):
        plan = Plan(kind=kind, expert=expert, context=context, shard=HOST if kind == "hsdp" else None)  # type: ignore[arg-type]
        if kind == "hsdp" and num_gpus <= HOST:
            continue
        try:
            plan.refuse(config, num_gpus)
        except ValueError:
            continue
        tokens = -(-length * rows // context)
        one = cost(config, sizes, plan, num_gpus, tokens=tokens, recompute=recompute, optimiser=optimiser)
        if one.memory <= memory:
            found.append(one)
    return sorted(found, key=lambda one: (-round(one.tokens_per_second), one.plan.context, one.plan.expert, one.memory))
