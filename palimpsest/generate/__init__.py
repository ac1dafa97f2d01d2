"""Generation: from prompts and states to tokens and text."""

from palimpsest.generate.draft import prompt_lookup
from palimpsest.generate.reader import Ready
from palimpsest.generate.sample import Generation, Piece, generate, prefill, stream
from palimpsest.generate.sampling import Sampling

__all__ = ["Generation", "Piece", "Ready", "Sampling", "generate", "prefill", "prompt_lookup", "stream"]
