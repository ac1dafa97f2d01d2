"""Generation: from prompts and states to tokens and text."""

from palimpsest.generate.conversation import Conversation, reply
from palimpsest.generate.decode_state import DecodeState
from palimpsest.generate.draft import prompt_lookup
from palimpsest.generate.sample import Generation, Piece, generate, prefill, stream
from palimpsest.generate.sampling import Sampling

__all__ = [
    "Conversation",
    "DecodeState",
    "Generation",
    "Piece",
    "Sampling",
    "generate",
    "prefill",
    "prompt_lookup",
    "reply",
    "stream",
]
