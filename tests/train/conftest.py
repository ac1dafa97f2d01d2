import json
import os
import signal

import pytest
import torch

from palimpsest.models.kimi_linear import KimiLinearConfig, KimiLinearForCausalLM
from palimpsest.train import Data, Evaluate, Output, Recipe, TextFiles, latest, train


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


def weights(folder):
    return KimiLinearForCausalLM.from_pretrained(latest(folder)).state_dict()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def lines(folder, event="train"):
    parsed = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timeless = [{k: v for k, v in p.items() if k not in ("seconds", "tokens_per_second")} for p in parsed]
    return [p for p in timeless if p["event"] == event]


def stopper(step):
    """A report that asks for a stop, as Ctrl-C does, after this step."""
    return lambda event: (
        os.kill(os.getpid(), signal.SIGINT) if event["event"] == "step" and event["step"] == step else None
    )


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """One run from start to end, for the tests that compare with it: recipe, folder, result, events."""
    texts = tmp_path_factory.mktemp("texts")
    for i in range(8):
        (texts / f"file{i}.py").write_text(
            "".join(f"def f{i}_{j}(x):\n    return x + {i * j}\n" for j in range(12 + i))
        )
    recipe, folder, events = small_recipe(texts), tmp_path_factory.mktemp("whole") / "run", []
    return recipe, folder, train(recipe, folder, report=events.append), events


@pytest.fixture
def recipe(texts):
    return small_recipe(texts)


@pytest.fixture(autouse=True)
def without_plots(monkeypatch):
    """Drawing takes four fifths of so small a run; the run that the tests share is made before this and draws."""
    monkeypatch.setattr("palimpsest.train.logger.draw_loss_curve", lambda *arguments: [])
