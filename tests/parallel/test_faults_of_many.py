"""What goes wrong with several processes: one sentence from one of them, no hang, and no checkpoint lost."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from palimpsest.models.kimi_linear import KimiLinearForCausalLM
from palimpsest.train import latest, load_recipe, train

from .faulty import CASES

SENTENCES = {  # case -> what is said, by whom
    "another recipe": (0, "process 1 has another recipe than process 0 (seed is 2, there 1)"),
    "other data": (0, "process 1 has another data than process 0"),
    "no such data": (0, "data file '/nowhere' does not exist; give a text file or a folder of them (process 1 of 2)"),
    "a plan too large": (0, "the plan needs parallel.data 3 x expert 1 x context 1 = 3 processes and the job has 2"),
    "experts that do not divide": (0, "parallel.expert is 2, which does not divide the model's 3 experts"),
    "rows that do not divide": (0, "data.batch_size 3 cannot be dealt to 2 processes"),
    "the second killed": (0, "another of the 2 processes is gone"),
    "the first killed": (1, "another of the 2 processes is gone"),
    "the second stopped": (0, "process 1 of 2 gave no sign of life for 2 s"),
    "the second killed while saving": (0, "another of the 2 processes is gone"),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faulty")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(Path(__file__).with_name("faulty.py")), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("case", SENTENCES)
def test_one_process_says_one_sentence_and_none_hangs(found, case):
    speaker, sentence = SENTENCES[case]
    said = [(found / case / f"said-{rank}").read_text() for rank in range(2)]
    errors = [line for text in said for line in text.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, said
    assert sentence in errors[0]
    assert errors[0] in said[speaker]
    assert not any("Traceback" in text for text in said)
    codes = (found / case / "codes").read_text().split()
    assert codes[speaker] == "1"
    assert "hung" not in codes
    assert "killed" in case or "stopped" in case or codes == ["1", "1"]


def test_nothing_is_written_before_a_refusal(found):
    for case in SENTENCES:
        if "killed" not in case and "stopped" not in case:
            assert not (found / case / "run" / "run.json").exists(), case


@pytest.mark.parametrize("case", [case for case in CASES if "saving" in case or case == "the first killed"])
def test_a_kill_loses_one_interval_and_one_process_goes_on(found, case, tmp_path):
    shutil.copytree(found / case / "run", tmp_path / "run")
    assert latest(tmp_path / "run").name == "step-00000002"
    assert train(load_recipe(str(found / "recipe.py")), tmp_path / "run", resume=True).finished
    ours, theirs = (
        KimiLinearForCausalLM.from_pretrained(latest(run)).state_dict()
        for run in (tmp_path / "run", found / "with experts" / "run")
    )
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=2e-2, atol=2e-4, msg=name)
    assert not [p for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.startswith(".")]
