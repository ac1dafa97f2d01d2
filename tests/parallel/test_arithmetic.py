"""The formulas of a plan against what is counted and what was measured, and the command that prints them."""

import json

import pytest

from palimpsest.cli import run
from palimpsest.models.kimi_linear import KimiLinearConfig, KimiLinearForCausalLM
from palimpsest.parallel import Plan
from palimpsest.parallel.arithmetic import cost, plans, sizes_of


def test_the_parameters_are_those_of_the_model():
    config = KimiLinearConfig.tiny()
    model, sizes = KimiLinearForCausalLM(config), sizes_of(config)
    assert sizes.alike + sizes.experts == sum(p.numel() for p in model.parameters())
    held = [m for m in model.modules() if type(m).__name__ == "Experts"]
    assert sizes.experts == sum(p.numel() for m in held for p in m.parameters())


@pytest.mark.parametrize(
    ("changes", "tokens", "gib"),
    [({}, 16 * 2048, 16.36), ({}, 4 * 2048, 5.80), ({"num_experts": 0}, 16 * 2048, 15.24)],
)
def test_memory_is_near_what_one_h100_needed(changes, tokens, gib):
    """benchmarks/results/h100/model.json, AdamW; what the driver takes is not in it."""
    config = KimiLinearConfig.medium(**changes)
    found = cost(config, sizes_of(config), Plan(), 1, tokens=tokens, recompute=False, optimiser="adamw")
    assert (found.states + found.activations) / 2**30 == pytest.approx(gib, rel=0.2)


def test_more_processes_hold_less_each():
    config = KimiLinearConfig.official_48b()
    sizes = sizes_of(config)
    bytes_of = lambda n, **plan: cost(config, sizes, Plan(**plan), n, tokens=8192, recompute=True).states
    assert bytes_of(8, kind="fsdp") < bytes_of(4, kind="fsdp") < bytes_of(4)
    assert bytes_of(8, expert=8) < bytes_of(8) / 4


def test_experts_that_stay_and_contexts_that_are_whole_are_not_heard_of():
    config = KimiLinearConfig.medium()
    sizes = sizes_of(config)
    assert cost(config, sizes, Plan(), 1, tokens=8192, recompute=False).traffic == {}
    heard = cost(config, sizes, Plan(expert=2, context=2), 4, tokens=8192, recompute=False).traffic
    assert {"experts", "context", "gradients", "Muon's work"} == heard.keys()


def test_the_48b_does_not_fit_eight_and_fits_64():
    assert not plans(KimiLinearConfig.official_48b(), 4)
    found = plans(KimiLinearConfig.official_48b(), 64)
    assert all(one.memory <= 80e9 for one in found)
    assert found[0].tokens_per_second >= found[-1].tokens_per_second


def test_the_command_prints_plans_and_refuses_what_fits_nowhere(capsys):
    assert run(["plan", "48b", "--gpus", "64", "--json"]) == 0
    first = json.loads(capsys.readouterr().out.splitlines()[0])
    assert first["plan"]["expert"] > 1
    assert run(["plan", "48b", "--gpus", "64"]) == 0
    assert "--set parallel.kind=" in capsys.readouterr().out
    assert run(["plan", "48b", "--gpus", "1"]) == 1
    assert "no plan of 1 GPUs of 80 GB holds this model" in capsys.readouterr().err
