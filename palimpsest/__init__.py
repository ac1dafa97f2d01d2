"""Palimpsest: Kimi Delta Attention, its family, and the model made of it.

The public names are these and nothing else; each is loaded when first used, so that `palimpsest --help` and the
explainer start before torch does. Beside them stand three rooms: `palimpsest.generate` (text from a model),
`palimpsest.train` (training) and `palimpsest.testing` (judge a kernel of your own).
"""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {  # name -> where it lives
    "kda": "ops.variants",
    "kda_from_logits": "ops.variants",
    "kda_step_": "ops.variants",
    "gdn2": "ops.variants",
    "gated_delta": "ops.variants",
    "gated_delta_product": "ops.variants",
    "delta_rule": "ops.variants",
    "gated_linear_attention": "ops.variants",
    "linear_attention": "ops.variants",
    "dplr": "ops.variants",
    "softmax_lookup": "ops.variants",
    "DeltaOutput": "ops.variants",
    "trace": "ops.trace",
    "gates": "ops.gates",
    "backends": "ops.backends",
    "KimiDeltaAttention": "layers.kimi_delta_attention",
    "MultiHeadLatentAttention": "layers.latent_attention",
    "KimiLinearConfig": "models.kimi_linear.config",
    "KimiLinearForCausalLM": "models.kimi_linear.model",
    "ModelState": "models.kimi_linear.model_state",
    "StateHistory": "models.kimi_linear.history",
}
_ROOMS = {"gates", "backends"}  # names that are modules

__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from palimpsest.layers.kimi_delta_attention import KimiDeltaAttention as KimiDeltaAttention
    from palimpsest.layers.latent_attention import MultiHeadLatentAttention as MultiHeadLatentAttention
    from palimpsest.models.kimi_linear.config import KimiLinearConfig as KimiLinearConfig
    from palimpsest.models.kimi_linear.history import StateHistory as StateHistory
    from palimpsest.models.kimi_linear.model import KimiLinearForCausalLM as KimiLinearForCausalLM
    from palimpsest.models.kimi_linear.model_state import ModelState as ModelState
    from palimpsest.ops import backends as backends
    from palimpsest.ops import gates as gates
    from palimpsest.ops.trace import trace as trace
    from palimpsest.ops.variants import DeltaOutput as DeltaOutput
    from palimpsest.ops.variants import delta_rule as delta_rule
    from palimpsest.ops.variants import dplr as dplr
    from palimpsest.ops.variants import gated_delta as gated_delta
    from palimpsest.ops.variants import gated_delta_product as gated_delta_product
    from palimpsest.ops.variants import gated_linear_attention as gated_linear_attention
    from palimpsest.ops.variants import gdn2 as gdn2
    from palimpsest.ops.variants import kda as kda
    from palimpsest.ops.variants import kda_from_logits as kda_from_logits
    from palimpsest.ops.variants import kda_step_ as kda_step_
    from palimpsest.ops.variants import linear_attention as linear_attention
    from palimpsest.ops.variants import softmax_lookup as softmax_lookup


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'palimpsest' has no attribute {name!r}; it has {', '.join(__all__)}")
    with warnings.catch_warnings():  # torch, as it is imported, where there is no NumPy: nothing here needs it
        warnings.filterwarnings("ignore", "Failed to initialize NumPy", UserWarning)
        module = import_module(f"palimpsest.{_HOME[name]}")
    value = module if name in _ROOMS else getattr(module, name)
    globals()[name] = value
    return value


def __dir__():
    return [*__all__, "__version__"]
