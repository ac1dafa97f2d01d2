"""Kimi Linear: three layers of Kimi Delta Attention to one of latent attention, with a mixture of experts in each."""

from palimpsest.models.kimi_linear.config import KimiLinearConfig
from palimpsest.models.kimi_linear.history import StateHistory
from palimpsest.models.kimi_linear.mixers import register_mixer
from palimpsest.models.kimi_linear.model import CausalOutput, KimiLinearForCausalLM, KimiLinearModel
from palimpsest.models.kimi_linear.model_state import ModelState
from palimpsest.models.kimi_linear.nonfinite import NonFiniteError
from palimpsest.models.kimi_linear.state_file import load_state, save_state

__all__ = [
    "CausalOutput",
    "KimiLinearConfig",
    "KimiLinearForCausalLM",
    "KimiLinearModel",
    "ModelState",
    "NonFiniteError",
    "StateHistory",
    "load_state",
    "register_mixer",
    "save_state",
]
