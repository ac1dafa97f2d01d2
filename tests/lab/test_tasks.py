"""Every generator against an independent solver, and what a fair experiment needs of them."""

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.lab.tasks import (
    IGNORED,
    MQAR,
    TASKS,
    Induction,
    Key,
    Needle,
    Palindrome,
    SelectiveCopy,
    Stack,
    StateTracking,
    Task,
    Text,
)
from tests.lab import solvers

seeds = st.integers(0, 2**31)
lengths = st.integers(2, 40)
ANY = {
    "palindrome": st.builds(lambda n, v: Palindrome(length=2 * n, vocab_size=v), lengths, st.integers(3, 100)),
    "mqar": st.builds(
        lambda n, more, spare, form: MQAR(length=4 * n + more, vocab_size=2 * (n + 1 + spare), pairs=n, form=form),
        st.integers(2, 12), lengths, st.integers(0, 300), st.sampled_from(["gaps", "separator"]),
    ),
    "stack": st.builds(lambda n, s: Stack(length=n + 4, stacks=s, elements=7), lengths, st.integers(1, 9)),
    "state_tracking": st.builds(
        lambda n, kind, degree, letters: StateTracking(length=n, kind=kind, degree=degree, letters=letters),
        lengths, st.sampled_from(["parity", "modular", "group"]), st.integers(2, 5), st.sampled_from(["all", "swaps"]),
    ),
    "needle": st.builds(
        lambda n, needles, values, depth: Needle(
            length=n * 20 + 600, needles=needles, queries=(needles + 1) // 2, values=values, depth=depth
        ),
        lengths, st.integers(1, 3), st.integers(1, 3), st.sampled_from([None, 0.0, 0.3, 1.0]),
    ),
    "selective_copy": st.builds(lambda n, k: SelectiveCopy(length=2 * k + n, symbols=k), lengths, st.integers(1, 9)),
    "induction": st.builds(
        lambda n, v, k: Induction(length=n + 24, vocab_size=v, n=k, piece=k + 4), lengths, st.integers(2, 90), st.integers(1, 3)
    ),
    "text": st.builds(lambda n: Text(length=n), lengths),
}  # fmt: skip


def test_every_task_is_tested():
    assert set(ANY) == set(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_an_independent_solver_finds_every_answer_and_no_other(name):
    @settings(max_examples=25)
    @given(ANY[name], seeds)
    def agree(task, seed):
        assert isinstance(task, Task)
        batch = task.draw(3, Key("train", seed, 5))
        assert batch.tokens.shape == batch.labels.shape == batch.scored.shape == (3, task.length)
        assert 0 <= batch.tokens.min() <= batch.tokens.max() < task.vocab_size
        asked = batch.scored if name == "needle" else batch.labels != IGNORED
        for tokens, labels, where in zip(batch.tokens.tolist(), batch.labels.tolist(), asked.tolist()):
            found = getattr(solvers, name)(tokens, task)
            told = {t: label for t, label in enumerate(labels) if where[t]}
            told.pop(task.length - 1 if name == "text" else None, None)  # the solver does not see the next byte
            assert told == found

    agree()


@pytest.mark.parametrize("name", TASKS)
def test_a_key_gives_one_batch_and_another_key_another(name):
    task = TASKS[name]() if name != "state_tracking" else StateTracking(length=64)
    one = task.draw(4, Key("train", 3, 7))
    assert one.tokens.equal(task.draw(4, Key("train", 3, 7)).tokens)
    for other in (Key("train", 3, 8), Key("train", 4, 7), Key("test", 3, 7)):
        assert not one.tokens.equal(task.draw(4, other).tokens)


@pytest.mark.parametrize("name", [n for n in TASKS if n != "text"])
def test_no_test_sequence_is_ever_trained_on(name):
    task = TASKS[name]() if name != "state_tracking" else StateTracking(length=64)
    rows = lambda split, seed: {
        tuple(row) for step in range(20) for row in task.draw(16, Key(split, seed, step)).tokens.tolist()
    }
    held_out = rows("test", 0)
    assert not held_out & (rows("train", 0) | rows("train", 1))


def test_training_and_test_text_come_from_different_files():
    from palimpsest.lab.tasks.text import library

    text = library(("python",))
    train = text["train"].tobytes()
    assert len(text["test"]) > 100_000
    assert len(train) > 1_000_000
    pieces = [text["test"][i : i + 200].tobytes() for i in range(0, 100_000, 1000)]
    assert sum(piece in train for piece in pieces) <= 10  # files of one library repeat some of each other


def test_a_broken_answer_is_caught():
    task = MQAR(length=32, vocab_size=32, pairs=4)
    batch = task.draw(1, Key("train", 0, 0))
    labels = batch.labels[0].roll(1).tolist()
    told = {t: label for t, label in enumerate(labels) if label != IGNORED}
    assert told != solvers.mqar(batch.tokens[0].tolist(), task)


def test_queries_come_soon_more_often_than_late():
    slices = MQAR(length=256, vocab_size=64, pairs=4).draw(512, Key("train", 0, 0))
    gap = slices.slices["gap"][slices.scored]
    assert (gap < 32).float().mean() > 3 * (gap > 200).float().mean() > 0


def test_a_needle_lies_at_its_depth():
    for depth in (0.0, 0.5, 1.0):
        task = Needle(length=2000, depth=depth)
        batch = task.draw(2, Key("test", 0, 0))
        place = bytes(batch.tokens[0].tolist()).index(b"\nThe key of ")
        assert abs(place / (2000 - 80) - depth) < 0.02
        assert set(batch.slices["depth"][batch.scored].tolist()) == {round(depth * 10)}


def test_all_values_of_a_name_are_asked_in_the_order_of_the_text():
    task = Needle(length=600, needles=2, values=3, depth=0.5)
    assert task.name == "needle, 1 of 2, 3 values"
    batch = task.draw(8, Key("test", 0, 0))
    assert batch.scored.sum(1).tolist() == [3 * 4] * 8
    for tokens, scored, depth in zip(batch.tokens.tolist(), batch.scored, batch.slices["depth"]):
        told = depth[scored][::4].tolist()
        assert told == sorted(told)
        assert 5 in told
        text = bytes(tokens)
        name = re.search(rb"keys of (\w{4})\?", text)[1]
        facts = re.findall(rb"\nThe key of %b is (\d{4})" % name, text)
        assert text.endswith(b"are " + b", ".join(facts))


def test_a_stack_is_asked_at_every_depth():
    batch = Stack(length=600, stacks=4).draw(16, Key("train", 0, 0))
    depths = batch.slices["depth"][batch.scored]
    assert set(range(1, 5)) <= set(depths.tolist())


def test_swaps_are_exchanges_of_two_things():
    task = StateTracking(kind="group", degree=4, letters="swaps")
    assert len(task.draw(8, Key("train", 0, 0)).tokens.unique()) == 6


BAD = {
    "pairs that do not fit": (lambda: MQAR(length=64, vocab_size=8192, pairs=17), "give at most 16 pairs"),
    "separator form": (lambda: MQAR(length=64, vocab_size=8192, pairs=40, form="separator"), "at most 31"),
    "too few keys": (lambda: MQAR(length=256, vocab_size=32, pairs=16), "give an even number of at least 34"),
    "half a pair": (lambda: MQAR(pairs=2.5), "pairs is 2.5; give a whole number"),
    "a length with a point": (lambda: Text(length=1e3), "Text: length is 1000.0; give a whole number"),
    "odd vocabulary": (lambda: MQAR(vocab_size=63), "even"),
    "unknown form": (lambda: MQAR(form="paper"), "'gaps' or 'separator'"),
    "power": (lambda: MQAR(power=0), "power is 0"),
    "odd palindrome": (lambda: Palindrome(length=63), "even number"),
    "palindrome vocabulary": (lambda: Palindrome(vocab_size=2), "vocab_size is 2"),
    "no room for a pop": (lambda: Stack(length=5), "at least 6"),
    "no stack": (lambda: Stack(stacks=0), "stacks is 0"),
    "unknown machine": (lambda: StateTracking(kind="turing"), "parity, modular, group"),
    "degree": (lambda: StateTracking(kind="group", degree=6), "2 to 5"),
    "symbols": (lambda: SelectiveCopy(length=16, symbols=9), "at most 8"),
    "piece": (lambda: Induction(n=3, piece=3), "more than n = 3"),
    "room for pieces": (lambda: Induction(length=12, piece=8), "at least 16"),
    "too many n-grams": (lambda: Induction(vocab_size=8192, n=5, piece=9), "smaller n"),
    "haystack too small": (lambda: Needle(length=64), "at least"),
    "more questions than needles": (lambda: Needle(queries=2), "queries is 2"),
    "no value": (lambda: Needle(values=0), "values is 0"),
    "more values than fit": (lambda: Needle(length=200, values=6), "give at least"),
    "depth in percent": (lambda: Needle(depth=50), "from 0 to 1"),
    "negative seed": (lambda: Palindrome().draw(1, Key("train", -1, 0)), "seed is -1"),
    "unknown split": (lambda: Palindrome().draw(1, Key("valid", 0, 0)), "'train' or 'test'"),
    "no text": (lambda: Text(paths=("no such folder",)).draw(1, Key("train", 0, 0)), "does not exist"),
}


@pytest.mark.parametrize("case", BAD)
def test_impossible_settings_are_one_sentence_with_the_remedy(case):
    make, sentence = BAD[case]
    with pytest.raises(ValueError, match=sentence) as error:
        make()
    assert "\n" not in str(error.value)


def test_text_shorter_than_the_sequence_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("too short " * 20)
    with pytest.raises(ValueError, match="too few for length"):
        Text(length=4096, paths=(str(tmp_path / "a.txt"),)).draw(1, Key("test", 0, 0))


@pytest.mark.parametrize("name", TASKS)
def test_every_number_that_should_be_whole_is_asked_to_be(name):
    with pytest.raises(ValueError, match="length is 64.0; give a whole number"):
        TASKS[name](length=64.0)


def test_lengths_extrapolate():
    for task in (Palindrome(), Stack(), StateTracking(), SelectiveCopy(), Induction()):
        assert replace(task, length=4 * task.length).vocab_size == task.vocab_size


def test_batches_are_int64_and_bool():
    batch = MQAR().draw(1, Key("test", 0, 0))
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64
    assert batch.scored.dtype == torch.bool
