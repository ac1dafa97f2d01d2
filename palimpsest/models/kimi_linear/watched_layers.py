"""Which layers of a model can be watched: those whose memory erases and writes with a beta."""

from typing import cast

from palimpsest.layers.kimi_delta_attention import KimiDeltaAttention
from palimpsest.models.kimi_linear.model import DecoderLayer, KimiLinearForCausalLM


def delta_rule_layers(model: KimiLinearForCausalLM) -> dict[int, KimiDeltaAttention]:
    """The model's layers of the delta rule, by their numbers from 0: `recurrence_inputs` says what each tells its memory.

    >>> from palimpsest.models.kimi_linear import KimiLinearConfig
    >>> list(delta_rule_layers(KimiLinearForCausalLM(KimiLinearConfig.tiny("KMAG"))))
    [0, 3]
    """
    mixers = [cast(DecoderLayer, layer).self_attn for layer in model.model.layers]
    return {i: m for i, m in enumerate(mixers) if isinstance(m, KimiDeltaAttention)}
