"""install(): code that says `from fla.ops.kda import chunk_kda` runs where flash-linear-attention cannot, on a CPU."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from palimpsest.compat.fla import delta, kda, linear, modules

_OPS = {
    "kda": (kda.chunk_kda, kda.fused_recurrent_kda),
    "kda.gate": (kda.fused_kda_gate, kda.naive_kda_gate, kda.naive_kda_lowerbound_gate),
    "kda.naive": (kda.naive_recurrent_kda,),
    "gdn2": (kda.chunk_gdn2, kda.fused_recurrent_gdn2),
    "gated_delta_rule": (delta.chunk_gated_delta_rule, delta.fused_recurrent_gated_delta_rule),
    "delta_rule": (delta.chunk_delta_rule, delta.fused_recurrent_delta_rule),
    "gated_delta_product": (delta.chunk_gated_delta_product,),
    "generalized_delta_rule": (delta.chunk_dplr_delta_rule, delta.fused_recurrent_dplr_delta_rule),
    "generalized_delta_rule.dplr": (delta.chunk_dplr_delta_rule, delta.fused_recurrent_dplr_delta_rule),
    "gla": (linear.chunk_gla, linear.fused_recurrent_gla),
    "linear_attn": (linear.chunk_linear_attn, linear.fused_chunk_linear_attn, linear.fused_recurrent_linear_attn),
}
_MODULES = {
    "": (modules.FusedRMSNormGated, modules.RMSNorm, modules.ShortConvolution),
    "l2norm": (modules.l2norm,),
    "norm": (modules.FusedRMSNormGated, modules.RMSNorm, modules.l2norm),
}
_ALIASES = {
    "chunk_gated_delta_rule": "chunk_gdn",
    "fused_recurrent_gated_delta_rule": "fused_recurrent_gdn",
    "l2norm": "l2_norm",
}
_SERVED: dict[str, ModuleType] = {}


def install() -> tuple[str, ...]:
    """Serve `fla.ops` and `fla.modules` from here, for the whole process. Calling it again changes nothing.

    Returns:
        The names of the modules that can now be imported.

    Raises:
        ImportError: flash-linear-attention is installed, and would be shadowed; import palimpsest.compat.fla by name.

    >>> names = install()
    >>> from fla.ops.kda import chunk_kda
    >>> chunk_kda.__module__
    'palimpsest.compat.fla.kda'
    >>> uninstall()
    """
    if _SERVED:
        return tuple(_SERVED)
    if "fla" in sys.modules or importlib.util.find_spec("fla") is not None:
        raise ImportError(
            "flash-linear-attention is installed and install() would hide it; uninstall it, or import what you need from "
            "palimpsest.compat.fla"
        )
    _serve("fla", (), version="0.6.0+palimpsest")
    _serve(
        "fla.ops",
        tuple(dict.fromkeys(f for functions in _OPS.values() for f in functions if "naive" not in f.__name__)),
    )
    for name, functions in _OPS.items():
        _serve(f"fla.ops.{name}", functions)
    for name, classes in _MODULES.items():
        _serve(f"fla.modules.{name}".rstrip("."), classes)
    sys.modules.update(_SERVED)
    return tuple(_SERVED)


def uninstall() -> None:
    """Take back what install() served; nothing happens if it did not."""
    for name, module in _SERVED.items():
        if sys.modules.get(name) is module:
            del sys.modules[name]
    _SERVED.clear()


def _serve(name: str, members: tuple, version: str | None = None) -> None:
    module = ModuleType(name, "flash-linear-attention's names over palimpsest's kernels.")
    module.__path__ = []
    module.__spec__ = importlib.util.spec_from_loader(name, loader=None, is_package=True)
    for member in members:
        setattr(module, member.__name__, member)
        if member.__name__ in _ALIASES:
            setattr(module, _ALIASES[member.__name__], member)
    if version:
        module.__version__ = version  # pyright: ignore[reportAttributeAccessIssue]
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(_SERVED[parent], child, module)
    _SERVED[name] = module
