"""The delta-rule family. A variant says only what its gates erase and write; the memory is shared.

    S <- Diag(exp log_decay) S;    S <- S + k (write - S^T erase)^T;    o = S^T q

    kda                      erase = beta k         write = beta v         one decay per channel
    gdn2                     erase = erase_gate k   write = write_gate v   one decay per channel
    gated_delta              erase = beta k         write = beta v         one decay per head
    gated_delta_product      n times a token:       beta_j k_j, beta_j v_j  one decay per head
    delta_rule               erase = beta k         write = beta v         no decay
    gated_linear_attention   erase = 0              write = v              one decay per channel
    linear_attention         erase = 0              write = v              no decay

Beside them stand `dplr`, the general transition that the paper compares with, and `softmax_lookup`, whose state
keeps everything. To add a variant: write its function here and add it to VARIANTS; tests and docs find it there.

Every function takes tensors in the layout [B, T, H, *] and returns (output, state). Heads may be grouped: v and the
gates may have more heads than q and k, a multiple; value head j then uses key head j // (value heads / key heads).
Sequences may be packed: a batch of one with cu_seqlens, the borders, and a state with one memory per sequence.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from palimpsest.ops import affine, arguments
from palimpsest.ops.arguments import expect_floats, scale_of, state_dtype
from palimpsest.ops.backends import Backend, Op, Problem, choose, within_a_transform
from palimpsest.ops.gates import SigmoidDecay, SoftplusDecay, l2norm
from palimpsest.ops.packing import check_cu_seqlens
from palimpsest.ops.split import SequenceSplit


class DeltaOutput(NamedTuple):
    """What every variant returns.

    Attributes:
        output: [B, T, HV, V] in v's dtype, what each token reads.
        state: the memory after the last token, [B, HV, K, V], or [N, HV, K, V] of N packed sequences; fp32, or fp64 for
            fp64 inputs.
    """

    output: Tensor
    state: Tensor


Gate = SoftplusDecay | SigmoidDecay | Callable[[Tensor], Tensor]


def kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    state: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    check: bool = False,
    backend: str = "auto",
    split: SequenceSplit | None = None,
) -> DeltaOutput:
    """Kimi Delta Attention: channel-wise decay, one strength beta for both erasing and writing.

        S_t = (I - beta_t k_t k_t^T) Diag(exp log_decay_t) S_{t-1} + beta_t k_t v_t^T        o_t = S_t^T (scale q_t)

    Args:
        q, k: [B, T, H, K]. Normalise k to unit length (`l2norm`) for a memory that cannot grow.
        v: [B, T, HV, V], HV a multiple of H.
        log_decay: [B, T, HV, K], natural log, <= 0. Keep it in fp32: bf16 rounds slow decays to none.
        beta: [B, T, HV], in (0, 1); (0, 2) allows negative eigenvalues.
        state: memory before the first token, [B, HV, K, V], or [N, HV, K, V] for N packed sequences; zeros if None.
        scale: multiplies q; 1 / sqrt(K) if None.
        cu_seqlens: [N + 1] borders of packed sequences, with B = 1.
        check: also read the values and refuse a positive or NaN log_decay.
        backend: "auto", or a name from `backends.names()`; a named backend never falls back.
        split: the tensors are this rank's part of a sequence that lies on several, `split_sequence` of `parallel.context`;
            without cu_seqlens. `state` then has one row a piece of this rank, and so has what is returned.

    A NaN in a token reaches no other head and no other sequence. With the backends `cpu` and `reference` it reaches no earlier
    token either; with `chunked`, `triton` and `hopper` it may show in earlier outputs of its chunk, of 32 or 64 tokens.

    Returns:
        DeltaOutput(output [B, T, HV, V], state [B or N, HV, K, V]).

    Raises:
        ValueError: a shape, dtype or device disagrees, or the named backend cannot run this call.
        TypeError: an argument is no tensor, or scale no number.

    Source: Kimi Linear, arXiv:2510.26692, equation 1.

    >>> q = k = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)
    >>> v, beta = torch.full((1, 1, 1, 2), 5.0), torch.ones(1, 1, 1)
    >>> log_decay = torch.tensor([1.0, 0.5]).log().view(1, 1, 1, 2)
    >>> memory = torch.tensor([[10.0, 10.0], [2.0, 2.0]]).view(1, 1, 2, 2)
    >>> kda(q, k, v, log_decay, beta, state=memory).state[0, 0]
    tensor([[10., 10.],
            [ 5.,  5.]])
    """
    arguments.check("kda", (q, k, v, log_decay, beta, _checkable(state, split, cu_seqlens)), cu_seqlens)
    if check:
        _check_decay(log_decay)
    return _run("kda", "kda", (q, k, v, log_decay, beta), v, state, scale, cu_seqlens, backend, split)


def gdn2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    erase_gate: Tensor,
    write_gate: Tensor,
    *,
    state: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    check: bool = False,
    backend: str = "auto",
    split: SequenceSplit | None = None,
) -> DeltaOutput:
    """Gated DeltaNet 2: KDA with erasing gated per key channel and writing gated per value channel.

    Args:
        q, k, v, log_decay: as of `kda`.
        erase_gate: [B, T, HV, K], in (0, 1): the token erases along erase_gate * k.
        write_gate: [B, T, HV, V], in (0, 1): it writes write_gate * v.
        state, scale, cu_seqlens, check, backend, split: as of `kda`.

    Returns:
        DeltaOutput(output [B, T, HV, V], state [B or N, HV, K, V]).

    Raises:
        ValueError, TypeError: as `kda`.

    Source: arXiv:2605.22791.

    >>> q = k = v = torch.ones(1, 3, 1, 4) / 2
    >>> gate = torch.full((1, 3, 1, 4), 0.5)  # the same gate for both: KDA with that beta
    >>> output, _ = gdn2(q, k, v, torch.zeros(1, 3, 1, 4), gate, gate)
    >>> torch.equal(output, kda(q, k, v, torch.zeros(1, 3, 1, 4), gate[..., 0]).output)
    True
    """
    arguments.check(
        "gdn2", (q, k, v, log_decay, erase_gate, write_gate, _checkable(state, split, cu_seqlens)), cu_seqlens
    )
    if check:
        _check_decay(log_decay)
    keys = _per_value_head(k, v.shape[2])
    core = (q, k, (erase_gate * keys).to(k.dtype), (write_gate * v).to(v.dtype), log_decay)  # gates may be wider
    return _run("core", "gdn2", core, v, state, scale, cu_seqlens, backend, split)


def gated_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    state: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    check: bool = False,
    backend: str = "auto",
    split: SequenceSplit | None = None,
) -> DeltaOutput:
    """Gated DeltaNet: KDA with one decay per head.

    Args:
        q, k, v, beta: as of `kda`.
        log_decay: [B, T, HV], natural log, <= 0, in fp32 where it can be.
        state, scale, cu_seqlens, check, backend, split: as of `kda`.

    Returns:
        DeltaOutput(output [B, T, HV, V], state [B or N, HV, K, V]).

    Raises:
        ValueError, TypeError: as `kda`.

    Source: arXiv:2412.06464.

    >>> q = k = v = torch.ones(1, 3, 1, 4) / 2
    >>> gated_delta(q, k, v, torch.zeros(1, 3, 1), torch.ones(1, 3, 1)).output.shape
    torch.Size([1, 3, 1, 4])
    """
    arguments.check("gated_delta", (q, k, v, log_decay, beta, _checkable(state, split, cu_seqlens)), cu_seqlens)
    if check:
        _check_decay(log_decay)
    log_decay = log_decay[..., None].expand(*log_decay.shape, q.shape[-1])
    return _run("kda", "gated_delta", (q, k, v, log_decay, beta), v, state, scale, cu_seqlens, backend, split)


def gated_delta_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    state: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    check: bool = False,
    backend: str = "auto",
    split: SequenceSplit | None = None,
) -> DeltaOutput:
    """Gated DeltaProduct: n erase-and-write sub-steps a token, then one read. The token's decay comes before the first.

    A token's transition is a product of n matrices I - beta_j k_j k_j^T, which with beta up to 2 can rotate and permute,
    where one such matrix can only reflect.

    Args:
        q: [B, T, H, K].
        k: [B, T, n, H, K]. v: [B, T, n, HV, V], HV a multiple of H. Sub-step j of a token has the key k[:, :, j].
        log_decay: [B, T, HV], or [B, T, HV, K] for one a channel; natural log, <= 0.
        beta: [B, T, n, HV], in (0, 1), or (0, 2).
        state, scale, cu_seqlens, check, backend, split: as of `kda`; borders count tokens, not sub-steps.

    Returns:
        DeltaOutput(output [B, T, HV, V], state [B or N, HV, K, V]).

    Raises:
        ValueError, TypeError: as `kda`.

    Source: DeltaProduct, arXiv:2502.10297.

    >>> k = torch.eye(2).view(1, 1, 2, 1, 2)  # a token that writes under two keys
    >>> v = torch.tensor([3.0, 4.0]).view(1, 1, 2, 1, 1)
    >>> gated_delta_product(k[:, :, 0], k, v, torch.zeros(1, 1, 1), torch.ones(1, 1, 2, 1)).state.flatten()
    tensor([3., 4.])
    """
    for name, x in (("q", q), ("k", k), ("v", v), ("log_decay", log_decay), ("beta", beta)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} is a {type(x).__name__}; it must be a torch.Tensor")
    if k.ndim != 5 or v.ndim != 5:
        raise ValueError(
            f"k has shape {tuple(k.shape)} and v {tuple(v.shape)}; both must be [B, T, sub-steps, heads, channels]"
        )
    (B, T, n, H, K), HV = k.shape, v.shape[3]
    if tuple(q.shape) != (B, T, H, K) or tuple(v.shape[:3]) != (B, T, n) or n == 0:
        raise ValueError(
            f"q has shape {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}; expected [B, T, H, K], "
            "[B, T, n, H, K] and [B, T, n, HV, V] with n of at least 1"
        )
    log_decay = log_decay[..., None] if log_decay.ndim == 3 else log_decay
    if tuple(log_decay.shape) not in ((B, T, HV, 1), (B, T, HV, K)):
        raise ValueError(f"log_decay has shape {tuple(log_decay.shape)}; expected {(B, T, HV)} or {(B, T, HV, K)}")
    if tuple(beta.shape) != (B, T, n, HV):
        raise ValueError(f"beta has shape {tuple(beta.shape)}; expected {(B, T, n, HV)}")
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, B, T, q.device)
    # A sub-step is a token of its own: the first has the decay, the last the read.
    decays = F.pad(log_decay.expand(B, T, HV, K)[:, :, None], (0, 0, 0, 0, 0, n - 1)).flatten(1, 2)
    reads = F.pad(q[:, :, None], (0, 0, 0, 0, n - 1, 0)).flatten(1, 2)
    k, v, beta = (x.flatten(1, 2) for x in (k, v, beta))
    borders = None if cu_seqlens is None else cu_seqlens * n
    result = kda(
        reads, k, v, decays, beta, state=state, scale=scale, cu_seqlens=borders, check=check, backend=backend,
        split=None if split is None else split.times(n),
    )  # fmt: skip
    return DeltaOutput(result.output[:, n - 1 :: n], result.state)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    state: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    split: SequenceSplit | None = None,
) -> DeltaOutput:
    """DeltaNet: no decay; each write is one gradient step of size beta on 1/2 |S^T k - v|^2.

    Args:
        q, k, v, beta: as of `kda`.
        state, scale, cu_seqlens, backend, split: as of `kda`.

    Returns:
        DeltaOutput(output [B, T, HV, V], state [B or N, HV, K, V]).

    Raises:
        ValueError, TypeError: as `kda`.

    Source: arXiv:2406.06484.

    >>> k = torch.eye(2).view(1, 2, 1, 2)[:, [0, 0]]  # the same key twice: the second value replaces the first
    >>> v = torch.tensor([3.0, 7.0]).view(1, 2, 1, 1)
    >>> delta_rule(k, k, v, torch.ones(1, 2, 1), scale=1.0).output.flatten().tolist()
    [3.0, 7.0]
    """
    arguments.check("delta_rule", (q, k, v, beta, _checkable(state, split, cu_seqlens)), cu_seqlens)
    log_decay = v.new_zeros(1, 1, 1, 1).expand(*beta.shape, q.shape[-1])  # a zero is exact in any dtype
    return _run("kda", "delta_rule", (q, k, v, log_decay, beta), v, state, scale, cu_seqlens, backend, split)


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    state: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    check: bool = False,
    backend: str = "auto",
    split: SequenceSplit | None = None,
) -> DeltaOutput:
    """Gated linear attention: channel-wise decay and no erasing.

        S_t = Diag(exp log_decay_t) S_{t-1} + k_t v_t^T        o_t = S_t^T (scale q_t)

    Args:
        q, k, v: as of `kda`; k need not be of unit length, for nothing is erased along it.
        log_decay: [B, T, HV, K], natural log, <= 0, in fp32 where it can be.
        state, scale, cu_seqlens, check, backend, split: as of `kda`.

    Returns:
        DeltaOutput(output [B, T, HV, V], state [B or N, HV, K, V]).

    Raises:
        ValueError, TypeError: as `kda`.

    Source: arXiv:2312.06635.

    >>> k = torch.ones(1, 2, 1, 1)
    >>> half = torch.full((1, 2, 1, 1), 0.5).log()
    >>> gated_linear_attention(k, k, k, half).state.item()  # the first value has faded to a half
    1.5
    """
    arguments.check("gated_linear_attention", (q, k, v, log_decay, _checkable(state, split, cu_seqlens)), cu_seqlens)
    if check:
        _check_decay(log_decay)
    core = (q, k, torch.zeros_like(log_decay, dtype=k.dtype), v, log_decay)
    return _run("core", "gated_linear_attention", core, v, state, scale, cu_seqlens, backend, split)


def elu_plus_one(x: Tensor) -> Tensor:
    """The feature map of the first linear transformer: positive everywhere.

    Args:
        x: any shape.

    Returns:
        elu(x) + 1, of the same shape.

    Source: arXiv:2006.16236.

    >>> elu_plus_one(torch.tensor([0.0, 2.0]))
    tensor([1., 3.])
    """
    return torch.nn.functional.elu(x) + 1


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: Callable[[Tensor], Tensor] = elu_plus_one,
    normalise: bool = True,
    state: Tensor | None = None,
    scale: float | None = 1.0,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    split: SequenceSplit | None = None,
) -> DeltaOutput:
    """Linear attention: o_t = phi(q_t)^T sum_s phi(k_s) v_s^T, over phi(q_t)^T sum_s phi(k_s) when normalised.

    Args:
        q, k: [B, T, H, K], before the feature map.
        v: [B, T, HV, V], HV a multiple of H.
        feature_map: phi, from [B, T, H, K] to [B, T, H, F] with any number F of features; `lambda x: x` for the plain
            outer-product memory. Features are taken in v's dtype.
        normalise: divide by the sum of weights. The state then has a last column that holds it.
        state: [B, HV, F, V], or [B, HV, F, V + 1] when normalised; [N, ...] for N packed sequences; zeros if None.
        scale: multiplies phi(q); 1 / sqrt(F) if None. It cancels when normalised.
        cu_seqlens, backend, split: as of `kda`.

    Returns:
        DeltaOutput(output [B, T, HV, V], state like the one that came).

    Raises:
        ValueError, TypeError: as `kda`; feature_map returns something else than features of each token.

    Source: arXiv:2006.16236.

    >>> q = k = v = torch.ones(1, 3, 1, 4)
    >>> linear_attention(q, k, v).output[0, 2, 0]  # an average of equal values
    tensor([1., 1., 1., 1.])
    """
    arguments.check("linear_attention", (q, k, v, None), cu_seqlens)
    q, k = _features(feature_map, "q", q), _features(feature_map, "k", k)
    write = torch.cat((v, torch.ones_like(v[..., :1])), -1) if normalise else v
    arguments.check("linear_attention", (q, k, write, _checkable(state, split, cu_seqlens)), cu_seqlens)
    result = _run("linear", "linear_attention", (q, k, write), write, state, scale, cu_seqlens, backend, split)
    if not normalise:
        return result
    V = v.shape[-1]
    return DeltaOutput(result.output[..., :V] / result.output[..., V:], result.state)


def _features(feature_map: Callable[[Tensor], Tensor], name: str, x: Tensor) -> Tensor:
    if not callable(feature_map):
        raise TypeError(f"feature_map is a {type(feature_map).__name__}; it must be a function of a torch.Tensor")
    features = feature_map(x)
    if not isinstance(features, Tensor):
        raise TypeError(f"feature_map made a {type(features).__name__} of {name}; it must return a torch.Tensor")
    if features.ndim != 4 or features.shape[:3] != x.shape[:3] or features.shape[3] == 0:
        raise ValueError(
            f"feature_map made {tuple(features.shape)} of {name}, {tuple(x.shape)}; "
            "it may change the number of channels, the last dimension, and nothing else"
        )
    if not features.is_floating_point() or features.device != x.device:
        raise ValueError(
            f"feature_map made {features.dtype} on {features.device} of {name}, {x.dtype} on {x.device}; "
            "features must be real numbers on the same device"
        )
    return features.to(x.dtype)


def dplr(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    *,
    state: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    check: bool = False,
    backend: str = "auto",
    split: SequenceSplit | None = None,
) -> DeltaOutput:
    """Diagonal plus low rank: S <- (Diag(exp log_decay) + b a^T) S + k v^T with free vectors a and b.

    Args:
        q, k, v, log_decay: as of `kda`.
        a: [B, T, HV, K], reads the memory before the token's decay.
        b: [B, T, HV, K], along which what a has read is added.
        state, scale, cu_seqlens, check, backend, split: as of `kda`.

    Returns:
        DeltaOutput(output [B, T, HV, V], state [B or N, HV, K, V]).

    Raises:
        ValueError, TypeError: as `kda`.

    Source: Kimi Linear, arXiv:2510.26692, section 3.2, which measures KDA against it.

    >>> k = torch.nn.functional.normalize(torch.randn(1, 5, 1, 4), dim=-1)
    >>> v, g, beta = torch.randn(1, 5, 1, 4), -torch.rand(1, 5, 1, 4), torch.rand(1, 5, 1)
    >>> output, _ = dplr(k, k, beta[..., None] * v, g.exp() * k, -beta[..., None] * k, g)  # KDA as a member
    >>> torch.allclose(output, kda(k, k, v, g, beta).output, atol=1e-5)
    True
    """
    arguments.check("dplr", (q, k, v, a, b, log_decay, _checkable(state, split, cu_seqlens)), cu_seqlens)
    if check:
        _check_decay(log_decay)
    return _run("dplr", "dplr", (q, k, v, a, b, log_decay), v, state, scale, cu_seqlens, backend, split)


def softmax_lookup(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    state: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Causal softmax attention: its state is every key and value so far, the KV cache, and grows with each token.

    Args:
        q, k: [B, T, H, K]. v: [B, T, HV, V], HV a multiple of H.
        state: (keys [B, S, H, K], values [B, S, HV, V]) before the first token; not with cu_seqlens.
        scale, cu_seqlens, backend: as of `kda`.

    Returns:
        A pair: output [B, T, HV, V], and state (keys, values) with these tokens appended.

    Raises:
        ValueError, TypeError: as `kda`; state came with cu_seqlens.

    >>> q = k = v = torch.ones(1, 3, 1, 4)
    >>> output, (keys, values) = softmax_lookup(q, k, v)
    >>> keys.shape
    torch.Size([1, 3, 1, 4])
    """
    arguments.check("softmax_lookup", (q, k, v), cu_seqlens)
    keys, values = (k[:, :0], v[:, :0]) if state is None else _kv_cache(state, k, v)
    if cu_seqlens is not None and state is not None:
        raise ValueError(
            "state came with cu_seqlens; a KV cache cannot be continued in a packed batch: call once a sequence"
        )
    problem = _problem("lookup", "softmax_lookup", q, v, cu_seqlens, (q, k, v, keys, values))
    run = choose(problem, backend).lookup
    assert run is not None
    output = run(q, k, v, keys, values, scale_of(scale, q), cu_seqlens)
    return output, (torch.cat((keys, k), 1), torch.cat((values, v), 1))


def _kv_cache(state: tuple[Tensor, Tensor], k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    if not (isinstance(state, (tuple, list)) and len(state) == 2 and all(isinstance(x, Tensor) for x in state)):
        raise TypeError(f"state is a {type(state).__name__}; it must be a pair of tensors, (keys, values)")
    S = state[0].shape[1] if state[0].ndim == 4 else -1
    for name, x, like in (("state keys", state[0], k), ("state values", state[1], v)):
        shape = (like.shape[0], S, *like.shape[2:])
        if tuple(x.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; q and v ask for [B, S, heads, channels], here {shape}"
            )
        expect_floats(name, x, like.device)
        if x.dtype != like.dtype:
            raise ValueError(f"{name} is {x.dtype}; with q and v in {like.dtype} it must be the same")
    return state[0], state[1]


def kda_from_logits(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay_logits: Tensor,
    beta_logits: Tensor,
    *,
    gate: Gate,
    beta_max: float = 1.0,
    state: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    split: SequenceSplit | None = None,
) -> DeltaOutput:
    """KDA as a layer calls it: normalise q and k, gate the logits, then `kda`. One kernel where a backend has one.

    Args:
        q, k: [B, T, H, K], not normalised; `l2norm` is applied, eps 1e-6 inside the root.
        v: [B, T, HV, V], HV a multiple of H.
        decay_logits: [B, T, HV, K].
        beta_logits: [B, T, HV]; beta = beta_max * sigmoid, in fp32.
        gate: gates.SoftplusDecay(A_log, dt_bias), gates.SigmoidDecay(A_log, dt_bias, floor), or any function from
            decay_logits to log_decay.
        beta_max: 1, or up to 2 for negative eigenvalues.
        state, scale, cu_seqlens, backend, split: as of `kda`.

    Returns:
        DeltaOutput(output [B, T, HV, V], state [B or N, HV, K, V]).

    Raises:
        ValueError, TypeError: as `kda`; gate is none, or beta_max no number above 0.

    >>> from palimpsest.ops import gates
    >>> gate = gates.SoftplusDecay(A_log=torch.zeros(2), dt_bias=torch.zeros(2, 8))
    >>> x = torch.randn(1, 5, 2, 8)
    >>> kda_from_logits(x, x, x, x, x[..., 0], gate=gate).state.shape
    torch.Size([1, 2, 8, 8])
    """
    if not (isinstance(beta_max, (int, float)) and 0 < beta_max < math.inf):
        raise ValueError(
            f"beta_max is {beta_max!r}; it must be a number above 0: 1, or up to 2 for negative eigenvalues"
        )
    tensors = (q, k, v, decay_logits, beta_logits)
    if not callable(gate):
        raise TypeError(f"gate is a {type(gate).__name__}; it must be a SoftplusDecay, a SigmoidDecay or a function")
    if not isinstance(gate, (SoftplusDecay, SigmoidDecay)):
        arguments.check("kda_from_logits", (*tensors, _checkable(state, split, cu_seqlens)), cu_seqlens)
    else:
        parameters = (gate.A_log, gate.dt_bias)
        arguments.check(
            "kda_from_logits, gated", (*tensors, *parameters, _checkable(state, split, cu_seqlens)), cu_seqlens
        )
        everything = (*tensors, *parameters, state)
        problem = _problem("kda_from_logits", "kda", q, v, cu_seqlens, everything, gate.name)
        chosen = choose(Problem("kda", *problem[1:]), backend)
        able = beta_max == 1.0 and chosen.refusal(problem) is None
        whole = chosen.kda_from_logits if able else None
        if whole:  # the backend that runs KDA takes the logits, too
            scale = scale_of(scale, q)
            if split is not None:
                return DeltaOutput(*affine.remember(split, chosen, "kda_from_logits", tensors, state, scale, gate))
            state = _begin(state, chosen, v, q.shape[-1], cu_seqlens)
            return DeltaOutput(*whole(*tensors, gate, state, scale, cu_seqlens))
    beta = beta_max * beta_logits.to(state_dtype(v.dtype)).sigmoid()
    return kda(
        l2norm(q), l2norm(k), v, gate(decay_logits), beta,
        state=state, scale=scale, cu_seqlens=cu_seqlens, backend=backend, split=split,
    )  # fmt: skip


def kda_step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    state: Tensor,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """One token of KDA against a state that is edited in place; returns what the token reads. No gradient.

    Args:
        q, k: [B, H, K]. v: [B, HV, V]. log_decay: [B, HV, K]. beta: [B, HV].
        state: [B, HV, K, V], contiguous, fp32 (fp64 for fp64 inputs). It is overwritten.
        scale, backend: as of `kda`.

    Returns:
        [B, HV, V] in v's dtype.

    Raises:
        ValueError, TypeError: as `kda`; the state is not contiguous.
        RuntimeError: an argument asks for a gradient, which `kda` gives and this cannot.

    >>> state = torch.zeros(1, 1, 2, 2)
    >>> q = k = torch.tensor([[[0.0, 1.0]]])
    >>> kda_step_(q, k, torch.full((1, 1, 2), 5.0), torch.zeros(1, 1, 2), torch.ones(1, 1), state, scale=1.0)
    tensor([[[5., 5.]]])
    >>> state[0, 0]
    tensor([[0., 0.],
            [5., 5.]])
    """
    tensors = (q, k, v, log_decay, beta, state)
    try:  # what the choice of a backend depends on; the backend's own door checks everything, once
        wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        (B, H, K), (_, HV, V) = q.shape, v.shape
    except (AttributeError, ValueError):
        arguments.check("kda_step_", tensors)
        raise
    if wants_gradient:
        raise RuntimeError("kda_step_ edits the state in place and has no gradient; call kda, or enter torch.no_grad()")
    problem = Problem(  # by position: half the time of names
        "step", "kda", q.device.type, v.dtype, K, V, 1, B, H, HV, False, False, "none", _capability(q), within_a_transform()
    )  # fmt: skip
    step = choose(problem, backend).step
    assert step is not None
    scale = scale_of(scale, q)
    if not torch.is_grad_enabled():  # a step takes microseconds, and so does entering no_grad
        return step(*tensors, scale)
    with torch.no_grad():
        return step(*tensors, scale)


VARIANTS: dict[str, Callable[..., DeltaOutput]] = {
    "kda": kda,
    "gdn2": gdn2,
    "gated_delta": gated_delta,
    "gated_delta_product": gated_delta_product,
    "delta_rule": delta_rule,
    "gated_linear_attention": gated_linear_attention,
    "linear_attention": linear_attention,
    "dplr": dplr,
}


def _run(
    op: Op,
    variant: str,
    tensors: tuple[Tensor, ...],
    values: Tensor,
    state: Tensor | None,
    scale: float | None,
    cu_seqlens: Tensor | None,
    backend: str,
    split: SequenceSplit | None,
) -> DeltaOutput:
    if split is not None:
        chosen = choose(_problem(op, variant, tensors[0], values, cu_seqlens, (*tensors, state)), backend)
        return DeltaOutput(*affine.remember(split, chosen, op, tensors, state, scale_of(scale, tensors[0])))
    chosen, state = _start(op, variant, tensors, values, state, cu_seqlens, backend)
    return DeltaOutput(*getattr(chosen, op)(*tensors, state, scale_of(scale, tensors[0]), cu_seqlens))


def _start(
    op: Op,
    variant: str,
    tensors: tuple[Tensor, ...],
    values: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    backend: str,
) -> tuple[Backend, Tensor | None]:
    """Who runs a call, once it is checked, and from which state."""
    q = tensors[0]
    chosen = choose(_problem(op, variant, q, values, cu_seqlens, (*tensors, state)), backend)
    return chosen, _begin(state, chosen, values, q.shape[-1], cu_seqlens)


def _checkable(state: Tensor | None, split: SequenceSplit | None, cu_seqlens: Tensor | None) -> Tensor | None:
    """The state as `arguments.check` can judge it; the rows of a split, which knows them, are judged there."""
    if split is None:
        return state
    if cu_seqlens is not None:
        raise ValueError(
            "cu_seqlens came with split; say where documents begin to split_sequence, of the whole sequence"
        )
    return None


def _problem(
    op: Op,
    variant: str,
    q: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    tensors: tuple[Tensor | None, ...],
    gate: str = "none",
) -> Problem:
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    packed = cu_seqlens is not None
    sequences = len(cu_seqlens) - 1 if packed else B
    needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    return Problem(  # by position: half the time of names
        op, variant, q.device.type, v.dtype, K, V, T, sequences, H, HV, packed, needs_grad, gate, _capability(q),
        within_a_transform(),
    )  # fmt: skip


_CAPABILITIES: dict[int, tuple[int, int]] = {}  # by device; a cached function would make torch.compile warn


def _capability(q: Tensor) -> tuple[int, int] | None:
    if not q.is_cuda:
        return None
    device = q.get_device()
    if torch.compiler.is_compiling():  # a constant to torch.compile; a table that fills up would compile twice
        return torch.cuda.get_device_capability(device)
    if device not in _CAPABILITIES:
        _CAPABILITIES[device] = torch.cuda.get_device_capability(device)
    return _CAPABILITIES[device]


def _begin(state: Tensor | None, chosen: Backend, v: Tensor, K: int, cu_seqlens: Tensor | None) -> Tensor | None:
    """The state; if there is none, zeros for a backend that wants them."""
    if state is not None or chosen.starts_empty:
        return state
    B, _, HV, V = v.shape
    return v.new_zeros(B if cu_seqlens is None else len(cu_seqlens) - 1, HV, K, V, dtype=state_dtype(v.dtype))


def _check_decay(log_decay: Tensor) -> None:
    if not bool((log_decay <= 0).all()):
        largest = log_decay.max().item()
        raise ValueError(f"log_decay reaches {largest}; it is the log of a factor of at most 1, so it must be <= 0")


def _per_value_head(k: Tensor, HV: int) -> Tensor:
    return k if k.shape[2] == HV else k.repeat_interleave(HV // k.shape[2], dim=2)
