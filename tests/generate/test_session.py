"""Decoding at fixed addresses gives what the plain decoder gives: tokens, texts, states, faults."""

import pytest
import torch

from palimpsest.generate import Sampling, generate
from palimpsest.generate import sample as sample_module
from palimpsest.generate.decoder import Decoder, SessionDecoder

PROMPTS = [[1, 2, 3], list(range(50, 90)), [7], list(range(100, 117))]
SAMPLINGS = [
    Sampling(),
    Sampling(repetition_penalty=1.5),
    Sampling(1.0),
    Sampling(0.9, top_k=40, top_p=0.9),
    Sampling(1.0, min_p=0.05, repetition_penalty=1.2),
]


@pytest.fixture
def at_fixed_addresses(monkeypatch):
    """`generate` decodes in sessions, without the graphs that a CPU does not have."""

    def decoder(model, start, most, stop_at_fault, history, graph):
        if history is not None:
            return Decoder(model, start, stop_at_fault=stop_at_fault, history=history)
        return SessionDecoder(model, start, most=most, graph=False, stop_at_fault=stop_at_fault)

    return lambda: monkeypatch.setattr(sample_module, "_decoder", decoder)


def assert_same(one, two):
    assert (one.tokens, one.texts, one.reasons, one.faults.keys()) == (
        two.tokens,
        two.texts,
        two.reasons,
        two.faults.keys(),
    )
    assert one.decode_state.seen.equal(two.decode_state.seen)
    torch.testing.assert_close(one.decode_state.logits, two.decode_state.logits, rtol=1e-4, atol=1e-5)
    mine, its = one.state.tensors(), two.state.tensors()
    for name in mine:
        if name.endswith("latent"):
            valid = mine[name.replace("latent", "valid")]
            torch.testing.assert_close(mine[name][valid], its[name][valid], rtol=1e-4, atol=1e-5)
        else:
            torch.testing.assert_close(mine[name], its[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=repr)
def test_the_same_tokens_and_states(model, sampling, at_fixed_addresses):
    arguments = dict(max_new_tokens=20, sampling=sampling, seed=3, end_tokens=(), prefill_chunk=16)
    plain = generate(model, PROMPTS, **arguments)
    at_fixed_addresses()
    assert_same(generate(model, PROMPTS, **arguments), plain)


def test_sequences_end_one_by_one_and_the_rest_is_gathered_anew(model, at_fixed_addresses):
    prompts = [[i, 2 * i, 3 * i] for i in range(1, 9)]
    arguments = dict(max_new_tokens=70, sampling=Sampling(1.0), end_tokens=tuple(range(0, 256, 20)))
    plain = generate(model, prompts, **arguments)
    assert len({len(tokens) for tokens in plain.tokens}) > 5
    at_fixed_addresses()
    assert_same(generate(model, prompts, **arguments), plain)
