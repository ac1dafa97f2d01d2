"""flash-linear-attention's functions over ours, on any device: signatures of its 0.6, kernels of this package.

    from palimpsest.compat.fla import chunk_kda     # by name, or
    palimpsest.compat.fla.install()                 # `from fla.ops.kda import chunk_kda` works, where FLA is absent

Hints about speed (chunk_size, disable_recompute, cu_seqlens_cpu, use_graph, safe_gate ...) are accepted and do nothing.
What changes a result is honoured, or refused by name. Every function has its gradient, the recurrent ones too.
"""

from palimpsest.compat.fla.delta import (
    chunk_delta_rule,
    chunk_dplr_delta_rule,
    chunk_gated_delta_product,
    chunk_gated_delta_rule,
    fused_recurrent_delta_rule,
    fused_recurrent_dplr_delta_rule,
    fused_recurrent_gated_delta_rule,
)
from palimpsest.compat.fla.install import install, uninstall
from palimpsest.compat.fla.kda import (
    chunk_gdn2,
    chunk_kda,
    fused_kda_gate,
    fused_recurrent_gdn2,
    fused_recurrent_kda,
    naive_kda_gate,
    naive_kda_lowerbound_gate,
    naive_recurrent_kda,
)
from palimpsest.compat.fla.linear import (
    chunk_gla,
    chunk_linear_attn,
    fused_chunk_linear_attn,
    fused_recurrent_gla,
    fused_recurrent_linear_attn,
)
from palimpsest.compat.fla.modules import FusedRMSNormGated, RMSNorm, ShortConvolution, l2norm

__all__ = [
    "chunk_kda",
    "fused_recurrent_kda",
    "naive_recurrent_kda",
    "fused_kda_gate",
    "naive_kda_gate",
    "naive_kda_lowerbound_gate",
    "chunk_gdn2",
    "fused_recurrent_gdn2",
    "chunk_gated_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "chunk_delta_rule",
    "fused_recurrent_delta_rule",
    "chunk_gated_delta_product",
    "chunk_dplr_delta_rule",
    "fused_recurrent_dplr_delta_rule",
    "chunk_gla",
    "fused_recurrent_gla",
    "chunk_linear_attn",
    "fused_chunk_linear_attn",
    "fused_recurrent_linear_attn",
    "FusedRMSNormGated",
    "RMSNorm",
    "ShortConvolution",
    "l2norm",
    "install",
    "uninstall",
]
