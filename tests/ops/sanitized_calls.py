"""Calls the C kernels as Python does, in a library built with the address and undefined-behaviour sanitizers.

    LD_PRELOAD=libasan.so python -m tests.ops.sanitized_calls LIBRARY [calls | without checks]

The process ends at the first address outside an array. "without checks" is the mutant that must end so: the table is asked
nothing, and a gate's bias is too short.
"""

import ctypes
import itertools
import random
import sys
from dataclasses import replace

import torch

from benchmarks.faults.bad_calls import FUNCTIONS, Draw, bad_operator_calls, outcome, spoiled
from benchmarks.faults.calls_beside import FUNCTIONS_BESIDE, spoiled_beside
from palimpsest import gates
from palimpsest.ops import arguments, decode
from palimpsest.ops.cpu import jit

SIZES = [
    (1, 1, 1, 1, 1),
    (17, 5, 3, 1, 2),
    (33, 17, 33, 2, 2),
    (70, 40, 72, 1, 3),
    (20, 64, 17, 2, 4),
    (3, 256, 7, 1, 1),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def right_calls() -> int:
    """Odd sizes, packings, dtypes and strides, with every gradient."""
    count = 0
    for n, ((T, K, V, H, G), dtype) in enumerate(itertools.product(SIZES, DTYPES)):
        draw = Draw(B=2, T=T, H=H, G=G, K=K, V=V, dtype=dtype, with_state=n % 2 == 0, seed=n)
        borders = (0, 0, T // 3, T // 3, T, T)
        for name in ("kda", "gdn2", "gated_linear_attention", "linear_attention", "kda_from_logits", "kda_step_"):
            for drawn in (draw, replace(draw, B=1, borders=borders)):
                call = FUNCTIONS[name].draw(drawn) | {"backend": "cpu"}
                if K * 2 > 256 and name == "linear_attention":
                    continue
                leaves = [x for x in call.values() if isinstance(x, torch.Tensor) and x.is_floating_point()]
                for x in leaves if name != "kda_step_" else ():
                    x.requires_grad_()
                results = FUNCTIONS[name].call(call)
                if name != "kda_step_":
                    sum(x.float().square().sum() for x in results).backward()
                assert all(x.isfinite().all() for x in results), name
                count += 1
    return count


@torch.no_grad()
def decoded_tokens() -> int:
    """The functions of one decoded token."""
    draw, count = torch.Generator().manual_seed(0), 0
    new = lambda *shape: torch.randn(*shape, generator=draw)
    for B, H, K, W in ((1, 1, 1, 2), (3, 2, 5, 4), (2, 1, 33, 64), (1, 3, 64, 3), (1, 1, 256, 4)):
        D, E, k, S = H * K, 5, 2, 7
        gate = gates.SoftplusDecay(new(H), new(D)) if count % 2 else gates.SigmoidDecay(new(H), new(D))
        streams, windows, weights = (
            [new(B, D) for _ in range(5)],
            [new(B, D, W - 1) for _ in "qkv"],
            [new(D, 1, W) for _ in "qkv"],
        )
        decode.memory_layer_step_(
            *streams[:3], weights, windows, streams[3], gate, new(B, H), streams[4], new(K), new(B, H, K, K), form="cpu"
        )
        decode.project([new(B, D)] * 3, [new(S, D), new(1, D), new(130, D)], form="cpu")
        decode.add_norm(new(B, D), new(B, 3, D), new(D), 1e-6, form="cpu")
        chosen, weights = decode.route(new(B, E), new(E), k, scaling=2.0, form="cpu")
        shared = [new(S, D), new(S, D), new(D, S)]
        for given in (chosen, torch.full_like(chosen, 10**9), -chosen - 1):
            decode.experts(
                new(B, D), given, weights, new(E, S, D), new(E, S, D), new(E, D, S), shared=shared, form="cpu"
            )
        count += 7
    return count


def wrong_calls(most: int) -> int:
    """A drawing of the wrong calls; what each gives or says is judged as elsewhere."""
    rng, count = random.Random(0), 0
    for name, function in FUNCTIONS.items():
        call = function.draw(Draw()) | ({"backend": "cpu"} if function.has_backends else {})
        for what, changed, value in rng.sample(list(spoiled(call)), most):
            assert outcome(name, call | {changed: value}) is None, (name, what)
            count += 1
    for name, function in FUNCTIONS_BESIDE.items():
        call = function.draw(Draw())
        for what, changed, value in rng.sample(list(spoiled_beside(call)), most):
            assert outcome(name, call | {changed: value}, functions=FUNCTIONS_BESIDE) is None, (name, what)
            count += 1
    for trial in itertools.islice(bad_operator_calls(), 0, None, 23):
        assert trial.run() is None, trial.name
        count += 1
    return count


def without_checks() -> None:
    arguments.check = lambda *_, **__: None
    call = FUNCTIONS["kda_from_logits"].draw(Draw(K=200))
    call["gate"] = gates.SoftplusDecay(call["gate"].A_log, torch.zeros(4, 199)[:, :199])
    inputs = (call["q"], call["k"], call["v"], call["decay_logits"], None, call["beta_logits"], call["state"])
    from palimpsest.ops.cpu.register import forward

    forward(*inputs, call["gate"].A_log, call["gate"].dt_bias, None, 1.0, "softplus", 0.0, False)


if __name__ == "__main__":
    library = ctypes.CDLL(sys.argv[1])
    jit.library = lambda: library
    torch.set_num_threads(2)
    if sys.argv[2] == "without checks":
        without_checks()
    else:
        print(right_calls() + decoded_tokens(), "right and", wrong_calls(40), "wrong calls")
