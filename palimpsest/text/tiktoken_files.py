"""The released model's tokenizer: `tiktoken.model`, as the `tokenizer.json` that every other tool reads.

File      a line a token, its bytes in base64 and its rank; byte pairs merge in the order of the rank of what they make.
Marks     256 ids after the last rank, named in tokenizer_config.json or else reserved; no Python of the folder is run.
Pattern   how text falls into pieces before the merges: that of the released Kimi tokenizers, Han apart from other letters.
"""

from __future__ import annotations

import base64
import binascii
import json
from pathlib import Path
from typing import Any

from palimpsest.files import read_bytes, read_object

TIKTOKEN = "tiktoken.model"
MARKS = 256  # ids kept for special tokens
LARGEST = 64 << 20  # bytes of a vocabulary
_WORD_START = r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = (rf"[\p{{{kind}}}\p{{Lm}}\p{{Lo}}\p{{M}}&&[^\p{{Han}}]]" for kind in (r"Lu}\p{Lt", "Ll"))
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = "|".join(
    (
        r"[\p{Han}]+",
        f"{_WORD_START}{_UPPER}*{_LOWER}+{_SHORT}",
        f"{_WORD_START}{_UPPER}+{_LOWER}*{_SHORT}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


def byte_characters() -> dict[int, str]:
    """How the tokenizers library writes a byte: as itself where that can be printed, else as the next character from U+0100.

    >>> byte_characters()[97], byte_characters()[32]
    ('a', 'Ġ')
    """
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) if byte in plain else chr(256 + others.index(byte)) for byte in range(256)}


def read_ranks(file: str | Path) -> list[bytes]:
    """The tokens of a tiktoken file, by rank.

    Raises:
        ValueError: a line is none, a rank is missing or given twice, or a byte has no token.
    """
    tokens: dict[int, bytes] = {}
    for number, line in enumerate(read_bytes(file, limit=LARGEST).splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            content, place = base64.b64decode(token, validate=True), int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(
                f"line {number} of {str(file)!r} is {line[:40]!r}; expected a token in base64 and its rank; fetch it again"
            ) from None
        if place in tokens:
            raise ValueError(f"line {number} of {str(file)!r} gives rank {place} again; fetch it again")
        tokens[place] = content
    if sorted(tokens) != list(range(len(tokens))):
        raise ValueError(f"{str(file)!r} has {len(tokens)} tokens, whose ranks do not run from 0 on; fetch it again")
    found = [tokens[rank] for rank in range(len(tokens))]
    if lacking := {bytes([byte]) for byte in range(256)} - set(found):
        raise ValueError(f"{str(file)!r} has no token for {len(lacking)} of the 256 bytes; fetch it again")
    return found


def special_tokens(folder: str | Path, first: int) -> dict[int, str]:
    """The marks of a folder: id -> text, `first` and the 255 after it."""
    config, named = Path(folder) / "tokenizer_config.json", {}
    said = read_object(config).get("added_tokens_decoder", {}) if config.is_file() else {}
    for number, token in said.items() if isinstance(said, dict) else ():
        if str(number).isdecimal() and isinstance(token, dict) and isinstance(token.get("content"), str):
            named[int(number)] = token["content"]
    return {i: named.get(i, f"<|reserved_token_{i}|>") for i in range(first, first + MARKS)}


def as_tokenizer_json(folder: str | Path) -> dict[str, Any]:
    """The tokenizer of a folder with a `tiktoken.model`, as a file of the tokenizers library: the same ids for any text.

    Raises:
        ValueError: as `read_ranks`.
    """
    ranks, shown = read_ranks(Path(folder) / TIKTOKEN), byte_characters()
    write = lambda token: "".join(shown[byte] for byte in token)
    known = {token: rank for rank, token in enumerate(ranks)}
    merges: list[list[str]] = []
    for token in ranks:  # every way in which two tokens make this one; of ways that meet, the earlier ranks go first
        splits = ((token[:i], token[i:]) for i in range(1, len(token)))
        whole = sorted(((known[a], known[b]) for a, b in splits if a in known and b in known))
        merges += [[write(ranks[a]), write(ranks[b])] for a, b in whole]
    marks = special_tokens(folder, len(ranks))
    as_added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": text, **as_added} for i, text in marks.items()],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "decoder": level,
        "model": {
            "type": "BPE",
            "ignore_merges": True,  # a piece that is a token as a whole is that token, whatever merges would make
            "vocab": {write(token): rank for token, rank in known.items()},
            "merges": merges,
        },
    }


def as_tokenizer_config(folder: str | Path) -> dict[str, Any]:
    """tokenizer_config.json for that file: what the folder says, read without its Python."""
    config = Path(folder) / "tokenizer_config.json"
    said = read_object(config) if config.is_file() else {}
    kept = {name: value for name, value in said.items() if name not in ("auto_map", "added_tokens_decoder")}
    return kept | {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}


def tokenizer_json_of(folder: str | Path) -> bytes:
    """`as_tokenizer_json` as the content of a file."""
    return json.dumps(as_tokenizer_json(folder), ensure_ascii=False).encode()
