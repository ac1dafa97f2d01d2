"""FLA's names over ours: its signatures, its laws written out token by token, and what is refused."""

import inspect
import sys

import pytest
import torch
import torch.nn.functional as F

from palimpsest.compat import fla
from palimpsest.compat import fla as ours
from palimpsest.ops.gates import l2norm
from palimpsest.testing import assert_within_budget

B, T, H, HV, K, V = 2, 21, 2, 4, 8, 6
BORDERS = torch.tensor([0, 5, 5, 21])

# Parameters of flash-linear-attention 0.6, in order.
SIGNATURES = {
    "chunk_kda": "q k v g beta scale initial_state output_final_state use_qk_l2norm_in_kernel use_gate_in_kernel "
    "use_beta_sigmoid_in_kernel allow_neg_eigval safe_gate lower_bound disable_recompute return_intermediate_states "
    "state_v_first cu_seqlens cu_seqlens_cpu cp_context use_graph max_num_seqs",
    "fused_recurrent_kda": "q k v g beta A_log dt_bias scale initial_state output_final_state use_qk_l2norm_in_kernel "
    "use_gate_in_kernel use_beta_sigmoid_in_kernel allow_neg_eigval lower_bound state_v_first cu_seqlens",
    "fused_kda_gate": "g A_log dt_bias lower_bound output_dtype",
    "naive_kda_gate": "g A_log dt_bias output_dtype",
    "naive_kda_lowerbound_gate": "g A_log dt_bias lower_bound output_dtype",
    "naive_recurrent_kda": "q k v g beta scale initial_state output_final_state",
    "chunk_gdn2": "q k v g b w scale initial_state output_final_state use_qk_l2norm_in_kernel use_gate_in_kernel cu_seqlens "
    "cu_seqlens_cpu safe_gate lower_bound disable_recompute return_intermediate_states state_v_first cp_context",
    "fused_recurrent_gdn2": "q k v g b w A_log dt_bias scale initial_state output_final_state use_qk_l2norm_in_kernel "
    "use_gate_in_kernel lower_bound state_v_first cu_seqlens",
    "chunk_gated_delta_rule": "q k v g beta scale initial_state output_final_state use_qk_l2norm_in_kernel "
    "use_beta_sigmoid_in_kernel allow_neg_eigval state_v_first cu_seqlens cu_seqlens_cpu chunk_indices cp_context",
    "fused_recurrent_gated_delta_rule": "q k v g gk gv beta scale initial_state output_final_state use_qk_l2norm_in_kernel "
    "use_gate_in_kernel A_log dt_bias use_beta_sigmoid_in_kernel allow_neg_eigval state_v_first cu_seqlens",
    "chunk_delta_rule": "q k v beta scale initial_state output_final_state use_qk_l2norm_in_kernel cu_seqlens cu_seqlens_cpu",
    "fused_recurrent_delta_rule": "q k v beta scale initial_state output_final_state use_qk_l2norm_in_kernel cu_seqlens",
    "chunk_gated_delta_product": "q k v g beta num_householder scale initial_state output_final_state "
    "use_qk_l2norm_in_kernel cu_seqlens cu_seqlens_cpu cp_context",
    "chunk_dplr_delta_rule": "q k v a b gk scale initial_state output_final_state cu_seqlens cu_seqlens_cpu safe_gate "
    "chunk_size disable_recompute cp_context lower_bound",
    "fused_recurrent_dplr_delta_rule": "q k v a b gk scale initial_state output_final_state reverse cu_seqlens",
    "chunk_gla": "q k v g scale initial_state output_final_state state_v_first cu_seqlens cu_seqlens_cpu",
    "fused_recurrent_gla": "q k v gk gv scale initial_state output_final_state reverse state_v_first cu_seqlens",
    "fused_chunk_linear_attn": "q k v scale initial_state output_final_state normalize cu_seqlens",
    "chunk_linear_attn": "q k v scale initial_state output_final_state normalize cu_seqlens",
    "fused_recurrent_linear_attn": "q k v scale initial_state output_final_state reverse normalize cu_seqlens",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_arguments_are_flas_in_flas_order(name):
    parameters = inspect.signature(getattr(fla, name)).parameters.values()
    assert " ".join(p.name for p in parameters if p.kind is not p.VAR_KEYWORD) == SIGNATURES[name]


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def law(q, k, v, decay, erase, write, state):
    """S <- Diag(exp decay) S; S <- S + k (write - S^T erase)^T; o = S^T q, one token at a time; erase and k as given."""
    heads = v.shape[2] // q.shape[2]
    q, k = (x.repeat_interleave(heads, 2) for x in (q, k))
    outputs = []
    for t in range(q.shape[1]):
        state = state * decay[:, t].exp()[..., None]
        read = (state * erase(k, t)[..., None]).sum(-2)
        state = state + k[:, t, :, :, None] * (write[:, t] - read)[..., None, :]
        outputs.append((state * q[:, t, :, :, None]).sum(-2) * q.shape[-1] ** -0.5)
    return torch.stack(outputs, 1), state


@pytest.fixture
def problem():
    q, k = l2norm(draw(B, T, H, K)), l2norm(draw(B, T, H, K))
    return q, k, draw(B, T, HV, V), -draw(B, T, HV, K).abs() / 4, draw(B, T, HV).sigmoid(), draw(B, HV, K, V)


def check(got, truth, tolerance=1e-9):
    for a, b in zip(got, truth):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


HINTS = {
    "disable_recompute": True, "cu_seqlens_cpu": None, "chunk_size": 32, "safe_gate": True, "use_graph": True,
    "max_num_seqs": 4, "lower_bound": -5.0, "A_log": torch.zeros(HV),
}  # fmt: skip


@pytest.mark.parametrize("hints", [{}, HINTS], ids=["plain", "hints"])
def test_kda(problem, hints):
    q, k, v, g, beta, state = problem
    truth = law(q, k, v, g, lambda k, t: beta[:, t, :, None] * k[:, t], beta[..., None] * v, state)
    check(fla.chunk_kda(q, k, v, g, beta, None, state, True, **hints), truth)
    check(fla.fused_recurrent_kda(q, k, v, g, beta, initial_state=state, output_final_state=True), truth)
    output, none = fla.chunk_kda(q, k, v, g, beta, 0.5 * K**-0.5, state)
    assert none is None
    check([output], [truth[0] / 2])
    first = fla.chunk_kda(q, k, v, g, beta, None, state.mT, True, state_v_first=True)
    check((first[0], first[1].mT), truth)
    older = fla.fused_recurrent_kda(
        q, k, v, g, beta, initial_state=state.mT, output_final_state=True, transpose_state_layout=True
    )
    check((older[0], older[1].mT), truth)


@pytest.mark.parametrize("bound", [None, -5.0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rates", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_the_gate_the_norm_and_beta_in_the_kernel(problem, bound, bias, rates, whole):
    q, k, v, _, _, state = problem
    q, k, g, beta = 3 * q, 2 * k, draw(B, T, HV, K), draw(B, T, HV)
    A_log = draw(HV) if rates else None
    dt_bias = draw(HV * K) if bias else None
    more = {"use_gate_in_kernel": True, "A_log": A_log, "dt_bias": dt_bias, "lower_bound": bound}
    if bound is None and not rates:
        with pytest.raises(ValueError, match="came without A_log and without lower_bound"):
            fla.chunk_kda(q, k, v, g, beta.sigmoid(), **more)
        return
    x = g if dt_bias is None else g + dt_bias.view(HV, K)
    rate = 1 if A_log is None else A_log.exp()[:, None]
    decay = -rate * F.softplus(x) if bound is None else bound * (rate * x).sigmoid()
    check([fla.fused_kda_gate(g, A_log, dt_bias, bound, torch.float64)], [decay])
    strength = 2 * beta.sigmoid() if whole else beta.sigmoid()
    if whole:
        more |= {"use_beta_sigmoid_in_kernel": True, "allow_neg_eigval": True}
    given = beta if whole else strength
    truth = law(
        l2norm(q), l2norm(k), v, decay, lambda k, t: strength[:, t, :, None] * k[:, t], strength[..., None] * v, state
    )
    got = fla.chunk_kda(q, k, v, g, given, None, state, True, use_qk_l2norm_in_kernel=True, **more)
    check(got, truth)
    got = fla.fused_recurrent_kda(
        q, k, v, g, given, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True, **more
    )
    check(got, truth)


def test_packed_sequences_and_gradients(problem):
    q, k, v, g, beta, _ = (x[:1].clone().requires_grad_() for x in problem)
    state = draw(3, HV, K, V)
    output, final = fla.chunk_kda(q, k, v, g, beta, None, state, True, cu_seqlens=BORDERS, cu_seqlens_cpu=BORDERS)
    output.sum().backward()
    packed = q.grad.clone()
    q.grad = None
    for n, (a, b) in enumerate(zip(BORDERS.tolist(), BORDERS.tolist()[1:])):
        part = [x[:, a:b] for x in (q, k, v, g, beta)]
        alone, last = fla.fused_recurrent_kda(*part, initial_state=state[n : n + 1], output_final_state=True)
        check((output[:, a:b], final[n : n + 1]), (alone, last))
        alone.sum().backward()
    check([packed], [q.grad])


@pytest.mark.parametrize("cu_seqlens", [None, BORDERS])
def test_intermediate_states_are_the_memories_before_each_chunk(problem, cu_seqlens):
    q, k, v, g, beta, _ = (x[:1] for x in problem)
    with torch.inference_mode():
        whole = fla.chunk_kda(q, k, v, g, beta, output_final_state=True, cu_seqlens=cu_seqlens)
        more = {"return_intermediate_states": True, "chunk_size": 8, "cu_seqlens": cu_seqlens, "state_v_first": True}
        output, final, states = fla.chunk_kda(q, k, v, g, beta, output_final_state=True, **more)
    check((output, final.mT), whole)
    starts = [0, 8, 16] if cu_seqlens is None else [0, 5, 13]
    assert states.shape == (1, 3, HV, V, K)
    first = 0 if cu_seqlens is None else 5
    truth = fla.chunk_kda(*(x[:, first : starts[2]] for x in (q, k, v, g, beta)), output_final_state=True)[1]
    check([states[:, 2].mT], [truth])
    with pytest.raises(ValueError, match="return_intermediate_states has no gradient"):
        fla.chunk_kda(q.clone().requires_grad_(), k, v, g, beta, return_intermediate_states=True)


def test_gdn2(problem):
    q, k, v, g, _, state = problem
    b, w, A_log = draw(B, T, HV, K).sigmoid(), draw(B, T, HV, V).sigmoid(), draw(HV)
    truth = law(q, k, v, g, lambda k, t: b[:, t] * k[:, t], w * v, state)
    check(fla.chunk_gdn2(q, k, v, g, b, w, None, state, True, disable_recompute=True), truth)
    check(fla.fused_recurrent_gdn2(q, k, v, g, b, w, initial_state=state, output_final_state=True), truth)
    logits = draw(B, T, HV, K)
    decay = -A_log.exp()[:, None] * F.softplus(logits)
    truth = law(q, k, v, decay, lambda k, t: b[:, t] * k[:, t], w * v, state)
    got = fla.fused_recurrent_gdn2(
        q, k, v, logits, b, w, A_log, None, None, state, True, use_gate_in_kernel=True, use_qk_l2norm_in_kernel=True
    )
    check(got, truth, 1e-5)  # q and k are of unit length already, up to the norm's epsilon


def test_gated_delta_rule(problem):
    q, k, v, _, beta, state = problem
    g = -draw(B, T, HV).abs()
    truth = law(q, k, v, g[..., None], lambda k, t: beta[:, t, :, None] * k[:, t], beta[..., None] * v, state)
    check(fla.chunk_gated_delta_rule(q, k, v, g, beta, None, state, True, chunk_size=16), truth)
    more = {"beta": beta, "initial_state": state, "output_final_state": True}
    check(fla.fused_recurrent_gated_delta_rule(q, k, v, g, **more), truth)
    channels = -draw(B, T, HV, K).abs()
    both = law(q, k, v, channels + g[..., None], lambda k, t: beta[:, t, :, None] * k[:, t], beta[..., None] * v, state)
    check(fla.fused_recurrent_gated_delta_rule(q, k, v, g, channels, **more), both)
    A_log, dt_bias, logits = draw(HV), draw(HV), draw(B, T, HV)
    decay = -A_log.exp() * F.softplus(logits + dt_bias)
    truth = law(q, k, v, decay[..., None], lambda k, t: beta[:, t, :, None] * k[:, t], beta[..., None] * v, state)
    gate = {"use_gate_in_kernel": True, "A_log": A_log, "dt_bias": dt_bias}
    check(fla.chunk_gated_delta_rule(q, k, v, logits, beta, None, state, True, **gate), truth)
    check(fla.fused_recurrent_gated_delta_rule(q, k, v, logits, **more, **gate), truth)


def test_delta_rule(problem):
    q, k, v, _, beta, state = problem
    v, beta, state = v[:, :, :H], beta[:, :, :H], state[:, :H]
    none = torch.zeros(B, T, H, 1, dtype=torch.float64)
    truth = law(q, k, v, none, lambda k, t: beta[:, t, :, None] * k[:, t], beta[..., None] * v, state)
    check(fla.chunk_delta_rule(q, k, v, beta, None, state, True, chunk_size=16), truth)
    check(fla.fused_recurrent_delta_rule(q, k, v, beta, None, state, True), truth)
    ones = law(q, k, v, none, lambda k, t: k[:, t], v, state)
    check(fla.fused_recurrent_delta_rule(q, k, v, None, None, state, True), ones)


@pytest.mark.parametrize("decays", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_gated_delta_product(decays, packed):
    rows, n = (1 if packed else B), 3
    q, k, v = draw(rows, T, H, K), l2norm(draw(rows, n * T, H, K)), draw(rows, n * T, H, V)
    g, beta = (-draw(rows, T, H).abs() if decays else None), 2 * draw(rows, n * T, H).sigmoid()
    borders = BORDERS if packed else None
    starts = draw(3 if packed else B, H, K, V)
    output, final = fla.chunk_gated_delta_product(q, k, v, g, beta, n, None, starts, True, False, borders)
    for row, (a, b) in enumerate(zip(BORDERS.tolist(), BORDERS.tolist()[1:]) if packed else [(0, T)] * B):
        at = 0 if packed else row
        state = starts[row]
        for t in range(a, b):
            state = state if g is None else state * g[at, t].exp()[:, None, None]
            for j in range(n * t, n * t + n):
                read = (state * k[at, j, :, :, None]).sum(-2)
                state = state + k[at, j, :, :, None] * (beta[at, j, :, None] * (v[at, j] - read))[:, None]
            check([output[at, t]], [(state * q[at, t, :, :, None]).sum(-2) * K**-0.5])
        check([final[row]], [state])


def test_dplr(problem):
    q, k, v, g, _, state = (x[:, :, :H] if x.ndim > 2 and x.shape[1] == T else x[:, :H] for x in problem)
    a, b = -l2norm(draw(B, T, H, K)), l2norm(draw(B, T, H, K)) / 2
    outputs, memory = [], state
    for t in range(T):
        read = (memory * a[:, t, :, :, None]).sum(-2, keepdim=True)
        memory = memory * g[:, t].exp()[..., None] + b[:, t, :, :, None] * read + k[:, t, :, :, None] * v[:, t, :, None]
        outputs.append((memory * q[:, t, :, :, None]).sum(-2) * K**-0.5)
    truth = torch.stack(outputs, 1), memory
    check(fla.chunk_dplr_delta_rule(q, k, v, a, b, g, None, state, True, lower_bound=-5.0), truth)
    check(fla.fused_recurrent_dplr_delta_rule(q, k, v, a, b, g, None, state, True), truth)


def test_gla_and_linear_attention(problem):
    q, k, v, g, _, state = (x[:, :, :H] if x.ndim > 2 and x.shape[1] == T else x[:, :H] for x in problem)
    truth = law(q, k, v, g, lambda k, t: 0 * k[:, t], v, state)
    check(fla.chunk_gla(q, k, v, g, None, state, True), truth)
    check(fla.fused_recurrent_gla(q, k, v, g, None, None, state, True), truth)
    plain = law(q, k, v, 0 * g, lambda k, t: 0 * k[:, t], v, state)
    check(fla.fused_recurrent_gla(q, k, v, initial_state=state, output_final_state=True), plain)
    check(fla.fused_recurrent_linear_attn(q, k, v, None, state, True), plain)

    q, k = F.elu(q) + 1, F.elu(k) + 1
    sums = draw(B, 1, H, K).abs()
    output, memory = law(q, k, v, 0 * g, lambda k, t: 0 * k[:, t], v, state)
    running = sums + k.cumsum(1)
    output = output / (q * K**-0.5 * running).sum(-1, keepdim=True)
    for run in (fla.chunk_linear_attn, fla.fused_chunk_linear_attn, fla.fused_recurrent_linear_attn):
        got, (kept, weights) = run(q, k, v, None, (state, sums), True, normalize=True)
        check((got, kept, weights), (output, memory, running[:, -1:]))
    with torch.no_grad():
        fresh, (none, _) = fla.chunk_linear_attn(q, k, v)
        assert none is None
        again, _ = fla.chunk_linear_attn(q, k, v, initial_state=0 * state)
    check([fresh], [again])


def test_half_precision_is_within_the_law():
    q, k, v, g, beta, _ = (x.bfloat16() for x in (*(l2norm(draw(B, T, H, K)) for _ in "qk"), draw(B, T, HV, V),
                           -draw(B, T, HV, K).abs(), draw(B, T, HV).sigmoid(), draw(1)))  # fmt: skip
    truth = fla.naive_recurrent_kda(*(x.double() for x in (q, k, v, g, beta)))[0]
    peer = fla.naive_recurrent_kda(q, k, v, g, beta)[0]
    assert_within_budget("chunk_kda", fla.chunk_kda(q, k, v, g, beta)[0], truth, peer)


def test_the_norm_of_the_way_out_and_the_short_convolution():
    x, gate = torch.randn(2, 7, 6), torch.randn(2, 7, 6)
    norm = fla.FusedRMSNormGated(6, activation="sigmoid")
    torch.testing.assert_close(norm(x, gate), F.rms_norm(x, (6,), eps=1e-5) * gate.sigmoid())
    both, kept = norm(x, gate, residual=x, prenorm=True)
    torch.testing.assert_close(kept, 2 * x)
    torch.testing.assert_close(both, norm(2 * x, gate))
    torch.testing.assert_close(fla.RMSNorm(6)(x), F.rms_norm(x, (6,), eps=1e-5))

    conv = fla.ShortConvolution(6, 4, bias=True)
    whole, none = conv(x)
    assert none is None
    truth = F.silu(F.conv1d(F.pad(x.mT, (3, 0)), conv.weight, conv.bias, groups=6).mT)
    torch.testing.assert_close(whole, truth)
    with torch.no_grad():
        head, cache = conv(x[:, :5], output_final_state=True)
        torch.testing.assert_close(cache, x[:, 1:5].mT)
        step, same = conv(x[:, 5:6], cache=cache, output_final_state=True)
        assert same is cache  # moved on in place
        torch.testing.assert_close(cache, x[:, 2:6].mT)
        tail, _ = conv(x[:, 6:], cache=cache)
    torch.testing.assert_close(torch.cat((head, step, tail), 1), truth)
    with pytest.raises(ValueError, match="activation is 'gelu'"):
        fla.ShortConvolution(6, 4, activation="gelu")


def test_nothing_is_ignored(problem):
    q, k, v, g, beta, state = problem
    with pytest.raises(
        TypeError, match="chunk_kda got use_qk_l2norm, which flash-linear-attention 0.6 does not have either"
    ):
        fla.chunk_kda(q, k, v, g, beta, use_qk_l2norm=True)
    with pytest.raises(NotImplementedError, match="cp_context; context parallelism is not offered here"):
        fla.chunk_kda(q, k, v, g, beta, cp_context=object())
    with pytest.raises(NotImplementedError, match=r"pass tensors as \[B, T, H"):
        fla.chunk_gla(q, k, v, g, head_first=True)
    with pytest.raises(ValueError, match="allow_neg_eigval came without use_beta_sigmoid_in_kernel"):
        fla.chunk_kda(q, k, v, g, beta, allow_neg_eigval=True)
    with pytest.raises(ValueError, match="both state_v_first and its older name"):
        fla.chunk_kda(q, k, v, g, beta, state_v_first=True, transpose_state_layout=True)
    with pytest.raises(ValueError, match="initial_state has 2 rows; there are 3 sequences"):
        fla.chunk_kda(q[:1], k[:1], v[:1], g[:1], beta[:1], None, state, cu_seqlens=BORDERS)
    with pytest.raises(NotImplementedError, match="gv decays the values"):
        fla.fused_recurrent_gla(q, k, v, gv=v)
    with pytest.raises(NotImplementedError, match="gv decays the values"):
        fla.fused_recurrent_gated_delta_rule(q, k, v, gv=v)
    with pytest.raises(NotImplementedError, match="reverse=True"):
        fla.fused_recurrent_linear_attn(q, k, v, reverse=True)
    with pytest.raises(NotImplementedError, match="one strength a head"):
        fla.chunk_delta_rule(q, k, v, beta[..., None])
    with pytest.raises(ValueError, match="with num_householder=2 they must have 42, 2 for each of the 21 of q"):
        fla.chunk_gated_delta_product(q, k, v, None, beta, 2)
    with pytest.raises(NotImplementedError, match="only chunk_kda returns them here"):
        fla.chunk_gdn2(q, k, v, g, g, v, return_intermediate_states=True)


def test_install_serves_flas_names_and_hides_nobody(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(ImportError, match="flash-linear-attention is installed and install"):
        fla.install()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    names = fla.install()
    try:
        assert fla.install() == names
        from fla.modules import FusedRMSNormGated, ShortConvolution  # noqa: F401
        from fla.modules.l2norm import l2_norm
        from fla.ops import chunk_gla
        from fla.ops.gated_delta_rule import chunk_gdn
        from fla.ops.generalized_delta_rule import chunk_dplr_delta_rule  # noqa: F401
        from fla.ops.kda import chunk_kda, fused_recurrent_kda  # noqa: F401
        from fla.ops.kda.gate import fused_kda_gate  # noqa: F401

        assert chunk_kda is ours.chunk_kda
        assert chunk_gla.__module__ == chunk_gdn.__module__.replace("delta", "linear") == "palimpsest.compat.fla.linear"
        assert l2_norm.__module__ == "palimpsest.compat.fla.modules"
    finally:
        sys.modules["palimpsest.compat.fla"].uninstall()
    assert "fla" not in sys.modules
    assert "fla.ops.kda" not in sys.modules
