"""generation_config.json: how a checkpoint wants its tokens chosen, in the file that transformers reads too."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from palimpsest.models.kimi_linear.config import KimiLinearConfig

GENERATION_CONFIG = "generation_config.json"
SAMPLING = {"temperature": 0.8, "top_p": 0.95}  # greedy text of a small model repeats itself, often a single blank
GREEDY = {"temperature": 0.0}
CHOICES = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def generation_config(config: KimiLinearConfig) -> dict[str, Any]:
    """The file for a new checkpoint: sampling, not greedy.

    >>> generation_config(KimiLinearConfig.tiny())["temperature"]
    0.8
    """
    marks = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {"do_sample": True, **SAMPLING, **{name: mark for name, mark in marks.items() if mark is not None}}


def sampling_defaults(folder: str | os.PathLike) -> dict[str, Any]:
    """The choices that a folder's generation_config.json makes, by the names of `generate.Sampling`; greedy without one.

    Raises:
        ValueError: the file is not JSON.
    """
    path = Path(folder) / GENERATION_CONFIG
    if not path.is_file():
        return dict(GREEDY)
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not JSON ({error}); mend it or remove it") from error
    if not isinstance(said, dict):
        raise ValueError(f"{str(path)!r} holds a {type(said).__name__}; expected a JSON object")
    if not said.get("do_sample", False):
        return dict(GREEDY)
    choices = {name: said[name] for name in CHOICES if said.get(name) is not None}
    if choices.get("top_k") == 0:  # transformers' way to keep all
        del choices["top_k"]
    return {"temperature": 1.0} | choices
