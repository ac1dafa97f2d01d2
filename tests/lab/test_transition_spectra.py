"""Spectra against dense linear algebra, and warnings that are given when they should be."""

import torch

from palimpsest.lab.measure.transition_spectra import eigenvalues, layer_inputs, spectrum, transition_matrix, warnings
from palimpsest.lab.model_variants import MODEL_VARIANTS, Size, build
from palimpsest.layers.kimi_delta_attention import RecurrenceInputs
from palimpsest.ops.gates import l2norm
from palimpsest.ops.variants import kda


def edits(T: int = 24, K: int = 6, beta_max: float = 1.0, rate: float = 0.3, unit: bool = True) -> RecurrenceInputs:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, T, 2, K, dtype=torch.float64) for _ in range(3))
    log_decay = -rate * torch.rand(1, T, 2, K, dtype=torch.float64)
    beta = beta_max * torch.rand(1, T, 2, dtype=torch.float64)
    return RecurrenceInputs(l2norm(q), l2norm(k) if unit else 2 * k, v, log_decay, beta)


def test_eigenvalues_are_those_of_the_matrix():
    e = edits(beta_max=2.0)
    M = transition_matrix(e.k, e.log_decay, e.beta)
    dense = torch.linalg.eigvals(M)
    assert dense.imag.abs().max() < 1e-7
    assert dense.real.sort().values.allclose(eigenvalues(e.k, e.log_decay, e.beta), atol=1e-7)


def test_the_matrix_is_what_the_memory_does():
    e = edits(T=1)
    memory = torch.randn(1, 2, 6, 6, dtype=torch.float64)
    after = kda(*e, state=memory).state
    M = transition_matrix(e.k, e.log_decay, e.beta)[:, 0]
    write = e.beta[:, 0, :, None, None] * e.k[:, 0, :, :, None] * e.v[:, 0, :, None, :]
    assert after.allclose(M @ memory + write)


def test_unit_keys_keep_every_transition_a_contraction():
    found = spectrum(edits(beta_max=2.0))
    assert found.eigenvalues.abs().max() <= 1 + 1e-9
    assert found.largest_stretch.max() <= 1 + 1e-9
    assert (found.eigenvalues < 0).any()
    assert (found.carried[:, 1:] <= found.carried[:, :-1] + 1e-9).all()
    assert warnings(0, found, 24) == []
    assert (spectrum(edits()).eigenvalues >= -1e-9).all()


def test_a_memory_norm_is_that_of_the_state():
    e = edits()
    assert spectrum(e).memory_norm[:, -1].allclose(kda(*e).state.flatten(2).norm(dim=-1))


def test_norms_are_those_of_singular_values():
    e = edits(beta_max=2.0, unit=False)
    found, M = spectrum(e), transition_matrix(e.k, e.log_decay, e.beta)
    assert found.largest_stretch.allclose(torch.linalg.matrix_norm(M, 2))
    product = M[:, 0]
    for t in range(1, 24):
        product = M[:, t] @ product
        assert found.carried[:, t].allclose(torch.linalg.matrix_norm(product, 2))


def test_a_long_sequence_is_looked_at_here_and_there(monkeypatch):
    whole = spectrum(edits())
    monkeypatch.setattr("palimpsest.lab.measure.transition_spectra.LOOKS", 5)
    some = spectrum(edits())
    assert some.tokens.tolist() == [1, 7, 13, 18, 24]
    assert some.timescale.equal(whole.timescale)
    for name in ("eigenvalues", "largest_stretch", "carried", "memory_norm"):
        assert getattr(some, name).allclose(getattr(whole, name)[:, some.tokens - 1])


def test_warnings_are_given_when_something_is_wrong():
    said = lambda e: " ".join(warnings(3, spectrum(e), 24))
    assert "lengthens vectors" in said(edits(beta_max=2.0, unit=False))
    assert "below -1" in said(edits(beta_max=2.0, unit=False))
    assert "hardly ever fade" in said(edits(rate=0.0))
    assert "forget within a token" in said(edits(rate=50.0))
    assert "hardly writes" in said(edits(beta_max=1e-3))
    growing = edits(T=64, rate=0.0)
    growing.v[:, 32:] *= 50
    assert "still grows" in said(growing)
    broken = edits()
    broken.v[0, 3] = torch.inf
    assert "not finite" in warnings(0, spectrum(edits())._replace(memory_norm=torch.full((1, 24, 2), torch.nan)), 24)[0]


def test_the_edits_of_a_model_are_those_of_its_layers():
    torch.manual_seed(0)
    model = build(MODEL_VARIANTS["kda"], Size(hidden_size=16, heads=2, head_dim=8, mlp=16), 20).eval()
    tokens = torch.randint(20, (2, 12))
    found = layer_inputs(model, tokens)
    assert list(found) == [0, 1]
    first = model.model.layers[0]
    x = first.input_layernorm(model.model.embed_tokens(tokens))
    for mine, theirs in zip(found[0], first.self_attn.recurrence_inputs(x)):
        assert mine.allclose(theirs)
    assert not model.model.layers[0].self_attn._forward_pre_hooks
