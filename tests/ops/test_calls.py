"""Every public function and every kernel's operator, called right and wrong: the law's number, or a sentence.

The wrong calls are those of `benchmarks.faults.bad_calls`, where `python -m benchmarks.faults --only "bad calls"` makes all
of them. Here a few hundred are drawn. `python -m pytest tests/ops/test_calls.py --hypothesis-profile=long` draws 20,000.
"""

import itertools

import pytest
import torch
from hypothesis import example, given, note, settings
from hypothesis import strategies as st

from benchmarks.faults.bad_calls import DOORS, FUNCTIONS, Draw, bad_operator_calls, outcome, spoiled
from palimpsest import backends
from palimpsest.ops import arguments
from palimpsest.ops.arguments import TABLES
from palimpsest.ops.cpu import register
from palimpsest.ops.gpu import register as gpu

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@st.composite
def draws(draw):
    """Right sizes, from none to a chunk and a bit more."""
    H, channels = draw(st.integers(1, 3)), st.sampled_from([1, 2, 3, 8, 17])
    borders = draw(st.none() | st.lists(st.integers(0, 40), max_size=4).map(sorted))
    T = draw(st.sampled_from([0, 1, 2, 15, 16, 17, 40]))
    sizes = {"H": H, "G": H * draw(st.integers(1, 3)), "K": draw(channels), "V": draw(channels)}
    if borders is None:
        sizes |= {"B": draw(st.integers(0, 3)), "T": T}
    else:
        sizes |= {"B": 1, "T": max([T, *borders]), "borders": (0, *borders, max([T, *borders]))}
    kinds = {"dtype": draw(st.sampled_from(DTYPES)), "gate_dtype": draw(st.sampled_from(DTYPES))}
    return Draw(**sizes, **kinds, with_state=draw(st.booleans()), seed=draw(st.integers(0, 3)))


@settings(max_examples=300)
@given(st.sampled_from(list(FUNCTIONS)), draws(), st.sampled_from(["auto", *backends.names()]), st.data())
@example("kda_from_logits", Draw(B=0), "auto", None)
@example("trace", Draw(T=0), "auto", None)
def test_a_call_gives_the_laws_number_or_a_sentence(name, draw, backend, data):
    function = FUNCTIONS[name]
    call = function.draw(draw)
    if function.has_backends:
        call["backend"] = backend
    wrong = list(spoiled(call))
    for at in data.draw(st.lists(st.integers(0, len(wrong) - 1), max_size=2)) if data else ():
        what, changed, value = wrong[at]
        call[changed] = value
        note(what)
    assert outcome(name, call) is None


def test_an_operator_refuses_what_its_kernel_cannot_read():
    wrong = [
        f"{trial.name}: {found}"
        for trial in itertools.islice(bad_operator_calls(), 0, None, 9)
        if (found := trial.run())
    ]
    assert wrong == []


# ---- mutants: with a row taken out of the table, what it refuses is let through ----


class Anything:
    """Equal to every shape, holds every dtype."""

    def __eq__(self, other):
        return True

    def __contains__(self, other):
        return True

    __hash__ = None


ROWS = [(op, i) for op, table in TABLES.items() for i in range(len(table.rows))]


def right(op):
    sizes = {"B": 1, "T": 3, "H": 2, "K": 5, "HV": 4, "V": 7, "N": 1, "P": 1, "HV*K": 20}
    shapes = ([sizes[x] for x in row.shape.removeprefix("numbers ").split()] for row in TABLES[op].rows)
    return [torch.zeros(shape) for shape in shapes]


def wrongs(op, i, x):
    """What a row refuses, by the part of the row that refuses it."""
    yield "shape", torch.zeros([x.shape[0] + 1, *x.shape[1:]] if i == 2 else [*x.shape[:-1], x.shape[-1] + 1])
    yield "dtypes", x.long()
    if i and TABLES[op].rows[i].optional is False:
        yield "optional", None
    if TABLES[op].rows[i].in_place:
        yield "in_place", torch.stack((x, x), -1)[..., 0]


def without(rules, i, part):
    """The rules of `check` without one part of one row."""
    mutants = {"shape": 0, "dtypes": 2, "optional": 3, "in_place": 4}
    rule = list(rules[i])
    rule[mutants[part]] = {
        "shape": lambda sizes: Anything(),
        "dtypes": Anything(),
        "optional": True,
        "in_place": False,
    }[part]
    return (*rules[:i], tuple(rule), *rules[i + 1 :])


@pytest.mark.parametrize(("op", "i"), ROWS, ids=lambda x: str(x))
def test_each_part_of_each_row_is_what_refuses(op, i, monkeypatch):
    tensors, kept = right(op), 1
    arguments.check(op, tensors, kept=kept)
    for part, wrong in wrongs(op, i, tensors[i]):
        changed = [*tensors[:i], wrong, *tensors[i + 1 :]]
        with pytest.raises((ValueError, TypeError)) as refusal:
            arguments.check(op, changed, kept=kept)
        assert TABLES[op].rows[i].name in str(refusal.value) or "the heads of" in str(refusal.value)
        if i in (0, 2):  # q and the values give the sizes: all rows then disagree with them
            continue
        rules, *rest = arguments.RULES[op]
        with monkeypatch.context() as patched:
            mutant = {dtype: without(rows, i, part) for dtype, rows in rules.items()}
            patched.setitem(arguments.RULES, op, (mutant, *rest))
            arguments.check(op, changed, kept=kept)


@pytest.mark.parametrize("op", TABLES)
def test_places_layouts_and_sizes_are_refused(op):
    tensors = right(op)
    for i, row in enumerate(TABLES[op].rows):
        for wrong in (tensors[i].to("meta"), tensors[i].to_sparse()):
            with pytest.raises(ValueError, match=rf"{row.name}|q .*{row.name}"):
                arguments.check(op, [*tensors[:i], wrong, *tensors[i + 1 :]], kept=1)
    if TABLES[op].on:
        with pytest.raises(ValueError, match=f"reads tensors on the {TABLES[op].on}"):
            arguments.check(op, [x.to("meta") for x in tensors], kept=1)
    for letter, most in (("K", TABLES[op].key_channels), ("V", TABLES[op].value_channels)):
        for size in (0, most + 1):
            if size == float("inf"):
                continue
            sizes = {"B": 1, "T": 3, "H": 2, "K": 5, "HV": 4, "V": 7, "N": 1, "P": 1} | {letter: int(size)}
            sizes["HV*K"] = 4 * sizes["K"]
            with pytest.raises(ValueError, match="channels a head"):
                arguments.check(op, [torch.zeros([sizes[x] for x in row.shape.removeprefix("numbers ").split()])
                                     for row in TABLES[op].rows], kept=1)  # fmt: skip
    for H, HV in ((0, 4), (3, 4), (2, 0)):
        sizes = {"B": 1, "T": 3, "H": H, "K": 5, "HV": HV, "V": 7, "N": 1, "P": 1, "HV*K": HV * 5}
        with pytest.raises(ValueError, match="the heads of v must be a multiple"):
            arguments.check(op, [torch.zeros([sizes[x] for x in row.shape.removeprefix("numbers ").split()])
                                 for row in TABLES[op].rows], kept=1)  # fmt: skip


class ReachedError(Exception):
    pass


@pytest.mark.parametrize("door", DOORS)
def test_every_door_checks_before_anything_else(door, monkeypatch):
    """A kernel's operator that did not ask the table would go on; this one is told to stop there."""

    def stop(*_, **__):
        raise ReachedError

    call, right = DOORS[door]
    monkeypatch.setattr(arguments, "check", stop)
    monkeypatch.setattr(gpu, "check", stop)
    monkeypatch.setattr(register.jit, "library", lambda: pytest.fail("a kernel was reached"))
    with pytest.raises(ReachedError):
        call(right)
    if door.startswith("gpu"):
        with pytest.raises(ReachedError):  # not the fakes alone
            call({n: x if x is None else torch.zeros(x.shape) for n, x in right.items()})
