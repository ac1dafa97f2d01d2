"""The loop as a whole: it learns, resumes to the bit, stops when told, and leaves whole files whatever happens."""

import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from palimpsest import files
from palimpsest.models.kimi_linear import KimiLinearForCausalLM, ModelState
from palimpsest.text import ByteTokenizer
from palimpsest.train import CheckpointError, NonFiniteError, Optim, checkpoints, latest, override, train
from palimpsest.train.data import Heldout, read_documents
from palimpsest.train.evaluate import compressors
from palimpsest.train.interrupts import interrupts

from .conftest import lines, same, small_recipe, stopper, weights

ROOT = Path(__file__).parents[2]


def test_a_run_tells_what_it_did(whole):
    recipe, folder, result, events = whole
    assert result.finished
    assert result.progress.step == 4
    assert [e["event"] for e in events if e["event"] != "step"] == [
        "start", "train", "train", "evaluate", "checkpoint", "train", "train", "checkpoint", "evaluate", "end",
    ]  # fmt: skip
    (first, *_), (last_evaluation, *_) = lines(folder), lines(folder, "evaluate")[::-1]
    assert first["loss"] == pytest.approx(math.log(257), rel=0.02)
    assert first["bits_per_byte"] == pytest.approx(first["loss"] / math.log(2), rel=0.01)
    assert last_evaluation["heldout_bits_per_byte"] == result.heldout_bits_per_byte < 8.1
    assert set(result.compressors) == {"unigram", "gzip", "xz"}
    assert len(first["expert_load"]) == 1
    assert first["expert_load"][0] >= 1
    assert json.loads((folder / "result.json").read_text())["step"] == 4
    assert (folder / "loss.png").read_bytes()[1:4] == b"PNG"
    assert "<svg" in (folder / "loss.svg").read_text()
    assert [p.name for p in sorted((folder / "checkpoints").iterdir())] == ["step-00000002", "step-00000004"]


def test_it_learns(tmp_path, texts):
    recipe = small_recipe(texts, steps=40, data={"batch_size": 8}, optim=Optim(lr=2e-2))
    result = train(override(recipe, {"evaluate.every": "100", "output.checkpoint_every": "100"}), tmp_path / "run")
    assert result.heldout_bits_per_byte < result.compressors["unigram"] < 5
    assert result.progress.tokens == 40 * 8 * 32


def test_heldout_bits_are_what_the_model_pays_token_by_token(whole):
    """Read one byte at a time by the recurrent step, which cannot look ahead."""
    recipe, folder, result, _ = whole
    model = KimiLinearForCausalLM.from_pretrained(latest(folder)).eval()
    pieces = Heldout(read_documents(recipe.data.source)[1], ByteTokenizer(), piece_bytes=64, max_bytes=512).pieces
    bits = 0.0
    with torch.no_grad():
        for piece in pieces:
            state, logits = ModelState.empty(model.config), torch.zeros(1, 257)
            for token in piece.tokens.tolist():
                bits -= float(logits.log_softmax(-1)[0, token]) / math.log(2)
                logits, state = model.step_(torch.tensor([token]), state)
    assert bits / sum(p.num_bytes for p in pieces) == pytest.approx(result.heldout_bits_per_byte, rel=1e-5)


@pytest.mark.parametrize("stop_after", [1, 3])
def test_interrupted_and_resumed_is_never_interrupted_to_the_bit(whole, tmp_path, stop_after):
    recipe, reference, result, _ = whole
    first = train(recipe, tmp_path / "run", report=stopper(stop_after))
    assert not first.finished
    assert first.progress.step == stop_after
    before, seen = torch.get_rng_state(), []
    torch.manual_seed(999)  # whatever happened in between
    note = lambda event: seen.append(torch.get_rng_state()) if event["event"] == "start" else None
    second = train(recipe, tmp_path / "run", resume=True, report=note)
    assert second.finished
    assert torch.equal(seen[0], before), "random numbers go on where they stopped"
    assert same(weights(tmp_path / "run"), weights(reference))
    assert lines(tmp_path / "run") == lines(reference)
    assert second.heldout_bits_per_byte == result.heldout_bits_per_byte


def test_resuming_without_the_optimisers_state_would_show(whole, tmp_path, monkeypatch):
    """The test above can fail: a resume that forgets the momentum gives other weights."""
    recipe, reference, _, _ = whole
    train(recipe, tmp_path / "run", report=stopper(3))
    monkeypatch.setattr("accelerate.optimizer.AcceleratedOptimizer.load_state_dict", lambda self, state: None)
    train(recipe, tmp_path / "run", resume=True)
    assert not same(weights(tmp_path / "run"), weights(reference))


def test_accumulated_parts_learn_the_same(whole, tmp_path):
    recipe, reference, _, _ = whole
    train(override(recipe, {"data.accumulate": "2"}), tmp_path / "run")
    ours, theirs = weights(tmp_path / "run"), weights(reference)
    assert [e["loss"] for e in lines(tmp_path / "run")] == pytest.approx(
        [e["loss"] for e in lines(reference)], rel=1e-4
    )
    assert max(float((ours[n] - theirs[n]).abs().max()) for n in ours) < 2e-2  # Muon's bfloat16 steps amplify rounding


@pytest.mark.parametrize("layout", ["packed"])
def test_packed_runs_train_too(tmp_path, texts, layout):
    result = train(small_recipe(texts, steps=2, data={"layout": layout}), tmp_path / "run")
    assert result.finished
    assert result.progress.tokens == 2 * 4 * 32


def test_a_finished_run_resumed_says_so_and_does_nothing_more(whole, tmp_path, monkeypatch):
    recipe, reference, result, _ = whole
    shutil.copytree(reference, tmp_path / "run")
    before, events = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}, []
    monkeypatch.setattr("palimpsest.train.loop.bits_per_byte", None)
    for _ in range(2):
        again = train(recipe, tmp_path / "run", resume=True, report=events.append)
        assert again.finished
        assert again.heldout_bits_per_byte == result.heldout_bits_per_byte
        assert again.compressors == result.compressors
        assert again.progress == result.progress
        assert again.checkpoint == latest(tmp_path / "run")
    assert [e["event"] for e in events] == ["finished", "finished"]
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_a_run_killed_before_its_result_evaluates_once_more_and_tells_it_once(whole, tmp_path):
    recipe, reference, result, _ = whole
    shutil.copytree(reference, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    again = train(recipe, tmp_path / "run", resume=True)
    assert again.heldout_bits_per_byte == result.heldout_bits_per_byte
    for event in ("train", "evaluate"):
        assert lines(tmp_path / "run", event) == lines(reference, event)
    assert same(weights(tmp_path / "run"), weights(reference))


def test_a_signal_is_heard_at_once(whole, tmp_path):
    recipe, _, _, _ = whole
    events = []

    def report(event):
        events.append(event)
        stopper(3)(event)

    assert not train(recipe, tmp_path / "run", report=report).finished
    names = [e["event"] for e in events if e.get("step") == 3]
    assert names == ["step", "interrupt", "train", "checkpoint", "end"]


def test_overwriting_waits_until_the_new_run_can_start(whole, tmp_path, monkeypatch):
    recipe, reference, _, _ = whole
    shutil.copytree(reference, tmp_path / "run")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    wrong = {
        "does not exist": {"data.source.paths": str(tmp_path / "nowhere")},
        "needs at least 257": {"model.vocab_size": "200", "model.eos_token_id": "none"},
        "needs a GPU": {"precision": "fp16"},
    }
    for sentence, settings in wrong.items():
        if sentence == "needs a GPU" and torch.cuda.is_available():
            continue
        with pytest.raises(ValueError, match=sentence):
            train(override(recipe, settings), tmp_path / "run", overwrite=True)
    with monkeypatch.context() as patch:
        patch.setattr(
            "palimpsest.train.loop.build_optimizer", lambda *a, **k: (_ for _ in ()).throw(MemoryError("too large"))
        )
        with pytest.raises(MemoryError):
            train(override(recipe, {"seed": "3"}), tmp_path / "run", overwrite=True)
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before
    result = train(override(recipe, {"steps": "1"}), tmp_path / "run", overwrite=True)
    assert (
        [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == [result.checkpoint.name] == ["step-00000001"]
    )
    assert [e["step"] for e in lines(tmp_path / "run")] == [1]


def test_two_runs_in_one_folder_are_one_and_a_refusal(whole, tmp_path):
    recipe, reference, _, _ = whole
    refusals = []

    def second(event):
        if event["event"] == "step" and event["step"] == 2:
            for options in ({"resume": True}, {"overwrite": True}):
                with pytest.raises(ValueError, match="another run is at work in folder") as error:
                    train(recipe, tmp_path / "run", **options)
                refusals.append(str(error.value))

    train(recipe, tmp_path / "run", report=second)
    assert len(refusals) == 2
    assert same(weights(tmp_path / "run"), weights(reference))
    assert lines(tmp_path / "run") == lines(reference)


def test_another_recipe_or_other_data_is_refused_before_anything_is_touched(whole, tmp_path, texts):
    recipe, reference, _, _ = whole
    shutil.copytree(reference, tmp_path / "run")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=r"another recipe: optim.lr was 0.003 and is now 0.1"):
        train(override(recipe, {"optim.lr": "0.1"}), tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match="holds a run already"):
        train(recipe, tmp_path / "run")
    changed = Path(recipe.data.source.paths[0]) / "file1.py"
    old = changed.read_text()
    try:
        changed.write_text(old + "\n# one more line\n")
        with pytest.raises(ValueError, match="the data changed since the run"):
            train(recipe, tmp_path / "run", resume=True)
    finally:
        changed.write_text(old)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="holds files but no run"):
        train(recipe, tmp_path / "other")
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_a_damaged_checkpoint_is_named(whole, tmp_path):
    recipe, reference, _, _ = whole
    for name in ("model.safetensors", "optimizer.safetensors", "random.json", "training.json"):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(reference, tmp_path / "run")
        (tmp_path / "run" / "result.json").unlink()  # else there would be nothing left to do
        file = latest(tmp_path / "run") / name
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(
            CheckpointError, match=r"step-00000004' cannot be resumed .*; move it away to resume from step-00000002"
        ):
            train(recipe, tmp_path / "run", resume=True)


def failing_at(monkeypatch, steps):
    """A model whose loss is not a number at these steps."""
    forward, count = KimiLinearForCausalLM.forward, [0]

    def wrapped(self, *args, **options):
        out = forward(self, *args, **options)
        if self.training:
            count[0] += 1
            if count[0] in steps:
                out = out._replace(loss=out.loss * math.nan)
        return out

    monkeypatch.setattr(KimiLinearForCausalLM, "forward", wrapped)


def test_a_loss_that_is_no_number_is_skipped_and_counted(tmp_path, texts, monkeypatch):
    failing_at(monkeypatch, {2, 3})
    result = train(small_recipe(texts, max_nonfinite=2), tmp_path / "run")
    assert result.progress.skipped == 2
    assert math.isfinite(result.heldout_bits_per_byte)
    assert [line["loss"] is None for line in lines(tmp_path / "run")] == [False, True, True, False]


def test_too_many_in_a_row_end_the_run(tmp_path, texts, monkeypatch):
    failing_at(monkeypatch, {3, 4, 5})
    with pytest.raises(NonFiniteError, match="2 steps in a row up to step 4 had no finite gradient"):
        train(small_recipe(texts, steps=6, max_nonfinite=1), tmp_path / "run")
    assert all(t.isfinite().all() for t in weights(tmp_path / "run").values())
    assert latest(tmp_path / "run").name == "step-00000002"


def test_a_full_disk_leaves_the_checkpoint_before_it_whole(whole, tmp_path, monkeypatch):
    recipe, reference, _, _ = whole
    write = checkpoints.write_rows

    def full(file, *args):
        if ".saving-step-00000004" in str(file):
            Path(file).write_bytes(b"half")
            raise OSError(28, "No space left on device", str(file))
        return write(file, *args)

    monkeypatch.setattr(checkpoints, "write_rows", full)
    with pytest.raises(CheckpointError, match=r"no room to write .*step-00000004.*\(step-00000002 is whole\)") as error:
        train(recipe, tmp_path / "run")
    assert "\n" not in str(error.value)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    monkeypatch.undo()
    train(recipe, tmp_path / "run", resume=True)
    assert same(weights(tmp_path / "run"), weights(reference))


def test_a_file_size_limit_of_the_system_is_such_a_fault_too(tmp_path, texts):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))  # the weights alone are larger
    try:
        with pytest.raises(CheckpointError, match="there is none before it"):
            train(small_recipe(texts), tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("moment", ["writing", "before the rename"])
def test_a_kill_while_saving_leaves_the_checkpoint_before_it_whole(whole, tmp_path, monkeypatch, moment):
    """What a kill leaves is what is on the disk when an exception that nothing catches goes through."""
    recipe, reference, _, _ = whole

    class Kill(BaseException):
        pass

    real = {"writing": checkpoints.write_rows, "before the rename": files.flush}[moment]

    def kill(*args, **options):
        real(*args, **options)
        if any(".saving-step-00000004" in str(a) for a in args):
            raise Kill

    if moment == "writing":
        monkeypatch.setattr(checkpoints, "write_rows", kill)
    else:
        monkeypatch.setattr(files, "flush", kill)
    with pytest.raises(Kill):
        train(recipe, tmp_path / "run")
    monkeypatch.undo()
    assert latest(tmp_path / "run").name == "step-00000002"
    train(recipe, tmp_path / "run", resume=True)
    assert same(weights(tmp_path / "run"), weights(reference))
    assert not [p for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.startswith(".")]


def test_steps_after_the_last_checkpoint_are_done_and_told_again(whole, tmp_path):
    recipe, reference, _, _ = whole

    def kill(event):
        if event["event"] == "train" and event["step"] == 3:
            with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
                file.write('{"event": "train", "st')  # a line cut short
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "run", report=kill)
    train(recipe, tmp_path / "run", resume=True)
    assert lines(tmp_path / "run") == lines(reference)
    assert same(weights(tmp_path / "run"), weights(reference))


def test_only_the_last_checkpoints_are_kept(tmp_path, texts):
    recipe = override(small_recipe(texts), {"output.checkpoint_every": "1", "output.checkpoints": "3"})
    train(recipe, tmp_path / "run")
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-00000002", "step-00000003", "step-00000004"]


def test_tensorboard_on_request(tmp_path, texts):
    pytest.importorskip("tensorboard")
    recipe = override(small_recipe(texts, steps=2), {"output.tensorboard": "true"})
    train(recipe, tmp_path / "run")
    assert list((tmp_path / "run" / "tensorboard").rglob("events.*"))


def test_a_vocabulary_too_small_for_the_tokenizer_is_refused(tmp_path, texts):
    with pytest.raises(ValueError, match="model.vocab_size is 200; tokenizer 'bytes' needs at least 257"):
        train(
            override(small_recipe(texts), {"model.vocab_size": "200", "model.eos_token_id": "none"}), tmp_path / "run"
        )


def test_minutes_end_a_run_as_steps_do(tmp_path, texts):
    recipe = small_recipe(texts, steps=10**6, minutes=0.02)
    shares = []
    result = train(
        recipe, tmp_path / "run", report=lambda e: shares.append(e["share"]) if e["event"] == "step" else None
    )
    assert result.finished
    assert 1 <= result.progress.step < 10**6
    assert shares == sorted(shares)


@pytest.fixture
def hears_ctrl_c():
    """Programs started in the background may have been told to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("hears_ctrl_c")
def test_the_second_signal_acts_as_ever():
    with pytest.raises(KeyboardInterrupt), interrupts() as interrupted:
        signal.raise_signal(signal.SIGINT)
        assert interrupted()
        signal.raise_signal(signal.SIGINT)


def test_compressors_agree_with_what_they_are():
    assert compressors(bytes(range(256)) * 4)["unigram"] == pytest.approx(8)
    assert compressors(b"a" * 1000)["unigram"] == 0


TWO_PROCESSES = """
import os, pickle, signal, sys
sys.path[:0] = [{root!r}]
from palimpsest.train import override, train

recipe = pickle.load(open({folder!r} + "/recipe.pkl", "rb"))
sharded = override(recipe, {{"parallel.kind": "fsdp", "parallel.expert": "2"}})

def stop(event):  # one process is told, both stop
    if event["event"] == "step" and event["step"] == 3:
        os.kill(os.getpid(), signal.SIGINT)

assert train(recipe, {folder!r} + "/ddp").finished
assert not train(sharded, {folder!r} + "/fsdp", report=stop).finished
assert train(sharded, {folder!r} + "/fsdp", resume=True).finished
"""


def test_two_processes_train_as_one(whole, tmp_path):
    """torchrun, two CPU processes, gloo; copies, and FSDP2 shards interrupted and resumed: the numbers of one process."""
    recipe, reference, _, _ = whole
    (tmp_path / "recipe.pkl").write_bytes(pickle.dumps(recipe))
    (tmp_path / "run.py").write_text(TWO_PROCESSES.format(root=str(ROOT), folder=str(tmp_path)))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(tmp_path / "run.py"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs, their_bits = lines(reference), [e["heldout_bits_per_byte"] for e in lines(reference, "evaluate")]
    for name in ("ddp", "fsdp"):
        ours, bits = lines(tmp_path / name), [e["heldout_bits_per_byte"] for e in lines(tmp_path / name, "evaluate")]
        assert [e["tokens"] for e in ours] == [e["tokens"] for e in theirs]
        assert [e["loss"] for e in ours] == pytest.approx([e["loss"] for e in theirs], rel=1e-4), name
        assert [e["gradient_norm"] for e in ours] == pytest.approx([e["gradient_norm"] for e in theirs], rel=2e-2), name
        assert bits == pytest.approx(their_bits, rel=3e-3), name
        first = abs(ours[0]["gradient_norm"] - theirs[0]["gradient_norm"])
        assert first < 1e-5, "before Muon's bfloat16 has rounded anything, the gradients are the same"
    assert {n: t.shape for n, t in weights(tmp_path / "fsdp").items()} == {
        n: t.shape for n, t in weights(reference).items()
    }
