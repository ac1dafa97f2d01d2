"""Formats: exact where they should be, unbiased where they claim it, and what feedback is for."""

import pytest
import torch

from palimpsest.lab.measure.state_formats import FORMATS, Format
from palimpsest.lab.measure.state_quantization import Drift, StepReader
from palimpsest.layers.options import MixerOptions
from palimpsest.models.kimi_linear import KimiLinearConfig, KimiLinearForCausalLM


def memory(seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 8, 16, generator=rng) * torch.logspace(-6, 6, 8)[:, None]


WORST = {"float32": 0.0, "bfloat16": 2**-8, "float8": 2**-4, "int8": 1 / 254}


@pytest.mark.parametrize("name", FORMATS)
def test_rounding_is_within_half_a_step_or_one_by_chance(name):
    how, S = FORMATS[name], memory()
    error = (how.unpack(how.pack(S, torch.Generator().manual_seed(0))) - S).abs()
    largest = S.abs().amax(-1, keepdim=True)
    bound = S.abs() if how.kind in ("float32", "bfloat16") else largest
    steps = 1 / 16 if how.feedback else 2 if how.stochastic else 1
    assert (error <= WORST[how.kind] * steps * bound * 1.01 + 1e-12).all()


@pytest.mark.parametrize("name", [n for n in FORMATS if "stochastic" in n])
def test_stochastic_rounding_is_right_on_average(name):
    how, rng = FORMATS[name], torch.Generator().manual_seed(1)
    S = memory()[:1, :1]
    many = torch.stack([how.unpack(how.pack(S, rng)) for _ in range(2000)])
    step = (many.amax(0) - many.amin(0)).amax(-1, keepdim=True)  # of a row's largest numbers
    assert ((many.mean(0) - S).abs() <= 0.06 * step).all()
    nearest = Format(how.kind)
    assert ((nearest.unpack(nearest.pack(S)) - S).abs() / step).max() > 0.2  # the plain form has a bias to lose


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_are_those_of_the_tensors(name):
    how = FORMATS[name]
    stored = how.pack(torch.randn(1, 2, 64, 128))
    per_number = {"float32": 4, "bfloat16": 2, "float8": 1 + 4 / 128, "int8": 1 + 4 / 128}[
        how.kind
    ] + 0.5 * how.feedback
    assert stored.nbytes == per_number * 2 * 64 * 128


def test_what_is_zero_stays_zero():
    for how in FORMATS.values():
        assert not how.unpack(how.pack(torch.zeros(1, 1, 4, 4))).any()


def test_float8_in_between_is_a_float8():
    x = torch.linspace(-448, 448, 999).view(1, 1, 1, -1)
    from palimpsest.lab.measure.state_formats import _between_float8

    y = _between_float8(x, torch.Generator().manual_seed(0))
    assert y.to(torch.float8_e4m3fn).float().equal(y)


def test_feedback_loses_less_than_plain_int8():
    error = lambda name: Drift(format=name, tokens=128, heads=1, channels=16, timescale="endless").run(
        "cpu", lambda *_: None
    )["rows"][-1]
    plain, fed, whole = (error(name)["relative_error"] for name in ("int8", "int8-feedback", "float32"))
    assert fed < plain / 4
    assert whole < 1e-4


def test_reading_in_steps_is_reading_at_once():
    torch.manual_seed(0)
    model = KimiLinearForCausalLM(KimiLinearConfig.tiny("KM", num_experts=0, mixer_options=MixerOptions())).eval()
    tokens = torch.randint(257, (2, 20))
    with torch.no_grad():
        assert StepReader(FORMATS["float32"], "cpu")(model, tokens).allclose(model.model(tokens)[0], atol=1e-4)


BAD = {
    "kind": (lambda: Format("int4"), "choose one of float32, bfloat16, float8, int8"),
    "feedback": (lambda: Format("float8", feedback=True), "feedback is for int8"),
    "stochastic": (lambda: Format("float32", stochastic=True), "no stochastic form"),
    "not finite": (lambda: Format("int8").pack(torch.full((1, 1, 2, 2), torch.nan)), "not finite"),
    "format": (lambda: Drift(format="int4").prepare(), "format 'int4' is unknown"),
    "timescale": (lambda: Drift(format="int8", timescale="eternal").prepare(), "choose one of short, long, endless"),
    "tokens": (lambda: Drift(format="int8", tokens=8).prepare(), "at least 16"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_formats_are_refused(case):
    make, sentence = BAD[case]
    with pytest.raises(ValueError, match=sentence):
        make()
