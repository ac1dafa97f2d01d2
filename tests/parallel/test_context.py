"""A sequence that lies on two, three and four processes: the numbers of one. The checks are in context_worker.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parallel import context_worker

WORKER = Path(context_worker.__file__)
ROOT = WORKER.parents[2]


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """rank -> check -> what went wrong: one group of four processes for all checks."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), "4", str(folder)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(4)
    ]
    errors = [rank.communicate(timeout=150)[1] for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), errors
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(4)]


@pytest.mark.parametrize("check", context_worker.CHECKS)
def test_as_one_rank(said, check):
    assert not any(rank[check] for rank in said), "\n".join(rank[check] for rank in said)
