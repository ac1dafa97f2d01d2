"""Prompts in, text out: read the prompt in chunks, then choose a token, read it, and so on.

Memory   A KDA layer holds as much after a million tokens as after one; a latent layer one short row per token.
Same     A sequence gets the same tokens alone, in any batch, in one run, and in several runs through a saved state.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from palimpsest.checks import is_count, require
from palimpsest.generate.decode_state import DecodeState
from palimpsest.generate.decoder import Decoder, SessionDecoder
from palimpsest.generate.prompts import Prompts, read_prompts
from palimpsest.generate.sampling import GREEDY, Sampling, choose_tokens
from palimpsest.generate.session import fits_a_session
from palimpsest.generate.stop import StopScan
from palimpsest.models.kimi_linear.history import StateHistory
from palimpsest.models.kimi_linear.model import KimiLinearForCausalLM
from palimpsest.models.kimi_linear.model_state import ModelState
from palimpsest.models.kimi_linear.nonfinite import Fault
from palimpsest.models.kimi_linear.state_file import check_state
from palimpsest.text import TextPieces, Tokenizer

Reason = Literal["length", "end", "stop", "nonfinite"]
PIECE = 2048  # tokens of a prompt read at once: enough that an expert's weights are read for some 60 of them
WORTH_A_GRAPH = 16  # tokens: recording a graph takes about as long as so many launched one by one
Draft = Callable[[Sequence[int]], Sequence[int]]


@dataclass(frozen=True)
class Piece:
    """One token of one sequence, as it comes.

    Attributes:
        sequence: its place in the batch.
        token: None in the piece that says "nonfinite".
        text: what became certain with it; never part of a character, and "" without a tokenizer.
        reason: why the sequence ends here; None if it goes on.
    """

    sequence: int
    token: int | None
    text: str
    reason: Reason | None


@dataclass(frozen=True)
class Generation:
    """What came out.

    Attributes:
        tokens: the new tokens of each sequence, with the one that ended it.
        texts: their text, without the stop string; "" without a tokenizer.
        reasons: why each ended: "length", "end" (an end token), "stop" (a stop string) or "nonfinite".
        decode_state: the sequences after all these tokens, to continue or to save. A token that only completed a stop
            string has been read too.
        faults: for sequences that ended as "nonfinite", where; by place in the batch.
        history: the one given, with this run in it.
        num_calls: forward passes taken.
    """

    tokens: list[list[int]]
    texts: list[str]
    reasons: list[Reason]
    decode_state: DecodeState
    faults: dict[int, Fault]
    history: StateHistory | None
    num_calls: int

    @property
    def state(self) -> ModelState:
        """The state after all tokens."""
        return self.decode_state.state


def generate(
    model: KimiLinearForCausalLM,
    prompts: Prompts | DecodeState,
    *,
    max_new_tokens: int,
    tokenizer: Tokenizer | None = None,
    sampling: Sampling = GREEDY,
    stop: Sequence[str] = (),
    end_tokens: Sequence[int] | None = None,
    seed: int | Sequence[int] = 0,
    state: ModelState | DecodeState | None = None,
    mask: Tensor | None = None,
    prefill_chunk: int = PIECE,
    on_nonfinite: Literal["raise", "stop"] = "raise",
    draft: Draft | None = None,
    history: StateHistory | None = None,
    graph: bool | None = None,
) -> Generation:
    """Continue each prompt.

    Args:
        prompts: a text or several (with a tokenizer), ids or several lists of them, or ids [B, T]; or a `DecodeState`, to
            go on exactly where `prefill` or an earlier generation ended.
        max_new_tokens: at most this many per sequence, >= 1.
        sampling: how tokens are chosen; greedy by default.
        stop: texts that end a sequence; they need a tokenizer.
        end_tokens: ids that end a sequence; by default the tokenizer's end mark or, without a tokenizer, the model's.
        seed: sequence i draws with seed + i; or one seed per sequence.
        state: what was read before the prompts, one row each; not changed. A `DecodeState` also tells the repetition
            penalty which tokens that was; with a state it counts the prompts alone.
        mask: for ids [B, T], bool, True for a token; left and right padding are the same.
        prefill_chunk: tokens of a prompt read at once, which bounds the memory that a prompt needs.
        on_nonfinite: "raise" NonFiniteError, which names sequence, layer, head and token, or "stop" that sequence at
            its last finite token.
        draft: guesses the tokens to come, such as `prompt_lookup`; one sequence only. Wrong guesses cost time; the
            tokens stay what they are without it.
        history: checkpoints to go back to; one sequence only, which continues from `history.latest`.
        graph: choose and read each token by CUDA graphs at fixed addresses; by default on a GPU, for 16 tokens or more
            without draft and history.

    Raises:
        ValueError: an argument that does not fit, named in one sentence.
        NonFiniteError: see on_nonfinite.

    >>> from palimpsest.models.kimi_linear import KimiLinearConfig
    >>> model = KimiLinearForCausalLM(KimiLinearConfig.tiny())
    >>> generation = generate(model, [[1, 2, 3], [4]], max_new_tokens=5, end_tokens=())
    >>> [len(tokens) for tokens in generation.tokens], generation.state.position
    ([5, 5], tensor([8, 6]))
    """
    pieces = stream(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        tokenizer=tokenizer,
        sampling=sampling,
        stop=stop,
        end_tokens=end_tokens,
        seed=seed,
        state=state,
        mask=mask,
        prefill_chunk=prefill_chunk,
        on_nonfinite=on_nonfinite,
        draft=draft,
        history=history,
        graph=graph,
    )
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return end.value


def stream(
    model: KimiLinearForCausalLM,
    prompts: Prompts | DecodeState,
    *,
    max_new_tokens: int,
    tokenizer: Tokenizer | None = None,
    sampling: Sampling = GREEDY,
    stop: Sequence[str] = (),
    end_tokens: Sequence[int] | None = None,
    seed: int | Sequence[int] = 0,
    state: ModelState | DecodeState | None = None,
    mask: Tensor | None = None,
    prefill_chunk: int = PIECE,
    on_nonfinite: Literal["raise", "stop"] = "raise",
    draft: Draft | None = None,
    history: StateHistory | None = None,
    graph: bool | None = None,
) -> Generator[Piece, None, Generation]:
    """The same as `generate`, one piece per token as they come; the generator's return value is the `Generation`.

    Arguments are checked at once, before the first piece is asked for.

    >>> from palimpsest.models.kimi_linear import KimiLinearConfig
    >>> from palimpsest.text import ByteTokenizer
    >>> model = KimiLinearForCausalLM(KimiLinearConfig.tiny())
    >>> pieces = stream(model, "def", max_new_tokens=3, tokenizer=ByteTokenizer(), end_tokens=())
    >>> [piece.reason for piece in pieces]
    [None, None, 'length']
    """
    require("max_new_tokens", max_new_tokens, is_count(max_new_tokens), "a whole number >= 1")
    require("on_nonfinite", on_nonfinite, on_nonfinite in ("raise", "stop"), "'raise' or 'stop'")
    if stop and tokenizer is None:
        raise ValueError("stop was given without a tokenizer; give one, or end_tokens instead")
    stop = [stop] if isinstance(stop, str) else list(stop)
    StopScan(stop)
    start, rows = _start(model, prompts, tokenizer, state, mask, prefill_chunk, history)
    count = start.state.batch_size
    if count > 1 and (draft is not None or history is not None):
        name = "draft" if draft is not None else "history"
        raise ValueError(f"{name} was given with {count} sequences; it takes one")
    seeds = _seeds(seed, count)
    if end_tokens is None:
        end_token = model.config.eos_token_id if tokenizer is None else tokenizer.eos_id
        end_tokens = () if end_token is None else end_token if isinstance(end_token, tuple) else (end_token,)

    _check_graph(model, graph, draft, history)
    if graph is None:
        graph = draft is None and history is None and max_new_tokens >= WORTH_A_GRAPH and model.device.type == "cuda"
        graph = graph and all(map(fits_a_session, start.state.layers))
    decoder = _decoder(model, start, max_new_tokens, on_nonfinite == "stop", history, graph)
    writers = [_Writer(i, max_new_tokens, tokenizer, stop, end_tokens) for i in range(count)]
    return _run(decoder, rows, prefill_chunk, writers, sampling, seeds, draft)


def prefill(
    model: KimiLinearForCausalLM,
    prompts: Prompts,
    *,
    tokenizer: Tokenizer | None = None,
    state: ModelState | DecodeState | None = None,
    mask: Tensor | None = None,
    prefill_chunk: int = PIECE,
) -> DecodeState:
    """Read prompts and stop there: to save, to fork, or to continue with `generate`. Arguments as in `generate`.

    >>> from palimpsest.models.kimi_linear import KimiLinearConfig
    >>> model = KimiLinearForCausalLM(KimiLinearConfig.tiny())
    >>> state = prefill(model, [[1, 2, 3, 4]], prefill_chunk=3)
    >>> state.state.position, state.logits.shape
    (tensor([4]), torch.Size([1, 257]))
    """
    start, rows = _start(model, prompts, tokenizer, state, mask, prefill_chunk, None)
    decoder = Decoder(model, start)
    _read_prompts(decoder, rows or [], prefill_chunk)
    return decoder.result()


def _check_graph(
    model: KimiLinearForCausalLM, graph: bool | None, draft: Draft | None, history: StateHistory | None
) -> None:
    require("graph", graph, graph is None or isinstance(graph, bool), "True, False or None")
    if not graph:
        return
    if draft is not None or history is not None:
        name = "draft" if draft is not None else "history"
        raise ValueError(
            f"graph is True and {name} was given, which reads several tokens at once; leave one of them out"
        )
    if model.device.type != "cuda":
        raise ValueError(f"graph is True and the model is on {model.device}; a CUDA graph needs a GPU: leave graph out")


def _decoder(
    model: KimiLinearForCausalLM,
    start: DecodeState,
    most: int,
    stop_at_fault: bool,
    history: StateHistory | None,
    graph: bool,
) -> Decoder:
    """The decoder of one run: a launch a token, or a call a token."""
    if graph:
        return SessionDecoder(model, start, most=most, graph=True, stop_at_fault=stop_at_fault)
    return Decoder(model, start, stop_at_fault=stop_at_fault, history=history)


class _Writer:
    """The tokens and the text of one sequence."""

    def __init__(
        self, sequence: int, limit: int, tokenizer: Tokenizer | None, stop: Sequence[str], ends: Sequence[int]
    ):
        self.sequence, self.limit, self.ends = sequence, limit, set(ends)
        self.tokens: list[int] = []
        self.text = ""
        self.reason: Reason | None = None
        self._tokenizer = tokenizer
        self._pieces = None if tokenizer is None else TextPieces(tokenizer)
        self._scan = StopScan(stop)

    def write(self, token: int) -> Piece:
        self.tokens.append(token)
        text = self._scan.push(self._pieces.push(token)) if self._pieces else ""
        if self._scan.found is not None:
            self.reason = "stop"
        elif token in self.ends:
            self.reason = "end"
        elif len(self.tokens) == self.limit:
            self.reason = "length"
        if self.reason is not None and self._pieces:
            text += self._scan.push(self._pieces.end()) + self._scan.end()
        self.text += text
        return Piece(self.sequence, token, text, self.reason)

    def fail(self, count: int) -> Piece:
        """End at a fault: the first `count` tokens are good, the others are taken back."""
        del self.tokens[count:]
        self.text = "" if self._tokenizer is None else self._tokenizer.decode(self.tokens)
        self.reason = "nonfinite"
        return Piece(self.sequence, None, "", self.reason)


def _run(
    decoder: Decoder,
    prompts: list[list[int]] | None,
    prefill_chunk: int,
    writers: list[_Writer],
    sampling: Sampling,
    seeds: list[int],
    draft: Draft | None,
) -> Generator[Piece, None, Generation]:
    if prompts is not None:
        _read_prompts(decoder, prompts, prefill_chunk)
    starts = list(decoder.positions)
    failed: set[int] = set()
    while True:
        for row in sorted(decoder.faults.keys() - failed):
            yield writers[row].fail(decoder.positions[row] - starts[row])
            failed.add(row)
        if not decoder.rows:
            break
        tokens = decoder.choose(sampling, seeds)
        if not tokens:  # all have failed
            continue
        for row, token in zip(decoder.rows, tokens):
            yield writers[row].write(token)
        writer = writers[decoder.rows[0]]
        guesses = [] if draft is None or writer.reason else _guesses(draft, prompts, writer, decoder)
        if not guesses:
            decoder.read([[token] for token in tokens])
        else:
            seen, count = decoder.current.seen, 1
            logits_TN = decoder.verify([*tokens, *guesses])
            for guess in guesses:
                seen = seen.clone()
                seen[0, tokens] = True
                positions = [decoder.positions[0] + count]
                logits_1N = logits_TN[count - 1 : count]
                tokens = choose_tokens(logits_1N, sampling, seeds=seeds, positions=positions, seen=seen).tolist()
                if tokens[0] != guess:
                    break
                count += 1
                yield writer.write(guess)
                if writer.reason:
                    break
            decoder.accept(count)
        decoder.retire([row for row in decoder.rows if writers[row].reason])

    return Generation(
        [w.tokens for w in writers],
        [w.text for w in writers],
        [w.reason or "length" for w in writers],
        decoder.result(),
        decoder.faults,
        decoder.history,
        decoder.num_calls,
    )


def _guesses(draft: Draft, prompts: list[list[int]] | None, writer: _Writer, decoder: Decoder) -> list[int]:
    """At most as many as may still be written, and as the history has room for."""
    most = writer.limit - len(writer.tokens)
    if decoder.history is not None:
        most = min(most, decoder.history.capacity - 1)
    known = [*(prompts[0] if prompts else []), *writer.tokens]
    vocab_size = decoder.model.config.vocab_size
    return [] if most < 1 else [t for t in draft(known) if 0 <= t < vocab_size][:most]


def _read_prompts(decoder: Decoder, prompts: list[list[int]], chunk: int) -> None:
    """Each prompt in the chunks that it would be read in alone; the shorter ones wait for the others."""
    for start in range(0, max(map(len, prompts), default=0), chunk):
        decoder.retire([row for row in decoder.rows if len(prompts[row]) <= start])
        if decoder.rows:
            decoder.read([prompts[row][start : start + chunk] for row in decoder.rows])
    decoder.resume()


def _start(
    model: KimiLinearForCausalLM,
    prompts: Prompts | DecodeState,
    tokenizer: Tokenizer | None,
    state: ModelState | DecodeState | None,
    mask: Tensor | None,
    prefill_chunk: int,
    history: StateHistory | None,
) -> tuple[DecodeState, list[list[int]] | None]:
    """Where the sequences stand and what they have to read first; None for a `DecodeState`, which has read."""
    require("prefill_chunk", prefill_chunk, is_count(prefill_chunk), "a whole number >= 1")
    if history is not None:
        if state is not None or isinstance(prompts, DecodeState):
            raise ValueError(
                "history was given with another state; it continues from history.latest, so give one of the two"
            )
        state = history.latest
    if isinstance(prompts, DecodeState):
        if state is not None or mask is not None:
            raise ValueError("prompts is a DecodeState, which has its own state; leave state and mask out")
        check_state(prompts.state, model)
        if not prompts.logits.isfinite().all():
            raise ValueError("prompts is a DecodeState whose logits are not finite; nothing can be chosen from them")
        return prompts, None
    rows = read_prompts(prompts, vocab_size=model.config.vocab_size, tokenizer=tokenizer, mask=mask)
    seen = state.seen if isinstance(state, DecodeState) else None
    state = state.state if isinstance(state, DecodeState) else state
    given = state is not None
    if state is None:
        state = ModelState.empty(model.config, len(rows), device=model.device, dtype=model.dtype)
    check_state(state, model, len(rows))  # one that was just made costs next to nothing
    if broken := given and state.nonfinite():
        raise ValueError(
            f"state is not finite in layer {broken[0].layer}, before any prompt; go back to an earlier state"
        )
    return DecodeState.before(state, model.config.vocab_size, seen), rows


def _seeds(seed: int | Sequence[int], count: int) -> list[int]:
    if isinstance(seed, int):
        return [seed + i for i in range(count)]
    seeds = list(seed)
    require(
        "seed", seed, len(seeds) == count and all(isinstance(s, int) for s in seeds), f"a number, or {count} of them"
    )
    return seeds
