"""flash-linear-attention's own test files against `palimpsest.compat.fla`: a pytest plugin that puts our functions in.

    git clone https://github.com/fla-org/flash-linear-attention
    python -m pytest -p benchmarks.fla_tests flash-linear-attention/tests/ops/test_kda.py ...

FLA is installed beside, with its references and its tolerances; only the public functions are ours. A test of FLA's internals
is left out, by the list below, with the reason.
"""

import importlib
from types import ModuleType
from typing import Any

import torch

from palimpsest.compat.fla import delta, kda, linear

OURS = {
    "kda": (kda.chunk_kda, kda.fused_recurrent_kda),
    "kda.gate": (kda.fused_kda_gate,),
    "gdn2": (kda.chunk_gdn2, kda.fused_recurrent_gdn2),
    "gated_delta_rule": (delta.chunk_gated_delta_rule, delta.fused_recurrent_gated_delta_rule),
    "delta_rule": (delta.chunk_delta_rule, delta.fused_recurrent_delta_rule),
    "gated_delta_product": (delta.chunk_gated_delta_product,),
    "generalized_delta_rule": (delta.chunk_dplr_delta_rule, delta.fused_recurrent_dplr_delta_rule),
    "generalized_delta_rule.dplr": (delta.chunk_dplr_delta_rule, delta.fused_recurrent_dplr_delta_rule),
    "gla": (linear.chunk_gla, linear.fused_recurrent_gla),
    "linear_attn": (linear.chunk_linear_attn, linear.fused_chunk_linear_attn, linear.fused_recurrent_linear_attn),
}
INTERNALS = {  # a part of a test's name -> what of FLA's own it looks into
    "vllm_decode": "a kernel of FLA's for vLLM's paged states, fused_recurrent_kda_fwd",
    "flash_kda": "the choice between FLA's backends",
    "flash_qla": "the choice between FLA's backends",
    "ascend": "the choice between FLA's backends",
    "blackwell": "the choice between FLA's kernels",
    "invalid_chunk_size": "which chunk sizes FLA's kernels were written for; ours have none to choose",
    "prepare_wy_repr": "a stage of FLA's backward pass",
    "test_recurrent_fwd": "FLA's own reference against itself",
    "safe_gate_multihead": "stages of FLA's backward pass",
    "test_layer": "a layer of FLA's",
    "naive": "FLA's own references against each other",
}
_used: set[str] = set()


def pytest_configure(config: Any) -> None:
    """Puts our functions into FLA's modules before any test imports from them."""
    if not torch.cuda.is_available():  # where FLA itself does not run, and its references do
        importlib.import_module("fla.utils").device = "cpu"  # type: ignore[attr-defined]
    for name, functions in OURS.items():
        module = importlib.import_module(f"fla.ops.{name}")
        for function in functions:
            if hasattr(module, function.__name__):
                setattr(module, function.__name__, _counted(function, module))
    if hasattr(config, "addinivalue_line"):
        config.addinivalue_line("filterwarnings", "ignore")


def _counted(function: Any, module: ModuleType) -> Any:
    def ours(*arguments: Any, **named: Any) -> Any:
        _used.add(f"{module.__name__}.{function.__name__}")
        return function(*arguments, **named)

    return ours


def pytest_collection_modifyitems(config: Any, items: list) -> None:
    """Leaves out what looks into FLA's internals."""
    left = [item for item in items if any(part in item.name for part in INTERNALS)]
    items[:] = [item for item in items if item not in left]
    config.hook.pytest_deselected(items=left)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Which functions of ours were really called."""
    terminalreporter.write_line(f"ours: {', '.join(sorted(_used)) or 'none'}")
