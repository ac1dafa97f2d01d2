"""Generation holds for every kind of layer and on a GPU: alone, in a batch, in two runs, and from a file."""

import pytest
import torch

from palimpsest.generate import DecodeState, Sampling, generate, prompt_lookup
from palimpsest.models.kimi_linear import KimiLinearConfig, KimiLinearForCausalLM

PROMPTS = [[1, 2, 3], list(range(50, 75)), [7]]


def check(model, tmp_path):
    rest = {"sampling": Sampling(0.8, top_p=0.9, repetition_penalty=1.2), "end_tokens": (), "prefill_chunk": 8}
    together = generate(model, PROMPTS, max_new_tokens=8, seed=2, **rest)
    alone = [generate(model, [p], max_new_tokens=8, seed=2 + i, **rest).tokens[0] for i, p in enumerate(PROMPTS)]
    assert together.tokens == alone

    first = generate(model, PROMPTS, max_new_tokens=3, seed=2, **rest)
    first.decode_state.save(tmp_path / "ready", model)
    second = generate(model, DecodeState.load(tmp_path / "ready", model), max_new_tokens=5, seed=2, **rest)
    assert [a + b for a, b in zip(first.tokens, second.tokens)] == alone

    drafted = generate(model, [PROMPTS[1]], max_new_tokens=8, seed=3, draft=prompt_lookup, **rest)
    assert drafted.tokens[0] == alone[1]


@pytest.mark.parametrize("pattern", ["K", "M", "R", "GM", "DE", "AL", "SR", "PK"])
def test_every_kind_of_layer(pattern, tmp_path):
    torch.manual_seed(0)
    check(KimiLinearForCausalLM(KimiLinearConfig.tiny(pattern, initializer_range=0.2)).eval(), tmp_path)


def test_without_convolutions(tmp_path):
    torch.manual_seed(0)
    config = KimiLinearConfig.tiny("KM", initializer_range=0.2, mixer_options={"conv": False})
    check(KimiLinearForCausalLM(config).eval(), tmp_path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(tmp_path):
    torch.manual_seed(0)
    model = KimiLinearForCausalLM(KimiLinearConfig.tiny("KKM", initializer_range=0.2)).eval()
    here = generate(model, PROMPTS, max_new_tokens=8, end_tokens=())
    model.cuda()
    check(model, tmp_path)
    state = here.state.to("cuda")
    assert state.device.type == "cuda"
    assert state.to("cpu").same(here.state)
    with pytest.raises(ValueError, match=r"the state is on cpu and the model on cuda:0; use state.to"):
        generate(model, PROMPTS, state=here.state, max_new_tokens=1)
