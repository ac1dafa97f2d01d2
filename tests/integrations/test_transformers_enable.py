"""The native models of transformers on our kernels. Each defect is shown without enable(), and mended with it."""

import json
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file

transformers = pytest.importorskip("transformers", minversion="5.17")

from native import tiny  # noqa: E402

from palimpsest.integrations.transformers import disable, enable, enabled  # noqa: E402
from palimpsest.integrations.transformers.documents import documents  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
FAMILIES = ("kimi_linear", "bailing_hybrid", "glm5_next", "qwen3_next", "qwen3_5", "qwen3_5_moe", "olmo_hybrid")
APART = tuple(name for name in FAMILIES if name != "glm5_next")
IDS = torch.randint(3, 64, (2, 37), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def as_it_was():
    yield
    disable()


def native(model_type: str, **more):
    model = tiny(model_type, **more)
    if model is None:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    return model


def run(model, ids=IDS, **more):
    result = model(input_ids=ids, **more)
    cache = getattr(result, "cache", None) or getattr(
        result, "past_key_values", None
    )  # its names after and before 5.24
    return (result.logits if "logits" in result else result.last_hidden_state), cache


def loss(logits):
    """Some number that no norm makes constant."""
    return (logits * torch.linspace(-1, 1, logits.numel()).sin().view_as(logits)).mean()


def forward(model, ids=IDS, **more):
    with torch.no_grad():
        return run(model, ids, **more)[0]


def differs(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("name", FAMILIES)
def test_same_numbers_forward_backward_and_step(name):
    model = native(name)
    theirs = run(model)[0]
    loss(theirs).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    enable([name])
    ours = run(model)[0]
    loss(ours).backward()
    assert 0 < differs(ours, theirs) < 3e-5  # not the same code, and the same function
    for n, p in model.named_parameters():
        if n in gradients and gradients[n].abs().max() > 1e-6:
            assert differs(p.grad, gradients[n]) < 2e-3, n
    with torch.no_grad():
        whole = ours.detach()
        _, cache = run(model, IDS[:, :20], use_cache=True)
        for start, stop in ((20, 21), (21, 22), (22, 37)):
            part, cache = run(model, IDS[:, start:stop], use_cache=True, past_key_values=cache)
            assert differs(part, whole[:, start:stop]) < 3e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_a_state_goes_on_where_the_other_code_left_it(name):
    model = native(name)
    with torch.no_grad():
        whole, _ = run(model)
        enable([name])
        _, cache = run(model, IDS[:, :20], use_cache=True)
        disable()
        part, cache = run(model, IDS[:, 20:21], use_cache=True, past_key_values=cache)
        enable([name])
        rest, _ = run(model, IDS[:, 21:], use_cache=True, past_key_values=cache)
    assert differs(torch.cat((part, rest), 1), whole[:, 20:]) < 3e-5


LENGTHS = (5, 9, 6)
PACKED = torch.cat([torch.arange(n) for n in LENGTHS])[None]
BORDERS = torch.tensor([0, 5, 14, 20], dtype=torch.int32)


def apart(model):
    return torch.cat([forward(model, part) for part in IDS[:1, :20].split(LENGTHS, 1)], 1)


@pytest.mark.parametrize("name", APART)
def test_packed_documents_are_kept_apart(name):
    model = native(name)
    truth = apart(model)
    leaked = forward(model, IDS[:1, :20], position_ids=PACKED)
    assert differs(leaked, truth) > 0.05  # transformers' own
    enable([name])
    for said in (
        {"position_ids": PACKED},
        {"cu_seq_lens_q": BORDERS},
        {"position_ids": PACKED, "cu_seq_lens_q": BORDERS},
        {"position_ids": PACKED, "attention_mask": torch.ones(1, 20, dtype=torch.long)},
    ):
        assert differs(forward(model, IDS[:1, :20], **said), truth) < 3e-5, said
    rows = forward(model, torch.cat((IDS[:1, :20], IDS[:1, :20])), position_ids=PACKED.expand(2, 20))
    assert differs(rows[1:], truth) < 3e-5


def test_packed_documents_in_training_have_the_gradient_of_separate_ones():
    model = native("kimi_linear").train()
    enable(["kimi_linear"])
    model.gradient_checkpointing_enable()
    run(model, IDS[:1, :20], position_ids=PACKED)[0].square().sum().backward()
    packed = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for part in IDS[:1, :20].split(LENGTHS, 1):
        run(model, part)[0].square().sum().backward()
    for n, p in model.named_parameters():
        if n in packed and packed[n].abs().max() > 1e-4:
            assert differs(p.grad, packed[n]) < 1e-3, n


def test_documents_that_cannot_be_kept_apart_are_refused():
    enable()
    with pytest.raises(ValueError, match="packed documents came to glm5_next, whose indexed attention would mix them"):
        forward(native("glm5_next"), IDS[:1, :20], position_ids=PACKED)
    model = native("kimi_linear")
    with pytest.raises(ValueError, match="packed documents came with a cache"):
        forward(model, IDS[:1, :20], position_ids=PACKED, use_cache=True)
    with pytest.raises(ValueError, match="say that documents begin at other tokens"):
        forward(model, IDS[:1, :20], position_ids=PACKED, cu_seq_lens_q=torch.tensor([0, 6, 14, 20]))
    with pytest.raises(ValueError, match="expected borders that rise from 0 to 20 in a single row"):
        forward(model, IDS[:1, :20], cu_seq_lens_q=torch.tensor([0, 6, 14, 21]))
    with pytest.raises(ValueError, match="a packed row has no padding"):
        hidden = torch.ones(1, 20, dtype=torch.long)
        hidden[0, -1] = 0
        forward(model, IDS[:1, :20], cu_seq_lens_q=BORDERS, attention_mask=hidden)


def test_documents_are_found_where_positions_start_again():
    assert documents((2, 4), torch.tensor([[0, 1, 2, 3], [4, 5, 0, 1]]), None).tolist() == [0, 4, 6, 8]
    assert documents((1, 4), None, torch.tensor([0, 4])) is None
    assert documents((1, 4), torch.tensor([[7, 8, 9, 10]]), None) is None


def states(model, cache):
    layers = [i for i, kind in enumerate(model.config.layer_types) if kind == "linear_attention"]
    return torch.cat([cache.layers[i].recurrent_states[0].flatten() for i in layers]), torch.cat(
        [cache.layers[i].conv_states[0][..., 1:].flatten() for i in layers]
    )


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["kimi_linear", "qwen3_next"])
def test_padding_leaves_no_trace_in_the_state(name, side):
    model, ids = native(name), IDS[:1, :12]
    pads = torch.zeros(1, 5, dtype=torch.long)
    mask = torch.ones(1, 12, dtype=torch.long)
    order = (lambda a, b: torch.cat((a, b), 1)) if side == "right" else (lambda a, b: torch.cat((b, a), 1))
    with torch.no_grad():
        _, clean = run(model, ids, use_cache=True)
        padded = {"attention_mask": order(mask, pads), "use_cache": True}
        _, theirs = run(model, order(ids, pads), **padded)
        enable([name])
        logits, ours = run(model, order(ids, pads), **padded)
    for dirty, mine, truth in zip(states(model, theirs), states(model, ours), states(model, clean)):
        if side == "right":
            assert differs(dirty, truth) > 0.05  # transformers' own
        assert differs(mine, truth) < 3e-5
    kept = logits[:, :12] if side == "right" else logits[:, 5:]
    assert differs(kept, forward(model, ids)) < 3e-5


@pytest.mark.parametrize("name", ["kimi_linear", "qwen3_next", "olmo_hybrid"])
def test_decay_rates_stay_exact_in_a_bf16_model(name, tmp_path):
    native(name).save_pretrained(tmp_path)
    read = lambda: transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    rates = lambda model: {n: p for n, p in model.named_parameters() if n.endswith(("A_log", "dt_bias"))}
    exact = rates(native(name))
    before = read()
    assert any(not torch.equal(p.float(), exact[n]) for n, p in rates(before).items())  # transformers' own
    enable([name])
    after = read()
    for n, p in rates(after).items():
        assert torch.equal(p, exact[n]), n
    assert after.lm_head.weight.dtype == torch.bfloat16
    with pytest.warns(UserWarning, match="was built or cast before palimpsest's enable"):
        forward(before)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        forward(after)


def test_slow_decay_survives_the_gate():
    """transformers' softplus is log(1 + exp x), which is zero below -16.7; a decay of 1e-8 a token is not none."""
    model = native("kimi_linear")
    gate = model.model.layers[0].self_attn.forget_gate
    with torch.no_grad():
        gate.dt_bias.fill_(-18.0)
        gate.f_b_proj.weight.zero_()
    assert (gate(torch.randn(1, 1, 32)) == 0).all()  # transformers' own
    from palimpsest.integrations.transformers.families import FAMILIES as TABLE

    assert (TABLE["kimi_linear"].decay(model.model.layers[0].self_attn)(torch.zeros(1, 1, 2, 16)) < 0).all()


def test_a_model_of_memory_layers_alone_runs_and_generates():
    model = native("kimi_linear", layer_types=["linear_attention"] * 4)
    with pytest.raises(Exception):  # noqa: B017
        model.generate(IDS, max_new_tokens=5, do_sample=False)
    enable()
    model = native("kimi_linear", layer_types=["linear_attention"] * 4)
    tokens = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=5, do_sample=False)
    for t in range(5):
        assert torch.equal(forward(model, tokens[:, : 37 + t])[:, -1].argmax(-1), tokens[:, 37 + t])


def test_the_dense_layer_is_saved_under_its_official_name(tmp_path):
    def names(folder):
        native("kimi_linear").save_pretrained(folder)
        return {name for path in folder.glob("*.safetensors") for name in load_file(path)}

    assert "model.layers.0.block_sparse_moe.gate_proj.weight" in names(tmp_path / "theirs")  # transformers' own
    enable(["kimi_linear"])
    written = names(tmp_path / "ours")
    assert "model.layers.0.mlp.gate_proj.weight" in written
    assert "model.layers.1.block_sparse_moe.gate.weight" in written
    assert "model.layers.1.block_sparse_moe.experts.0.w1.weight" in written
    assert "model.layers.1.block_sparse_moe.shared_experts.gate_proj.weight" in written
    again, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for parameter, truth in zip(again.parameters(), native("kimi_linear").parameters()):
        assert torch.equal(parameter, truth)


def test_a_configuration_without_layer_types_gets_the_released_pattern():
    attention = lambda: [
        i + 1 for i, kind in enumerate(transformers.KimiLinearConfig().layer_types) if kind == "full_attention"
    ]
    assert attention() != [4, 8, 12, 16, 20, 24, 27]  # transformers' own
    enable(["kimi_linear"])
    assert attention() == [4, 8, 12, 16, 20, 24, 27]


@pytest.mark.parametrize("name", ["kimi_linear", "qwen3_next"])
def test_generate_gives_the_same_tokens(name):
    model = native(name)
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    draw = lambda **more: model.generate(IDS, attention_mask=mask, max_new_tokens=8, do_sample=False, **more)
    greedy, beams = draw(), draw(num_beams=2)
    enable([name])
    assert torch.equal(draw(), greedy)
    assert torch.equal(draw(num_beams=2), beams)


def test_it_says_what_it_did_and_undoes_it():
    from transformers.cache_utils import Cache
    from transformers.models.kimi_linear import modeling_kimi_linear as module

    def look():
        kept = [module.KimiLinearDeltaAttention, module.KimiLinearModel, module.KimiLinearPreTrainedModel, Cache]
        return [dict(vars(owner)) for owner in kept]

    before = look()
    assert enabled() is None
    report = enable(["kimi_linear"])
    assert enabled() is report
    assert "kimi_linear: packed documents" in str(report)
    assert look() != before
    enable(["qwen3_next"])  # the second call replaces the first
    assert module.KimiLinearDeltaAttention.forward is before[0]["forward"]
    disable()
    assert look() == before
    assert enabled() is None
    disable()  # nothing to do


def test_bad_input_is_refused_and_nothing_is_half_patched(monkeypatch):
    from transformers.models.kimi_linear import modeling_kimi_linear as module
    from transformers.models.qwen3_next import modeling_qwen3_next as other

    before = module.KimiLinearDeltaAttention.forward
    with pytest.raises(ValueError, match="llama: no such native model; those with a delta-rule memory are kimi_linear"):
        enable(["llama"])
    with pytest.raises(ValueError, match="backend 'fastest' is unknown"):
        enable(backend="fastest")
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.16.1")
    with pytest.raises(ValueError, match=r"install 5\.17 or newer"):
        enable()
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "6.2.0")
    with pytest.warns(UserWarning, match="newer than the newest that was tried"):
        enable(["kimi_linear"])
    disable()
    monkeypatch.undo()
    monkeypatch.setattr(other.Qwen3NextGatedDeltaNet, "forward", lambda self, x, state: x)
    with pytest.raises(ValueError, match="nothing was changed"):
        enable(["kimi_linear", "qwen3_next"])
    assert module.KimiLinearDeltaAttention.forward is before


def test_a_named_backend_is_the_one_that_runs():
    model = native("kimi_linear")
    fast = forward(model)
    enable(["kimi_linear"], backend="reference")
    assert differs(forward(model), fast) < 3e-5


def test_official_checkpoints_give_our_logits(tmp_path):
    """The same folder in our model and in the native one on our kernels: one function."""
    from palimpsest.models.kimi_linear import KimiLinearForCausalLM

    enable(["kimi_linear"])
    native("kimi_linear").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "kimi_linear"
    native_again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert differs(forward(native_again), forward(native("kimi_linear"))) == 0
    assert KimiLinearForCausalLM is not None
