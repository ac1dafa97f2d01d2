"""The kernels of decoding, and of prompts between their products, compile for sm_90 without a GPU: bfloat16, released sizes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# Under the interpreter the kernels are Python, so the compiler works in a process of its own.
PROGRAM = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from palimpsest.ops.gpu.triton import expert_sum, experts_step, gated_norm, grouped, latent_step, memory_layer_step
from palimpsest.ops.gpu.triton import projections, short_conv, swiglu

TILE = dict(BLOCK_N=32, BLOCK_M=16, BLOCK_D=128, PRECISION="tf32")
EXPERTS = dict(K=8, D=2304, WIDTH=1024, SHARED=1024, BLOCK_P=128, BLOCK_N=32, BLOCK_M=16, PRECISION="tf32")
CONV = dict(W=4, PACKED=True)
KERNELS = {
    projections.project_kernel: (
        dict(O0=4096, O1=4096, O2=4096, O3=128, O4=128, O5=32, D=2304, **TILE), dict(num_warps=4, num_stages=4)
    ),
    memory_layer_step.memory_layer_step_kernel: (
        dict(H=32, K=128, W=4, BLOCK_K=128, BLOCK_W=4, GATE=1, SILU=False), dict(num_warps=8)
    ),
    experts_step.experts_up_kernel: (dict(EXPERTS, BLOCK_D=128), dict(num_warps=4, num_stages=3)),
    experts_step.experts_down_kernel: (dict(EXPERTS, BLOCK_W=128, BLOCK_S=128), dict(num_warps=4, num_stages=4)),
    latent_step.latent_split_kernel: (
        dict(T=1, H=32, R=512, P=64, BLOCK_M=32, BLOCK_S=32, BLOCK_R=512, BLOCK_P=64, PRECISION="tf32"),
        dict(num_warps=8, num_stages=2),
    ),
    grouped.product_kernel: (
        dict(BLOCK_E=16, BLOCK_M=128, BLOCK_A=64, BLOCK_B=128, PRECISION="tf32"), dict(num_warps=8, num_stages=3)
    ),
    grouped.outer_kernel: (dict(BLOCK_M=64, BLOCK_A=128, BLOCK_B=128, PRECISION="tf32"), dict(num_warps=8, num_stages=3)),
    short_conv.forward_kernel: (dict(CONV, STATE=True, BLOCK_T=32, BLOCK_D=128), dict(num_warps=4)),
    short_conv.activation_backward_kernel: (dict(CONV, STATE=True, BLOCK_T=64, BLOCK_D=32), dict(num_warps=4)),
    short_conv.backward_kernel: (dict(CONV, BLOCK_T=64, BLOCK_D=32), dict(num_warps=4)),
    gated_norm.gated_norm_kernel: (dict(K=128, BLOCK_R=16, BLOCK_K=128, SILU=False), dict(num_warps=4)),
    swiglu.swiglu_kernel: (dict(I=1024, BLOCK_I=1024, WEIGHTED=False, weight=None), dict(num_warps=4)),
    expert_sum.expert_sum_kernel: (dict(k=8, D=2304, BLOCK_D=512), dict(num_warps=2)),
    short_conv.walk_forward_kernel: (dict(STATE=True, PACKED=True, WALK_T=128, BLOCK_D=256), dict(num_warps=4)),
    short_conv.walk_kernel: (dict(PACKED=True, WALK_T=128, BLOCK_D=256), dict(num_warps=4)),
}
INTEGERS, FLOATS = {"N", "B", "S", "E", "PAIRS", "SPLITS"}, {"scale", "floor", "beta_max", "eps"}
INTEGERS |= {"M", "A", "T", "D", "D0", "D1", "D2", "held", "R", "WIDEST"}
TYPES = dict.fromkeys(("A_log", "dt_bias", "state", "weights", "parts", "read", "largest", "total"), "*fp32")
TYPES |= dict.fromkeys(("experts", "length", "back"), "*i64") | dict.fromkeys(("ends", "ages"), "*i32") | {"d_weight": "*fp32"}

for kernel, (constants, options) in KERNELS.items():
    signature, constexprs, attributes = {}, {}, {}
    for at, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], constexprs[(at,)] = "constexpr", constants[name]
        elif name in INTEGERS | FLOATS or "stride" in name:
            signature[name] = "fp32" if name in FLOATS else "i32"
        elif name == "rows" and "ages" in kernel.arg_names:
            signature[name] = "*i32"
        else:
            signature[name], attributes[(at,)] = TYPES.get(name, "*bf16"), [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    found = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    print(kernel.__name__, found.metadata.shared)
"""


def test_they_compile(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(program)],
        capture_output=True,
        text=True,
        env={**environment, "PYTHONPATH": str(Path(__file__).parents[2]), "TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 15
    for line in lines:
        kernel, shared = line.split()
        assert int(shared) <= 227 * 1024, f"{kernel} wants {shared} bytes of shared memory"
