"""Decoding by CUDA graphs: the plain decoder's tokens, without a wait for the device, the same bits twice."""

import pytest
import torch

from palimpsest.generate import Sampling, generate, prefill
from palimpsest.generate.session import DecodeSession
from palimpsest.models.kimi_linear import KimiLinearConfig, KimiLinearForCausalLM, captured_prompt
from palimpsest.text import ByteTokenizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
PROMPTS = [[1, 2, 3], list(range(50, 90)), [7], list(range(100, 117))]
SAMPLINGS = [
    Sampling(),
    Sampling(1.0, repetition_penalty=1.3),
    Sampling(0.9, top_k=40, top_p=0.9),
    Sampling(1, min_p=0.1),
]


@pytest.fixture(scope="module", params=["KKM", "KR", "GM"])
def model(request):
    torch.manual_seed(0)
    return KimiLinearForCausalLM(KimiLinearConfig.tiny(request.param, initializer_range=0.2)).eval().cuda()


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=repr)
def test_a_graph_chooses_the_plain_decoders_tokens(model, sampling):
    arguments = dict(max_new_tokens=40, sampling=sampling, seed=3, end_tokens=())
    plain, ours = (generate(model, PROMPTS, graph=graph, **arguments) for graph in (False, True))
    assert ours.tokens == plain.tokens
    assert ours.state.position.equal(plain.state.position)
    for name, tensor in ours.state.tensors().items():
        if "memory" in name:
            torch.testing.assert_close(tensor, plain.state.tensors()[name], rtol=1e-3, atol=1e-4)
    again = generate(model, PROMPTS, graph=True, **arguments)
    assert again.state.same(ours.state)
    on = [generate(model, ours.decode_state, graph=graph, **arguments).tokens for graph in (False, True)]
    assert on[0] == on[1]


def test_texts_stop_as_they_do_in_the_plain_decoder(model):
    arguments = dict(
        max_new_tokens=60, tokenizer=ByteTokenizer(), sampling=Sampling(1.0), stop=["a", "xy", "#"], seed=1
    )
    plain, ours = (generate(model, ["one", "two words", "3"] * 4, graph=graph, **arguments) for graph in (False, True))
    assert (ours.texts, ours.reasons, ours.tokens) == (plain.texts, plain.reasons, plain.tokens)
    assert "stop" in ours.reasons


def test_a_step_never_waits(model, never_waiting):
    with torch.no_grad():
        start = prefill(model, PROMPTS)
        for graph in (False, True):
            session = DecodeSession(model, start, Sampling(0.8, top_p=0.9), [1, 2, 3, 4], capacity=64, graph=graph)
            session.step_()
            with never_waiting():
                session.step_()


def test_rooms_are_made_anew_when_a_context_outgrows_them(model, monkeypatch):
    from palimpsest.generate import decoder

    monkeypatch.setattr(decoder, "FIRST_ROOM", 8)
    arguments = dict(max_new_tokens=50, sampling=Sampling(1.0), seed=3, end_tokens=())
    plain, ours = (generate(model, PROMPTS, graph=graph, **arguments) for graph in (False, True))
    assert ours.tokens == plain.tokens


def test_half_precision_decodes_close_to_double(model):
    truth = KimiLinearForCausalLM(model.config).double().eval()
    truth.load_state_dict(model.state_dict())
    half = KimiLinearForCausalLM(model.config).bfloat16().eval().cuda()
    half.load_state_dict(model.state_dict())
    ids = torch.randint(0, 256, (3, 12))
    with torch.no_grad():
        exact = truth(ids).logits[:, -1]
        plain = half(ids.cuda()).logits[:, -1].cpu().double()
        session = DecodeSession(half, prefill(half, ids[:, :1].cuda()), Sampling(), [0] * 3, capacity=16, graph=False)
        for t in range(1, 12):
            session._token.copy_(ids[:, t])
            session._read_()
        ours = session._logits.cpu().double()
    assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max() + 2**-7 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.no_grad()
def test_pieces_of_a_prompt_by_graphs(monkeypatch, dtype):
    torch.manual_seed(0)
    config = KimiLinearConfig.tiny("KKMKM", hidden_size=128, linear_num_heads=2, linear_head_dim=64)
    model = KimiLinearForCausalLM(config).eval().to("cuda", dtype)
    prompts = torch.randint(257, (2, 6 * 256)).tolist()
    with monkeypatch.context() as patch:
        patch.setattr(captured_prompt, "MOST_TOKENS", 0)
        plain = prefill(model, prompts, prefill_chunk=256)
    assert not model.model._captured_prompt._recordings
    first, ours, again = (prefill(model, prompts, prefill_chunk=256) for _ in range(3))
    assert list(model.model._captured_prompt._recordings) == [(2, 256)]
    assert ours.state.same(again.state)
    assert ours.logits.equal(again.logits)
    tolerance = dict(rtol=3e-2, atol=3e-2) if dtype == torch.bfloat16 else dict(rtol=1e-3, atol=1e-4)
    for found in (first, ours):
        torch.testing.assert_close(found.logits, plain.logits, **tolerance)
        assert found.state.position.equal(plain.state.position)
        for a, b in zip(found.state.tensors().values(), plain.state.tensors().values(), strict=True):
            torch.testing.assert_close(a, b, **tolerance)


def test_a_state_that_is_not_finite_is_found_whatever_holds_it(model):
    state = prefill(model, PROMPTS).state
    assert not state.nonfinite()
    for bad in (torch.nan, torch.inf, -torch.inf):
        for name, tensor in state.tensors().items():
            if tensor.is_floating_point() and tensor.numel():
                broken = tensor[1].flatten()[0].clone()
                tensor[1].view(-1)[0] = bad
                assert [place.sequence for place in state.nonfinite()] == [1], name
                tensor[1].view(-1)[0] = broken
