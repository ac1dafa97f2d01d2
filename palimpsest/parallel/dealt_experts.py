"""Experts dealt to processes: tokens go to the experts that they chose, and what these made of them comes back.

A token is sent once to each process that holds some of its experts, with its choices and weights; the process adds up what
its experts give, and one row comes back. Both ways are the transpose of one another, and so are their gradients:

    send     rows [N, C]  ->  a row for each (process, token) that wants it, exchanged   [M, C]
    collect  rows [M, C]  ->  exchanged back, and added up by token, processes in order  [N, C]

Sums have one order, so the same inputs give the same bits. The host waits once a mixture for the numbers of rows, which
no other process can guess; capacities, which would be guesses, would drop tokens.

Letters  N tokens here, k experts a token, P processes, E experts of each, M rows received, D channels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from palimpsest.layers.moe import Experts, MoE
from palimpsest.ops.experts import product_dtype, run_held_experts


class Exchange(NamedTuple):
    """Which rows go where: what both ways of one mixture and their gradients need to know."""

    group: dist.ProcessGroup
    tokens: Tensor  # [S]: the token of each row sent, by process, then by token
    places: Tensor  # [P, N]: the row sent to process p of token n; their number if there is none
    sent: list[int]  # rows to each process
    received: list[int]  # rows from each process
    pairs: int  # of a received token and an expert held here


def plan_exchange(experts_Nk: Tensor, experts_each: int, group: dist.ProcessGroup) -> Exchange:
    """Agrees with the other processes on what is to be sent; the host waits here for the device.

    Args:
        experts_Nk: the experts chosen here, of all that there are.
        experts_each: those that each process holds, the first process the first ones.
        group: the processes that share the experts.
    """
    N, P = len(experts_Nk), group.size()
    owner_PNk = (experts_Nk // experts_each) == torch.arange(P, device=experts_Nk.device)[:, None, None]
    wanted_PN = owner_PNk.any(2)
    mine_P2 = torch.stack((wanted_PN.sum(1), owner_PNk.sum((1, 2))), 1)
    theirs_P2 = torch.empty_like(mine_P2)
    dist.all_to_all_single(theirs_P2, mine_P2, group=group)
    counts = torch.stack((mine_P2, theirs_P2)).tolist()
    sent, received = ([rows for rows, _ in side] for side in counts)
    S = sum(sent)
    place_PN = torch.where(wanted_PN, wanted_PN.flatten().cumsum(0).view(P, N) - 1, S)
    every_PN = torch.arange(N, device=experts_Nk.device).expand(P, N)
    token_S = every_PN.new_empty(S + 1).scatter_(0, place_PN.flatten(), every_PN.flatten())[:S]
    return Exchange(group, token_S, place_PN, sent, received, sum(pairs for _, pairs in counts[1]))


def send(rows_NC: Tensor, exchange: Exchange) -> Tensor:
    """The rows that other processes have for this one, [M, C]; differentiable."""
    return cast(Tensor, _Send.apply(rows_NC, exchange))


def collect(rows_MC: Tensor, exchange: Exchange) -> Tensor:
    """Rows back to whom they came from, added up there by token, [N, C]; differentiable."""
    return cast(Tensor, _Collect.apply(rows_MC, exchange))


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_NC, exchange):
        ctx.exchange = exchange
        return _sent(rows_NC, exchange)

    @staticmethod
    def backward(ctx, d_rows_MC):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _collected(d_rows_MC, ctx.exchange), None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_MC, exchange):
        ctx.exchange = exchange
        return _collected(rows_MC, exchange)

    @staticmethod
    def backward(ctx, d_rows_NC):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _sent(d_rows_NC, ctx.exchange), None


def _sent(rows_NC: Tensor, exchange: Exchange) -> Tensor:
    received = rows_NC.new_empty(sum(exchange.received), rows_NC.shape[1])
    dist.all_to_all_single(
        received, rows_NC[exchange.tokens], exchange.received, exchange.sent, group=exchange.group
    )  # fmt: skip
    return received


def _collected(rows_MC: Tensor, exchange: Exchange) -> Tensor:
    back = rows_MC.new_empty(sum(exchange.sent) + 1, rows_MC.shape[1])
    back[-1] = 0  # of tokens that a process was not sent
    dist.all_to_all_single(back[:-1], rows_MC.contiguous(), exchange.sent, exchange.received, group=exchange.group)
    first, *others = exchange.places
    total = back[first].to(torch.promote_types(back.dtype, torch.float32))
    for place_N in others:
        total += back[place_N]
    return total.to(rows_MC.dtype)


class DealtExperts(Experts):
    """The experts of a mixture that this process holds, reached by the tokens of all processes of a group.

    Args:
        whole: all experts; this process keeps its own of them.
        group: the processes that share them, the first of them the first experts.

    `compiled` runs the arithmetic between the two exchanges by torch.compile.
    """

    def __init__(self, whole: Experts, group: dist.ProcessGroup):
        nn.Module.__init__(self)
        self.group, self.num_experts = group, len(whole.w1)
        self.first = self.num_experts // group.size() * group.rank()
        held = slice(self.first, self.first + self.num_experts // group.size())
        for name, weight in whole.named_parameters():
            self.register_parameter(name, nn.Parameter(weight.detach()[held].clone(), weight.requires_grad))
        self.compiled = False

    @torch.compiler.disable
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] - what the decorator makes has no signature
        self, x_ND: Tensor, experts_Nk: Tensor, weights_Nk: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As Experts.forward; the tokens counted are those of this process, for all experts."""
        exchange = plan_exchange(experts_Nk, len(self.w1), self.group)
        x_MD = send(x_ND.to(product_dtype(x_ND)), exchange)
        weights_Mk = send(weights_Nk, exchange)
        experts_Mk = _sent(experts_Nk, exchange) - self.first
        run = _compiled_run() if self.compiled else run_held_experts
        y_MD = run(x_MD, experts_Mk, weights_Mk, self.w1, self.w3, self.w2, exchange.pairs)
        load_E = torch.zeros(self.num_experts, dtype=torch.int64, device=x_ND.device)
        load_E.scatter_add_(0, experts_Nk.flatten(), torch.ones_like(experts_Nk).flatten())
        return collect(y_MD, exchange), load_E

    def extra_repr(self) -> str:
        held, I, D = self.w1.shape
        return f"experts {self.first} to {self.first + held - 1} of {self.num_experts}, {D} -> {I} -> {D}"


@cache
def _compiled_run() -> Callable[..., Tensor]:
    return torch.compile(run_held_experts, dynamic=True)  # numbers of rows differ every time


def deal_experts_(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Leaves each process of the group its own experts of every mixture in model, in place."""
    for module in model.modules():
        if isinstance(module, MoE):
            module.experts = DealtExperts(module.experts, group)


@torch.no_grad()
def rank_loads(load_E: Tensor, num_ranks: int) -> Tensor:
    """Tokens times choices of each process that experts are dealt to, from those of each expert.

    >>> rank_loads(torch.tensor([3, 1, 0, 2]), 2)
    tensor([4, 2])
    """
    return load_E.unflatten(-1, (num_ranks, -1)).sum(-1)
