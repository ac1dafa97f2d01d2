"""Against the native kimi_linear of transformers, on tiny random weights.

The truth is our model in float64; transformers, which computes its memory in float32 at best, is the honest peer of our
float32. Which experts a token goes to is forced where hidden states are compared: a near tie decided differently is no
error of either, and would hide one.
"""

import warnings

import pytest
import torch

from palimpsest.layers.moe import MoE, Router
from palimpsest.models.kimi_linear import KimiLinearConfig, KimiLinearForCausalLM
from palimpsest.models.kimi_linear.official_names import official_tensors
from palimpsest.testing import assert_within_budget

transformers = pytest.importorskip("transformers", minversion="5.17")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

EXPERTS, CHOSEN, LENGTH = 8, 2, 150


def build():
    torch.manual_seed(0)
    config = KimiLinearConfig.tiny("KKMKM", hidden_size=48, v_head_dim=12, num_experts=EXPERTS, intermediate_size=64)
    model = KimiLinearForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1, 0.2)
        elif "A_log" not in name and "dt_bias" not in name:
            torch.nn.init.normal_(parameter, 0, 0.2)
    for module in model.modules():
        if isinstance(module, MoE):
            module.gate.e_score_correction_bias.normal_(0, 0.1)
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Ours in float64, ours in float32, theirs in float32 read from what ours wrote."""
    folder, ours = tmp_path_factory.mktemp("model"), build()
    ours.save_pretrained(folder, max_shard_bytes=100_000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
    assert type(theirs).__module__.startswith("transformers.models.kimi_linear")
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return build().double(), ours, theirs.eval()


@pytest.fixture
def forced(models, monkeypatch):
    """Token t of MoE layer l goes to the same experts in every model; call it to start again at token 0."""
    table = torch.rand(len(models[0].model.layers), LENGTH, EXPERTS, generator=torch.Generator().manual_seed(1)).topk(
        CHOSEN
    )[1]
    seen: dict = {}

    def chosen(router, layer, count):
        start = seen.get(router, 0)
        seen[router] = start + count
        return table[layer, start : start + count]

    def weights(scores, experts):
        picked = scores.gather(1, experts)
        return picked / (picked.sum(-1, keepdim=True) + 1e-20) * 2.446

    for model in models[:2]:
        for i, layer in enumerate(model.model.layers):
            if hasattr(layer, "block_sparse_moe"):
                gate = layer.block_sparse_moe.gate

                def ours(x, gate=gate, i=i):
                    experts = chosen(gate, i, len(x))
                    return experts, weights((x @ gate.weight.T).sigmoid(), experts)

                monkeypatch.setattr(gate, "forward", ours)
    for i, layer in enumerate(models[2].model.layers[1:], 1):
        gate = layer.mlp.gate

        def theirs(x, gate=gate, i=i):
            x = x.view(-1, gate.hidden_dim)
            logits = x @ gate.weight.T
            experts = chosen(gate, i, len(x))
            return logits, weights(logits.sigmoid(), experts), experts

        monkeypatch.setattr(gate, "forward", theirs)
    return seen.clear


def tokens(seed=0):
    return torch.randint(0, 257, (1, LENGTH), generator=torch.Generator().manual_seed(seed))


def hidden(model, ids):
    """What each layer hands to the next, and the logits."""
    outputs, hooks = [], []
    for layer in model.model.layers:
        keep = lambda _, __, out: outputs.append(out[0] if isinstance(out, tuple) else out)
        hooks.append(layer.register_forward_hook(keep))
    logits = model(ids).logits
    for hook in hooks:
        hook.remove()
    return [*outputs, logits]


def compare(name, truth, ours, theirs, scale=1e-4):
    """Theirs is close to the truth, so it is the same function; and ours in float32 is no worse than twice theirs."""
    assert (theirs.double() - truth).abs().max() <= scale * truth.abs().max(), name
    assert_within_budget(name, ours, truth, theirs)


@torch.no_grad()
def test_hidden_states_of_every_layer_and_logits(models, forced):
    ids = tokens()
    results = []
    for model in models:
        forced()
        results.append(hidden(model, ids))
    for i, (truth, ours, theirs) in enumerate(zip(*results, strict=True)):
        compare(f"layer {i}" if i < 5 else "logits", truth, ours, theirs)


@torch.no_grad()
def test_prefill_and_decode_split_anywhere(models, forced):
    ids = tokens(1)
    cuts = [(0, 37), (37, 102), *((t, t + 1) for t in range(102, 107)), (107, LENGTH)]
    forced()
    truth = models[0](ids).logits
    for i, model in enumerate(models[:2]):
        forced()
        logits, state = [], None
        for a, b in cuts:
            out = model(ids[:, a:b], state=state)
            logits.append(out.logits)
            state = out.state
        results = torch.cat(logits, 1)
        if i == 0:
            torch.testing.assert_close(results, truth, rtol=1e-9, atol=1e-10)
    forced()
    logits, cache = [], None
    for a, b in cuts:
        out = models[2](ids[:, a:b], past_key_values=cache, use_cache=True)
        logits.append(out.logits)
        cache = out.past_key_values
    compare("logits", truth, results, torch.cat(logits, 1))
    memories = [layer.memory for layer in state.layers if hasattr(layer, "memory")]
    theirs = [layer.recurrent_states for layer in cache.layers if hasattr(layer, "recurrent_states")]
    assert len(memories) == len(theirs) == 3
    for ours, their in zip(memories, theirs):
        their = next(iter(their.values())) if isinstance(their, dict) else their
        torch.testing.assert_close(ours, their, rtol=1e-3, atol=1e-4)


def under_our_names(theirs, names):
    """Their gradients, taken apart and named as in the official checkpoint."""
    found = {}
    for name, parameter in theirs.named_parameters():
        grad = parameter.grad
        if ".conv1d." in name:
            found |= {name.replace("conv1d", f"{s}_conv1d"): g for s, g in zip("qkv", grad.chunk(3))}
        elif name.endswith("experts.gate_up_proj"):
            for e, both in enumerate(grad):
                for w, g in zip(("w1", "w3"), both.chunk(2)):
                    found[name.replace("gate_up_proj", f"{e}.{w}.weight")] = g
        elif name.endswith("experts.down_proj"):
            found |= {name.replace("down_proj", f"{e}.w2.weight"): g for e, g in enumerate(grad)}
        else:
            found[name.replace("forget_gate.", "")] = grad
    sparse = {name: name.replace(".mlp.", ".block_sparse_moe.") for name in found}
    return {(name if name in names else sparse[name]): grad for name, grad in found.items()}


def test_gradients_of_every_parameter(models, forced):
    ids = tokens(2)
    for model in models:
        forced()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
    truth, ours = (dict(official_tensors({n: p.grad for n, p in model.named_parameters()})) for model in models[:2])
    theirs = under_our_names(models[2], truth)
    assert theirs.keys() == truth.keys()
    for name, grad in truth.items():
        assert grad.abs().max() > 0, name
        assert (theirs[name].double() - grad).abs().max() <= 1e-4 * grad.abs().max(), name
        assert (ours[name].double() - grad).abs().max() <= 5e-5 * grad.abs().max(), name


@torch.no_grad()
def test_routers_choose_and_weigh_alike(models):
    gates = [[m for m in model.modules() if type(m).__name__.endswith("Router")] for model in models[1:]]
    assert len(gates[0]) == len(gates[1]) == 4
    assert all(isinstance(gate, Router) for gate in gates[0])
    x = torch.randn(500, 48, generator=torch.Generator().manual_seed(3))
    for ours, theirs in zip(*gates):
        experts, weights = ours(x)
        _, their_weights, their_experts = theirs(x)
        order, their_order = experts.argsort(), their_experts.argsort()
        assert experts.gather(1, order).equal(their_experts.gather(1, their_order))
        torch.testing.assert_close(weights.gather(1, order), their_weights.gather(1, their_order))


@torch.no_grad()
def test_greedy_generation_is_the_same(models):
    """With routing free, prompt padded on the left there and here."""
    _, ours, theirs = models
    ids = torch.cat([tokens(4)[:, :20], tokens(5)[:, :20]])
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, :7] = False
    their = theirs.generate(
        ids, attention_mask=mask.long(), max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=-1
    )
    logits, state, _ = ours(ids, mask=mask, last_only=True)
    token, written = logits[:, 0].argmax(-1), []
    for _ in range(12):
        written.append(token)
        logits, state = ours.step_(token, state)
        token = logits.argmax(-1)
    assert torch.stack(written, 1).equal(their[:, 20:])


@torch.no_grad()
def test_what_transformers_saves_is_read(models, tmp_path):
    """It writes the dense layer under the sparse layer's name; ours reads both."""
    _, ours, theirs = models
    theirs.save_pretrained(tmp_path)
    again = KimiLinearForCausalLM.from_pretrained(tmp_path)
    assert again.config == ours.config
    for name, tensor in ours.state_dict().items():
        assert again.state_dict()[name].equal(tensor), name


@torch.no_grad()
def test_tied_models_go_both_ways(tmp_path):
    """transformers does not tie these models: it needs the head in the file, and writes one."""
    torch.manual_seed(0)
    ours = KimiLinearForCausalLM(KimiLinearConfig.tiny("KM", tie_word_embeddings=True, initializer_range=0.2)).eval()
    ours.save_pretrained(tmp_path / "ours")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    logits = ours(tokens()).logits
    torch.testing.assert_close(theirs.eval()(tokens()).logits, logits, rtol=1e-4, atol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    again = KimiLinearForCausalLM.from_pretrained(tmp_path / "theirs")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert again(tokens()).logits.equal(logits)


MUTANTS = {
    "eps of the latent norm": lambda m: setattr(m.model.layers[2].self_attn.kv_a_layernorm, "eps", 1e-3),
    "rotary positions": lambda m: setattr(m.model.layers[2].self_attn, "rope", 10000.0),
    "A_log of another head": lambda m: m.model.layers[0].self_attn.A_log.data.copy_(
        m.model.layers[0].self_attn.A_log.data.flip(2)
    ),
    "a window one token late": lambda m: m.model.layers[1].self_attn.k_conv1d.weight.data.copy_(
        m.model.layers[1].self_attn.k_conv1d.weight.data.roll(1, -1)
    ),
    "shared expert scaled": lambda m: m.model.layers[3].block_sparse_moe.shared_experts.down_proj.weight.data.mul_(2.446),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
@torch.no_grad()
def test_parity_rejects_wrong_models(models, forced, mutant, monkeypatch):
    ids, wrong = tokens(), build()
    for gate, other in zip(*([m for m in model.modules() if isinstance(m, Router)] for model in (wrong, models[1]))):
        monkeypatch.setattr(gate, "forward", other.forward)
    MUTANTS[mutant](wrong)
    results = []
    for model in (models[0], wrong, models[2]):
        forced()
        results.append(model(ids).logits)
    with pytest.raises(AssertionError, match="exceeds budget"):
        compare("logits", *results)
