"""Sequences read side by side, each leaving when it is done; numbers checked on the way."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from palimpsest.generate.decode_state import DecodeState
from palimpsest.generate.sampling import Sampling, choose_tokens
from palimpsest.generate.session import DecodeSession
from palimpsest.models.kimi_linear.history import StateHistory
from palimpsest.models.kimi_linear.model import KimiLinearForCausalLM
from palimpsest.models.kimi_linear.model_state import ModelState, NonFinite
from palimpsest.models.kimi_linear.nonfinite import Fault, NonFiniteError, read_until_fault

CHECK_EVERY = 64  # steps between two checks of the whole state; the logits are checked at every one
SESSION_CHECK_EVERY = 256  # the same in a session, where a check copies the whole state and waits for it
MOST_TOGETHER = 32768  # tokens read in one call, so that many long prompts need no more memory than a few
FIRST_ROOM = 4096  # tokens that a session has room for beyond those read; the next has as many as were read, or more


class Decoder:
    """Reads tokens into states. Sequences keep the number they came with; `rows` lists those still being read.

    Args:
        start: where the sequences stand; not changed.
        stop_at_fault: leave a sequence at its last finite token instead of raising NonFiniteError.
        history: keeps checkpoints on the way, for one sequence.
    """

    def __init__(
        self,
        model: KimiLinearForCausalLM,
        start: DecodeState,
        *,
        stop_at_fault: bool = False,
        history: StateHistory | None = None,
    ):
        self.model, self.stop_at_fault, self.history = model, stop_at_fault, history
        self.rows = list(range(start.state.batch_size))
        self.current = start
        self.positions: list[int] = start.state.position.tolist()  # kept here too, so that a device is asked only once
        self.faults: dict[int, Fault] = {}
        self.num_calls = 0
        self._retired: dict[int, DecodeState] = {}
        self._good = start  # as last checked; the tokens of each row since then make a fault's token known
        self._since: list[list[int]] = [[] for _ in self.rows]
        self._tried: tuple[Tensor, ModelState, Tensor] | None = None

    def read(self, tokens: Sequence[Sequence[int]]) -> None:
        """Read the next tokens of each sequence in `rows`, at least one of each."""
        ids_BT, mask_BT = self._as_tensors(tokens)
        pieces = [ids_BT.shape[1]] if self.history is None else self._pieces(ids_BT.shape[1])
        for ids in ids_BT.split(pieces, dim=1):
            stepped = ids.shape[1] == 1 and mask_BT is None
            state, logits = self._step(ids) if stepped else self._chunk(ids, mask_BT)
            self._take(state, logits, ids, stepped)
        self._note(tokens)

    def verify(self, tokens: Sequence[int]) -> Tensor:
        """The logits [n, N] after each of n tokens of the one sequence there is, without reading them for good."""
        ids = torch.tensor([list(tokens)], device=self.current.state.device)
        with _undisturbed(self.model):
            output = self.model(ids, state=self.current.state)
        self.num_calls += 1
        assert output.logits is not None
        assert output.state is not None
        self._tried = ids, output.state, output.logits
        return output.logits[0]

    def accept(self, count: int) -> None:
        """Read the first `count` of the tokens tried out: free if all are kept, otherwise the state goes back."""
        assert self._tried is not None, "accept comes after verify"
        (ids, state, logits), self._tried = self._tried, None
        if count < ids.shape[1]:
            ids = ids[:, :count]
            state, logits = self._chunk(ids, None)
        else:
            logits = logits[:, -1]
        self._take(state, logits, ids, stepped=False)
        self._note(ids.tolist())

    def choose(self, sampling: Sampling, seeds: Sequence[int]) -> list[int]:
        """The next token of each sequence in `rows`; seeds are those of all sequences."""
        start, positions = self.current, [self.positions[row] for row in self.rows]
        rows = [seeds[row] for row in self.rows]
        return choose_tokens(start.logits, sampling, seeds=rows, positions=positions, seen=start.seen).tolist()

    def retire(self, rows: Sequence[int]) -> None:
        """Sequences that are done: their states are checked, kept, and read no further."""
        if not rows:
            return
        self._check()
        for row in rows:
            if row in self.rows:
                self._retired[row] = self.current.select([self.rows.index(row)])
        self._remain([row for row in self.rows if row not in rows])

    def resume(self) -> None:
        """Read on with the sequences that have left, but for those that failed."""
        back = sorted(row for row in self._retired if row not in self.faults)
        if back:
            parts = [*([self.current] if self.rows else []), *(self._retired.pop(row) for row in back)]
            self.rows, self.current = [*self.rows, *back], DecodeState.join(parts)
            self._rest_here()

    def result(self) -> DecodeState:
        """All sequences, those that failed at their last finite token."""
        if self.rows == list(range(len(self.positions))):  # none has left: the batch as it is
            self._check()
            if not self._retired:
                return self.current
        self.retire(self.rows)
        return DecodeState.join([self._retired[row] for row in sorted(self._retired)])

    def _step(self, ids: Tensor) -> tuple[ModelState, Tensor]:
        state = self.current.state
        if state is self._good.state:  # a step writes in place, and this one must last
            state = state.snapshot()
        with _undisturbed(self.model):
            logits, state = self.model.step_(ids[:, 0], state)
        self.num_calls += 1
        return state, logits

    def _chunk(self, ids: Tensor, mask: Tensor | None) -> tuple[ModelState, Tensor]:
        B, T = ids.shape
        together = max(1, MOST_TOGETHER // T)
        outputs = []
        for first in range(0, B, together):
            rows = range(first, min(first + together, B))
            state = self.current.state if len(rows) == B else self.current.state.select(rows)
            its_mask = None if mask is None else mask[first : rows.stop]
            with _undisturbed(self.model):
                outputs.append(self.model(ids[first : rows.stop], state=state, mask=its_mask, last_only=True))
            self.num_calls += 1
        logits = torch.cat([output.logits[:, -1] for output in outputs])
        return (outputs[0].state if len(outputs) == 1 else ModelState.join([o.state for o in outputs])), logits

    def _take(self, state: ModelState, logits: Tensor, ids: Tensor, stepped: bool) -> None:
        self.current = DecodeState(state, logits, self.current.seen.scatter(1, ids, True))
        if self.history is not None:
            self.history = self.history.record(state, ids[:, 0] if stepped else ids)

    def _note(self, tokens: Sequence[Sequence[int]]) -> None:
        for row, since, new in zip(self.rows, self._since, tokens, strict=True):
            since.extend(new)
            self.positions[row] += len(new)
        if max(map(len, self._since)) >= CHECK_EVERY or not self.current.logits.isfinite().all():
            self._check()

    def _check(self) -> None:
        """Raise at the first fault, or leave the sequences that have one."""
        if not any(self._since):  # nothing was read since the last check
            return self._rest_here()
        finite = self.current.logits.isfinite().all(-1).tolist()
        faults = {fault.sequence: fault for fault in self.current.state.nonfinite()}
        bad = [i for i in range(len(self.rows)) if any(self._since) and (i in faults or not finite[i])]
        for i in bad:
            self._fail(i, faults.get(i))
        if bad:
            self._remain([row for i, row in enumerate(self.rows) if i not in bad])
        else:
            self._rest_here()

    def _fail(self, i: int, place: NonFinite | None) -> None:
        """Raise, or keep the sequence at its last finite token; place is where its state was found not finite."""
        row, start = self.rows[i], self._good.select([i])
        with _undisturbed(self.model):
            state, logits, fault = read_until_fault(self.model, start.state, self._since[i], row)
        if fault is None:  # finite token by token, but not as it was read: name the place and where that began
            where = (place.layer, place.head) if place else (None, None)
            fault = Fault(row, *where, int(start.state.position), self._since[i][0])
            state, logits = start.state, None
        if not self.stop_at_fault:
            raise NonFiniteError(fault)
        self.faults[row], self.positions[row] = fault, fault.position
        read = self._since[i][: fault.position - int(start.state.position)]
        seen = start.seen.clone()
        seen[:, read] = True
        self._retired[row] = DecodeState(state, start.logits if logits is None else logits, seen)

    def _remain(self, rows: list[int]) -> None:
        if rows and rows != self.rows:
            self.current = self.current.select([self.rows.index(row) for row in rows])
        self.rows = rows
        self._rest_here()

    def _rest_here(self) -> None:
        self._good, self._since = self.current, [[] for _ in self.rows]

    def _pieces(self, count: int) -> list[int]:
        """Lengths that end wherever the history wants a checkpoint."""
        assert self.history is not None
        pieces, capacity = [], self.history.capacity
        while count:
            pieces.append(min(capacity, count))
            count, capacity = count - pieces[-1], self.history.every
        return pieces

    def _as_tensors(self, tokens: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
        lengths = [len(t) for t in tokens]
        T = max(lengths)
        flat = array("q")  # torch.tensor takes ten times as long for nested lists
        for row in tokens:
            flat.extend(row)
            flat.extend(
                [row[-1]] * (T - len(row))
            )  # the filling repeats a token of its own row, so that `seen` stays true
        ids_BT = torch.frombuffer(flat, dtype=torch.int64).view(len(tokens), T).to(self.current.state.device)
        if min(lengths) == T:
            return ids_BT, None
        return ids_BT, (torch.arange(T) < torch.tensor(lengths)[:, None]).to(ids_BT.device)


class SessionDecoder(Decoder):
    """A decoder that chooses and reads tokens in a `DecodeSession`: one launch a token, no wait for its numbers.

    A sequence that is done goes on in the session, unheard, until three quarters are: a smaller batch is a new session.

    Args:
        most: tokens that will be read after the prompts, at most.
        graph: see DecodeSession.
    """

    def __init__(
        self, model: KimiLinearForCausalLM, start: DecodeState, *, most: int, graph: bool, stop_at_fault: bool = False
    ):
        super().__init__(model, start, stop_at_fault=stop_at_fault)
        self._most, self._graph = most, graph
        self._session: DecodeSession | None = None
        self._places: list[int] = []  # of the sequences in `rows`, in the session

    def choose(self, sampling: Sampling, seeds: Sequence[int]) -> list[int]:
        """As Decoder.choose. The tokens are on their way into the states already; `read` only notes them."""
        self._most -= 1
        with _undisturbed(self.model):
            if self._session is None or max(self.positions[row] for row in self.rows) >= self._session.capacity:
                self._open(sampling, [seeds[row] for row in self.rows])
            assert self._session is not None
            self._session.step_()
            self.num_calls += 1
        told = self._session.tokens()
        tokens = [told[place] for place in self._places]
        if bad := [i for i, token in enumerate(tokens) if token < 0]:
            for i in bad:
                self._fail(i, None)
            self._keep([row for i, row in enumerate(self.rows) if i not in bad])
        return [token for token in tokens if token >= 0]

    def read(self, tokens: Sequence[Sequence[int]]) -> None:
        if self._session is None:
            return super().read(tokens)
        for row, since, new in zip(self.rows, self._since, tokens, strict=True):
            since.extend(new)
            self.positions[row] += len(new)
        if max(map(len, self._since)) >= SESSION_CHECK_EVERY:
            self._check()

    def _open(self, sampling: Sampling, seeds: list[int]) -> None:
        """A session for the sequences in `rows`, with room for FIRST_ROOM tokens, or as many as there are."""
        if self._session is not None:
            self._fetch()
        longest = max(self.positions[row] for row in self.rows)
        capacity = longest + min(self._most + 1, max(FIRST_ROOM, longest))
        self._session = DecodeSession(self.model, self.current, sampling, seeds, capacity=capacity, graph=self._graph)
        self._places = list(range(len(self.rows)))

    def _fetch(self) -> None:
        if self._session is not None:
            self.current = self._session.value(self._places)

    def _check(self) -> None:
        self._fetch()
        super()._check()

    def _remain(self, rows: list[int]) -> None:
        places = [self._places[self.rows.index(row)] for row in rows] if self._session else []
        super()._remain(rows)
        self._places = places
        if self._session is not None and len(rows) <= self._session.batch_size // 4:
            self._session = None

    def _keep(self, rows: list[int]) -> None:
        """Go on with some of the sequences, those tokens unchecked that were read since the last check."""
        at = [self.rows.index(row) for row in rows]
        self._places, self._since = [self._places[i] for i in at], [self._since[i] for i in at]
        if at:
            self._good = self._good.select(at)
        self.rows = rows


@contextmanager
def _undisturbed(model: KimiLinearForCausalLM) -> Iterator[None]:
    """Without gradients and not as in training; afterwards every module is as it was."""
    training = [module for module in model.modules() if module.training] if model.training else []
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
