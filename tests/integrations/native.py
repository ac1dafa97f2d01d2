"""Tiny random models of every native family."""

import torch


def tiny(model_type: str, **more):
    """A model of transformers with memory and attention layers, in float32; None where this transformers lacks it."""
    import transformers

    torch.manual_seed(0)
    common = dict(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=512,
    )  # fmt: skip
    moe = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    kda = dict(linear_head_dim=16, linear_num_heads=2)
    gdn = dict(
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16, head_dim=16
    )
    mla = dict(kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16)
    types = ["linear_attention", "linear_attention", "full_attention", "linear_attention"]
    if model_type == "kimi_linear":
        config = transformers.KimiLinearConfig(
            **{**common, **kda, **mla, **moe, "num_local_experts": 4, "layer_types": types, **more}
        )
        model = transformers.KimiLinearForCausalLM(config)
    elif model_type == "bailing_hybrid":
        if not hasattr(transformers, "BailingHybridConfig"):
            return None
        config = transformers.BailingHybridConfig(
            **{
                **common, **kda, **mla, **moe, "num_shared_experts": 1, "n_group": 1, "topk_group": 1, "q_lora_rank": None,
                "layer_types": types, "mlp_layer_types": ["dense"] + ["sparse"] * 3, **more,
            }
        )  # fmt: skip
        model = transformers.BailingHybridForCausalLM(config)
    elif model_type == "glm5_next":
        from transformers.models.glm5_next.configuration_glm5_next import Glm5NextTextConfig
        from transformers.models.glm5_next.modeling_glm5_next import Glm5NextTextModel

        older = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23)
        indexed = "deepseek_sparse_attention" if older else "indexed_attention"
        config = Glm5NextTextConfig(
            **{
                **common, **kda, **mla, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "qk_rope_head_dim": 0, "index_topk": 64,
                "index_n_heads": 2, "index_head_dim": 16,
                "layer_types": ["linear_attention"] * 2 + [indexed, "linear_attention"], **more,
            }
        )  # fmt: skip
        model = Glm5NextTextModel(config)
    elif model_type == "qwen3_next":
        config = transformers.Qwen3NextConfig(
            **{
                **common, **gdn, **moe, "shared_expert_intermediate_size": 16, "decoder_sparse_step": 2, "layer_types": types,
                **more,
            }
        )  # fmt: skip
        model = transformers.Qwen3NextForCausalLM(config)
    elif model_type == "qwen3_5":
        from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
        from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5ForCausalLM

        model = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**{**common, **gdn, "layer_types": types, **more}))
    elif model_type == "qwen3_5_moe":
        from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeTextConfig
        from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeForCausalLM

        config = Qwen3_5MoeTextConfig(
            **{**common, **gdn, **moe, "shared_expert_intermediate_size": 16, "layer_types": types, **more}
        )
        model = Qwen3_5MoeForCausalLM(config)
    elif model_type == "olmo_hybrid":
        config = transformers.OlmoHybridConfig(
            **{**common, **gdn, "linear_num_key_heads": 4, "layer_types": types, **more}
        )
        model = transformers.OlmoHybridForCausalLM(config)
    else:
        raise KeyError(model_type)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and "A_log" not in name and "dt_bias" not in name:
                parameter.normal_(0, 0.15)
    return model.eval()
