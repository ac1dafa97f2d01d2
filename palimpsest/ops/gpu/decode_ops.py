"""The kernels of decoding as torch custom ops, palimpsest_gpu::*. Shapes, types and devices are checked here, before any
address is used; values that address memory, such as experts and lengths, are clamped in the kernels."""

from functools import wraps

import torch
from torch import Tensor

_LIB = torch.library.Library("palimpsest_gpu", "FRAGMENT")
_LIB.define("project(Tensor[] xs, Tensor[] weights, ScalarType dtype) -> Tensor[]")
_LIB.define("add_norm(Tensor x, Tensor parts, Tensor weight, float eps) -> (Tensor, Tensor)")
_LIB.define(
    "memory_layer_step_(Tensor q, Tensor k, Tensor v, Tensor[] weights, Tensor(a!)[] windows, Tensor decay, Tensor A_log, "
    "Tensor dt_bias, Tensor beta, Tensor gate, Tensor norm, Tensor(b!) state, float eps, float beta_max, int kind, "
    "float floor, bool silu) -> Tensor"
)
_LIB.define("latent_step(Tensor q, Tensor rows, Tensor length, int value_dim) -> Tensor")
_LIB.define(
    "latent_layer_step_(Tensor q, Tensor latent, Tensor norm, Tensor weights, Tensor(a!) rows, Tensor(b!) length, "
    "float eps) -> Tensor"
)
_LIB.define(
    "route(Tensor logits, Tensor bias, int k, float scaling, bool renormalize, bool biased) -> (Tensor, Tensor)"
)
_LIB.define(
    "experts_step(Tensor x, Tensor experts, Tensor weights, Tensor gate, Tensor up, Tensor down, Tensor[] shared) -> Tensor"
)


def _on_the_device_of_its_tensors(run):
    """A launch goes to the current device, which need not be that of the tensors."""

    @wraps(run)
    def there(x, *rest):
        first = x if isinstance(x, Tensor) else x[0]
        if not first.is_cuda or first.get_device() == torch.cuda.current_device():
            return run(x, *rest)
        with torch.cuda.device(first.device):
            return run(x, *rest)

    return there


def _project(xs: list[Tensor], weights: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    from palimpsest.ops.gpu.triton import projections

    N, D = xs[0].shape
    if not 1 <= len(weights) <= projections.MOST or len(xs) != len(weights):
        raise ValueError(
            f"there are {len(xs)} xs and {len(weights)} weights; expected as many, {projections.MOST} at most"
        )
    for i, (x, w) in enumerate(zip(xs, weights)):
        _expect(f"xs[{i}]", x, (N, D), xs[0])
        _expect(f"weights[{i}]", w, (len(w), D), xs[0])
        if x.data_ptr() % 16 or w.data_ptr() % 16:
            raise ValueError(f"xs[{i}] or weights[{i}] does not begin at a multiple of 16 bytes; pass a clone")
    return projections.project(xs, weights, dtype)


def _add_norm(x: Tensor, parts: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from palimpsest.ops.gpu.triton import add_norm

    N, D = x.shape
    _expect("x", x, (N, D), x)
    _expect("parts", parts, (N, parts.shape[1], D), x, parts.dtype)
    _expect("weight", weight, (D,), x, weight.dtype)
    return add_norm.add_norm(x, parts, weight, eps)


def _memory_layer_step_(
    q, k, v, weights, windows, decay, A_log, dt_bias, beta, gate, norm, state, eps, beta_max, kind, floor, silu
) -> Tensor:
    from palimpsest.ops.gpu.triton import memory_layer_step

    B, H, K, _ = state.shape
    D = H * K
    if K > 256:
        raise ValueError(f"state has heads of {K} channels; the kernel holds at most 256")
    for name, x in (("q", q), ("k", k), ("v", v), ("decay_logits", decay), ("gate_logits", gate)):
        _expect(name, x, (B, D), q)
    W = weights[0].shape[-1]
    if len(weights) != 3 or len(windows) != 3 or W < 2:
        raise ValueError(
            f"there are {len(weights)} weights of {W} taps; expected three, for q, k and v, of 2 taps or more"
        )
    for i in range(3):
        _expect(f"weights[{i}]", weights[i], (D, 1, W), q)
        _expect(f"windows[{i}]", windows[i], (B, D, W - 1), q)
    A_log, dt_bias = A_log.reshape(-1), dt_bias.reshape(-1)
    _expect("A_log", A_log, (H,), q, torch.float32)
    _expect("dt_bias", dt_bias, (D,), q, torch.float32)
    _expect("beta_logits", beta, (B, H), q)
    _expect("norm", norm, (K,), q, norm.dtype)
    _expect("state", state, (B, H, K, K), q, torch.float32)
    return memory_layer_step.memory_layer_step_(
        q, k, v, weights, windows, decay, A_log, dt_bias, beta, gate, norm, state, eps, beta_max, kind, floor, silu
    )


def _latent_step(q: Tensor, rows: Tensor, length: Tensor, value_dim: int) -> Tensor:
    from palimpsest.ops.gpu.triton import latent_step

    B, T, H, C = q.shape
    _expect("q", q, (B, T, H, C), q)
    _expect("rows", rows, (B, rows.shape[1], C), q)
    _expect("length", length, (B,), q, torch.int64)
    if not 1 <= value_dim <= C:
        raise ValueError(f"value_dim is {value_dim}; it must be from 1 to the {C} channels of a row")
    return latent_step.latent_step(q, rows, length, value_dim)


def _latent_layer_step_(
    q: Tensor, latent: Tensor, norm: Tensor, weights: Tensor, rows: Tensor, length: Tensor, eps: float
) -> Tensor:
    from palimpsest.ops.gpu.triton import latent_step

    (B, S, C), (H, X, R) = rows.shape, weights.shape
    P = C - R
    N = q.shape[1] // H - P
    if P < 0 or not 1 <= N < X or not S:
        raise ValueError(
            f"q of shape {tuple(q.shape)}, weights {tuple(weights.shape)} and rows {tuple(rows.shape)} leave {P} position, "
            f"{N} key and {X - N} value channels a head and {S} rows of room; expected 0, 1, 1 and 1 at least"
        )
    _expect("q", q, (B, H * (N + P)), q)
    _expect("latent", latent, (B, C), q)
    _expect("norm", norm, (R,), q, norm.dtype)
    _expect("weights", weights, (H, X, R), q)
    _expect("rows", rows, (B, S, C), q)
    _expect("length", length, (B,), q, torch.int64)
    return latent_step.latent_layer_step_(q, latent, norm, weights, rows, length, eps)


def _route(logits: Tensor, bias: Tensor, k: int, scaling: float, renormalize: bool, biased: bool):
    from palimpsest.ops.gpu.triton import experts_step

    N, E = logits.shape
    _expect("logits", logits, (N, E), logits, torch.float32)
    _expect("bias", bias, (E,), logits, torch.float32)
    if not 1 <= k <= E:
        raise ValueError(f"k is {k}; it must be from 1 to the {E} experts")
    return experts_step.route(logits, bias, k, scaling, renormalize, biased)


def _experts_step(x, experts, weights, gate, up, down, shared) -> Tensor:
    from palimpsest.ops.gpu.triton import experts_step

    (N, D), k, (E, W, _) = x.shape, experts.shape[1], gate.shape
    _expect("x", x, (N, D), x)
    _expect("experts", experts, (N, k), x, torch.int64)
    _expect("weights", weights, (N, k), x, torch.float32)
    for name, matrix, shape in (("gate", gate, (E, W, D)), ("up", up, (E, W, D)), ("down", down, (E, D, W))):
        _expect(name, matrix, shape, x)
    if shared:
        S = len(shared[0])
        for name, matrix, shape in zip(("gate", "up", "down"), shared, ((S, D), (S, D), (D, S)), strict=True):
            _expect(f"the shared {name}", matrix, shape, x)
    return experts_step.experts_step(x, experts, weights, gate, up, down, shared)


def _expect(name: str, x: Tensor, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> None:
    dtype = dtype or like.dtype
    if tuple(x.shape) != shape or x.dtype != dtype or x.device != like.device or not x.is_contiguous():
        kind = "" if x.is_contiguous() else ", not contiguous"
        raise ValueError(
            f"{name} is {x.dtype} of shape {tuple(x.shape)} on {x.device}{kind}; expected {dtype} {shape} on {like.device}, "
            "contiguous"
        )


for _name, _run in (
    ("project", _project),
    ("add_norm", _add_norm),
    ("memory_layer_step_", _memory_layer_step_),
    ("latent_step", _latent_step),
    ("latent_layer_step_", _latent_layer_step_),
    ("route", _route),
    ("experts_step", _experts_step),
):
    for _key in ("CUDA", "CPU"):  # on a CPU the kernels run under Triton's interpreter: for tests
        _LIB.impl(_name, _on_the_device_of_its_tensors(_run), _key)
