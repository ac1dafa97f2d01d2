import pytest

from palimpsest.models.kimi_linear import KimiLinearConfig
from palimpsest.train import Data, Evaluate, Output, Recipe, TextFiles


@pytest.fixture
def texts(tmp_path):
    """A folder of eight small Python-like files."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(8):
        (folder / f"file{i}.py").write_text(
            "".join(f"def f{i}_{j}(x):\n    return x + {i * j}\n" for j in range(12 + i))
        )
    return folder


def small_recipe(folder, **changes) -> Recipe:
    """A run of a second: two layers, an MoE in the second, 4 steps of 4 rows of 32 bytes."""
    data = {"sequence_length": 32, "batch_size": 4} | changes.pop("data", {})
    fields = {
        "model": KimiLinearConfig.tiny(
            "KM", hidden_size=16, intermediate_size=32, linear_head_dim=8, moe_intermediate_size=8
        ),
        "data": Data(source=TextFiles(paths=(str(folder),)), **data),
        "steps": 4,
        "evaluate": Evaluate(every=2, piece_bytes=64, max_bytes=256, final_max_bytes=512),
        "output": Output(checkpoint_every=2, log_every=1),
    }
    return Recipe(**fields | changes)


@pytest.fixture
def recipe(texts):
    return small_recipe(texts)
