"""The config: letters, the official JSON there and back, and numbers that do not fit."""

import json

import pytest
import torch

from palimpsest.layers.moe import MoE
from palimpsest.layers.options import MixerOptions
from palimpsest.models.kimi_linear.config import KimiLinearConfig
from palimpsest.models.kimi_linear.mixers import MIXERS, make_mixer
from palimpsest.models.kimi_linear.model import KimiLinearForCausalLM

RELEASED = {  # the config.json of Kimi-Linear-48B-A3B, but for what concerns remote code
    "architectures": ["KimiLinearForCausalLM"],
    "bos_token_id": 163584,
    "dtype": "bfloat16",
    "eos_token_id": 163586,
    "first_k_dense_replace": 1,
    "head_dim": 72,
    "hidden_act": "silu",
    "hidden_size": 2304,
    "initializer_range": 0.02,
    "intermediate_size": 9216,
    "kv_lora_rank": 512,
    "linear_attn_config": {
        "full_attn_layers": [4, 8, 12, 16, 20, 24, 27],
        "head_dim": 128,
        "kda_layers": [1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 14, 15, 17, 18, 19, 21, 22, 23, 25, 26],
        "num_heads": 32,
        "short_conv_kernel_size": 4,
    },
    "mla_use_nope": True,
    "model_max_length": 1048576,
    "model_type": "kimi_linear",
    "moe_intermediate_size": 1024,
    "moe_layer_freq": 1,
    "moe_renormalize": True,
    "moe_router_activation_func": "sigmoid",
    "num_attention_heads": 32,
    "num_expert_group": 1,
    "num_experts": 256,
    "num_experts_per_token": 8,
    "num_hidden_layers": 27,
    "num_key_value_heads": 32,
    "num_nextn_predict_layers": 0,
    "num_shared_experts": 1,
    "pad_token_id": 163839,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "routed_scaling_factor": 2.446,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "use_cache": True,
    "use_grouped_topk": True,
    "v_head_dim": 128,
    "vocab_size": 163840,
}


def changed(**changes):
    official = json.loads(json.dumps(RELEASED))
    for name, value in changes.items():
        where = official["linear_attn_config"] if name in official["linear_attn_config"] else official
        where[name] = value
    return official


def test_the_48b_preset_is_the_released_config():
    config = KimiLinearConfig.official_48b()
    assert KimiLinearConfig.from_dict(RELEASED) == config
    assert config.to_dict() | {"dtype": "bfloat16"} == RELEASED
    assert "".join(MIXERS[name].letter for name in config.layer_types) == "KKKM" * 6 + "KKM"
    assert [config.is_sparse(i) for i in range(27)] == [False] + [True] * 26


@pytest.mark.parametrize(
    "config",
    [
        KimiLinearConfig.tiny(),
        KimiLinearConfig.tiny("M"),
        KimiLinearConfig.tiny("KR", router="official_alias", num_experts=0),
        KimiLinearConfig.tiny("GDEALSKM", mixer_options=MixerOptions(output_gate="silu", conv=False, beta_max=2.0)),
        KimiLinearConfig.tiny("KKKK", first_k_dense_replace=2, moe_layer_freq=2, tie_word_embeddings=True),
    ],
)
def test_every_config_survives_json(config):
    assert KimiLinearConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_options_are_read_under_their_former_name():
    config = KimiLinearConfig.tiny(mixer_options={"conv": False})
    former = config.to_dict()
    former["palimpsest"]["parts"] = former["palimpsest"].pop("mixer_options")
    assert KimiLinearConfig.from_dict(former) == config


@pytest.mark.parametrize(
    ("preset", "total", "active"), [("tiny", 0.196, 0.159), ("small", 24.4, 12.0), ("medium", 172, 94.6)]
)
def test_presets_have_the_size_they_say(preset, total, active):
    config = getattr(KimiLinearConfig, preset)()
    with torch.device("meta"):
        model = KimiLinearForCausalLM(config)
    count = lambda modules: sum(p.numel() for module in modules for p in module.parameters())
    experts = count([m.experts for m in model.modules() if isinstance(m, MoE)])
    idle = experts * (1 - config.num_experts_per_token / config.num_experts)
    assert count([model]) == pytest.approx(total * 1e6, rel=0.01)
    assert count([model]) - idle == pytest.approx(active * 1e6, rel=0.01)


def test_patterns_may_be_letters_or_names():
    assert KimiLinearConfig.tiny("KM") == KimiLinearConfig.tiny(["kda", "mla"])
    assert KimiLinearConfig.tiny("KM").num_hidden_layers == 2


def test_letters_choose_the_memory_and_options_the_rest():
    config = KimiLinearConfig.tiny("KGDEALSP", mixer_options={"conv": False})
    with torch.device("meta"):
        layers = [make_mixer(config, i) for i in range(8)]
    assert [(type(m).__name__, m.options.decay, m.options.conv) for m in layers] == [
        ("KimiDeltaAttention", "channel", False),
        ("KimiDeltaAttention", "head", False),
        ("KimiDeltaAttention", "none", False),
        ("GatedDeltaNet2", "channel", False),
        ("GatedLinearAttention", "channel", False),
        ("GatedLinearAttention", "none", False),
        ("ScalarDecay", "head", False),
        ("GatedDeltaProduct", "head", False),
    ]


def test_eos_lists_and_absent_experts_are_read():
    assert KimiLinearConfig.from_dict(changed(eos_token_id=[7])).eos_token_id == 7
    several = KimiLinearConfig.from_dict(changed(eos_token_id=[7, 8]))
    assert several.eos_token_id == (7, 8)
    assert several.to_dict()["eos_token_id"] == [7, 8]
    assert KimiLinearConfig.from_dict(changed(num_experts=None)).num_experts == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KimiLinearConfig.tiny("KKXM?"), r"'KKXM\?' has unknown letters \?, X; the letters are K \(kda\), M"),
        (lambda: KimiLinearConfig.tiny(["kda", "attention"]), "layer_types names 'attention'; the types are kda, mla"),
        (lambda: KimiLinearConfig.tiny(""), "layer_types is empty; give at least one layer"),
        (lambda: KimiLinearConfig.tiny(num_expert=4), "has no field 'num_expert'; did you mean 'num_experts'?"),
        (lambda: KimiLinearConfig.tiny(zzz=4), "has no field 'zzz'; the fields are vocab_size"),
        (lambda: KimiLinearConfig.tiny().replace(hidden=4), "has no field 'hidden'; did you mean 'hidden_size'?"),
        (lambda: KimiLinearConfig.tiny(mixer_options={"convolution": True}), "mixer_options has no field 'convolution'; the"),
        (lambda: KimiLinearConfig.tiny(hidden_size=0), "hidden_size is 0; it must be at least 1"),
        (lambda: KimiLinearConfig.tiny(hidden_size=64.0), "hidden_size is 64.0; it must be a whole number"),
        (lambda: KimiLinearConfig.tiny(vocab_size="257"), "vocab_size is '257'; it must be a whole number"),
        (lambda: KimiLinearConfig.tiny(router="biased"), "router is 'biased'; choose one of 'unbiased', 'official_alias'"),
        (lambda: KimiLinearConfig.tiny("R", qk_rope_head_dim=7), "qk_rope_head_dim is 7; rotation turns pairs"),
        (lambda: KimiLinearConfig.tiny(num_experts=4, num_expert_group=3), "num_experts 4 does not divide into"),
        (lambda: KimiLinearConfig.tiny(topk_group=2), "topk_group 2 is more than the num_expert_group 1"),
        (lambda: KimiLinearConfig.tiny(num_experts_per_token=5), "num_experts_per_token 5 is more than the 4"),
        (lambda: KimiLinearConfig.from_dict([]), "the config is a list; expected a JSON object"),
        (lambda: KimiLinearConfig.from_dict({"model_type": "llama"}), "of model_type 'llama'; this model reads"),
        (lambda: KimiLinearConfig.from_dict(changed(kda_layers=[*range(1, 27)])), r"lists layers twice: 4, 8, 12"),
        (lambda: KimiLinearConfig.from_dict(changed(kda_layers=[1, 2])), r"leaves layers out: 3, 5, 6"),
        (lambda: KimiLinearConfig.from_dict(changed(full_attn_layers=[0, 4, 8, 12, 16, 20, 24, 27])), r"do not exist: 0"),
        (lambda: KimiLinearConfig.from_dict(changed(num_hidden_layers=26)), r"do not exist: 27; .* each of 1..26 once"),
        (lambda: KimiLinearConfig.from_dict(changed(linear_attn_config=None)), "has no linear_attn_config"),
        (lambda: KimiLinearConfig.from_dict(changed(q_lora_rank=64)), "has q_lora_rank = 64; this model has only None"),
        (lambda: KimiLinearConfig.from_dict(changed(hidden_act="gelu")), "has hidden_act = 'gelu'; this model has only"),
        (lambda: KimiLinearConfig.from_dict(changed(num_key_value_heads=8)), "8 num_key_value_heads and 32"),
        (lambda: KimiLinearConfig.from_dict(changed(vocab_size="many")), "vocab_size is 'many'; it must be a whole number"),
    ],
)  # fmt: skip
def test_bad_configs_are_refused_in_a_sentence(make, message):
    with pytest.raises(ValueError, match=message) as raised:
        make()
    assert "\n" not in str(raised.value)
