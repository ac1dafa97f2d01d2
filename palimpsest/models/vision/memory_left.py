"""What is left of each patch in a memory that has read the whole image.

A token writes k u^T, u = beta (v - what the memory already says under k). What comes later fades and erases: of the write
remains (A_T ... A_{t+1} k) u^T, with A the transition. Its size, over the image, is what the memory still knows of where.

Letters  B images, T patches, H heads, K channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from palimpsest.layers.kimi_delta_attention import KimiDeltaAttention
from palimpsest.models.vision.patch_mixers import ScannedMemory
from palimpsest.models.vision.scans import scan_order
from palimpsest.models.vision.vision_transformer import VisionTransformer


@torch.no_grad()
def memory_left(model: VisionTransformer, images: Tensor, *, layer: int = -1) -> dict[str, Tensor]:
    """How much of each patch's write is in the memories of a layer after the last patch.

    Args:
        model: its mixer is "kda", "gated_delta" or "delta_rule".
        images: as the model's.
        layer: which, from 0; -1 is the last.

    Returns:
        Direction -> [B, rows, columns], the Frobenius norm of what is left of each patch's write, over all heads.

    Raises:
        ValueError: the layers of the model erase in another way, or not at all.

    >>> from palimpsest.models.vision import VisionConfig
    >>> config = VisionConfig(image_size=8, patch_size=2, hidden_size=16, head_dim=8, num_layers=1, num_classes=3)
    >>> {name: left.shape for name, left in memory_left(VisionTransformer(config), torch.rand(2, 3, 8, 8)).items()}
    {'rows': torch.Size([2, 4, 4]), 'rows back': torch.Size([2, 4, 4])}
    """
    mixer = model.layers[layer].mixer
    if not isinstance(mixer, ScannedMemory) or not all(isinstance(m, KimiDeltaAttention) for m in mixer.mixers):
        raise ValueError(
            f"the model's mixer is {model.config.mixer!r}; what is left of a write is known of 'kda', 'gated_delta' and "
            "'delta_rule'"
        )
    x, rows, columns = model.until(images, layer)
    found = {}
    for direction, memory in zip(mixer.directions, mixer.mixers):
        order = scan_order(direction, rows, columns).to(x.device)
        left = left_of_writes(*memory.recurrence_inputs(x[:, order])[1:])  # type: ignore[operator]
        found[direction] = left[:, order.argsort()].unflatten(1, (rows, columns))
    return found


def left_of_writes(k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    """Of one memory a head.

    Args:
        k, v, log_decay: [B, T, H, K]. beta: [B, T, H].

    Returns:
        [B, T], the norm of what is left of each token's write at the end.
    """
    k, v, decay, beta = k.double(), v.double(), log_decay.double().exp(), beta.double()[..., None]
    B, T, H, K = k.shape
    S = k.new_zeros(B, H, K, v.shape[-1])
    writes = []
    for t in range(T):
        S = decay[:, t, ..., None] * S
        u = beta[:, t] * (v[:, t] - (k[:, t, ..., None] * S).sum(2))
        S = S + k[:, t, ..., None] * u[..., None, :]
        writes.append(u.norm(dim=-1))
    later = torch.eye(K, dtype=k.dtype, device=k.device).expand(B, H, K, K)  # the transitions after t, multiplied
    left = [k.new_zeros(B)] * T
    for t in range(T - 1, -1, -1):
        kept = (later @ k[:, t, ..., None])[..., 0].norm(dim=-1)
        left[t] = (kept * writes[t]).square().sum(1).sqrt()
        along = later @ k[:, t, ..., None]
        later = (later - along * (beta[:, t] * k[:, t])[..., None, :]) * decay[:, t, ..., None, :]
    return torch.stack(left, 1).float()
