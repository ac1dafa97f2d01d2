"""One run of one contestant: the same again from the same seed, and ended when it should end."""

import math
from dataclasses import replace

import pytest
import torch

from palimpsest.lab.contestants import CONTESTANTS, Size, build
from palimpsest.lab.run import counted, spelled
from palimpsest.lab.tasks import IGNORED, MQAR, Key, Needle, Palindrome, Text
from palimpsest.lab.training import Training, answer_losses, evaluate, learn

SIZE = Size(layers=1, hidden_size=16, heads=1, head_dim=8, mlp=16)
POINT = Training(
    who=CONTESTANTS["kda"], train=(MQAR(length=16, vocab_size=16, pairs=3),), size=SIZE, steps=4, tokens_per_step=64,
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
    again = counted(spelled(found))
    assert math.isnan(again["curve"][-1]["train_loss"]) or math.isinf(again["curve"][-1]["train_loss"])


def test_tests_are_other_tasks_and_a_mixture_trains_on_several():
    long = MQAR(length=32, vocab_size=16, pairs=3)
    rows = result(replace(POINT, train=(*POINT.train, long), tests=(POINT.train[0], long)))["rows"]
    assert [row["test_length"] for row in rows] == [16, 32]


def test_only_what_is_asked_is_learned():
    model = build(CONTESTANTS["kda"], SIZE, 16)
    batch = POINT.train[0].draw(2, Key("train", 0, 0))
    losses, correct = answer_losses(model, batch, "cpu")
    assert len(losses) == 1
    assert len(losses[0]) == int((batch.labels != IGNORED).sum())
    assert not correct[~batch.scored].any()
    logits = model(batch.tokens).logits
    assert correct[batch.scored].equal(logits.argmax(-1)[batch.scored] == batch.labels[batch.scored])
    right = torch.nn.functional.cross_entropy(logits[batch.scored], batch.labels[batch.scored])
    assert losses[0].mean().item() == pytest.approx(right.item(), rel=1e-5)


def test_answers_weigh_as_much_as_the_text_around_them():
    model = build(CONTESTANTS["kda"], SIZE, 256)
    batch = Needle(length=200).draw(2, Key("train", 0, 0))
    losses, _ = answer_losses(model, batch, "cpu")
    assert [len(part) for part in losses] == [8, 2 * 200 - 8]


def test_an_evaluation_counts_answers_sequences_and_slices():
    model = build(CONTESTANTS["kda"], SIZE, 256)
    found = evaluate(model, replace(POINT, train=(Text(length=64),)), Text(length=64), "cpu")
    assert found["bits"] == pytest.approx(8, abs=0.3)  # an untrained model knows nothing of 256 bytes
    asked = evaluate(build(CONTESTANTS["kda"], SIZE, 16), POINT, POINT.train[0], "cpu")
    slices = asked["slices"]["gap"]
    assert sum(n for _, n in slices.values()) == 3 * 4
    assert sum(ok * n for ok, n in slices.values()) / 12 == pytest.approx(asked["accuracy"])


BAD = {
    "no task": ({"train": ()}, "train is empty"),
    "two vocabularies": ({"tests": (MQAR(length=16, vocab_size=32, pairs=3),)}, r"vocabularies of \[16, 32\]"),
    "no steps": ({"steps": 0}, "steps is 0"),
    "rate": ({"lr": -1.0}, "lr is -1.0"),
    "less than a sequence": ({"tokens_per_step": 8}, "less than one sequence of 16"),
    "schedule": ({"warmup": 0.6, "decay": 0.6}, "more than the run"),
    "pattern": ({"who": CONTESTANTS["kda"].__class__("x", "KKKM")}, "pattern of 4 layers"),
}


@pytest.mark.parametrize("case", BAD)
def test_impossible_points_are_refused(case):
    changes, sentence = BAD[case]
    with pytest.raises(ValueError, match=sentence):
        replace(POINT, **changes).prepare()
