import pytest
import torch

from palimpsest import gates, kda
from palimpsest.compat.fla import chunk_kda
from palimpsest.ops.gates import l2norm

q, k, v, g = (torch.randn(1, 9, 2, 8) for _ in range(4))
b, A_log, dt_bias, state = torch.randn(1, 9, 2), torch.rand(2), torch.randn(16), torch.randn(1, 2, 8, 8)


def test_activated_inputs_are_kda():
    output, final = chunk_kda(q, k, v, -g.abs(), b.sigmoid(), 0.3, state, output_final_state=True)
    truth = kda(q, k, v, -g.abs(), b.sigmoid(), state=state, scale=0.3)
    torch.testing.assert_close((output, final), tuple(truth))
    assert chunk_kda(q, k, v, -g.abs(), b.sigmoid())[1] is None


@pytest.mark.parametrize("bound", [None, -5.0])
def test_everything_in_the_kernel(bound):
    output, final = chunk_kda(
        q, k, v, g, b, initial_state=state.mT, output_final_state=True, use_qk_l2norm_in_kernel=True,
        use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True, allow_neg_eigval=True, lower_bound=bound,
        A_log=A_log, dt_bias=dt_bias, state_v_first=True,
    )  # fmt: skip
    decay = gates.softplus_decay(g, A_log, dt_bias) if bound is None else gates.sigmoid_decay(g, A_log, dt_bias, bound)
    truth = kda(l2norm(q), l2norm(k), v, decay, 2 * b.sigmoid(), state=state)
    torch.testing.assert_close((output, final.mT), tuple(truth))


def test_nothing_is_ignored():
    with pytest.raises(TypeError, match="use_qk_l2norm"):
        chunk_kda(q, k, v, g, b, use_qk_l2norm=True)  # pyright: ignore
    with pytest.raises(ValueError, match="A_log, dt_bias or lower_bound came without use_gate_in_kernel"):
        chunk_kda(q, k, v, g, b, A_log=A_log)
    with pytest.raises(ValueError, match="use_gate_in_kernel came without A_log"):
        chunk_kda(q, k, v, g, b, use_gate_in_kernel=True)
    with pytest.raises(ValueError, match="allow_neg_eigval came without use_beta_sigmoid_in_kernel"):
        chunk_kda(q, k, v, g, b, allow_neg_eigval=True)
