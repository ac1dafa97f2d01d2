"""A model's card: its pattern, its parameters by part, and what it holds in memory as a text grows.

Nothing is allocated: models and states are made on the meta device, the 48B one included.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from palimpsest.models.kimi_linear.config import KimiLinearConfig
from palimpsest.models.kimi_linear.mixers import MIXERS, is_full_attention
from palimpsest.models.kimi_linear.model import KimiLinearForCausalLM
from palimpsest.models.kimi_linear.model_state import ModelState
from palimpsest.ops import backends

CONTEXTS = (4096, 32768, 131072, 1048576)
LAYER_PARTS = {
    "self_attn": "mixers",
    "mlp": "dense MLPs",
    "input_layernorm": "norms",
    "post_attention_layernorm": "norms",
}
MOE_PARTS = {"gate": "routers", "experts": "routed experts", "shared_experts": "shared experts"}


def describe(config: KimiLinearConfig, *, contexts: tuple[int, ...] = CONTEXTS) -> dict[str, Any]:
    """The card of a model.

    Args:
        config: the model's.
        contexts: lengths, in tokens, at which memory is told.

    Returns:
        pattern: a letter a layer, as `KimiLinearConfig.layer_types` takes them.
        parameters: by part, their total, and `active`, those that work on one token.
        memory: for each context the bytes of one sequence: `state` of this model, `latent` if every layer were latent
            attention, `full` if every layer kept whole keys and values; bfloat16, but float32 memories.

    >>> card = describe(KimiLinearConfig.official_48b())
    >>> card["pattern"], f"{card['parameters']['total']:,}"
    ('KKKMKKKMKKKMKKKMKKKMKKKMKKM', '49,122,681,728')
    >>> [round(row["state"] / row["latent"], 2) for row in card["memory"]]
    [0.6, 0.3, 0.27, 0.26]
    """
    one = {"num_experts": 1, "num_experts_per_token": 1, "num_expert_group": 1, "topk_group": 1}
    with torch.device("meta"):  # one expert stands for all: thousands of them take seconds to make
        model = KimiLinearForCausalLM(config.replace(**one) if config.num_experts else config)
    counts: Counter[str] = Counter()
    for name, tensor in model.state_dict().items():
        part = _part(name, config)
        counts[part] += tensor.numel() * (config.num_experts if part in ("routers", "routed experts") else 1)
    total = sum(counts.values())
    resting = 1 - config.num_experts_per_token / max(config.num_experts, 1)
    idle = round(counts["routed experts"] * resting)
    return {
        "pattern": "".join(MIXERS[name].letter for name in config.layer_types),
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "parameters": {**counts, "total": total, "active": total - idle},
        "memory": [{"tokens": tokens, **_bytes(config, tokens)} for tokens in contexts],
    }


def answers() -> dict[str, dict[str, str]]:
    """call -> backend -> what it says to that call on this machine, "ok" or why not: KDA in training, and one step.

    >>> answers()["kda, float32"]["reference"]
    'ok'
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    capability = torch.cuda.get_device_capability() if device == "cuda" else None
    dtypes = (torch.bfloat16, torch.float32) if device == "cuda" else (torch.float32, torch.float64)
    said = {}
    for op in ("kda", "step"):
        for dtype in dtypes:
            problem = backends.Problem(
                op, "kda", device, dtype, 128, 128, 1 if op == "step" else 4096, sequences=1, heads=32, value_heads=32,
                needs_grad=op == "kda", capability=capability,
            )  # fmt: skip
            lines = (line.split(maxsplit=1) for line in backends.explain(problem).splitlines())
            said[f"{op}, {str(dtype).removeprefix('torch.')}"] = {name: said for name, said in lines}
    return said


def _part(name: str, config: KimiLinearConfig) -> str:
    pieces = name.split(".")
    if pieces[1] != "layers":
        return {"embed_tokens": "embedding", "norm": "norms", "weight": "head"}[pieces[1]]
    if pieces[3] == "self_attn":
        return "latent attention" if is_full_attention(config.layer_types[int(pieces[2])]) else "memory layers"
    return MOE_PARTS[pieces[4]] if pieces[3] == "block_sparse_moe" else LAYER_PARTS[pieces[3]]


def _bytes(config: KimiLinearConfig, tokens: int) -> dict[str, int]:
    layers = ModelState.empty(config, device="meta", dtype=torch.bfloat16).account()
    latent_row = 2 * (config.kv_lora_rank + config.qk_rope_head_dim)
    whole_row = 2 * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    return {
        "state": sum(layer.total + layer.bytes_per_token * tokens for layer in layers),
        "latent": latent_row * tokens * config.num_hidden_layers,
        "full": whole_row * tokens * config.num_hidden_layers,
    }
