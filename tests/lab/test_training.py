"""One run of one contestant: the same again from the same seed, and ended when it should end."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from palimpsest.lab.framework.experiment import InterruptedSweep
from palimpsest.lab.framework.results import from_json, to_json
from palimpsest.lab.measure.context_cost import Cache, Decode, Prefill
from palimpsest.lab.measure.state_quantization import Drift, StoredState
from palimpsest.lab.measure.transition_spectra import Spectra
from palimpsest.lab.model_variants import MODEL_VARIANTS, Size, build
from palimpsest.lab.tasks import IGNORED, MQAR, Key, Needle, Palindrome, Stack, Text
from palimpsest.lab.tasks.task import batch
from palimpsest.lab.training import Training, answer_losses, draw_test, evaluate, learn, question

SIZE = Size(layers=1, hidden_size=16, heads=1, head_dim=8, mlp=16)
POINT = Training(
    who=MODEL_VARIANTS["kda"], train=(MQAR(length=16, vocab_size=16, pairs=3),), size=SIZE, steps=4, tokens_per_step=64,
    evaluate_every=2, test_batches=1,
)  # fmt: skip


def result(point: Training):
    return learn(point, "cpu", lambda *_: None)[0]


def test_the_same_seed_gives_the_same_numbers_and_another_others():
    one = result(POINT)
    assert one == result(POINT)
    assert one != result(replace(POINT, seed=1))


def test_a_run_ends_when_it_has_succeeded():
    found = result(replace(POINT, stop_at=1e-9, steps=50))
    assert found["rows"][0]["steps"] <= 50
    early = result(replace(POINT, train=(Palindrome(length=4, vocab_size=3),), steps=400, lr=3e-2, evaluate_every=20))
    assert early["rows"][0]["steps"] < 400
    assert early["rows"][0]["best_accuracy"] >= 0.995


def test_a_run_that_diverges_is_told_and_ends():
    found = result(replace(POINT, lr=1e30, steps=50, warmup=0.0))
    assert found["rows"][0]["diverged"]
    assert found["rows"][0]["steps"] < 50
    again = from_json(to_json(found))
    assert math.isnan(again["curve"][-1]["train_loss"]) or math.isinf(again["curve"][-1]["train_loss"])


def test_tests_are_other_tasks_and_a_mixture_trains_on_several():
    long = MQAR(length=32, vocab_size=16, pairs=3)
    rows = result(replace(POINT, train=(*POINT.train, long), tests=(POINT.train[0], long)))["rows"]
    assert [row["test_length"] for row in rows] == [16, 32]


class Interrupt:
    """Interrupts at some step."""

    def __init__(self, share: float):
        self.share = share

    def __call__(self, share: float, word: str) -> None:
        if share >= self.share:
            raise InterruptedSweep


@pytest.mark.parametrize("share", [0.15, 0.5, 0.9])  # between evaluations, at one, near the end
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(tmp_path, share):
    point, place = replace(POINT, steps=20, evaluate_every=5, lr=1e-2), tmp_path / "unfinished" / "point.pt"
    whole = learn(point, "cpu", lambda *_: None)
    with pytest.raises(InterruptedSweep):
        learn(point, "cpu", Interrupt(share), place)
    asked = []
    again = learn(point, "cpu", lambda share, word: asked.append(share), place)
    assert len(asked) == round(20 * (1 - share))
    assert again[0] == whole[0]
    assert all(mine.equal(theirs) for mine, theirs in zip(again[1].parameters(), whole[1].parameters()))


def test_a_run_interrupted_as_it_succeeds_does_not_go_on(tmp_path):
    point = replace(POINT, steps=20, evaluate_every=5, stop_at=1e-9, lr=1e-2)
    first = next(c["step"] for c in result(point)["curve"] if c["accuracy"] > 0)
    with pytest.raises(InterruptedSweep):
        learn(point, "cpu", Interrupt(first / 20), tmp_path / "point.pt")
    assert learn(point, "cpu", lambda *_: None, tmp_path / "point.pt")[0]["rows"][0]["steps"] == first


def test_only_what_is_asked_is_learned():
    model = build(MODEL_VARIANTS["kda"], SIZE, 16)
    batch = POINT.train[0].draw(2, Key("train", 0, 0))
    asked = question(batch, "cpu")
    losses, correct = answer_losses(model, asked, "cpu")
    assert len(losses) == len(correct) == asked.num_scored == int((batch.labels != IGNORED).sum())
    logits = model(batch.tokens).logits
    assert correct.equal(logits.argmax(-1)[batch.scored] == batch.labels[batch.scored])
    right = torch.nn.functional.cross_entropy(logits[batch.scored], batch.labels[batch.scored])
    assert losses.mean().item() == pytest.approx(right.item(), rel=1e-5)


def test_answers_are_told_from_the_text_around_them():
    batch = Needle(length=200).draw(2, Key("train", 0, 0))
    asked = question(batch, "cpu")
    assert (asked.num_scored, len(asked.place)) == (8, 2 * 200)
    assert asked.target[:8].equal(batch.labels[batch.scored])
    assert sorted(asked.place.tolist()) == list(range(400))


def test_a_gpu_copies_batches_by_itself(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    batch = POINT.train[0].draw(2, Key("train", 0, 0))
    question(batch, "cpu")
    assert pinned == []
    assert question(batch, "cuda:1").tokens is pinned[0]
    assert len(pinned) == 3


def test_a_batch_that_asks_nothing_teaches_nothing():
    quiet = Stack(length=6, stacks=64, elements=4)  # a push, and hardly ever its pop
    point = replace(POINT, train=(quiet,), tests=(replace(quiet, length=300),), tokens_per_step=6, steps=3)
    assert result(point)["rows"][0]["steps"] == 3


def test_an_untrained_model_knows_nothing():
    model = build(MODEL_VARIANTS["kda"], SIZE, 256)
    found = evaluate(model, draw_test(Text(length=64), 2, 2, "cpu"), "cpu")
    assert found["bits"] == pytest.approx(8, abs=0.3)


def test_a_sequence_is_exact_if_all_its_answers_are_right(monkeypatch):
    some_right = lambda model, asked, *_: (torch.zeros(len(asked.place)), asked.place % 48 % 5 > 0)
    monkeypatch.setattr("palimpsest.lab.training.answer_losses", some_right)
    test = draw_test(MQAR(length=16, vocab_size=16, pairs=2), 4, 3, "cpu")
    found = evaluate(build(MODEL_VARIANTS["kda"], SIZE, 16), test, "cpu")
    places = torch.arange(64).view(4, 16) % 48 % 5 > 0
    right = torch.cat([places | ~b.scored for b in test.batches])
    answers = sum(int(b.scored.sum()) for b in test.batches)
    assert answers == 12 * 2
    assert 0 < found["exact"] < found["accuracy"] < 1
    assert found["exact"] == pytest.approx(right.all(1).double().mean().item())
    assert found["accuracy"] == pytest.approx(1 - int((~right).sum()) / answers)
    slices = found["slices"]["gap"]
    assert sum(n for _, n in slices.values()) == answers
    assert sum(ok * n for ok, n in slices.values()) / answers == pytest.approx(found["accuracy"])


BAD = {
    "no task": ({"train": ()}, "train is empty"),
    "two vocabularies": ({"tests": (MQAR(length=16, vocab_size=32, pairs=3),)}, r"vocabularies of \[16, 32\]"),
    "no steps": ({"steps": 0}, "steps is 0"),
    "half a step": ({"steps": 2.5}, "steps is 2.5; it must be a whole number"),
    "seed": ({"seed": -1}, "seed is -1"),
    "one task for several": ({"train": POINT.train[0]}, "give a tuple of tasks"),
    "a name for a contestant": ({"who": "kda"}, "give a ModelVariant"),
    "rate": ({"lr": -1.0}, "lr is -1.0"),
    "less than a sequence": ({"tokens_per_step": 8}, "less than one sequence of 16"),
    "schedule": ({"warmup": 0.6, "decay": 0.6}, "more than the run"),
    "pattern": ({"who": MODEL_VARIANTS["kda"].__class__("x", "KKKM")}, "pattern of 4 layers"),
}


@pytest.mark.parametrize("case", BAD)
def test_impossible_points_are_refused(case):
    changes, sentence = BAD[case]
    with pytest.raises(ValueError, match=sentence):
        replace(POINT, **changes).prepare()


@dataclass(frozen=True)
class Sides:
    """The answer tells the split: 1 after every token of a training sequence, 2 after every one of a test sequence."""

    name: str = "sides"
    length: int = 8
    vocab_size: int = 4

    def draw(self, count: int, key: Key):
        tokens = key.generator().integers(0, 4, (count, self.length))
        return batch(tokens, np.full_like(tokens, {"train": 1, "test": 2}[key.split]))


SIDES = replace(POINT, train=(Sides(),), steps=20, lr=1e-1, warmup=0.0, evaluate_every=5)


def test_what_is_learnt_is_of_the_training_split_alone_and_what_is_tested_of_the_other():
    found, model = learn(SIDES, "cpu", lambda *_: None)
    on = lambda split: (
        answer_losses(model, question(Sides().draw(16, Key(split, 1, 1)), "cpu"), "cpu")[1].float().mean()
    )
    assert found["curve"][-1]["train_loss"] < 0.1  # learnt it has
    assert on("train") == 1  # and that after which it was taught, however often it was tested in between
    assert on("test") == 0
    assert [row["accuracy"] for row in found["rows"]] == [0.0]
    assert all(point["accuracy"] == 0.0 for point in found["curve"])


def test_what_a_trained_model_is_asked_in_few_bits_is_of_the_test_split():
    stored = StoredState(training=SIDES, tests=(Sides(),), batch_size=4).run("cpu", lambda *_: None)
    assert {row["accuracy"] for row in stored["rows"]} == {0.0}


def test_what_a_trained_model_is_looked_at_is_of_the_test_split(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        Sides, "draw", lambda self, count, key, draw=Sides.draw: drawn.append(key) or draw(self, count, key)
    )
    measured = Spectra(training=replace(SIDES, steps=2), sequences=2).run("cpu", lambda *_: None)
    assert measured["rows"][0]["accuracy"] == 0.0
    assert drawn[-1].split == "test"
    assert {key.step for key in drawn if key.split == "train"} == {0, 1}


@pytest.mark.parametrize(
    ("point", "sentence"),
    [
        (replace(POINT, seed=True), "seed is True"),
        (replace(POINT, lr=math.inf), "lr is inf"),
        (replace(POINT, warmup=-1.0), "warmup is -1.0; give 0 or more"),
        (Spectra(training=POINT, sequences=1.5), "sequences is 1.5"),  # type: ignore[arg-type]
        (Drift(format="int8", heads=0), "heads is 0"),
        (Drift(format="int8", seed=-1), "seed is -1"),
        (StoredState(training=POINT, tests=POINT.train, batch_size=0), "batch_size is 0"),
        (Decode(layer=3), "layer is 3; it must be a text"),  # type: ignore[arg-type]
        (Decode(layer="kda", rounds=0), "rounds is 0"),
        (Decode(layer="kda", steps=0), "steps is 0"),
        (Prefill(layer="kda", backend="cdua"), "backend is 'cdua'; choose one of auto, "),
        (Cache(pattern="K", contexts=()), "give at least one"),
    ],
)
def test_fields_of_a_wrong_kind_or_range_are_refused_before_anything_runs(point, sentence):
    with pytest.raises(ValueError, match=sentence):
        point.prepare()
