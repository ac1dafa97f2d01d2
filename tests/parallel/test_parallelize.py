"""Two, three and four processes by every kind of plan: in float64 the numbers, weights and files of one process."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from palimpsest.models.kimi_linear import KimiLinearForCausalLM
from palimpsest.models.kimi_linear.official_names import official_tensors

from .many import BY_ADAMW, CONFIG, PLANS, model_of

RUNS = [f"{size} {name}" for size, plans in PLANS.items() for name in plans if size > 1]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The folder in which all groups of processes left what they came to."""
    folder = tmp_path_factory.mktemp("many")
    root = Path(__file__).parents[2]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, str(Path(__file__).with_name("many.py")), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize(("run", "kind"), [(run, "muon") for run in RUNS] + [(run, "adamw") for run in BY_ADAMW[1:]])
def test_many_train_as_one(found, run, kind):
    """Losses, gradient norms and the loads of experts at each step; then every weight."""
    alone, many = (torch.tensor(torch.load(found / f"{name} {kind}.pt")) for name in ("1 alone", run))
    torch.testing.assert_close(many, alone, rtol=1e-12, atol=1e-12)
    ours, theirs = (load_file(found / f"{name} {kind}.safetensors") for name in (run, "1 alone"))
    assert list(ours) == list(theirs)
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-10, atol=1e-12, msg=name)


def test_the_runs_did_learn(found):
    start = dict(official_tensors(model_of().state_dict()))
    end = load_file(found / "1 alone muon.safetensors")
    assert start.keys() == end.keys()
    assert all(not torch.equal(start[name].detach(), end[name]) for name in end)


def test_the_same_plan_gives_the_same_bits_recomputed_or_not(found):
    recomputed, again = torch.load(found / "repeated.pt")
    assert recomputed == again == torch.load(found / "4 experts and data muon.pt")


def test_the_files_are_a_model_to_any_reader(found, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    shutil.copy(found / "4 hsdp, experts muon.safetensors", tmp_path / "model.safetensors")
    model = KimiLinearForCausalLM.from_pretrained(tmp_path)
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
