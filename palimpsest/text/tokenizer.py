"""Text to token ids and back: bytes as they are, any tokenizer file of the `tokenizers` library, or a `tiktoken.model`.

A tokenizer is anything with `name`, `vocab_size`, `eos_id` (None if it has none), `encode(text)` and `decode(ids)`.
"""

import codecs
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from palimpsest.checks import shown
from palimpsest.files import read_object
from palimpsest.text.tiktoken_files import TIKTOKEN, as_tokenizer_config, byte_characters, tokenizer_json_of

END_OF_DOCUMENT = "<|endoftext|>"  # the text of byte 256, where a file must have one
REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no character, and for a character still incomplete


class Tokenizer(Protocol):
    """What training and generation ask of a tokenizer."""

    @property
    def name(self) -> str:
        """ "bytes", or its file."""
        ...

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def eos_id(self) -> int | None:
        """The end mark; None if it has none."""
        ...

    def encode(self, text: str) -> list[int]:
        """The ids of text; no mark is added."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without marks."""
        ...


class ByteTokenizer:
    """UTF-8 bytes are the tokens, 0 to 255; 256 ends a document.

    >>> tokenizer = ByteTokenizer()
    >>> tokenizer.encode("héllo")
    [104, 195, 169, 108, 108, 111]
    >>> tokenizer.decode([104, 195, 169, 108, 108, 111, tokenizer.eos_id])
    'héllo'
    >>> tokenizer.vocab_size
    257
    """

    name = "bytes"
    vocab_size = 257
    eos_id = 256

    def encode(self, text: str | bytes) -> list[int]:
        """The UTF-8 bytes of text, or the bytes given; no end mark is added."""
        return list(text if isinstance(text, bytes) else text.encode("utf-8", errors="surrogatepass"))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids: bytes that are no UTF-8 become U+FFFD; ids from 256 on (end mark, padding) have none."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids, exactly."""
        return bytes(i for i in ids if i < 256)


class FileTokenizer:
    """A `tokenizer.json` of the `tokenizers` library, or the released model's `tiktoken.model`; or a folder with one of them.

    Args:
        path: the file, or its folder.
        eos: the text of the end mark, such as "</s>"; by default `eos_token` of the `tokenizer_config.json` beside it.

    Raises:
        ValueError: the file is missing or is not a tokenizer, or eos is not one of its tokens.
    """

    def __init__(self, path: str | Path, *, eos: str | None = None):
        try:
            import tokenizers
        except ImportError as error:
            raise ImportError("reading a tokenizer file needs tokenizers: pip install palimpsest-kda[train]") from error
        file = _file_in(Path(path)) if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise ValueError(
                f"tokenizer {str(file)!r} does not exist; give a tokenizer.json or tiktoken.model, or 'bytes' for plain bytes"
            )
        content = tokenizer_json_of(file.parent) if file.name == TIKTOKEN else None
        try:
            make = tokenizers.Tokenizer
            self._tokenizer = make.from_file(str(file)) if content is None else make.from_str(content.decode())
        except Exception as error:  # the library raises a bare Exception with the parser's words
            raise ValueError(f"{str(file)!r} is not a tokenizer file of the tokenizers library: {error}") from error
        self.name = str(file)
        eos = eos if eos is not None else _eos_beside(file)
        self.eos_id: int | None = None if eos is None else self._tokenizer.token_to_id(eos)
        if eos is not None and self.eos_id is None:
            raise ValueError(f"eos {eos!r} is not a token of {str(file)!r}; name one that is")

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        # Not the count of tokens: added tokens may leave holes, and an embedding must cover the largest id.
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str) -> list[int]:
        """The ids of text; no begin or end mark is added."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def text_of(self, token: int) -> str:
        """The text of one token, a special one's too."""
        return self._tokenizer.decode([token], skip_special_tokens=False)

    def to_json(self) -> bytes:
        """The content of its tokenizer.json."""
        return self._tokenizer.to_str().encode()


def load_tokenizer(name: str | Path, *, eos: str | None = None) -> Tokenizer:
    """ "bytes", or the path of a `tokenizer.json` or its folder.

    >>> load_tokenizer("bytes").encode("ab")
    [97, 98]
    """
    return ByteTokenizer() if str(name) == "bytes" else FileTokenizer(name, eos=eos)


def tokenizer_of(folder: str | Path, name: str | Path | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint's folder: what its palimpsest.json names, or its tokenizer.json.

    Args:
        folder: with the weights.
        name: "bytes" or a tokenizer.json, to use instead of what the folder says.

    Raises:
        ValueError: the folder does not say, or the file is not a tokenizer.
    """
    folder = Path(folder)
    if name is not None:
        return load_tokenizer(name)
    if (folder / "palimpsest.json").is_file():
        said = read_object(folder / "palimpsest.json").get("tokenizer", "bytes")
        if not isinstance(said, str) or Path(said).name != said:  # a folder speaks of its own files alone
            raise ValueError(
                f"{str(folder / 'palimpsest.json')!r} names the tokenizer {shown(said)}; expected 'bytes' or a file beside "
                "it; give --tokenizer bytes or a file"
            )
        return load_tokenizer("bytes" if said == "bytes" else folder / said)
    if _file_in(folder).is_file():
        return load_tokenizer(folder)
    raise ValueError(f"folder {str(folder)!r} does not say which tokenizer it needs; give --tokenizer bytes or a file")


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The files that go with a checkpoint so that other tools read its tokenizer, bytes included: name to content.

    >>> sorted(tokenizer_files(ByteTokenizer()))
    ['palimpsest.json', 'tokenizer.json', 'tokenizer_config.json']
    """
    whole = isinstance(tokenizer, ByteTokenizer)
    files = {"palimpsest.json": json.dumps({"tokenizer": "bytes" if whole else "tokenizer.json"}, indent=2).encode()}
    if whole:
        files["tokenizer.json"] = json.dumps(_bytes_for_tokenizers(), indent=1).encode()
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END_OF_DOCUMENT,
            "clean_up_tokenization_spaces": False,
        }
        files["tokenizer_config.json"] = json.dumps(config, indent=2).encode()
    elif isinstance(tokenizer, FileTokenizer):
        source = Path(tokenizer.name)
        if source.name == TIKTOKEN:
            files["tokenizer.json"] = tokenizer.to_json()
            files["tokenizer_config.json"] = json.dumps(as_tokenizer_config(source.parent), indent=2).encode()
        else:
            files["tokenizer.json"] = source.read_bytes()
        for beside in ("tokenizer_config.json", "chat_template.jinja"):
            if beside not in files and source.with_name(beside).is_file():
                files[beside] = source.with_name(beside).read_bytes()
    return files


def _bytes_for_tokenizers() -> dict:
    """The byte tokenizer as a file of the tokenizers library: a byte-level vocabulary without merges."""
    shown = byte_characters()
    end = {"id": 256, "content": END_OF_DOCUMENT, "special": True, "normalized": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": [end | {"single_word": False, "lstrip": False, "rstrip": False}],
        "pre_tokenizer": level,
        "decoder": level,
        "model": {
            "type": "BPE",
            "vocab": {shown[byte]: byte for byte in range(256)} | {END_OF_DOCUMENT: 256},
            "merges": [],
        },
    }


class TextPieces:
    """Tokens in, text out as soon as it is certain: no piece ends inside a character.

    The pieces joined, with `end()` last, are `tokenizer.decode` of all tokens.

    >>> pieces = TextPieces(ByteTokenizer())
    >>> [pieces.push(token) for token in "né".encode()]
    ['n', '', 'é']
    >>> pieces.end()
    ''
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace") if isinstance(tokenizer, ByteTokenizer) else None
        self._sent: list[int] = []  # tokens whose text is out; the last few, as context: spaces depend on neighbours
        self._held: list[int] = []  # tokens whose text may still change

    def push(self, token: int) -> str:
        """The text that became certain with this token; often empty inside a character."""
        if self._bytes is not None:
            return self._bytes.decode(bytes([token]) if token < 256 else b"")
        self._held.append(token)
        piece = self._piece()
        if not piece or piece.endswith(REPLACEMENT):  # perhaps the first bytes of a character
            return ""
        self._sent, self._held = self._held, []
        return piece

    def end(self) -> str:
        """What is left: an incomplete character becomes U+FFFD."""
        if self._bytes is not None:
            return self._bytes.decode(b"", final=True)
        piece = self._piece() if self._held else ""
        self._sent, self._held = [], []
        return piece

    def _piece(self) -> str:
        before = self._tokenizer.decode(self._sent)
        return self._tokenizer.decode(self._sent + self._held)[len(before) :]


def _file_in(folder: Path) -> Path:
    """The tokenizer of a folder: tokenizer.json, else tiktoken.model, else the first of them, which is not there."""
    return folder / (
        TIKTOKEN if (folder / TIKTOKEN).is_file() and not (folder / "tokenizer.json").is_file() else "tokenizer.json"
    )


def _eos_beside(file: Path) -> str | None:
    config = file.with_name("tokenizer_config.json")
    if not config.is_file():
        return None
    eos = read_object(config).get("eos_token")
    eos = eos.get("content") if isinstance(eos, dict) else eos
    if not isinstance(eos, str | None):
        raise ValueError(f"{str(config)!r} names the end mark {shown(eos)}; expected the text of a token")
    return eos
