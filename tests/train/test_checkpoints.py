"""Checkpoints: no code runs from one, every byte is known, what is not finite is not saved, any number of processes."""

import json
import math
import os
import pickle
import shutil

import pytest
import safetensors.torch
import torch

from palimpsest.train import CheckpointError, NonFiniteError, best, checkpoints, latest, override, train
from palimpsest.train.run_folder import checkpoints_of

from .conftest import lines, same, small_recipe, stopper, weights


@pytest.fixture
def stopped(whole, tmp_path):
    """A copy of the shared run as it was after step 2, and its recipe."""
    recipe, reference, _, _ = whole
    shutil.copytree(reference, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    return recipe, tmp_path / "run"


def resumed(stopped):
    return train(*stopped, resume=True)


def forged(folder, change):
    """Changes training.json as somebody would who knows its digest."""
    state = json.loads((folder / "training.json").read_text())
    del state["digest"]
    change(state)
    for name in state["files"] if isinstance(state.get("files"), dict) else ():
        if (folder / name).is_file():
            state["files"][name] = checkpoints._sha256(folder / name)
    (folder / "training.json").write_text(json.dumps(state | {"digest": checkpoints._digest(state)}))


class Payload:
    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


PICKLES = ("custom_checkpoint_0.pkl", "optimizer.bin", "random_states_0.pkl", "scheduler.bin", "scaler.pt", ".metadata")


def test_no_code_runs_from_a_run_that_somebody_made(stopped, tmp_path):
    recipe, run = stopped
    for name in PICKLES:
        (latest(run) / name).write_bytes(pickle.dumps(Payload(tmp_path / "owned")))
        (latest(run) / "pytorch_model_fsdp_0").mkdir(exist_ok=True)
        (latest(run) / "pytorch_model_fsdp_0" / name).write_bytes(pickle.dumps(Payload(tmp_path / "owned")))
    assert resumed(stopped).finished, "what is not in the list of files is not looked at"
    assert not (tmp_path / "owned").exists()


def test_the_payload_would_run_if_it_were_unpickled(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "owned")))
    assert (tmp_path / "owned").exists()


def test_the_pickles_of_an_earlier_release_are_refused_and_its_weights_are_not(stopped, tmp_path):
    recipe, run = stopped
    (latest(run) / "training.json").unlink()
    for name in PICKLES:
        (latest(run) / name).write_bytes(pickle.dumps(Payload(tmp_path / "owned")))
    with pytest.raises(CheckpointError, match="earlier release wrote its training state by pickle"):
        resumed(stopped)
    assert not (tmp_path / "owned").exists()
    assert weights(run)


def test_one_flipped_bit_is_noticed_in_every_file(stopped):
    recipe, run = stopped
    whole = latest(run)
    names = sorted(p.name for p in whole.iterdir())
    assert {"model.safetensors", "optimizer.safetensors", "random.json", "training.json", "config.json"} <= set(names)
    for name in names:
        content = (whole / name).read_bytes()
        for place in (len(content) // 3, len(content) * 3 // 4):
            flipped = bytearray(content)
            flipped[place] ^= 1
            (whole / name).write_bytes(flipped)
            with pytest.raises(CheckpointError, match="step-00000002' cannot be resumed .*; it is the only one"):
                resumed(stopped)
        (whole / name).write_bytes(content)
    assert resumed(stopped).finished


FORGERIES = {
    "another step": (lambda s: s["progress"].update(step=3), "it is of step 3"),
    "a step below 0": (lambda s: s["progress"].update(step=-2), "negative"),
    "a step that is a text": (lambda s: s["progress"].update(step="2"), "progress.step is '2'"),
    "seconds that are NaN": (lambda s: s["progress"].update(seconds=math.nan), "progress.seconds is nan"),
    "no tokens": (lambda s: s["progress"].pop("tokens"), "other fields"),
    "no progress": (lambda s: s.update(progress=[]), "other fields"),
    "no files": (lambda s: s.update(files={}), "files are missing"),
    "files that are a list": (lambda s: s.update(files=[]), "cannot be resumed"),
    "a file elsewhere": (lambda s: s["files"].update({"../../run.json": "0"}), "run.json is missing"),
    "another version": (lambda s: s.update(version=2), "version 2; this release reads"),
    "another format": (lambda s: s.update(format=[]), "this release reads"),
}


@pytest.mark.parametrize("case", FORGERIES)
def test_a_forged_state_ends_in_a_sentence(stopped, case):
    change, sentence = FORGERIES[case]
    forged(latest(stopped[1]), change)
    with pytest.raises(CheckpointError, match=sentence) as error:
        resumed(stopped)
    assert "\n" not in str(error.value)


MOMENTA = {
    "of another shape": (lambda t: t | {n: x[:1].clone() for n, x in t.items() if x.ndim == 2}, "not \\("),
    "of another parameter": (lambda t: t | {"exp_avg/model.nothing": torch.zeros(2)}, "model.nothing"),
    "of whole numbers": (lambda t: t | {n: x.long() for n, x in t.items()}, "I64, no floating point"),
    "not finite": (lambda t: t | {n: x * math.nan for n, x in t.items() if x.ndim}, "NaN or infinity"),
}


@pytest.mark.parametrize("case", MOMENTA)
def test_forged_momenta_end_in_a_sentence(stopped, case):
    change, sentence = MOMENTA[case]
    file = latest(stopped[1]) / "optimizer.safetensors"
    safetensors.torch.save_file(change(safetensors.torch.load_file(file)), file)
    forged(latest(stopped[1]), lambda state: None)
    with pytest.raises(CheckpointError, match=sentence):
        resumed(stopped)


def poison(monkeypatch, step, what):
    """Makes one weight or momentum NaN after a step of the optimiser, as a faulty machine may."""
    from palimpsest.train.optim import MuonAdamW

    real, count = MuonAdamW.step, [0]

    def struck(self, *arguments):
        real(self, *arguments)
        count[0] += 1
        if count[0] == step:
            parameter = self.param_groups[0]["params"][-1]
            tensor = parameter.data if what == "weight" else self.state[parameter]["momentum_buffer"]
            tensor.view(-1)[0] = math.nan

    monkeypatch.setattr(MuonAdamW, "step", struck)


@pytest.mark.parametrize("what", ["weight", "momentum"])
def test_what_is_not_finite_is_not_saved_and_takes_nothing_away(tmp_path, texts, monkeypatch, what):
    poison(monkeypatch, 3, what)
    recipe = small_recipe(texts, steps=8)
    with pytest.raises(
        NonFiniteError, match=r"NaN or infinity after step .*nothing was saved .*step-00000002' is whole"
    ):
        train(recipe, tmp_path / "run")
    assert [path.name for path in checkpoints_of(tmp_path / "run")] == ["step-00000002"]
    assert all(x.isfinite().all() for x in weights(tmp_path / "run").values())


def test_a_poisoned_checkpoint_is_not_resumed(stopped):
    file = latest(stopped[1]) / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["model.norm.weight"][0] = math.inf
    safetensors.torch.save_file(tensors, file)  # without a digest, as somebody else's tool would
    with pytest.raises(CheckpointError, match=r"model.norm.weight holds NaN or infinity"):
        resumed(stopped)


def test_a_run_that_diverges_keeps_its_best(tmp_path, texts, monkeypatch):
    bits = iter([5.0, 3.0, 8.0, 9.0, 9.5, 9.9])
    monkeypatch.setattr("palimpsest.train.loop.bits_per_byte", lambda *a, **o: next(bits))
    recipe = override(
        small_recipe(texts, steps=6), {"evaluate.every": "1", "output.checkpoint_every": "1", "output.checkpoints": "1"}
    )
    result = train(recipe, tmp_path / "run")
    assert [path.name for path in checkpoints_of(tmp_path / "run")] == ["step-00000002", "step-00000006"]
    assert result.best == best(tmp_path / "run") == tmp_path / "run" / "checkpoints" / "step-00000002"
    assert json.loads((tmp_path / "run" / "result.json").read_text())["best"].endswith("step-00000002")


def test_heldout_bits_that_are_not_finite_are_told_and_end_nothing(tmp_path, texts, monkeypatch):
    monkeypatch.setattr("palimpsest.train.loop.bits_per_byte", lambda *a, **o: math.inf)
    events = []
    result = train(small_recipe(texts), tmp_path / "run", report=events.append)
    assert result.finished
    assert result.heldout_bits_per_byte is None
    assert [e["heldout_bits_per_byte"] for e in events if e["event"] == "evaluate"] == [None, None]
    assert "Infinity" not in (tmp_path / "run" / "result.json").read_text()
    assert [e["heldout_bits_per_byte"] for e in lines(tmp_path / "run", "evaluate")] == [None, None]


def test_more_processes_than_there_were_start_from_the_seed(stopped, whole):
    folder = latest(stopped[1])
    (folder / "random.json").write_text('{"processes": []}')
    forged(folder, lambda state: None)
    assert resumed(stopped).finished
    assert same(weights(stopped[1]), weights(whole[1])), "training itself draws none"


def test_interrupted_twice_is_never_interrupted(whole, tmp_path):
    recipe, reference, _, _ = whole
    for step in (1, 2):
        train(recipe, tmp_path / "run", resume=True, report=stopper(step))
    train(recipe, tmp_path / "run", resume=True)
    assert same(weights(tmp_path / "run"), weights(reference))
    assert lines(tmp_path / "run", "evaluate") == lines(reference, "evaluate")
