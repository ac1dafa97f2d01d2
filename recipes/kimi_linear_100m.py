"""A Kimi Linear of 100 million parameters on text of your own, in bytes or tokens; for one or several GPUs.

    palimpsest train recipes/kimi_linear_100m.py:debug                           # two minutes anywhere: does all of it run?
    palimpsest train recipes/kimi_linear_100m.py --set data.source.paths=my_texts
    torchrun --nproc_per_node=8 -m palimpsest train recipes/kimi_linear_100m.py --set parallel.kind=fsdp

Twelve layers, 3 : 1, 16 experts of which 2 work on a token. It learns from Python's own sources until it is given better.
"""

import dataclasses
import sysconfig

from palimpsest.models.kimi_linear import KimiLinearConfig
from palimpsest.train import Data, Evaluate, Optim, Output, Recipe, Schedule, TextFiles


def recipe() -> Recipe:
    return Recipe(
        model=KimiLinearConfig.tiny(
            "KKKM" * 3,
            hidden_size=512,
            intermediate_size=1536,
            linear_num_heads=4,
            linear_head_dim=128,
            num_attention_heads=8,
            kv_lora_rank=128,
            qk_nope_head_dim=64,
            qk_rope_head_dim=32,
            v_head_dim=64,
            num_experts=16,
            num_experts_per_token=2,
            moe_intermediate_size=288,
            model_max_length=65536,
        ),
        data=Data(
            source=TextFiles(
                paths=(sysconfig.get_path("stdlib"),),
                include=("*.py",),
                exclude=("site-packages/*", "dist-packages/*"),
            ),
            sequence_length=2048,
            batch_size=64,
            layout="packed",
        ),
        steps=5000,
        optim=Optim(lr=3e-3, matrix_lr=1e-2),
        schedule=Schedule(warmup=0.02, decay=0.3),
        evaluate=Evaluate(every=250, piece_bytes=4096, max_bytes=1 << 19, final_max_bytes=1 << 22),
        output=Output(checkpoint_every=500, tensorboard=False),
        precision="bf16",
    )


def debug() -> Recipe:
    """The same in miniature."""
    large = recipe()
    return dataclasses.replace(
        large,
        model=large.model.replace(
            hidden_size=64, intermediate_size=128, moe_intermediate_size=32, linear_head_dim=16, layer_types="KKKM"
        ),
        data=dataclasses.replace(large.data, sequence_length=128, batch_size=4),
        steps=20,
        evaluate=Evaluate(every=10, max_bytes=8192, final_max_bytes=16384),
        output=Output(checkpoint_every=10, log_every=1),
        precision="no",
    )
