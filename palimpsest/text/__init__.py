"""Text as token ids: bytes, tokenizer files, the released model's tiktoken file, and chat templates."""

from palimpsest.text.chat_template import ChatTemplate, chat_template_of
from palimpsest.text.tokenizer import (
    ByteTokenizer,
    FileTokenizer,
    TextPieces,
    load_tokenizer,
    tokenizer_files,
    tokenizer_of,
)
from palimpsest.text.tokenizer import Tokenizer as Tokenizer

__all__ = [
    "ByteTokenizer",
    "ChatTemplate",
    "FileTokenizer",
    "TextPieces",
    "chat_template_of",
    "load_tokenizer",
    "tokenizer_files",
    "tokenizer_of",
]
