"""The main job: a small Kimi Linear that reads bytes and learns the Python standard library's own sources.

    palimpsest train recipes/demo.py --out runs/demo
    palimpsest train recipes/demo.py:debug          some steps of one in miniature, in seconds
    palimpsest generate runs/demo --prompt "def read_lines(path):"

Three layers of Kimi Delta Attention to one of latent attention, a mixture of experts in each but the first. It stops
after four and a half minutes of training, however fast the machine is, and the learning rate follows the clock.
"""

import dataclasses
import sysconfig

from palimpsest.models.kimi_linear import KimiLinearConfig
from palimpsest.train import Data, Evaluate, Optim, Output, Recipe, Schedule, TextFiles


def recipe() -> Recipe:
    return Recipe(
        model=KimiLinearConfig.tiny(
            "KKKM",
            hidden_size=128,
            intermediate_size=384,
            linear_num_heads=4,
            linear_head_dim=32,
            num_attention_heads=2,
            kv_lora_rank=64,
            qk_nope_head_dim=32,
            qk_rope_head_dim=16,
            v_head_dim=32,
            num_experts=4,
            num_experts_per_token=2,
            moe_intermediate_size=128,
        ),
        data=Data(
            source=TextFiles(
                paths=(sysconfig.get_path("stdlib"),),
                include=("*.py",),
                exclude=(
                    "site-packages/*",
                    "dist-packages/*",
                    "test/*",
                    "*/test/*",
                    "*/tests/*",
                    "encodings/*",
                    "pydoc_data/*",
                ),
            ),
            sequence_length=256,
            batch_size=16,
        ),
        steps=100_000,
        minutes=4.5,
        optim=Optim(lr=2e-2, matrix_lr=1.5e-2, momentum=0.9),
        schedule=Schedule(warmup=0.02, decay=0.4),
        evaluate=Evaluate(every=100, max_bytes=32768, final_max_bytes=1 << 18),
        output=Output(checkpoint_every=200, log_every=5),
    )


def debug() -> Recipe:
    """The same in miniature: twenty steps, to see that everything works."""
    large = recipe()
    return dataclasses.replace(
        large,
        model=KimiLinearConfig.tiny("KKKM"),
        data=dataclasses.replace(large.data, sequence_length=64, batch_size=4),
        steps=20,
        minutes=None,
        evaluate=Evaluate(every=10, max_bytes=4096, final_max_bytes=4096),
        output=Output(checkpoint_every=10, log_every=1),
    )
