"""Decoding's kernels against their laws: under the interpreter without a GPU (fp32), compiled with one."""

import pytest
import torch

from palimpsest.ops import decode
from palimpsest.ops.gates import SigmoidDecay, SoftplusDecay
from palimpsest.testing import assert_within_budget

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def drawn(*shape, scale=1.0):
    return scale * torch.randn(shape, device=DEVICE)


def to(dtype, x):
    if isinstance(x, list | tuple):
        return [to(dtype, y) for y in x]
    if isinstance(x, SoftplusDecay):
        return SoftplusDecay(to(dtype, x.A_log), to(dtype, x.dt_bias))
    if isinstance(x, SigmoidDecay):
        return SigmoidDecay(to(dtype, x.A_log), to(dtype, x.dt_bias), x.floor)
    if isinstance(x, torch.Tensor):
        return x.to(dtype, copy=True) if x.is_floating_point() else x.clone()
    return x


def assert_is_the_law(function, *inputs, also=(), cpu=True, **options):
    """Outputs, and the inputs named in `also`, which are rewritten in place, by every form that there is here."""
    results = []
    forms = [(torch.float64, "torch"), (torch.float32, "torch"), (torch.float32, "triton")]
    forms += [(torch.float32, "cpu")] if cpu and DEVICE == "cpu" and function.__name__ in decode.ON_CPU else []
    for dtype, form in forms:
        arguments = to(dtype, list(inputs))
        with torch.no_grad():
            output = function(*arguments, form=form, **options)
        found = [output] if isinstance(output, torch.Tensor) else list(output)
        for at in also:
            found += [arguments[at]] if isinstance(arguments[at], torch.Tensor) else arguments[at]
        results.append(found)
    for (_, form), found in zip(forms[2:], results[2:], strict=True):
        for i, (truth, peer, actual) in enumerate(zip(*results[:2], found, strict=True)):
            if actual.is_floating_point():
                assert_within_budget(f"{form} {i}", actual, truth, peer)
            else:
                assert actual.equal(truth), i


@pytest.mark.parametrize(("N", "D", "sizes"), [(1, 48, [40, 7, 16]), (5, 40, [3]), (17, 32, [16, 16, 5, 33, 1, 2])])
def test_project(N, D, sizes):
    x, other = drawn(N, D), drawn(N, D)
    weights = [drawn(size, D) for size in sizes]
    assert_is_the_law(decode.project, [other if i == 2 else x for i in range(len(sizes))], weights, cpu=N < 5)


@pytest.mark.parametrize(("N", "J", "D"), [(1, 1, 24), (3, 5, 40)])
def test_add_norm(N, J, D):
    assert_is_the_law(decode.add_norm, drawn(N, D), drawn(N, J, D), drawn(D), 1e-5)


def memory_inputs(B=2, H=2, K=16, W=4, gate="softplus"):
    D = H * K
    A_log, dt_bias = drawn(H).abs(), drawn(D)
    decay = SoftplusDecay(A_log, dt_bias) if gate == "softplus" else SigmoidDecay(A_log, dt_bias, -5.0)
    return (
        *(drawn(B, D) for _ in range(3)), [drawn(D, 1, W) for _ in range(3)], [drawn(B, D, W - 1) for _ in range(3)],
        drawn(B, D), decay, drawn(B, H), drawn(B, D), drawn(K), drawn(B, H, K, K),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({}, {}),
        ({"B": 1, "H": 1, "K": 24, "gate": "sigmoid"}, {"beta_max": 2.0, "silu_gate": True}),
        ({"W": 2, "B": 1}, {"eps": 1e-2}),
    ],
)
def test_memory_layer_step(sizes, options):
    assert_is_the_law(decode.memory_layer_step_, *memory_inputs(**sizes), also=(4, 10), **options)


@pytest.mark.parametrize(
    ("T", "H", "R", "P", "S", "lengths"),
    [
        (1, 2, 32, 8, 70, [1, 33, 70]),
        (1, 5, 24, 0, 40, [16, 17]),
        (3, 2, 16, 16, 50, [3, 50]),
        (1, 20, 16, 8, 300, [299]),
    ],
)
def test_latent_step(T, H, R, P, S, lengths):
    B = len(lengths)
    q, rows = drawn(B, T, H, R + P), drawn(B, S, R + P)
    assert_is_the_law(decode.latent_step, q, rows, torch.tensor(lengths, device=DEVICE), value_dim=R)


@pytest.mark.parametrize(
    ("N", "E", "k", "options"), [(1, 4, 2, {}), (3, 20, 8, {"biased": True, "renormalize": False})]
)
def test_route(N, E, k, options):
    assert_is_the_law(decode.route, drawn(N, E), drawn(E, scale=0.1), k, scaling=2.4, **options)


def test_a_route_of_numbers_that_are_none_stays_among_the_experts():
    logits = torch.full((2, 5), torch.nan, device=DEVICE)
    chosen, _ = decode.route(logits, torch.zeros(5, device=DEVICE), 3, scaling=1.0, form="triton")
    assert chosen.min() >= 0
    assert chosen.max() < 5


def expert_inputs(N, E, k, D=24, W=20, S=None, chosen=None):
    chosen = torch.stack([torch.randperm(E, device=DEVICE)[:k] for _ in range(N)]) if chosen is None else chosen
    shared = None if S is None else tuple(drawn(*shape) for shape in ((S, D), (S, D), (D, S)))
    return (
        (drawn(N, D), chosen, drawn(N, k), drawn(E, W, D), drawn(E, W, D), drawn(E, D, W)),
        {} if shared is None else {"shared": shared},
    )


@pytest.mark.parametrize(("N", "E", "k", "S"), [(1, 4, 2, None), (1, 4, 2, 20), (5, 3, 2, 36), (20, 2, 1, 16)])
def test_experts(N, E, k, S):
    inputs, shared = expert_inputs(N, E, k, S=S)

    def experts(*arguments, form):
        *rest, options = arguments
        return decode.experts(*rest, shared=options, form=form)

    assert_is_the_law(experts, *inputs, list(shared.get("shared", ())))


def test_experts_all_tokens_on_one():
    chosen = torch.full((19, 1), 2, device=DEVICE)
    inputs, _ = expert_inputs(19, 4, 1, chosen=chosen)
    assert_is_the_law(decode.experts, *inputs)


@pytest.mark.skipif(DEVICE == "cuda", reason="says what a CPU says")
def test_a_named_form_never_falls_back():
    with pytest.raises(ValueError, match="form is 'cuda'; choose"):
        decode.project([torch.ones(1, 2)], [torch.ones(1, 2)], form="cuda")
    assert decode.refusal(torch.ones(1))
    with pytest.raises(ValueError, match="form 'cpu' cannot run memory_layer_step_ on torch.float64"):
        decode.memory_layer_step_(*to(torch.float64, list(memory_inputs())), form="cpu")


@pytest.mark.parametrize(
    ("H", "N", "P", "V", "R", "S", "lengths"),
    [(2, 16, 8, 16, 32, 70, [0, 33, 69]), (3, 24, 0, 40, 24, 40, [16]), (17, 4, 4, 4, 16, 9, [8, 9])],
)
def test_latent_layer_step(H, N, P, V, R, S, lengths):
    B = len(lengths)
    inputs = drawn(B, H * (N + P)), drawn(B, R + P), drawn(R), drawn(H, N + V, R), drawn(B, S, R + P)
    assert_is_the_law(decode.latent_layer_step_, *inputs, torch.tensor(lengths, device=DEVICE), also=(4, 5))


def test_a_latent_cache_grows_by_the_row_it_was_given():
    lengths = torch.tensor([0, 3], device=DEVICE)
    inputs = drawn(2, 2 * 8), drawn(2, 16 + 4), drawn(16), drawn(2, 8, 16), drawn(2, 4, 16 + 4)
    decode.latent_layer_step_(*inputs, lengths, form="triton")
    assert lengths.tolist() == [1, 4]
