"""What we write against the loaders of vLLM and SGLang, as far as that goes without them: parameters, and what fills them.

The rules are those of their kimi_linear models: which parameters there are, which pieces of them a name of a checkpoint
fills, that a name without a parameter ends the load, and what the config must say.
"""

import json
from collections import defaultdict

import pytest
import torch

from palimpsest.convert import convert
from palimpsest.convert.layouts import official_shapes
from palimpsest.models.kimi_linear import KimiLinearConfig, KimiLinearForCausalLM

SERVERS = ["vllm", "sglang"]


def parameters(said, server):
    """Name -> shape of a server's parameters on one GPU, from config.json; a stack of pieces as a list of shapes."""
    D, heads = said["hidden_size"], said["num_attention_heads"]
    linear = said["linear_attn_config"]
    H, K, W = linear["num_heads"], linear["head_dim"], linear["short_conv_kernel_size"]
    nope, rope, V, L = (said[n] for n in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank"))
    found = {"model.embed_tokens.weight": (said["vocab_size"], D), "model.norm.weight": (D,)}
    found["lm_head.weight"] = (said["vocab_size"], D)

    def mlp(prefix, width):
        found[f"{prefix}.gate_up_proj.weight"] = [(width, D), (width, D)]
        found[f"{prefix}.down_proj.weight"] = (D, width)

    for i in range(said["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        attn = f"{layer}.self_attn"
        found |= {f"{layer}.input_layernorm.weight": (D,), f"{layer}.post_attention_layernorm.weight": (D,)}
        if i + 1 in linear["kda_layers"]:  # counted from one
            found |= {f"{attn}.A_log": (1, 1, H, 1), f"{attn}.dt_bias": (H * K,), f"{attn}.o_norm.weight": (K,)}
            found |= {f"{attn}.o_proj.weight": (D, H * K)}
            if server == "sglang":
                wide = [(H * K, D)] * 3 + [(H, D), (K, D), (K, D)]
                found |= {
                    f"{attn}.fused_qkvbfg_a_proj.weight": wide,
                    f"{attn}.fused_fg_b_proj.weight": [(H * K, K)] * 2,
                }
                found |= {f"{attn}.qkv_conv1d.weight": [(H * K, 1, W)] * 3}
            else:
                found |= {f"{attn}.{x}_proj.weight": (H * K, D) for x in "qkv"}
                found |= {f"{attn}.{x}_conv1d.weight": (H * K, 1, W) for x in "qkv"}
                found |= {f"{attn}.{x}_a_proj.weight": (K, D) for x in "fg"}
                found |= {f"{attn}.{x}_b_proj.weight": (H * K, K) for x in "fg"}
                found |= {f"{attn}.b_proj.weight": (H, D)}
        else:
            found |= {f"{attn}.q_proj.weight": (heads * (nope + rope), D), f"{attn}.kv_a_layernorm.weight": (L,)}
            found |= {f"{attn}.kv_a_proj_with_mqa.weight": (L + rope, D), f"{attn}.o_proj.weight": (D, heads * V)}
            found |= {f"{attn}.kv_b_proj.weight": (heads * (nope + V), L)}
        if i >= said["first_k_dense_replace"] and i % said["moe_layer_freq"] == 0:
            moe, E, I = f"{layer}.block_sparse_moe", said["num_experts"], said["moe_intermediate_size"]
            found |= {f"{moe}.gate.weight": (E, D), f"{moe}.gate.e_score_correction_bias": (E,)}
            found |= {f"{moe}.experts.w13_weight": [(I, D), (I, D)] * E, f"{moe}.experts.w2_weight": [(D, I)] * E}
            mlp(f"{moe}.shared_experts", I * said["num_shared_experts"])
        else:
            mlp(f"{layer}.mlp", said["intermediate_size"])
    return found


def place(name, server, said):
    """Where a tensor of a checkpoint goes: the parameter, and which piece of it."""
    kda = ".self_attn." in name and int(name.split(".")[2]) + 1 in said["linear_attn_config"]["kda_layers"]
    if ".experts." in name and name.split(".experts.")[1][0].isdecimal():
        head, expert, which, _ = name.rsplit(".", 3)
        number = int(expert)
        return (f"{head}.w2_weight", number) if which == "w2" else (f"{head}.w13_weight", 2 * number + (which == "w3"))
    stacks = {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)}
    if server == "sglang" and kda:
        fused = ("q_proj", "k_proj", "v_proj", "b_proj", "f_a_proj", "g_a_proj")
        stacks |= {x: ("fused_qkvbfg_a_proj", i) for i, x in enumerate(fused)}
        stacks |= {"f_b_proj": ("fused_fg_b_proj", 0), "g_b_proj": ("fused_fg_b_proj", 1)}
        stacks |= {f"{x}_conv1d": ("qkv_conv1d", i) for i, x in enumerate("qkv")}
    head, _, tail = name.rpartition(".")
    head, _, module = head.rpartition(".")
    if module in stacks:
        return f"{head}.{stacks[module][0]}.{tail}", stacks[module][1]
    return name, None


def faults(shapes, said, server):
    """What such a loader would stumble over, in words."""
    expected, filled = parameters(said, server), defaultdict(set)
    wrong = []
    for name, shape in shapes.items():
        parameter, piece = place(name, server, said)
        if parameter not in expected:
            wrong.append(f"{name} has no parameter")
            continue
        wanted = expected[parameter] if piece is None else expected[parameter][piece]
        if wanted != shape:
            wrong.append(f"{name} {shape}, not {wanted}")
        filled[parameter].add(piece)
    for name, shape in expected.items():
        count = len(shape) if isinstance(shape, list) else 1
        if len(filled[name]) != count:
            wrong.append(f"{name} is not filled")
    return wrong


@pytest.mark.parametrize("server", SERVERS)
def test_the_released_sizes_fill_every_parameter(server):
    config = KimiLinearConfig.official_48b()
    assert faults(official_shapes(config), config.to_dict(), server) == []


@pytest.mark.parametrize("server", SERVERS)
def test_what_a_run_and_a_conversion_write_fills_every_parameter(tmp_path, server):
    from safetensors import safe_open

    torch.manual_seed(0)
    KimiLinearForCausalLM(KimiLinearConfig.tiny("KKMKM", v_head_dim=12)).save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "native", "native")
    convert(tmp_path / "native", tmp_path / "b", "official", shard_bytes=100_000)
    for folder in (tmp_path / "a", tmp_path / "b"):
        shapes = {}
        for file in folder.glob("*.safetensors"):
            with safe_open(file, "pt") as opened:
                shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        assert faults(shapes, json.loads((folder / "config.json").read_text()), server) == []
    with safe_open(tmp_path / "native" / "model.safetensors", "pt") as opened:
        shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    assert faults(
        shapes, json.loads((tmp_path / "native" / "config.json").read_text()), server
    )  # theirs is the official one


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("change", ["missing", "extra", "misshapen"])
def test_a_fault_is_found(server, change):
    config = KimiLinearConfig.tiny("KKMK")
    shapes = dict(official_shapes(config))
    name = "model.layers.1.self_attn.f_a_proj.weight"
    if change == "missing":
        del shapes[name]
    elif change == "extra":
        shapes["model.layers.1.mlp.gate.weight"] = (1, 1)
    else:
        shapes[name] = shapes[name][::-1]
    assert len(faults(shapes, config.to_dict(), server)) == 1


def test_the_config_says_what_they_ask():
    said = KimiLinearConfig.tiny("KKMK").to_dict()
    assert said["architectures"] == ["KimiLinearForCausalLM"]
    assert said["model_type"] == "kimi_linear"
    assert said["mla_use_nope"] is True
    assert said["q_lora_rank"] is None
    assert said["hidden_act"] == "silu"
    assert said["linear_attn_config"]["kda_layers"] == [1, 2, 4]
    assert said["linear_attn_config"]["full_attn_layers"] == [3]
    for name in ("moe_router_activation_func", "use_grouped_topk", "num_expert_group", "topk_group", "moe_renormalize",
                 "routed_scaling_factor", "num_shared_experts", "num_experts_per_token", "rms_norm_eps"):  # fmt: skip
        assert name in said, name
