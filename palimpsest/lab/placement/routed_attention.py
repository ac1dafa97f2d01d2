"""Latent attention that keeps only the tokens that a router chooses: its cache grows with what is worth keeping.

Letters  B sequences, T queries, S keys, H heads, D hidden channels, N + P and V channels of a key and a value.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palimpsest.checks import check
from palimpsest.layers.latent_attention import MultiHeadLatentAttention


class RoutedLatentAttention(nn.Module):
    """Attention of every token to itself and to the kept tokens before it.

    Whether a token is kept is decided from itself alone, when it comes, as a cache must: r = sigmoid(w . x + b), kept where
    r > 1/2. Forward the choice is hard, so that what is trained is what will run; backward it has r's gradient.

    Args:
        attention: without positions; its weights are used as they are.
        budget: the share of tokens that costs nothing. price: nats a token for all of them beyond it.
    """

    def __init__(self, attention: MultiHeadLatentAttention, budget: float = 0.1, price: float = 2.0):
        super().__init__()
        check(0 < budget <= 1, f"budget is {budget}; give a share of tokens above 0 and at most 1")
        check(attention.rope is None, "a routed layer has no positions; give attention without rotary positions")
        self.attention, self.budget, self.price = attention, budget, price
        self.router = nn.Linear(attention.hidden_size, 1)
        nn.init.zeros_(self.router.weight)
        nn.init.constant_(self.router.bias, 1.0)  # everything is kept until something is known
        self.share = torch.ones(())  # of the last forward pass: soft, with its gradient
        self.kept_BT = torch.ones(1, 1)  # of the last forward pass: hard

    def keep(self, x: Tensor) -> Tensor:
        """r [B, T], in float32."""
        return F.linear(x.float(), self.router.weight.float(), self.router.bias.float())[..., 0].sigmoid()

    def penalty(self) -> Tensor:
        """A scalar for the loss, of the last forward pass."""
        return self.price * (self.share - self.budget).clamp(min=0)

    def without_state(self, x: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """y [B, T, D] of x [B, T, D]."""
        return self(x)[0]

    def forward(self, x: Tensor, state: None = None, *, cu_seqlens: Tensor | None = None) -> tuple[Tensor, None]:
        """As of a mixer, without a state: for training and for tests on whole sequences."""
        check(cu_seqlens is None, "a routed layer takes no packed documents; give one sequence a row")
        T = x.shape[1]
        r_BT = self.keep(x)
        hard_BT = (r_BT > 0.5).float()
        chosen_BS = hard_BT + r_BT - r_BT.detach()
        self.share, self.kept_BT = r_BT.mean(), hard_BT.detach()
        attention = self.attention
        q_BTHC, latent_BSC = attention._project(x, torch.zeros(1, T, dtype=torch.long, device=x.device))
        k_BSHC, v_BSHV = attention._keys_and_values(latent_BSC)
        scores = torch.einsum("bthc,bshc->bhts", q_BTHC, k_BSHC).float() * attention.scale
        causal = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()
        itself = torch.eye(T, device=x.device)
        scores = scores.masked_fill(~causal, -torch.inf)
        weights = (scores - scores.amax(-1, keepdim=True).detach()).exp()
        weights = weights * (itself + (1 - itself) * chosen_BS[:, None, None])
        weights = weights / weights.sum(-1, keepdim=True)  # a token always sees itself: never an empty row
        y_BTHV = torch.einsum("bhts,bshv->bthv", weights.to(v_BSHV.dtype), v_BSHV)
        return attention.o_proj(y_BTHV.flatten(-2)), None
