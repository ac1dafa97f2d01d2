"""Recipes: what a dotted path may change, what it may not, and in which words."""

import dataclasses
from pathlib import Path

import pytest

from palimpsest.models.kimi_linear import KimiLinearConfig
from palimpsest.train import (
    Data,
    Evaluate,
    NamedDataset,
    Optim,
    Output,
    Recipe,
    Schedule,
    TextFiles,
    load_recipe,
    override,
)
from palimpsest.train.recipe import as_dict, difference

ROOT = Path(__file__).parents[2]


def test_dotted_paths_change_what_they_name_and_nothing_else(recipe):
    changed = override(
        recipe,
        {
            "optim.lr": "3e-4", "steps": "1_000", "minutes": "2.5", "output.tensorboard": "yes", "optim.betas": "0.8,0.9",
            "data.source.exclude": "a/*, b.py", "model.hidden_size": "48", "model.layer_types": "KKM",
            "schedule.kind": "cosine",
        },
    )  # fmt: skip
    assert (changed.optim.lr, changed.steps, changed.minutes, changed.output.tensorboard) == (3e-4, 1000, 2.5, True)
    assert changed.optim.betas == (0.8, 0.9)
    assert changed.data.source.exclude == ("a/*", "b.py")
    assert changed.model.hidden_size == 48
    assert changed.model.layer_types == ("kda", "kda", "mla")
    assert changed.schedule.kind == "cosine"
    assert override(changed, {"minutes": "none"}).minutes is None
    assert changed.evaluate == recipe.evaluate
    assert recipe.optim.lr == Recipe.__dataclass_fields__["optim"].default_factory().lr, "the recipe given is untouched"


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("optim.lrr", "1", "no field 'optim.lrr'; did you mean 'optim.lr'"),
        ("otpim.lr", "1", "no field 'otpim'; did you mean 'optim'"),
        ("zzz", "1", "no field 'zzz'; it has model, data"),
        ("optim.lr", "fast", "optim.lr is 'fast'; expected a number"),
        ("steps", "2.5", "steps is '2.5'; expected a whole number"),
        ("steps", "0", "steps is 0; expected at least 1"),
        ("optim", "adamw", "'optim' is a group; set one of optim.kind"),
        ("steps.more", "1", "'steps' is a single value"),
        ("optim.kind", "sgd", "optim.kind is 'sgd'; expected one of muon, adamw"),
        ("output.tensorboard", "perhaps", "expected true or false"),
        ("optim.betas", "0.9", "expected 2 values"),
        ("model.layer_types", "KXM", "unknown letters X"),
        ("model.num_experts_per_token", "9", "num_experts_per_token 9 is more than"),
        ("schedule.warmup", "0.9", "at most 1 together"),
        ("data.sequence_length", "1", "expected at least 2"),
        ("optim.lr", "nan", "optim.lr is nan"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_sentence(recipe, path, value, sentence):
    with pytest.raises(ValueError) as error:
        override(recipe, {path: value})
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_fields_are_checked_together_and_not_one_after_the_other(recipe):
    wide = override(recipe, {"model.num_experts": "2", "model.num_experts_per_token": "2"})
    assert override(wide, {"model.num_experts": "8", "model.num_experts_per_token": "6"}).model.num_experts == 8


@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / "recipes").glob("*.py")))
def test_every_recipe_of_the_house_is_one(name):
    if name.startswith("lab_"):
        pytest.skip("the lab's recipes are sweeps, and its own tests read them")
    assert isinstance(load_recipe(str(ROOT / "recipes" / name)), Recipe)


@pytest.mark.parametrize(
    ("text", "place", "sentence"),
    [
        (None, "absent.py", "is not a file"),
        ("x = 1", "r.py", "has no function 'recipe'; it has none"),
        ("def small():\n    return 1", "r.py", "has no function 'recipe'; it has small"),
        ("def recipe():\n    return 1", "r.py", "returns int; expected"),
        ("def recipe():\n    return 1 / 0", "r.py", "ZeroDivisionError"),
        ("def recipe(:\n", "r.py", "SyntaxError"),
    ],
)
def test_a_wrong_recipe_file_is_refused_in_one_sentence(tmp_path, text, place, sentence):
    if text is not None:
        (tmp_path / place).write_text(text)
    with pytest.raises(ValueError, match=sentence):
        load_recipe(str(tmp_path / place))


def test_the_first_difference_is_named_and_what_decides_no_number_may_differ(recipe):
    saved = as_dict(recipe)
    assert difference(recipe, saved) is None
    assert difference(override(recipe, {"output.checkpoints": "7"}), saved) is None
    assert difference(override(recipe, {"optim.lr": "0.5"}), saved) == "optim.lr was 0.003 and is now 0.5"
    assert "model.layer_types" in difference(override(recipe, {"model.layer_types": "KKM"}), saved)


def test_a_recipe_is_frozen(recipe):
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.steps = 3


NAN, INFINITY = float("nan"), float("inf")
NONSENSE = {
    Optim: {
        "lr": [NAN, INFINITY, 0, -1, "3e-3", None, True, 1j], "matrix_lr": [NAN, -1.0], "clip": [0, NAN],
        "momentum": [5, 1.0, -0.1, NAN], "betas": [(0.9,), (0.9, 1.0), (NAN, 0.9), [0.9, 0.95], 0.9, (-1, 0.5)],
        "weight_decay": [-0.1, INFINITY, "0"], "kind": ["sgd", None, 1],
    },
    Schedule: {"warmup": [-0.1, 2, NAN], "decay": [1.0, NAN], "floor": [2, NAN, None], "kind": ["linear"]},
    Evaluate: {
        "every": [0, 1.5, True, None], "piece_bytes": [1, "64"], "max_bytes": [0, NAN], "final_max_bytes": [-1],
        "batch_size": [0, INFINITY],
    },
    Output: {"checkpoint_every": [0, 0.5], "checkpoints": [0, True], "log_every": [0], "tensorboard": [1, "no", None]},
    TextFiles: {
        "paths": ["texts", ["texts"], (1,), (Path("texts"),), ()], "include": ["*.py"], "heldout": [0, 1, NAN, True],
        "exclude": [None], "heldout_paths": ["x"],
    },
    NamedDataset: {"name": [None, 3], "document_start": ["(", 3], "column": [0], "config": [1]},
    Data: {
        "source": ["texts", None], "sequence_length": [1, 32.0, "32"], "batch_size": [0, True], "accumulate": [0],
        "layout": ["rows"], "tokenizer": ["", None, Path("x")],
    },
    Recipe: {
        "model": [None, {}], "data": [None], "steps": [0, 1.0, NAN, "4", True], "minutes": [0, -1, NAN, INFINITY, "1"],
        "optim": [{}], "router_bias_rate": [-1, NAN], "precision": ["fp8", None], "parallel": ["tp"],
        "max_nonfinite": [-1, 1.5], "seed": [-1, 2**32, 0.5, NAN, None],
    },
}  # fmt: skip
GOOD = {
    TextFiles: {"paths": ("texts",)},
    NamedDataset: {"name": "texts"},
    Data: {"source": TextFiles(paths=("texts",))},
    Recipe: {"model": KimiLinearConfig.tiny(), "data": Data(source=TextFiles(paths=("texts",))), "steps": 4},
}


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [(part, name, value) for part, names in NONSENSE.items() for name, values in names.items() for value in values],
)
def test_nonsense_is_refused_in_a_sentence_that_names_the_field(part, name, value):
    part(**GOOD.get(part, {}))
    with pytest.raises(ValueError, match=rf"(^|\.){name}\b|schedule.warmup") as error:
        part(**GOOD.get(part, {}) | {name: value})
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_a_field_named_without_its_group_is_found(recipe):
    for name, path in {"batch_size": "'data.batch_size' or 'evaluate.batch_size'", "lr": "'optim.lr'"}.items():
        with pytest.raises(ValueError, match=f"has no field '{name}'; did you mean {path}"):
            override(recipe, {name: "8"})
    with pytest.raises(ValueError, match=r"no field 'optim.batch_size'; did you mean 'data.batch_size'"):
        override(recipe, {"optim.batch_size": "8"})
    with pytest.raises(ValueError, match="optim.lr is inf; it must be a finite number"):
        override(recipe, {"optim.lr": "inf"})
