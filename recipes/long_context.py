"""Long contexts: whole files end to end in rows of 262,144 tokens on one GPU, of a million on two.

    palimpsest train recipes/long_context.py                                                  # one GPU of 80 GB
    torchrun --nproc_per_node=2 -m palimpsest train recipes/long_context.py:million           # two of them
    palimpsest train recipes/long_context.py:debug                                            # a minute anywhere: does it run?

The model is that of `KimiLinearConfig.medium`, with the bytes of Python's own sources for words until it is given better. Layers
are computed again in the backward, and the loss is formed in pieces, so that a token costs some 75 KB: see
docs/how-to/long-context.md.
"""

import dataclasses
import sysconfig

from palimpsest.models.kimi_linear import KimiLinearConfig
from palimpsest.parallel import Plan
from palimpsest.train import Data, Evaluate, Optim, Output, Recipe, Schedule, TextFiles


def recipe() -> Recipe:
    return Recipe(
        model=KimiLinearConfig.medium(model_max_length=1 << 20),
        data=Data(
            source=TextFiles(
                paths=(sysconfig.get_path("stdlib"),),
                include=("*.py",),
                exclude=("site-packages/*", "dist-packages/*"),
            ),
            sequence_length=262_144,
            batch_size=1,
            layout="packed",
        ),
        steps=1000,
        recompute=True,
        optim=Optim(lr=1e-3, matrix_lr=1e-2),
        schedule=Schedule(warmup=0.02, decay=0.3),
        evaluate=Evaluate(every=50, piece_bytes=65_536, max_bytes=1 << 19, final_max_bytes=1 << 22, batch_size=1),
        output=Output(checkpoint_every=50),
        precision="bf16",
    )


def million() -> Recipe:
    """Rows of 1,048,576 tokens, each on two GPUs."""
    shorter = recipe()
    data = dataclasses.replace(shorter.data, sequence_length=1 << 20)
    return dataclasses.replace(shorter, data=data, parallel=Plan(context=2))


def debug() -> Recipe:
    """The same in miniature, for one process or, with `parallel.context=2`, two."""
    large = recipe()
    return dataclasses.replace(
        large,
        model=KimiLinearConfig.tiny("KM", hidden_size=32, num_experts=0),
        data=dataclasses.replace(large.data, sequence_length=1024),
        steps=8,
        evaluate=Evaluate(every=4, piece_bytes=1024, max_bytes=4096, final_max_bytes=8192),
        output=Output(checkpoint_every=4, log_every=1),
        precision="no",
    )
