"""Hostile and damaged model folders and saved states: each is refused in a sentence, fast, or read as it was written."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from benchmarks.faults import Campaign, Trial, refused
from palimpsest import KimiLinearConfig, KimiLinearForCausalLM
from palimpsest.models.kimi_linear.state_file import load_state, save_state

NO_SIZE = (None, "64", -1, 64.5, True, [64], {}, 10**12, float("nan"))
NO_NUMBER = (None, "x", True, [], float("nan"), float("inf"), -1.0)
NO_FLAG = ("yes", 1, 0.0, None, [])


def official() -> dict[str, Any]:
    return KimiLinearConfig.tiny("KM", hidden_size=32).to_dict()


def wrong_configs() -> Iterator[tuple[str, Any]]:
    """Configs that say what cannot be."""
    sizes = [name for name, value in official().items() if isinstance(value, int) and not isinstance(value, bool)]
    for name in sizes:
        if name not in (
            "head_dim",
            "eos_token_id",
            "num_nextn_predict_layers",
            "model_max_length",
            "num_key_value_heads",
        ):
            absent = (None,) if name == "num_experts" else ()
            yield from ((f"{name} = {value!r}", official() | {name: value}) for value in NO_SIZE if value not in absent)
    for name in ("rope_theta", "rms_norm_eps", "routed_scaling_factor", "initializer_range"):
        yield from ((f"{name} = {value!r}", official() | {name: value}) for value in NO_NUMBER)
    for name in ("moe_renormalize", "tie_word_embeddings"):
        yield from ((f"{name} = {value!r}", official() | {name: value}) for value in NO_FLAG)
    for name, value in (
        ("eos_token_id", []), ("eos_token_id", ["a"]), ("eos_token_id", [7, -1]), ("eos_token_id", 1.5),
        ("linear_attn_config", []), ("linear_attn_config", None), ("linear_attn_config", {}), ("palimpsest", []),
        ("palimpsest", {"layer_types": "??"}), ("palimpsest", {"layer_types": ["kda"]}), ("palimpsest", {"router": 3}),
        ("palimpsest", {"mixer_options": {"gate": 3}}), ("palimpsest", {"mixer_options": []}), ("palimpsest", {"x": 1}),
        ("palimpsest", {"layer_types": [["kda"], "mla"]}), ("model_type", "x" * 10**6), ("hidden_act", "x" * 10**6),
    ):  # fmt: skip
        yield f"{name} = {str(value)[:40]}", official() | {name: value}
    for name, value in itertools.product(
        ("kda_layers", "full_attn_layers"), ("1", [0], [3], ["1"], [1.5], {}, [10**9], [1, 1])
    ):
        wrong = official()
        wrong["linear_attn_config"] = wrong["linear_attn_config"] | {name: value}
        yield f"{name} = {value!r}", wrong
    for value in ([], 3, "x", None):
        yield f"config = {value!r}", value


def config_trials(folder: Path) -> Iterator[Trial]:
    """A whole model under each wrong config."""
    torch.manual_seed(0)
    whole = folder / "whole"
    KimiLinearForCausalLM(KimiLinearConfig.from_dict(official())).save_pretrained(whole)

    def read(config: Any) -> str | None:
        (whole / "config.json").write_text(json.dumps(config))
        return refused(lambda: KimiLinearForCausalLM.from_pretrained(whole))

    for name, config in wrong_configs():
        yield Trial(name, partial(read, config))


def weight_trials(folder: Path) -> Iterator[Trial]:
    """Indexes and tensors that are not what the config asks for."""
    torch.manual_seed(0)
    whole, sharded = folder / "whole", folder / "sharded"
    model = KimiLinearForCausalLM(KimiLinearConfig.from_dict(official()))
    model.save_pretrained(whole)
    model.save_pretrained(sharded, max_shard_bytes=20_000)
    tensors = safetensors.torch.load_file(whole / "model.safetensors")

    def with_index(index: str) -> str | None:
        place = shutil.copytree(sharded, folder / "changed", dirs_exist_ok=True)
        Path(place, "model.safetensors.index.json").write_text(index)
        return refused(lambda: KimiLinearForCausalLM.from_pretrained(place))

    for index in (
        "", "{", "[]", "3", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": "../x.safetensors"}}', '{"weight_map": {"a": "/etc/passwd"}}', '{"weight_map": {"a": null}}',
        '{"weight_map": {"a": "x\\u0000.safetensors"}}', '{"weight_map": {"a": "config.json"}}', "[" * 100_000,
    ):  # fmt: skip
        yield Trial(f"index {index[:60]!r}", partial(with_index, index))

    def with_tensor(name: str, tensor: torch.Tensor | None) -> str | None:
        place = Path(shutil.copytree(whole, folder / "changed", dirs_exist_ok=True))
        (place / "model.safetensors.index.json").unlink(missing_ok=True)
        changed = {key: x for key, x in tensors.items() if key != name}
        safetensors.torch.save_file(changed | ({} if tensor is None else {name: tensor}), place / "model.safetensors")
        return refused(lambda: KimiLinearForCausalLM.from_pretrained(place))

    for name, x in tensors.items():
        for what, tensor in (
            ("absent", None), ("int8", x.to(torch.int8)), ("complex", x.to(torch.complex64)), ("bool", x.bool()),
            ("one longer", torch.cat([x, x[:1]]).contiguous()), ("flat", x[None].clone()),
        ):  # fmt: skip
            yield Trial(f"{name} {what}", partial(with_tensor, name, tensor))


def state_trials(folder: Path) -> Iterator[Trial]:
    """Saved states whose tensors were changed and whose digest was made anew, as a forger would."""
    from palimpsest.models.kimi_linear import state_file

    torch.manual_seed(0)
    model = KimiLinearForCausalLM(KimiLinearConfig.from_dict(official())).eval().requires_grad_(False)
    state, file = model(torch.arange(6)[None]).state, folder / "state"
    save_state(file, state, model)
    with safetensors.safe_open(file, "pt") as opened:
        metadata = opened.metadata() | {"digest": state_file.NO_DIGEST}

    def forged(tensors: dict[str, torch.Tensor], changes: dict[str, str]) -> str | None:
        kept = {key: value for key, value in (metadata | changes).items() if value != "absent"}
        safetensors.torch.save_file(tensors, file, kept)
        if kept.get("digest") == state_file.NO_DIGEST:
            state_file._write_digest(file)
        return refused(lambda: load_state(file, model))

    named = {name: x.clone() for name, x in state.tensors().items()}
    for name, x in named.items():
        rest = {key: value for key, value in named.items() if key != name}
        for what, tensor in (
            ("absent", {}), ("of another type", {name: x.to(torch.complex64)}), ("two sequences", {name: torch.cat([x, x])}),
            ("without a dimension", {name: x[0].clone()}), ("renamed", {name + "0": x}), ("a number", {name: torch.tensor(3)}),
            ("a layer further", {"layers.7." + name.rpartition(".")[2]: x.clone(), name: x}), ("empty", {name: x[:0].clone()}),
        ):  # fmt: skip
            yield Trial(f"{name} {what}", partial(forged, rest | tensor, {}))
    for key, value in itertools.product(metadata, ("absent", "", "3", "[]", "{}", "x" * 10**5)):
        if key not in ("positions",):
            yield Trial(f"metadata {key} = {value[:10]!r}", partial(forged, named, {key: value}))


CAMPAIGNS = [
    Campaign(
        "model configs",
        "`config.json` with a field of another type, out of range, or at odds with its files",
        config_trials,
    ),
    Campaign(
        "model weights", "indexes and tensors missing, of another type or shape, or outside the folder", weight_trials
    ),
    Campaign("forged states", "saved states with changed tensors or metadata under a digest made to fit", state_trials),
]
