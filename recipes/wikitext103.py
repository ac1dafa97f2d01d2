"""Wikitext-103 by the `datasets` library: articles, packed end to end, no article reading another.

    pip install "palimpsest-kda[train,data,cli]"
    palimpsest train recipes/wikitext103.py                                # fetches the data once, needs a network
    palimpsest train recipes/wikitext103.py --set data.source.name=my_copy    # a local folder: train and validation files

Rows of the data set are lines; an article begins at a line such as " = Valkyria Chronicles III = ".
"""

import dataclasses

from palimpsest.models.kimi_linear import KimiLinearConfig
from palimpsest.train import Data, Evaluate, NamedDataset, Optim, Output, Recipe, Schedule


def recipe() -> Recipe:
    return Recipe(
        model=KimiLinearConfig.tiny(
            "KKKM" * 2,
            hidden_size=384,
            intermediate_size=1024,
            linear_num_heads=3,
            linear_head_dim=128,
            num_attention_heads=6,
            kv_lora_rank=128,
            qk_nope_head_dim=64,
            qk_rope_head_dim=32,
            v_head_dim=64,
            num_experts=8,
            num_experts_per_token=2,
            moe_intermediate_size=256,
            model_max_length=65536,
        ),
        data=Data(
            source=NamedDataset(
                name="Salesforce/wikitext", config="wikitext-103-raw-v1", document_start=r"^ = [^=].*[^=] = \n?$"
            ),
            sequence_length=1024,
            batch_size=64,
            layout="packed",
        ),
        steps=8000,
        optim=Optim(lr=5e-3, matrix_lr=1e-2),
        schedule=Schedule(warmup=0.02, decay=0.3),
        evaluate=Evaluate(every=500, piece_bytes=4096, max_bytes=1 << 19, final_max_bytes=1 << 22),
        output=Output(checkpoint_every=500),
        precision="bf16",
    )


def local() -> Recipe:
    """For a copy on this machine: a folder `wikitext103` with train.jsonl and validation.jsonl, a line of text a row."""
    return dataclasses.replace(
        recipe(),
        data=dataclasses.replace(
            recipe().data, source=NamedDataset(name="wikitext103", document_start=r"^ = [^=].*[^=] = \n?$")
        ),
    )
