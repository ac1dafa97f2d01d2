"""Contestants are equal where they should be, see no future, and fail where they must."""

import pytest
import torch

from palimpsest.lab.model_variants import (
    ABOUT,
    MODEL_VARIANTS,
    PAPER_SIZE,
    ModelVariant,
    Size,
    build,
    config,
    count_parameters,
    model_variant,
    state_numbers,
)
from palimpsest.lab.tasks import Palindrome
from palimpsest.lab.training import Training, learn
from palimpsest.models.kimi_linear.mixers import is_full_attention
from palimpsest.models.kimi_linear.model_state import ModelState
from palimpsest.ops import variants

EVERYONE = [*MODEL_VARIANTS, "KKKM", "KM"]
SIZE = Size(layers=4, hidden_size=32, heads=2, head_dim=16, mlp=64)


@pytest.mark.parametrize("name", EVERYONE)
def test_parameters_are_matched_to_half_a_percent(name):
    for size in (SIZE, Size(layers=4), PAPER_SIZE):
        if size.layers < len(model_variant(name).pattern):
            continue
        have, want = (count_parameters(config(model_variant(who), size, 512)) for who in (name, "kda"))
        assert abs(have - want) <= max(0.005 * want, 3 * size.hidden_size * size.layers / 2 + 1)


@pytest.mark.parametrize("name", EVERYONE)
def test_the_state_is_counted_as_it_is(name):
    model = build(model_variant(name), SIZE, 20)
    with torch.no_grad():
        state = model(torch.randint(20, (1, 24))).state
    held = sum(
        x.numel() for key, x in state.tensors().items() if key not in ("position",) and not key.endswith("valid")
    )
    assert held == state_numbers(model.config, 24)
    assert isinstance(state, ModelState)


def test_every_matrix_memory_holds_as_many_numbers():
    """Gated DeltaProduct has, beside the same memory, windows for the keys and values of a second sub-step."""
    matrix = [name for name in MODEL_VARIANTS if "softmax" not in name]
    layers = {name: ModelState.empty(config(model_variant(name), SIZE, 20)).layers for name in matrix}
    assert len({state.memory.shape for states in layers.values() for state in states}) == 1
    held = {name: state_numbers(config(model_variant(name), SIZE, 20), 999) for name in matrix}
    assert len({held[name] for name in matrix if name != "deltaproduct"}) == 1
    more = sum(state.conv[1].numel() for state in layers["deltaproduct"])
    assert held["deltaproduct"] - held["kda"] == more


@pytest.mark.parametrize("name", EVERYONE)
def test_nobody_sees_a_future_token(name):
    torch.manual_seed(0)
    model = build(model_variant(name), SIZE, 20).eval()
    tokens = torch.randint(20, (1, 40))
    changed = tokens.clone()
    changed[:, 25:] = (changed[:, 25:] + 7) % 20
    with torch.no_grad():
        one, other = model(tokens).logits, model(changed).logits
    assert one[:, :25].equal(other[:, :25]) or (one[:, :25] - other[:, :25]).abs().max() < 1e-5
    assert (one[:, 25:] - other[:, 25:]).abs().max() > 1e-3


@pytest.mark.parametrize("name", EVERYONE)
def test_half_precision_reaches_products_and_no_decay(name, monkeypatch):
    """As a GPU trains it: q, k and v in bfloat16, so that its kernels take them; decays and parameters in float32."""
    told, problem = [], variants._problem

    def note(op, variant, q, v, cu_seqlens, tensors, gate="none"):
        told.append((op, tensors))
        return problem(op, variant, q, v, cu_seqlens, tensors, gate)

    monkeypatch.setattr(variants, "_problem", note)
    torch.manual_seed(0)
    model = build(model_variant(name), SIZE, 20)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.randint(20, (2, 24))).logits
    logits.float().logsumexp(-1).mean().backward()
    assert all(p.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    assert bool(told) != all(map(is_full_attention, model.config.layer_types))
    for i, (op, tensors) in enumerate(told):
        if op == "kda" and i and told[i - 1][0] == "kda_from_logits":
            continue  # the same call again, asked of the backends as one of KDA
        width = {"core": 4, "kda": 3, "kda_from_logits": 3}[op]
        assert {x.dtype for x in tensors[:width]} == {torch.bfloat16}
        decays = tensors[5:7] if op == "kda_from_logits" else tensors[width : width + 1]
        assert {x.dtype for x in decays} == {torch.float32}


def test_every_contestant_says_what_it_is():
    assert set(ABOUT) == set(MODEL_VARIANTS)


def test_a_bounded_gate_starts_where_it_can_learn():
    model = build(ModelVariant("bounded", "K", {"gate": "sigmoid"}), SIZE, 20)
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("A_log"))


TASK = Palindrome(length=8, vocab_size=10)
LEARN = {
    "train": (TASK,),
    "size": Size(layers=1, hidden_size=32, heads=1, head_dim=16, mlp=32),
    "lr": 2e-2,
    "steps": 120,
    "tokens_per_step": 256,
    "evaluate_every": 30,
    "test_batches": 2,
}


def test_who_cannot_tell_the_order_fails_and_who_can_learns():
    """Linear attention without decay and convolution gives the same answer to any order of what it read."""
    blind = ModelVariant("blind", "L", {"conv": False})
    found = {
        w.name: learn(Training(who=w, **LEARN), "cpu", lambda *_: None)[0]["rows"][0]
        for w in (blind, MODEL_VARIANTS["kda"])
    }
    assert found["kda"]["best_accuracy"] > 0.8
    assert found["blind"]["best_accuracy"] < 0.5
    assert found["kda"]["parameters"] == pytest.approx(found["blind"]["parameters"], rel=0.01)


BAD = {
    "unknown": (lambda: model_variant("kdaa"), "did you mean 'kda'"),
    "unknown, far": (lambda: model_variant("transformer-xl"), "choose one of kda, "),
    "letter": (lambda: model_variant("KX"), "unknown letters X"),
    "part": (lambda: ModelVariant("mine", "K", {"convolution": False}), "did you mean conv?"),
    "value": (lambda: ModelVariant("mine", "K", {"decay": "token"}), "choose one of 'channel'"),
    "layers": (lambda: config(model_variant("KKKM"), Size(layers=2), 20), "pattern of 4 layers"),
    "size": (lambda: Size(heads=0), "heads is 0"),
    "no room": (lambda: config(model_variant("gdn2"), Size(hidden_size=64, mlp=8), 20), "give mlp at least"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_contestants_are_refused_in_a_sentence(case):
    make, sentence = BAD[case]
    with pytest.raises(ValueError, match=sentence):
        make()
