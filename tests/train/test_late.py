"""What a CPU can show of steps that are captured and read late."""

import pytest
import torch

from palimpsest.train.captured import CapturedGradients
from palimpsest.train.late import LateNumbers


def test_on_a_cpu_nothing_is_late():
    late = LateNumbers(torch.device("cpu"))
    late.push("a", torch.tensor([1.0]))
    assert list(late.ready()) == [("a", [1.0])]
    assert list(late.all()) == []


def test_a_graph_asked_for_on_a_cpu_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match="a CUDA graph was asked for and the model is on cpu; set capture=false"):
        CapturedGradients(torch.nn.Linear(2, 2))
