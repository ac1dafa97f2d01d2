"""Decoding at fixed addresses gives what the plain decoder gives: tokens, texts, states, faults."""

import pytest
import torch

from palimpsest.generate import DecodeState, Sampling, generate, prefill, stream
from palimpsest.generate import sample as sample_module
from palimpsest.generate.decoder import Decoder, SessionDecoder
from palimpsest.generate.sampling import as_int64, uniform, uniforms
from palimpsest.generate.session import DecodeSession
from palimpsest.models.kimi_linear import KimiLinearConfig, KimiLinearForCausalLM
from palimpsest.text import ByteTokenizer

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


def test_texts_and_stop_strings(model, at_fixed_addresses):
    prompts = ["one", "two words", "3"]
    arguments = dict(max_new_tokens=40, tokenizer=ByteTokenizer(), sampling=Sampling(1.0), seed=1)
    free = generate(model, prompts, **arguments).texts
    arguments["stop"] = [free[0][9:11], free[2][15]]
    plain = list(stream(model, prompts, **arguments))
    at_fixed_addresses()
    assert list(stream(model, prompts, **arguments)) == plain
    assert "stop" in {piece.reason for piece in plain}


def test_a_context_outgrows_its_room(model, at_fixed_addresses, monkeypatch):
    monkeypatch.setattr("palimpsest.generate.decoder.FIRST_ROOM", 2)
    arguments = dict(max_new_tokens=100, sampling=Sampling(1.0), end_tokens=())
    plain = generate(model, [[5], [6, 7]], **arguments)
    at_fixed_addresses()
    assert_same(generate(model, [[5], [6, 7]], **arguments), plain)


def test_what_a_session_gives_back_can_be_forked_saved_rolled_back_and_continued(model, at_fixed_addresses, tmp_path):
    sampling, rest = Sampling(0.8), {"end_tokens": (), "sampling": Sampling(0.8)}
    whole = generate(model, [[1, 2, 3]], max_new_tokens=16, **rest).tokens[0]
    at_fixed_addresses()
    first = generate(model, [[1, 2, 3]], max_new_tokens=6, **rest)
    first.decode_state.save(tmp_path / "state", model)
    for start in (first.decode_state, DecodeState.load(tmp_path / "state", model)):
        forked = generate(model, start.select([0, 0]), max_new_tokens=10, seed=[0, 0], **rest)
        assert [first.tokens[0] + tokens for tokens in forked.tokens] == [whole, whole]

    session = DecodeSession(model, start, sampling, [0], capacity=64, graph=False)
    with torch.no_grad():
        session.step_()
        kept = session.value([0])
        for _ in range(4):
            session.step_()
    assert kept.state.position.tolist() == [10]  # a value: steps do not touch it
    assert generate(model, kept, max_new_tokens=5, **rest).tokens[0] == whole[7:12]


def test_drafts_and_sessions_agree(model, at_fixed_addresses):
    text = [1, 2, 3, 4, 5, 1, 2, 3]
    arguments = dict(max_new_tokens=20, end_tokens=())
    drafted = generate(model, [text], draft=lambda tokens: [tokens[-1]] * 3, **arguments)
    at_fixed_addresses()
    assert generate(model, [text], **arguments).tokens == drafted.tokens


@pytest.mark.parametrize("when", [0, 5, 70])
@pytest.mark.parametrize("how", ["raise", "stop"])
def test_faults_are_found_and_named(when, how, at_fixed_addresses):
    torch.manual_seed(0)
    model = KimiLinearForCausalLM(KimiLinearConfig.tiny("KM", initializer_range=0.2)).eval()
    prompts = [[7], [1, 2]]
    tokens = generate(model, prompts, max_new_tokens=when + 1, sampling=Sampling(1.0), end_tokens=()).tokens
    only = next(t for t in reversed(tokens[1]) if t not in tokens[0][: when + 1])
    with torch.no_grad():
        model.model.embed_tokens.weight[only] = torch.nan

    def run():
        try:
            return generate(model, prompts, max_new_tokens=90, sampling=Sampling(1.0), end_tokens=(), on_nonfinite=how)
        except ArithmeticError as error:
            return str(error)

    plain = run()
    at_fixed_addresses()
    if how == "raise":
        assert run() == plain
        assert f"token {only} at position" in plain
    else:
        ours = run()
        assert ours.faults == plain.faults
        assert_same(ours, plain)
        assert "nonfinite" in ours.reasons


def test_a_graph_on_a_cpu_is_a_sentence(model):
    with pytest.raises(ValueError, match="graph is True and the model is on cpu; a CUDA graph needs a GPU"):
        generate(model, [[1]], max_new_tokens=1, graph=True)
    with pytest.raises(ValueError, match="graph is True and draft was given"):
        generate(model, [[1]], max_new_tokens=1, graph=True, draft=lambda tokens: [])
    with pytest.raises(ValueError, match="graph is 1; it must be"):
        generate(model, [[1]], max_new_tokens=1, graph=1)
    start = prefill(model, [[1, 2, 3]])
    with pytest.raises(ValueError, match="capacity is 3 and a sequence has 3 tokens; give room for more"):
        DecodeSession(model, start, Sampling(), [0], capacity=3, graph=False)


@pytest.mark.parametrize("seed", [0, 7, -1, 2**63, 2**64 - 1, -(2**70) + 5])
def test_draws_of_tensors_are_those_of_numbers(seed):
    positions = [0, 1, 1000, 2**40]
    found = uniforms(torch.tensor([as_int64(seed)] * 4), torch.tensor(positions))
    assert found.tolist() == [uniform(seed, position) for position in positions]


def test_many_prompts_are_read_a_few_at_a_time(model, monkeypatch):
    together = prefill(model, PROMPTS, prefill_chunk=16)
    monkeypatch.setattr("palimpsest.generate.decoder.MOST_TOGETHER", 20)
    apart = prefill(model, PROMPTS, prefill_chunk=16)
    torch.testing.assert_close(apart.logits, together.logits)
    assert apart.state.position.equal(together.state.position)
    with pytest.raises(ValueError, match="prefill_chunk"):
        prefill(model, PROMPTS, prefill_chunk=0)


@torch.no_grad()
def test_no_token_beyond_the_room():
    model = KimiLinearForCausalLM(KimiLinearConfig.tiny("KM")).eval()
    session = DecodeSession(model, prefill(model, [[1, 2, 3], [4]]), Sampling(), [0, 1], capacity=4, graph=False)
    session.step_()
    with pytest.raises(ValueError, match="a sequence has 4 tokens and capacity is 4; go on in a new session"):
        session.step_()
    assert session.value([1]).state.position.tolist() == [2]
