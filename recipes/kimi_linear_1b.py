"""Kimi Linear of a billion parameters and more, dense or a mixture, for one GPU upwards.

    palimpsest train recipes/kimi_linear_1b.py --set data.source.paths=my_texts --set data.tokenizer=tokenizer.json
    palimpsest train recipes/kimi_linear_1b.py:mixture --set data.source.paths=my_texts --set data.tokenizer=tokenizer.json
    palimpsest train recipes/kimi_linear_1b.py:debug                             # a minute anywhere: does all of it run?

The dense hybrid has 1.3 billion parameters. The mixture has 2 billion, of which 0.4 work on a token: 64 experts, 6 of them
and a shared one for each token. Both want a tokenizer of 32,768 words at most; without one they read bytes.
"""

import dataclasses
import sysconfig

from palimpsest.models.kimi_linear import KimiLinearConfig
from palimpsest.train import Data, Evaluate, Optim, Output, Recipe, Schedule, TextFiles

SHARED = {
    "vocab_size": 32768,
    "linear_head_dim": 128,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "tie_word_embeddings": True,
    "model_max_length": 1 << 20,
}


def recipe() -> Recipe:
    """The dense hybrid, 24 layers of width 2,048."""
    return Recipe(
        model=KimiLinearConfig.tiny(
            "KKKM" * 6,
            hidden_size=2048,
            intermediate_size=5632,
            linear_num_heads=16,
            num_attention_heads=16,
            num_experts=0,
            **SHARED,
        ),
        data=Data(
            source=TextFiles(
                paths=(sysconfig.get_path("stdlib"),),
                include=("*.py",),
                exclude=("site-packages/*", "dist-packages/*"),
            ),
            sequence_length=2048,
            batch_size=64,
            accumulate=8,
            layout="packed",
        ),
        steps=20000,
        optim=Optim(lr=2e-3, matrix_lr=5e-3),
        schedule=Schedule(warmup=0.02, decay=0.3),
        evaluate=Evaluate(every=500, piece_bytes=4096, max_bytes=1 << 19, final_max_bytes=1 << 22),
        output=Output(checkpoint_every=1000),
        precision="bf16",
    )


def mixture() -> Recipe:
    """The mixture, 24 layers of width 1,024."""
    dense = recipe()
    return dataclasses.replace(
        dense,
        model=KimiLinearConfig.tiny(
            "KKKM" * 6,
            hidden_size=1024,
            intermediate_size=4096,
            linear_num_heads=8,
            num_attention_heads=8,
            num_experts=64,
            num_experts_per_token=6,
            moe_intermediate_size=384,
            **SHARED,
        ),
    )


def debug() -> Recipe:
    """The mixture in miniature."""
    large = mixture()
    small = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32, "linear_head_dim": 16}
    small |= {"linear_num_heads": 2, "num_attention_heads": 2, "kv_lora_rank": 32, "vocab_size": 257}
    return dataclasses.replace(
        large,
        model=large.model.replace(layer_types="KKKM", num_experts=4, num_experts_per_token=2, **small),
        data=dataclasses.replace(large.data, sequence_length=128, batch_size=4, accumulate=1),
        steps=20,
        evaluate=Evaluate(every=10, max_bytes=8192, final_max_bytes=16384),
        output=Output(checkpoint_every=10, log_every=1),
        precision="no",
    )
