"""Is a folder, or a .gguf file, a whole checkpoint of the layout it claims? What is missing, extra or misshapen, by name."""

from __future__ import annotations

import os
from typing import NamedTuple

from palimpsest.convert.layouts import check_config, tensors_of
from palimpsest.convert.sources import Source


class Finding(NamedTuple):
    """One thing wrong with a checkpoint.

    Attributes:
        kind: "missing", "extra" or "misshapen".
        name: of the tensor.
        sentence: what is wrong with it.
    """

    kind: str
    name: str
    sentence: str


def detect(source: Source | str | os.PathLike) -> str:
    """The layout of a checkpoint, by the names of its tensors."""
    opened = source if isinstance(source, Source) else Source(source)
    if opened.path.suffix == ".gguf":
        return "gguf"
    names = opened.entries
    if any(".forget_gate." in name or name.endswith(".mlp.experts.gate_up_proj") for name in names):
        return "native"
    return "fla" if any(".attn.f_proj." in name for name in names) else "official"


def validate(source: str | os.PathLike, layout: str | None = None) -> list[Finding]:
    """Compare a checkpoint with a layout; an empty list is a whole one.

    Args:
        source: a folder with config.json and safetensors, or a .gguf file.
        layout: "official", "native", "fla" or "gguf"; what the names look like if None.

    Raises:
        ValueError: it cannot be read, is another model's, or the layout has no place for this model.
    """
    opened = Source(source)
    return _findings(opened, detect(opened) if layout is None else layout)


def refuse_unless_whole(opened: Source, layout: str) -> None:
    """Raise ValueError if a source is not a whole checkpoint."""
    if findings := _findings(opened, layout):
        more = "" if len(findings) == 1 else f", and {len(findings) - 1} more; palimpsest validate lists them"
        raise ValueError(f"{str(opened.path)!r} is no whole {layout} checkpoint: {findings[0].sentence}{more}")


def _findings(opened: Source, layout: str) -> list[Finding]:
    check_config(opened.config, layout)
    expected = {made.name: made.shape for made in tensors_of(opened.config, layout)}
    findings = []
    for name, shape in expected.items():
        if name not in opened.entries:
            findings.append(Finding("missing", name, f"{name} of shape {list(shape)} is missing"))
        elif opened.entries[name].shape != shape:
            have = list(opened.entries[name].shape)
            findings.append(Finding("misshapen", name, f"{name} has shape {have}; expected {list(shape)}"))
    for name in opened.entries:
        if name not in expected:
            findings.append(Finding("extra", name, f"{name} has no place in the {layout} layout"))
    return findings
