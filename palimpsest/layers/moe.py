"""A mixture of experts: each token goes through a few of many small MLPs, and through one that all share.

Letters  N tokens, E experts, k experts a token, D hidden channels.
Source   the router of DeepSeek-V3, arXiv:2412.19437, as in Kimi Linear; balancing without a loss, arXiv:2408.15664.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from palimpsest.layers.linears import is_plain
from palimpsest.layers.mlp import GatedMLP
from palimpsest.layers.padding import check_sizes
from palimpsest.layers.precision import Float32Tensors, float32
from palimpsest.ops.arguments import state_dtype
from palimpsest.ops.decode import experts, gathers, project, route
from palimpsest.ops.experts import run_experts
from palimpsest.ops.prefill import suits


class Router(Float32Tensors):
    """Scores every expert for every token, in float32, and picks the best k.

    Scores are sigmoids. A bias an expert, not trained by gradients, takes part in the choice but not in the weights.

    Args as MoE.
    """

    float32_names = ("e_score_correction_bias",)
    e_score_correction_bias: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        num_experts_per_token: int,
        *,
        num_groups: int = 1,
        groups_per_token: int = 1,
        renormalize: bool = True,
        scaling: float = 2.446,
        weigh_by: str = "unbiased",
    ):
        super().__init__()
        _check_counts(num_experts, num_experts_per_token, num_groups, groups_per_token)
        self.num_experts_per_token, self.num_groups, self.groups_per_token = (
            num_experts_per_token,
            num_groups,
            groups_per_token,
        )
        self.renormalize, self.scaling, self.weigh_by = renormalize, scaling, weigh_by
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size).normal_(std=0.02))
        self.register_buffer("e_score_correction_bias", torch.zeros(num_experts, dtype=torch.float32))

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """The chosen experts [N, k] and their weights [N, k], float32."""
        if self.num_groups == self.groups_per_token and suits(x_ND):  # many tokens, and nobody wants a gradient
            return self._route(self._logits(x_ND))
        with torch.autocast(x_ND.device.type, enabled=False):
            scores_NE = F.linear(float32(x_ND), float32(self.weight)).sigmoid()
        biased_NE = scores_NE + self.e_score_correction_bias
        experts_Nk = self._within_best_groups(biased_NE).topk(self.num_experts_per_token, dim=-1).indices
        weights_Nk = (scores_NE if self.weigh_by == "unbiased" else biased_NE).gather(1, experts_Nk)
        if self.renormalize:
            weights_Nk = weights_Nk / (weights_Nk.sum(-1, keepdim=True) + 1e-20)
        return experts_Nk, weights_Nk * self.scaling

    def step(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """As forward, for a few tokens."""
        if self.num_groups != self.groups_per_token:
            return self(x_ND)
        return self._route(project([x_ND], [self.weight], dtype=state_dtype(x_ND.dtype))[0])

    def _route(self, logits_NE: Tensor) -> tuple[Tensor, Tensor]:
        return route(
            logits_NE, self.e_score_correction_bias, self.num_experts_per_token, scaling=self.scaling,
            renormalize=self.renormalize, biased=self.weigh_by != "unbiased",
        )  # fmt: skip

    def _logits(self, x_ND: Tensor) -> Tensor:
        """Of a GPU, float32: products of two narrow numbers are exact in it, so narrow factors need not be widened first."""
        if x_ND.dtype == self.weight.dtype != torch.float32:
            return torch.mm(x_ND, self.weight.mT, out_dtype=torch.float32)
        return F.linear(float32(x_ND), float32(self.weight))

    def _within_best_groups(self, biased_NE: Tensor) -> Tensor:
        if self.num_groups == self.groups_per_token:
            return biased_NE
        biased_NGE = biased_NE.unflatten(1, (self.num_groups, -1))
        best_NG = (
            biased_NGE.topk(min(2, biased_NGE.shape[-1]), dim=-1).values.sum(-1).topk(self.groups_per_token).indices
        )
        outside_NG = torch.ones_like(biased_NGE[..., 0], dtype=torch.bool).scatter(1, best_NG, False)
        return biased_NGE.masked_fill(outside_NG[..., None], -torch.inf).flatten(1)


class Experts(nn.Module):
    """E gated MLPs without biases, each projection of all of them one tensor: w1 gates, w3 goes up, w2 down.

    Args:
        num_experts: E.
        hidden_size, intermediate_size: channels outside, D, and inside, I.

    >>> {name: tuple(w.shape) for name, w in Experts(4, 8, 16).named_parameters()}
    {'w1': (4, 16, 8), 'w3': (4, 16, 8), 'w2': (4, 8, 16)}
    """

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int):
        super().__init__()
        E, D, I = num_experts, hidden_size, intermediate_size
        self.w1, self.w3, self.w2 = (nn.Parameter(torch.empty(E, *s)) for s in ((I, D), (I, D), (D, I)))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw the weights anew."""
        for weight in (self.w1, self.w3, self.w2):
            nn.init.normal_(weight, std=std)

    def forward(self, x_ND: Tensor, experts_Nk: Tensor, weights_Nk: Tensor) -> tuple[Tensor, Tensor]:
        """Each token through the experts given for it, times the weights given; and the tokens of each expert, [E]."""
        return run_experts(x_ND, experts_Nk, weights_Nk, self.w1, self.w3, self.w2)

    def extra_repr(self) -> str:
        E, I, D = self.w1.shape
        return f"{E} experts, {D} -> {I} -> {D}"


class MoE(nn.Module):
    """A sparse layer: k routed experts a token, weighted, and the shared ones, unweighted.

    Args:
        hidden_size, intermediate_size: channels outside and inside an expert.
        num_experts, num_experts_per_token: E and k.
        num_shared_experts: their MLP is that many times as wide; 0 for none.
        num_groups, groups_per_token: experts are chosen from the best groups only; 1 and 1 is no restriction.
        renormalize: make a token's weights sum to 1, before scaling.
        scaling: times the weights.
        weigh_by: "unbiased", or "official_alias": by scores that include the bias, as the released remote code does.

    After a forward, `last_load` holds how many tokens each expert was given, [E]. A model in training adds it to
    `total_load`, from which `update_router_bias` balances.

    >>> moe = MoE(8, 16, num_experts=4, num_experts_per_token=2)
    >>> moe(torch.randn(2, 3, 8)).shape, moe.last_load.sum()
    (torch.Size([2, 3, 8]), tensor(12))
    """

    last_load: Tensor
    total_load: Tensor

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        num_experts_per_token: int,
        *,
        num_shared_experts: int = 1,
        num_groups: int = 1,
        groups_per_token: int = 1,
        renormalize: bool = True,
        scaling: float = 2.446,
        weigh_by: str = "unbiased",
    ):
        super().__init__()
        self.gate = Router(
            hidden_size,
            num_experts,
            num_experts_per_token,
            num_groups=num_groups,
            groups_per_token=groups_per_token,
            renormalize=renormalize,
            scaling=scaling,
            weigh_by=weigh_by,
        )
        self.experts = Experts(num_experts, hidden_size, intermediate_size)
        if num_shared_experts:
            self.shared_experts = GatedMLP(hidden_size, intermediate_size * num_shared_experts)
        for name in ("last_load", "total_load"):
            self.register_buffer(name, torch.zeros(num_experts, dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> y [..., D]."""
        x_ND = x.flatten(0, -2)
        y_ND = self.route(x_ND, *self.gate(x_ND))
        if hasattr(self, "shared_experts"):
            y_ND = y_ND + self.shared_experts(x_ND)
        return y_ND.view_as(x)

    def step(self, x_ND: Tensor) -> Tensor:
        """A few tokens, as parts to be added to the residual stream, [N, J, D]: without a count of the load, and on a GPU
        reading the chosen experts' weights alone."""
        shared = getattr(self, "shared_experts", None)
        three = () if shared is None else (shared.gate_proj, shared.up_proj, shared.down_proj)
        stacked = self.experts.w1, self.experts.w3, self.experts.w2
        plain = (
            type(self.experts) is Experts
            and all(map(is_plain, three))
            and all(w.is_contiguous() and type(w) is nn.Parameter for w in stacked)
        )
        if not plain or stacked[0].dtype != x_ND.dtype or not gathers(x_ND, self.gate.num_experts_per_token):
            return self(x_ND)[:, None]
        chosen, weights = self.gate.step(x_ND)
        return experts(x_ND, chosen, weights, *stacked, shared=[m.weight for m in three])

    def route(self, x_ND: Tensor, experts_Nk: Tensor, weights_Nk: Tensor) -> Tensor:
        """Each token through the experts given for it, times the weights given, summed in float32."""
        y_ND, load_E = self.experts(x_ND, experts_Nk, weights_Nk)
        self.last_load = load_E
        return y_ND.to(x_ND.dtype)

    def record_load(self) -> None:
        """Add the load of the last forward to the total."""
        self.total_load += self.last_load


def _check_counts(num_experts: int, num_experts_per_token: int, num_groups: int, groups_per_token: int) -> None:
    check_sizes(num_experts=num_experts, num_experts_per_token=num_experts_per_token, num_groups=num_groups)
    if num_experts % num_groups:
        raise ValueError(
            f"num_experts is {num_experts} and num_groups {num_groups}; give a number of experts that divides into groups"
        )
    if not 1 <= groups_per_token <= num_groups:
        raise ValueError(f"groups_per_token is {groups_per_token}; expected 1 to num_groups = {num_groups}")
    within = num_experts // num_groups * groups_per_token
    if num_experts_per_token > within:
        raise ValueError(
            f"num_experts_per_token is {num_experts_per_token} and {groups_per_token} of {num_groups} groups hold {within} "
            "experts; choose fewer, or among more groups"
        )


@torch.no_grad()
def gather_loads(model: nn.Module) -> None:
    """Makes `total_load` of every MoE in model that of all processes."""
    if dist.is_available() and dist.is_initialized():
        for moes in _alike(model):
            load_LE = torch.stack([moe.total_load for moe in moes])
            dist.all_reduce(load_LE)
            torch._foreach_copy_([moe.total_load for moe in moes], [*load_LE])


@torch.no_grad()
def update_router_bias(model: nn.Module, rate: float | Tensor = 1e-3, *, gathered: bool = False) -> None:
    """Balance the experts of every MoE in model: those below the mean load rise in bias, those above sink.

    Call it after the optimiser's step. It uses the load since the last call, of all processes, and starts a new count.

    Args:
        rate: how far a bias moves; a scalar on the model's device is not waited for.
        gathered: the loads are those of all processes already, by `gather_loads`.

    >>> moe = MoE(8, 16, num_experts=2, num_experts_per_token=1)
    >>> moe.total_load.copy_(torch.tensor([9, 1]))
    tensor([9, 1])
    >>> update_router_bias(moe, rate=0.5)
    >>> moe.gate.e_score_correction_bias
    tensor([-0.5000,  0.5000])
    """
    if not gathered:
        gather_loads(model)
    for moes in _alike(model):
        load_LE = torch.stack([moe.total_load for moe in moes]).float()
        moves = rate * torch.sign(load_LE.mean(1, keepdim=True) - load_LE)
        torch._foreach_add_([moe.gate.e_score_correction_bias for moe in moes], [*moves])
        torch._foreach_zero_([moe.total_load for moe in moes])


def busiest_shares(model: nn.Module, num_groups: int | None = None) -> Tensor:
    """For each MoE in model, the busiest expert's tokens over the mean since the last `update_router_bias`, [layers].

    Args:
        model: in training.
        num_groups: of experts that lie side by side, each on a process of its own: then the busiest group's over the mean.

    >>> moe = MoE(8, 16, num_experts=2, num_experts_per_token=1)
    >>> moe.total_load.copy_(torch.tensor([9, 1]))
    tensor([9, 1])
    >>> busiest_shares(moe)
    tensor([1.8000])
    """
    loads = [torch.stack([moe.total_load for moe in moes]).float() for moes in _alike(model)]
    loads = loads if num_groups is None else [load.unflatten(1, (num_groups, -1)).sum(2) for load in loads]
    return torch.cat([load.amax(1) / load.mean(1).clamp(min=1e-9) for load in loads]) if loads else torch.zeros(0)


def _alike(model: nn.Module) -> list[list[MoE]]:
    """The MoEs of a model, those with as many experts together: one stack of loads, few launches."""
    groups: dict[int, list[MoE]] = {}
    for module in model.modules():
        if isinstance(module, MoE):
            groups.setdefault(len(module.total_load), []).append(module)
    return list(groups.values())
