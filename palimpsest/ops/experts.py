"""Many small MLPs, a few of them for each token: the experts of a mixture, on stacked weights.

    y_n = sum_j weights_nj w2[e] (silu(w1[e] x_n) * (w3[e] x_n)),    e = experts_nj

Letters  N tokens, k experts a token, E experts, D channels outside and I inside an expert, M = N k pairs of a token and
         one of its experts.
Forms    `law` says it one expert at a time. `run_experts` sorts the pairs by expert on the device and multiplies each
         expert's rows by its own matrix, forward and backward; no count of tokens goes to the host of a GPU, and sums have
         one order, so the same inputs give the same bits.
Products "loop"      a product an expert, where the host knows the counts: CPUs
         "grouped"   torch's grouped product: bfloat16 on compute capability 9.0 and later
         "triton"    the same as one Triton kernel: other GPUs and dtypes
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from palimpsest.ops.arguments import fit, state_dtype
from palimpsest.ops.prefill import expert_sum, suits, swiglu


def law(x: Tensor, experts: Tensor, weights: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
    """The definition, one expert at a time, in the dtype it is given. Args as `run_experts`."""
    y = torch.zeros_like(x)
    for e, (gate, up, down) in enumerate(zip(w1, w3, w2)):
        weight_N1 = (weights * (experts == e)).sum(1, keepdim=True)
        y = y + weight_N1.to(x.dtype) * ((F.silu(x @ gate.mT) * (x @ up.mT)) @ down.mT)
    return y


def run_experts(
    x: Tensor, experts: Tensor, weights: Tensor, w1: Tensor, w3: Tensor, w2: Tensor
) -> tuple[Tensor, Tensor]:
    """Each token through its experts.

    Args:
        x: [N, D]. Under autocast the products run in autocast's dtype.
        experts: [N, k], int32 or int64, 0 to E - 1. An expert that a token names twice is added twice, as the sum says.
        weights: [N, k], float32 (float64 for float64 x).
        w1, w3: [E, I, D], gate and up. w2: [E, D, I], down.

    Returns:
        y [N, D] in the dtype of the products, and the number of tokens of each expert, [E] int64, on the device of x.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; on a CPU also an expert beyond those there are. A GPU, which is
            not waited for, gives NaN for the token that names it.

    >>> x, experts, weights = torch.ones(1, 2), torch.tensor([[1]]), torch.ones(1, 1)
    >>> y, load = run_experts(x, experts, weights, torch.ones(2, 3, 2), torch.ones(2, 3, 2), torch.ones(2, 2, 3))
    >>> y.shape, load
    (torch.Size([1, 2]), tensor([0, 1]))
    """
    fit("run_experts", (x, experts, weights, w1, w3, w2))
    if form(x) != "loop":
        experts, weights = spoil_unknown(experts, weights, len(w1))
    order_M, back_Nk, ends_E = sort_by_expert(experts, len(w1))
    load_E = torch.diff(ends_E, prepend=ends_E.new_zeros(1)).long()
    if suits(x) and w1.dtype == x.dtype and form(x) != "loop":
        return _without_gradient(x, weights, w1, w3, w2, order_M, back_Nk, ends_E), load_E
    y = _Experts.apply(x.to(product_dtype(x)), weights, w1, w3, w2, order_M, back_Nk, ends_E)
    return y, load_E


def run_held_experts(
    x: Tensor, experts: Tensor, weights: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, num_pairs: int
) -> Tensor:
    """As `run_experts` where some of the experts are held elsewhere: what those held here add to each token.

    Args:
        x: [N, D], in the dtype of the products.
        experts: [N, k]; those outside 0 to E - 1 are elsewhere, and pass.
        weights: [N, k], float32 (float64 for float64 x).
        w1, w3, w2: of the experts held here, as in `run_experts`.
        num_pairs: of a token and an expert held here: known to the host, so that nothing waits and no row is empty.

    Returns:
        y [N, D].

    >>> x, experts, weights = torch.ones(1, 2), torch.tensor([[1, 7]]), torch.ones(1, 2)
    >>> run_held_experts(x, experts, weights, torch.ones(2, 3, 2), torch.ones(2, 3, 2), torch.ones(2, 2, 3), 1).shape
    torch.Size([1, 2])
    """
    experts = torch.where((experts >= 0) & (experts < len(w1)), experts, len(w1))
    order, back_Nk, ends_E = sort_by_expert(experts, len(w1))
    rows = num_pairs if form(x) == "loop" else max(num_pairs, 1)  # a grouped product wants a row; no end counts it
    back_Nk = torch.where(experts == len(w1), -1, back_Nk)
    return _Experts.apply(x, weights, w1, w3, w2, order[:rows], back_Nk, ends_E)  # type: ignore[return-value]


def spoil_unknown(experts: Tensor, weights: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Where `experts` names none that there is: one that there is, so that every address holds, and the weight NaN.

    >>> spoil_unknown(torch.tensor([[1, 9, -1]]), torch.ones(1, 3), 2)
    (tensor([[1, 1, 0]]), tensor([[1., nan, nan]]))
    """
    known = experts.clamp(0, num_experts - 1)
    return known, torch.where(known == experts, weights, torch.nan)


def sort_by_expert(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of a token and one of its experts, those of one expert side by side, tokens in order.

    Args:
        experts: [N, k].

    Returns:
        order [M]: the pair (token k + choice) at each row; back [N, k]: the row of each pair; ends [E] int32: where each
        expert's rows end. Pairs of an expert beyond those there are come last, and no end counts them; on a GPU there must
        be none.

    >>> [x.tolist() for x in sort_by_expert(torch.tensor([[2, 0], [0, 1]]), 3)]
    [[1, 2, 3, 0], [[3, 0], [1, 2]], [2, 3, 4]]
    """
    if not experts.is_cuda:  # judged before it is narrowed, which may make a known expert of any number
        experts = experts.where((experts >= 0) & (experts < num_experts), num_experts)
    small = torch.int16 if num_experts < 2**15 else torch.int32  # fewer digits to sort
    sorted_M, order_M = experts.flatten().to(small).sort(stable=True)
    back_M = torch.empty_like(order_M).scatter_(0, order_M, torch.arange(len(order_M), device=order_M.device))
    every_E = torch.arange(num_experts, dtype=small, device=experts.device)
    ends_E = torch.searchsorted(sorted_M, every_E, right=True, out_int32=True)
    return order_M, back_M.view_as(experts), ends_E


def form(x: Tensor) -> str:
    """Which form of products runs for x, "loop", "grouped" or "triton"; see the head of this file.

    >>> form(torch.ones(1, 2))
    'loop'
    """
    if not x.is_cuda or x.dtype == torch.float64:  # float64 waits for the host on a GPU: it is for checks
        return "loop"
    whole = x.shape[-1] * x.element_size() % 16 == 0  # rows begin at 16 bytes, as the hardware's copies want
    if product_dtype(x) == torch.bfloat16 and torch.cuda.get_device_capability(x.device) >= (9, 0) and whole:
        return "grouped"
    return "triton"


def explain(x: Tensor, *, trained: bool = False) -> str:
    """Which form of products `run_experts` takes for x, and why, in a sentence.

    Args:
        x: [N, D], or any tensor of its dtype, channels and device.
        trained: whether a gradient is wanted.

    >>> explain(torch.ones(1, 2))
    'loop: a product an expert; x is on cpu, where the host knows how many tokens each has'
    """
    kind = form(x)
    if kind == "loop":
        why = "x is float64, which on a GPU waits for the host" if x.is_cuda else "x is on cpu, where the host knows"
        return f"loop: a product an expert; {why} how many tokens each has"
    if kind == "grouped":
        said = "grouped: torch's grouped product; x is multiplied in bfloat16 on compute capability 9.0 or later"
    else:
        width = x.shape[-1] * x.element_size()
        why = f"{product_dtype(x)}, rows of {width} bytes, compute capability {torch.cuda.get_device_capability(x.device)}"
        said = f"triton: one grouped Triton kernel, which takes what torch's grouped product refuses ({why})"
    return said if trained else f"{said}; without a gradient, activation and sum are one kernel each"


def _without_gradient(x_ND, weights_Nk, w1, w3, w2, order_M, back_Nk, ends_E) -> Tensor:
    """A prompt: the weights are read where they lie, and each pass between the products is one kernel."""
    x_MD = x_ND[order_M // weights_Nk.shape[1]]
    gate_MI, up_MI = (grouped_product(x_MD, w, ends_E) for w in (w1, w3))
    hidden_MI = swiglu(gate_MI, up_MI, weights_Nk.flatten()[order_M])
    return expert_sum(grouped_product(hidden_MI, w2, ends_E), back_Nk)


class _Experts(torch.autograd.Function):
    """Keeps x and the two products before the activation; rows of sorted tokens are gathered again for the gradient."""

    @staticmethod
    def forward(ctx, x_ND, weights_Nk, w1, w3, w2, order_M, back_Nk, ends_E):
        x_MD = x_ND[order_M // weights_Nk.shape[1]]
        weight_M1 = weights_Nk.flatten()[order_M, None]
        w2 = w2.to(x_ND.dtype)
        if form(x_ND) == "loop":
            up = w1.to(x_ND.dtype), w3.to(x_ND.dtype)
            gate_MI, up_MI = (grouped_product(x_MD, w, ends_E) for w in up)
        else:  # both in one product, which reads x once
            up = (torch.cat((w1.to(x_ND.dtype), w3.to(x_ND.dtype)), dim=1),)
            gate_MI, up_MI = grouped_product(x_MD, *up, ends_E).chunk(2, dim=-1)
        y_MD = grouped_product(_activate(gate_MI, up_MI, weight_M1), w2, ends_E)
        ctx.save_for_backward(x_ND, weights_Nk, order_M, back_Nk, ends_E, gate_MI, up_MI, w2, *up)
        ctx.weight_dtype = w1.dtype
        ctx.whole = back_Nk.numel() == len(order_M)
        return _gathered_sum(y_MD, back_Nk, ctx.whole)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_ND):  # pyright: ignore[reportIncompatibleMethodOverride]
        x_ND, weights_Nk, order_M, back_Nk, ends_E, gate_MI, up_MI, w2, *up = ctx.saved_tensors
        token_M = order_M // weights_Nk.shape[1]
        weight_M1 = weights_Nk.flatten()[order_M, None]
        dy_MD, x_MD = dy_ND.to(x_ND.dtype)[token_M], x_ND[token_M]
        d_hidden_MI = grouped_product(dy_MD, w2.mT, ends_E)
        d_w2 = grouped_outer(dy_MD, _activate(gate_MI, up_MI, weight_M1), ends_E)
        d_gate_MI, d_up_MI, d_weight_M = _activation_gradients(gate_MI, up_MI, weight_M1, d_hidden_MI)
        if len(up) == 2:
            dx_MD = grouped_product(d_gate_MI, up[0].mT, ends_E) + grouped_product(d_up_MI, up[1].mT, ends_E)
            d_w1, d_w3 = (grouped_outer(d, x_MD, ends_E) for d in (d_gate_MI, d_up_MI))
        else:
            d_both_MC = torch.cat((d_gate_MI, d_up_MI), -1)
            dx_MD = grouped_product(d_both_MC, up[0].mT, ends_E)
            d_w1, d_w3 = grouped_outer(d_both_MC, x_MD, ends_E).chunk(2, dim=1)
        d_weights = (d.to(ctx.weight_dtype) for d in (d_w1, d_w3, d_w2))
        d_weights_Nk = _gathered(d_weight_M, back_Nk, ctx.whole)
        return _gathered_sum(dx_MD, back_Nk, ctx.whole), d_weights_Nk, *d_weights, None, None, None


def _activate(gate: Tensor, up: Tensor, weight_M1: Tensor) -> Tensor:
    """silu(gate) * up * weight: the weight of a token's expert goes in here, where rows are shortest."""
    return (F.silu(_wide(gate)) * _wide(up) * weight_M1).to(gate.dtype)


def _activation_gradients(
    gate: Tensor, up: Tensor, weight_M1: Tensor, d_hidden: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, (gate, up, d_hidden) = gate.dtype, (_wide(x) for x in (gate, up, d_hidden))
    share = gate.sigmoid()
    silu = gate * share
    d_weight_M = (d_hidden * silu * up).sum(-1).to(weight_M1.dtype)
    d_hidden = d_hidden * weight_M1
    d_gate = d_hidden * up * share * (1 + gate * (1 - share))
    return d_gate.to(dtype), (d_hidden * silu).to(dtype), d_weight_M


def _gathered_sum(rows_MD: Tensor, back_Nk: Tensor, whole: bool) -> Tensor:
    """What a token's experts gave, in float32, summed in the order of its choices."""
    return _wide(_gathered(rows_MD, back_Nk, whole)).sum(1).to(rows_MD.dtype)


def _gathered(rows: Tensor, back_Nk: Tensor, whole: bool) -> Tensor:
    """The rows of each token's choices; unless they are whole, 0 where the place is -1."""
    if whole:
        return rows[back_Nk]
    if not len(rows):
        return rows.new_zeros(*back_Nk.shape, *rows.shape[1:])
    absent = (back_Nk < 0).view(*back_Nk.shape, *[1] * (rows.ndim - 1))
    return torch.where(absent, 0, rows[back_Nk.clamp(min=0)])


def grouped_product(rows_MA: Tensor, matrices_EBA: Tensor, ends_E: Tensor) -> Tensor:
    """[M, B]: rows from ends[e - 1] to ends[e] times the transpose of matrix e."""
    kind = form(rows_MA)
    if kind == "grouped":
        return torch._grouped_mm(rows_MA, matrices_EBA.mT, offs=ends_E)
    if kind == "triton":
        return torch.ops.palimpsest_gpu.grouped_product(rows_MA, matrices_EBA, ends_E)
    parts = [rows @ matrix.mT for rows, matrix in zip(_split(rows_MA, ends_E), matrices_EBA) if len(rows)]
    return torch.cat(parts) if parts else rows_MA.new_zeros(0, matrices_EBA.shape[1])


def grouped_outer(left_MA: Tensor, right_MB: Tensor, ends_E: Tensor) -> Tensor:
    """[E, A, B]: for each expert the transpose of its rows of `left` times its rows of `right`; 0 without rows."""
    kind = form(left_MA)
    if kind == "grouped":
        return torch._grouped_mm(left_MA.mT, right_MB, offs=ends_E)
    if kind == "triton":
        return torch.ops.palimpsest_gpu.grouped_outer(left_MA, right_MB, ends_E)
    return torch.stack([left.mT @ right for left, right in zip(_split(left_MA, ends_E), _split(right_MB, ends_E))])


def _split(rows: Tensor, ends_E: Tensor) -> tuple[Tensor, ...]:
    ends = ends_E.tolist()
    if ends[-1] != len(rows):
        raise ValueError(f"experts names some beyond the {len(ends)} there are; expected 0 to {len(ends) - 1}")
    return rows.split([b - a for a, b in zip([0, *ends], ends)])


def _wide(x: Tensor) -> Tensor:
    return x.to(state_dtype(x.dtype))


def product_dtype(x: Tensor) -> torch.dtype:
    """In which dtype the products of x run: autocast's, where there is one."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) and x.dtype != torch.float64 else x.dtype
