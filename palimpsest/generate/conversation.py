"""A conversation as a value: what was said, and the state after it. To go on, to take back, to fork, to save.

The state is kept between turns, so a turn reads its own words alone, however long the conversation is. Where a template
writes earlier turns otherwise once others follow, such as without their thoughts, the conversation goes back to the last
turn that still stands as it was read, and reads on from there.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from palimpsest.generate.decode_state import DecodeState
from palimpsest.generate.sample import Generation, Piece, prefill, stream
from palimpsest.generate.sampling import GREEDY, Sampling
from palimpsest.models.kimi_linear.model import KimiLinearForCausalLM
from palimpsest.models.kimi_linear.state_file import read_state, save_state
from palimpsest.text import ChatTemplate, FileTokenizer, Tokenizer

KEPT = 32  # turns that can be taken back: a state each, 42 MB for the released model


@dataclass(frozen=True)
class Conversation:
    """Messages, and the model's state after them.

    Attributes:
        messages: each with "role" and "content", oldest first.
        text: all that was read and written, as the model saw it.
        state: after that text; None before the first word.
        reason: why the last reply ended: as a `Generation` says, or "interrupted"; None before the first.
        before: the conversation before the last turns, the latest first.
    """

    messages: tuple[Mapping[str, str], ...] = ()
    text: str = ""
    state: DecodeState | None = None
    reason: str | None = None
    before: tuple[Conversation, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens read and written."""
        return 0 if self.state is None else int(self.state.state.position[0])

    def undo(self) -> Conversation:
        """The conversation before the last turn.

        Raises:
            ValueError: there is none, or it is no longer kept.
        """
        if not self.before:
            raise ValueError("nothing can be taken back: this is the beginning, or the earliest turn that is kept")
        return replace(self.before[0], before=self.before[1:])

    def save(self, path: str | Path, model: KimiLinearForCausalLM) -> None:
        """Write words and state to a file; errors as `state_file.save_state`. Turns taken back later are not in it."""
        if self.state is None:
            raise ValueError("the conversation has not begun; there is no state to save")
        said = json.dumps({"messages": [dict(m) for m in self.messages], "text": self.text}).encode()
        extra = {
            "logits": self.state.logits,
            "seen": self.state.seen,
            "said": torch.tensor(list(said), dtype=torch.uint8),
        }
        save_state(path, self.state.state, model, extra=extra)

    @staticmethod
    def load(path: str | Path, model: KimiLinearForCausalLM) -> Conversation:
        """Read what `save` wrote; errors as `state_file.load_state`."""
        state, extra = read_state(path, model)
        if extra.keys() != {"logits", "seen", "said"}:
            raise ValueError(
                f"{str(path)!r} holds a state without its words; go on with it by palimpsest generate --load"
            )
        said = json.loads(bytes(extra["said"].tolist()))
        decode_state = DecodeState(state, extra["logits"], extra["seen"])
        return Conversation(tuple(said["messages"]), said["text"], decode_state)


def reply(
    model: KimiLinearForCausalLM,
    conversation: Conversation,
    words: str,
    *,
    tokenizer: Tokenizer,
    template: ChatTemplate | None = None,
    max_new_tokens: int = 512,
    sampling: Sampling = GREEDY,
    stop: Sequence[str] = (),
    end_tokens: Sequence[int] | None = None,
    seed: int = 0,
) -> Generator[Piece, None, Conversation]:
    """Say something and stream the reply; the generator's return value is the conversation after it.

    An interrupt (Ctrl-C) while the model writes ends the reply, and the conversation has what was written until then.

    Args:
        words: what the user says.
        template: how messages are written for the model; without one the words are read as they stand, and continued.
        max_new_tokens, sampling, stop, end_tokens, seed: as in `generate`. The seed of a turn should be another than the last's.

    Raises:
        ValueError: words are empty, or the template refuses them.

    >>> from palimpsest.models.kimi_linear import KimiLinearConfig
    >>> from palimpsest.text import ByteTokenizer
    >>> model = KimiLinearForCausalLM(KimiLinearConfig.tiny()).eval()
    >>> pieces = reply(model, Conversation(), "Hello.", tokenizer=ByteTokenizer(), max_new_tokens=4, end_tokens=())
    >>> len([piece.token for piece in pieces])
    4
    """
    if not words:
        raise ValueError("words is empty; say something")
    heard = hear(conversation, words, template)
    start = heard.state
    if start is None or heard.unread:
        start = prefill(model, heard.unread, tokenizer=tokenizer, state=heard.state)
    tokens, text = [], ""
    try:
        pieces = stream(
            model, start, max_new_tokens=max_new_tokens, tokenizer=tokenizer, sampling=sampling, stop=tuple(stop),
            end_tokens=end_tokens, seed=seed,
        )  # fmt: skip
        while True:
            piece = next(pieces)
            tokens.append(piece.token)
            text += piece.text
            yield piece
    except StopIteration as end:
        return _answered(heard, end.value, tokenizer)
    except KeyboardInterrupt:
        state = start if not tokens else prefill(model, [tokens], state=start)
        return _after(heard, text, text, state, "interrupted")


@dataclass(frozen=True)
class Heard:
    """A conversation with the user's words, before the reply.

    Attributes:
        conversation: the one before.
        messages: with the words.
        text: all that the model is to have read.
        state: of the longest part of it that was read before.
        unread: the rest of the text.
    """

    conversation: Conversation
    messages: tuple[Mapping[str, str], ...]
    text: str
    state: DecodeState | None
    unread: str


def hear(conversation: Conversation, words: str, template: ChatTemplate | None) -> Heard:
    """What the model has to read so that it can reply; nothing is read yet."""
    messages = (*conversation.messages, {"role": "user", "content": words})
    text = conversation.text + words if template is None else template.render(messages, reply=True)
    for known in (conversation, *conversation.before):
        if known.state is not None and text.startswith(known.text):
            return Heard(conversation, messages, text, known.state, text[len(known.text) :])
    return Heard(conversation, messages, text, None, text)


def _answered(heard: Heard, generation: Generation, tokenizer: Tokenizer) -> Conversation:
    tokens, text = generation.tokens[0], generation.texts[0]
    read = text
    if generation.reasons[0] == "end" and tokens and isinstance(tokenizer, FileTokenizer):
        read += tokenizer.text_of(tokens[-1])  # the end mark, which the template writes too
    elif generation.reasons[0] == "stop":  # the stop string was read as well
        read = tokenizer.decode(tokens)
    return _after(heard, text, read, generation.decode_state, generation.reasons[0])


def _after(heard: Heard, said: str, read: str, state: DecodeState, reason: str) -> Conversation:
    earlier = (replace(heard.conversation, before=()), *heard.conversation.before)[:KEPT]
    messages = (*heard.messages, {"role": "assistant", "content": said})
    return Conversation(messages, heard.text + read, state, reason, earlier)
