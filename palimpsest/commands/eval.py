"""`palimpsest eval`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from palimpsest.commands.generate import device_of
from palimpsest.commands.options import Json, Plugin, checkpoint_of


def evaluate(
    model: Annotated[str, typer.Argument(help="A run's folder, or any folder with a Kimi Linear checkpoint.")],
    files: Annotated[list[Path], typer.Argument(help="Text files; each is read whole, from an empty memory.")],
    tokenizer: Annotated[
        str | None,
        typer.Option(help="`bytes` or a tokenizer.json; by default what the folder says.", show_default=False),
    ] = None,
    chunk: Annotated[int, typer.Option(min=2, help="Tokens read at once; the state carries over.")] = 2048,
    device: Annotated[str, typer.Option(help="`cpu`, `cuda`, or `auto`.")] = "auto",
    plugin: Plugin = None,
    as_json: Json = False,
) -> int:
    """What a model pays for files: bits a byte, and perplexity a token.

    A file is read from end to end, however long: the state goes from chunk to chunk. Its first token costs what a guess
    among all tokens does.

    Example: `palimpsest eval runs/demo notes.txt`
    """
    from palimpsest.models.kimi_linear import KimiLinearForCausalLM
    from palimpsest.text import tokenizer_of

    folder = checkpoint_of(model)
    contents = [_content(file) for file in files]  # all, before anything is computed
    words = tokenizer_of(folder, tokenizer)
    network = KimiLinearForCausalLM.from_pretrained(folder, device=device_of(device))
    rows: list[dict[str, Any]] = []
    for file, content in zip(files, contents):
        ids = words.encode(content.decode("utf-8", errors="surrogateescape"))
        if words.name == "bytes":
            ids = list(content)
        nats = math.log(words.vocab_size) + _nats(network, ids, chunk)
        rows.append({"file": str(file), "bytes": len(content), "tokens": len(ids), "nats": nats})
    if len(rows) > 1:
        rows.append({"file": "all", **{key: sum(row[key] for row in rows) for key in ("bytes", "tokens", "nats")}})
    for row in rows:
        row["bits_per_byte"] = row["nats"] / math.log(2) / row["bytes"]
        row["perplexity"] = math.exp(row.pop("nats") / row["tokens"])
    if as_json:
        for row in rows:
            typer.echo(json.dumps(row))
        return 0
    table = Table("file", "bytes", "tokens", "bits/byte", "perplexity")
    for row in rows:
        table.add_row(
            row["file"],
            f"{row['bytes']:,}",
            f"{row['tokens']:,}",
            f"{row['bits_per_byte']:.3f}",
            f"{row['perplexity']:.2f}",
        )
    Console(highlight=False).print(table)
    return 0


def _content(file: Path) -> bytes:
    from palimpsest.files import read_bytes

    content = read_bytes(file)
    if not content:
        raise ValueError(f"{str(file)!r} is empty; nothing can be measured on it")
    return content


def _nats(network, ids: list[int], chunk: int) -> float:
    """What every token after the first costs, given all before it."""
    import torch
    import torch.nn.functional as F

    total, state = 0.0, None
    with torch.no_grad():
        for start in range(0, len(ids) - 1, chunk):
            part = torch.tensor([ids[start : start + chunk + 1]], device=network.device)
            logits, state, _ = network(part[:, :-1], state=state)
            total += F.cross_entropy(logits[0].double(), part[0, 1:], reduction="sum").item()
    return total
