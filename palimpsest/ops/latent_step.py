"""Latent attention of the newest tokens over a cache with room: the length is read where it lies, on the device.

    read_t = sum_s softmax_s(q_t . row_s) value_s        s < length - T + 1 + t, value_s the first R channels of row_s

Letters  B sequences, T newest tokens (one or a few), H heads, S rows of room, C channels of a row, R of a value.
"""

import torch
from torch import Tensor


def latent_step(q: Tensor, rows: Tensor, length: Tensor, *, value_dim: int) -> Tensor:
    """Every head of every new token reads the rows up to its own.

    Args:
        q: [B, T, H, C], scaled.
        rows: [B, S, C], finite everywhere.
        length: [B], int64, rows filled, those of the T new tokens included.
        value_dim: R.

    Returns:
        [B, T, H, R] in q's dtype.

    >>> rows = torch.tensor([[[1.0, 0.0], [3.0, 0.0], [9.0, 9.0]]])
    >>> latent_step(torch.zeros(1, 1, 1, 2), rows, torch.tensor([2]), value_dim=1)
    tensor([[[[2.]]]])
    """
    T, S = q.shape[1], rows.shape[1]
    scores = torch.einsum("bthc,bsc->bths", q, rows)
    scores = scores if scores.dtype == torch.float64 else scores.float()
    until_BT = length[:, None] + torch.arange(1 - T, 1, device=q.device)
    hidden_BTS = torch.arange(S, device=q.device) >= until_BT[..., None]
    weights = scores.masked_fill(hidden_BTS[:, :, None], -torch.inf).softmax(-1).to(rows.dtype)
    return torch.einsum("bths,bsr->bthr", weights, rows[..., :value_dim])
