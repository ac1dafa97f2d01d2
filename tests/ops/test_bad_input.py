"""What a caller can get wrong, and the sentence that tells them: the argument, what came, what was expected."""

import pytest
import torch

from palimpsest import backends
from palimpsest.compat.fla.kda import _in_chunks
from palimpsest.ops.backends import Backend, Problem
from palimpsest.ops.packing import by_sequence
from palimpsest.ops.short_conv import short_conv
from palimpsest.ops.torch_backends import CHUNKED
from palimpsest.ops.trace import trace
from palimpsest.ops.variants import dplr, gated_delta, kda, kda_step_, linear_attention, softmax_lookup


def good():
    x = torch.randn(2, 4, 3, 8)
    return {"q": x, "k": x, "v": x[..., :5], "log_decay": -x.abs(), "beta": torch.rand(2, 4, 3)}


CASES = [
    ({"log_decay": torch.zeros(2, 4, 3, 7)}, r"log_decay has shape \(2, 4, 3, 7\); q and v ask for \(2, 4, 3, 8\)"),
    ({"k": torch.zeros(2, 5, 3, 8)}, r"k has shape \(2, 5, 3, 8\); q and v ask for \(2, 4, 3, 8\)"),
    ({"beta": torch.zeros(2, 4, 3, 1)}, r"beta has shape \(2, 4, 3, 1\); q and v ask for \(2, 4, 3\)"),
    ({"q": torch.zeros(2, 4, 8)}, r"q has shape \(2, 4, 8\).*must be \[B, T, H, K\] and \[B, T, HV, V\]"),
    ({"v": torch.zeros(2, 4, 4, 5)}, "v has 4 heads and q has 3; the heads of v must be a multiple of those of q"),
    ({"v": torch.zeros(2, 4, 3, 5).double()}, "v is torch.float64 and q is torch.float32; q, k and v must share"),
    ({"q": torch.zeros(2, 4, 3, 8).long()}, "q is torch.int64; it must be torch.bfloat16, torch.float16, torch.float32 or"),
    ({"state": torch.zeros(2, 3, 5, 8)}, r"state has shape \(2, 3, 5, 8\); q and v ask for \(2, 3, 8, 5\)"),
    ({"state": torch.zeros(2, 3, 8, 5).bfloat16()}, "state is torch.bfloat16; with v in torch.float32 it must be torch.float32"),
    ({"log_decay": torch.ones(2, 4, 3, 8), "check": True}, "log_decay reaches 1.0; .* must be <= 0"),
    ({"log_decay": torch.full((2, 4, 3, 8), torch.nan), "check": True}, "log_decay reaches nan"),
    ({"cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens came with a batch of 2; packed sequences lie end to end in a batch of 1"),
    ({"backend": "fastest"}, "backend 'fastest' is unknown; this machine has .*chunked, reference"),
    ({"log_decay": -torch.ones(2, 4, 3, 8, device="meta")}, "log_decay is on meta and q on cpu; move all of them to one device"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "sentence"), CASES, ids=lambda x: " ".join(x) if isinstance(x, dict) else "")
def test_kda_says_what_is_wrong(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        kda(**{**good(), **change})


@pytest.mark.parametrize(
    ("borders", "sentence"),
    [
        ([0, 5, 3, 8], r"cu_seqlens is \[0, 5, 3, 8\]; it must rise from 0 to the number of tokens, 8"),
        ([0, 9], r"it must rise from 0 to the number of tokens, 8"),
        ([1, 8], "it must rise from 0"),
        ([0.0, 8.0], r"cu_seqlens is torch.float32 of shape \(2,\); it must be \[sequences \+ 1\] int32 or int64"),
        ([0], r"it must be \[sequences \+ 1\]"),
    ],
)
def test_packing_says_what_is_wrong(borders, sentence):
    packed = {name: x.flatten(0, 1)[None] for name, x in good().items()}
    with pytest.raises(ValueError, match=sentence):
        kda(**packed, cu_seqlens=torch.tensor(borders))
    with pytest.raises(ValueError, match=sentence):
        short_conv(torch.zeros(1, 8, 2), torch.zeros(2, 1, 4), cu_seqlens=torch.tensor(borders))


@pytest.mark.parametrize("ends", [[0, 5, 3, 8], [0, 9], [1, 8], [0, 7]])
def test_borders_that_came_from_a_gpu_are_judged_where_the_host_gets_them(ends):
    """The public functions do not read a GPU's; the forms that bring them to the host do."""
    x, cu_seqlens, state = good()["q"].flatten(0, 1)[None], torch.tensor(ends), torch.zeros(len(ends) - 1, 3, 8, 8)
    for run in (
        lambda: by_sequence(lambda x, state: (x, state), (x,), state, cu_seqlens),
        lambda: CHUNKED.lookup(x, x, x, x[:, :0], x[:, :0], 1.0, cu_seqlens),
        lambda: _in_chunks(lambda *x: x, (x, x, x), state, cu_seqlens, 4),
    ):
        with pytest.raises(ValueError, match="it must rise from 0 to the number of tokens, 8"):
            run()


def test_an_unknown_option_is_a_type_error():
    with pytest.raises(TypeError, match="use_qk_l2norm"):
        kda(**good(), use_qk_l2norm=True)  # pyright: ignore


def test_a_step_refuses_gradients_and_states_it_cannot_edit():
    one = {name: x[:, 0] for name, x in good().items()}
    state = torch.zeros(2, 3, 8, 5)
    with pytest.raises(RuntimeError, match="kda_step_ edits the state in place and has no gradient; call kda"):
        kda_step_(**{**one, "v": one["v"].clone().requires_grad_()}, state=state)
    with pytest.raises(ValueError, match="state is not contiguous; it is edited in place"):
        kda_step_(**one, state=torch.zeros(2, 3, 5, 8).mT)
    with pytest.raises(ValueError, match=r"they must be \[B, H, K\] and \[B, HV, V\]"):
        kda_step_(**good(), state=state)


def test_the_cousins_say_what_is_wrong():
    x = good()
    with pytest.raises(ValueError, match=r"log_decay has shape \(2, 4, 3, 8\); q and v ask for \(2, 4, 3\)"):
        gated_delta(*x.values())
    with pytest.raises(ValueError, match=r"a has shape \(2, 4, 3\); q and v ask for \(2, 4, 3, 8\)"):
        dplr(x["q"], x["k"], x["v"], x["beta"], x["k"], x["log_decay"])
    with pytest.raises(ValueError, match="a KV cache cannot be continued in a packed batch"):
        one = [x[name][:1] for name in "qkv"]
        softmax_lookup(*one, state=(one[1], one[2]), cu_seqlens=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="a trace needs at least one"):
        trace(*(tensor[:, :0] for tensor in x.values()))
    with pytest.raises(ValueError, match=r"weight is torch.float32 of shape \(8, 4\); .* \[D, 1, W\], D = 8"):
        short_conv(torch.zeros(2, 4, 8), torch.zeros(8, 4))


class TestBackends:
    problem = Problem("kda", "kda", "cpu", torch.float64, 8, 5, 4, sequences=2, heads=3, value_heads=3)

    def test_explain_has_one_line_a_backend_and_says_what_auto_runs(self):
        lines = dict(line.split(maxsplit=1) for line in backends.explain(self.problem).splitlines())
        assert tuple(lines) == backends.names()
        ok = [name for name, verdict in lines.items() if verdict == "ok"]
        assert backends.choose(self.problem).name == ok[0]

    def test_a_named_backend_never_falls_back(self, monkeypatch):
        monkeypatch.setattr(backends, "_BACKENDS", list(backends._BACKENDS))
        backends.register(
            Backend("picky", lambda p: "wants an even key_dim" if p.key_dim % 2 else None, kda=lambda *x: x[2])
        )
        odd = {
            **good(),
            "q": torch.zeros(2, 4, 3, 7),
            "k": torch.zeros(2, 4, 3, 7),
            "log_decay": torch.zeros(2, 4, 3, 7),
        }
        with pytest.raises(
            ValueError, match="backend 'picky' cannot run this call: it wants an even key_dim; .*chunked"
        ):
            kda(**odd, backend="picky")
        with pytest.raises(ValueError, match="it has no kernel for DPLR"):
            dplr(*(good()["q"] for _ in range(6)), backend="picky")
        with pytest.raises(ValueError, match="'picky' is registered already"):
            backends.register(Backend("picky", lambda p: None))

    def test_a_backend_can_be_put_first(self, monkeypatch):
        monkeypatch.setattr(backends, "_BACKENDS", list(backends._BACKENDS))
        backends.register(Backend("mine", lambda p: None, kda=lambda q, k, v, g, beta, S, *_: (v + 41, S)), first=True)
        x = good()
        assert torch.equal(kda(**x).output, x["v"] + 41)

    @pytest.mark.parametrize(("op", "words"), [("step", "a single step"), ("linear", "linear attention")])
    def test_hopper_refuses_what_it_has_no_kernel_for(self, op, words):
        problem = Problem(op, "any", "cuda", torch.bfloat16, 128, 128, 1, 1, 4, 4, capability=(9, 0))
        with pytest.raises(ValueError, match=f"backend 'hopper' cannot run this call: it has no kernel for {words}"):
            backends.choose(problem, "hopper")
        assert backends.choose(problem._replace(op="kda"), "hopper").name == "hopper"

    def test_linear_attention_is_an_op_like_the_others(self, monkeypatch):
        monkeypatch.setattr(backends, "_BACKENDS", list(backends._BACKENDS))
        backends.register(Backend("cores", lambda p: None, core=lambda *x: (x[3], x[5])))
        backends.register(Backend("linear", lambda p: None, linear=lambda q, k, v, S, *_: (v + 41, S)))
        q, k, v = (good()[name] for name in "qkv")
        assert torch.equal(linear_attention(q, k, v, normalise=False, backend="linear").output, v + 41)
        with pytest.raises(ValueError, match="'cores' cannot run this call: it has no kernel for linear attention"):
            linear_attention(q, k, v, backend="cores")
