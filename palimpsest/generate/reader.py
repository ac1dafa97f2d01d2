"""Sequences read side by side, each leaving when it is done; numbers checked on the way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from palimpsest.models.kimi_linear.history import StateHistory
from palimpsest.models.kimi_linear.model import CausalOutput, KimiLinearForCausalLM
from palimpsest.models.kimi_linear.nonfinite import Fault, NonFiniteError, read_until_fault
from palimpsest.models.kimi_linear.state import ModelState
from palimpsest.models.kimi_linear.state_file import read_state, save_state

CHECK_EVERY = 64  # steps between two checks of the whole state; the logits are checked at every one


@dataclass(frozen=True)
class Ready:
    """Sequences that have been read and are ready to go on.

    Attributes:
        state: after all tokens.
        logits: [B, N], for the next token.
        seen: [B, N] bool, the tokens that occurred; for the repetition penalty.
    """

    state: ModelState
    logits: Tensor
    seen: Tensor

    def select(self, rows: Sequence[int]) -> Ready:
        """Some of the sequences, in the order given; a sequence may occur more than once."""
        index = torch.tensor(list(rows), device=self.logits.device)
        return Ready(self.state.select(rows), self.logits[index], self.seen[index])

    @staticmethod
    def join(parts: Sequence[Ready]) -> Ready:
        """Several as one batch."""
        state = ModelState.join([part.state for part in parts])
        return Ready(state, torch.cat([p.logits for p in parts]), torch.cat([p.seen for p in parts]))

    def save(self, path: str | Path, model: KimiLinearForCausalLM) -> None:
        """Write everything to a file; errors as `state_file.save_state`."""
        save_state(path, self.state, model, extra={"logits": self.logits, "seen": self.seen})

    @staticmethod
    def load(path: str | Path, model: KimiLinearForCausalLM) -> Ready:
        """Read what `save` wrote; errors as `state_file.load_state`."""
        state, extra = read_state(path, model)
        if extra.keys() != {"logits", "seen"}:
            raise ValueError(f"{str(path)!r} holds a state alone; load it with ModelState.load and give a prompt")
        return Ready(state, extra["logits"], extra["seen"])

    @staticmethod
    def before(state: ModelState, vocab_size: int, seen: Tensor | None = None) -> Ready:
        """A state before its prompt: the logits are unknown, and so NaN, until a token is read."""
        shape = (state.batch_size, vocab_size)
        if seen is None:
            seen = torch.zeros(shape, dtype=torch.bool, device=state.device)
        return Ready(state, torch.full(shape, torch.nan, device=state.device), seen)


class Reader:
    """Reads tokens into states. Sequences keep the number they came with; `rows` lists those still being read.

    Args:
        ready: where the sequences stand; not changed.
        stop_at_fault: leave a sequence at its last finite token instead of raising NonFiniteError.
        history: keeps checkpoints on the way, for one sequence.
    """

    def __init__(
        self,
        model: KimiLinearForCausalLM,
        ready: Ready,
        *,
        stop_at_fault: bool = False,
        history: StateHistory | None = None,
    ):
        self.model, self.stop_at_fault, self.history = model, stop_at_fault, history
        self.rows = list(range(ready.state.batch_size))
        self.ready = ready
        self.positions: list[int] = ready.state.position.tolist()  # kept here too, so that a device is asked only once
        self.faults: dict[int, Fault] = {}
        self.num_calls = 0
        self._left: dict[int, Ready] = {}
        self._good = ready  # as last checked; the tokens of each row since then make a fault's token known
        self._since: list[list[int]] = [[] for _ in self.rows]
        self._tried: tuple[Tensor, CausalOutput] | None = None

    def read(self, tokens: Sequence[Sequence[int]]) -> None:
        """Read the next tokens of each sequence in `rows`, at least one of each."""
        ids_BT, mask_BT = self._as_tensors(tokens)
        pieces = [ids_BT.shape[1]] if self.history is None else self._pieces(ids_BT.shape[1])
        for ids in ids_BT.split(pieces, dim=1):
            state, logits = self._step(ids) if ids.shape[1] == 1 and mask_BT is None else self._chunk(ids, mask_BT)
            self._take(state, logits, ids)
        self._note(tokens)

    def try_out(self, tokens: Sequence[int]) -> Tensor:
        """The logits [n, N] after each of n tokens of the one sequence there is, without reading them for good."""
        ids = torch.tensor([list(tokens)], device=self.ready.state.device)
        with _undisturbed(self.model):
            output = self.model(ids, state=self.ready.state)
        self.num_calls += 1
        self._tried = ids, output
        return output.logits[0]

    def keep(self, count: int) -> None:
        """Read the first `count` of the tokens tried out: free if all are kept, otherwise the state goes back."""
        assert self._tried is not None, "keep comes after try_out"
        (ids, output), self._tried = self._tried, None
        if count < ids.shape[1]:
            ids = ids[:, :count]
            state, logits = self._chunk(ids, None)
        else:
            state, logits = output.state, output.logits[:, -1]
        self._take(state, logits, ids)
        self._note(ids.tolist())

    def leave(self, rows: Sequence[int]) -> None:
        """Sequences that are done: their states are checked, kept, and read no further."""
        if not rows:
            return
        self._check()
        for row in rows:
            if row in self.rows:
                self._left[row] = self.ready.select([self.rows.index(row)])
        self._remain([row for row in self.rows if row not in rows])

    def return_all(self) -> None:
        """Read on with the sequences that have left, but for those that failed."""
        back = sorted(row for row in self._left if row not in self.faults)
        if back:
            parts = [*([self.ready] if self.rows else []), *(self._left.pop(row) for row in back)]
            self.rows, self.ready = [*self.rows, *back], Ready.join(parts)
            self._rest_here()

    def result(self) -> Ready:
        """All sequences, those that failed at their last finite token."""
        self.leave(self.rows)
        return Ready.join([self._left[row] for row in sorted(self._left)])

    def _step(self, ids: Tensor) -> tuple[ModelState, Tensor]:
        state = self.ready.state
        if state is self._good.state:  # a step writes in place, and this one must last
            state = state.snapshot()
        with _undisturbed(self.model):
            logits, state = self.model.step_(ids[:, 0], state)
        self.num_calls += 1
        return state, logits

    def _chunk(self, ids: Tensor, mask: Tensor | None) -> tuple[ModelState, Tensor]:
        with _undisturbed(self.model):
            output = self.model(ids, state=self.ready.state, mask=mask, last_only=True)
        self.num_calls += 1
        return output.state, output.logits[:, -1]

    def _take(self, state: ModelState, logits: Tensor, ids: Tensor) -> None:
        self.ready = Ready(state, logits, self.ready.seen.scatter(1, ids, True))
        if self.history is not None:
            self.history = self.history.record(state, ids)

    def _note(self, tokens: Sequence[Sequence[int]]) -> None:
        for row, since, new in zip(self.rows, self._since, tokens, strict=True):
            since.extend(new)
            self.positions[row] += len(new)
        if max(map(len, self._since)) >= CHECK_EVERY or not self.ready.logits.isfinite().all():
            self._check()

    def _check(self) -> None:
        """Raise at the first fault, or leave the sequences that have one."""
        finite = self.ready.logits.isfinite().all(-1).tolist()
        found = {fault.sequence: fault for fault in self.ready.state.nonfinite()}
        bad = [i for i in range(len(self.rows)) if any(self._since) and (i in found or not finite[i])]
        for i in bad:
            row, start = self.rows[i], self._good.select([i])
            with _undisturbed(self.model):
                state, logits, fault = read_until_fault(self.model, start.state, self._since[i], row)
            if fault is None:  # finite token by token, but not in chunks: name the place and where its chunk began
                place = found.get(i)
                where = (place.layer, place.head) if place else (None, None)
                fault = Fault(row, *where, int(start.state.position), self._since[i][0])
                state, logits = start.state, None
            if not self.stop_at_fault:
                raise NonFiniteError(fault)
            self.faults[row], self.positions[row] = fault, fault.position
            read = self._since[i][: fault.position - int(start.state.position)]
            seen = start.seen.clone()
            seen[:, read] = True
            self._left[row] = Ready(state, start.logits if logits is None else logits, seen)
        if bad:
            self._remain([row for i, row in enumerate(self.rows) if i not in bad])
        else:
            self._rest_here()

    def _remain(self, rows: list[int]) -> None:
        if rows and rows != self.rows:
            self.ready = self.ready.select([self.rows.index(row) for row in rows])
        self.rows = rows
        self._rest_here()

    def _rest_here(self) -> None:
        self._good, self._since = self.ready, [[] for _ in self.rows]

    def _pieces(self, count: int) -> list[int]:
        """Lengths that end wherever the history wants a checkpoint."""
        assert self.history is not None
        pieces, room = [], self.history.room
        while count:
            pieces.append(min(room, count))
            count, room = count - pieces[-1], self.history.every
        return pieces

    def _as_tensors(self, tokens: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
        lengths = [len(t) for t in tokens]
        T = max(lengths)
        # The filling repeats a token of its own row, so that `seen` stays true.
        ids_BT = torch.tensor([[*t, *[t[-1]] * (T - len(t))] for t in tokens], device=self.ready.state.device)
        if min(lengths) == T:
            return ids_BT, None
        return ids_BT, (torch.arange(T) < torch.tensor(lengths)[:, None]).to(ids_BT.device)


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
