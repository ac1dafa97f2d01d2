"""The kernels of decoding as torch custom ops, palimpsest_gpu::*. Shapes, types and devices are checked here, before any
address is used; values that address memory, such as experts and lengths, are clamped in the kernels."""

from functools import wraps

import torch
from torch import Tensor

from palimpsest.ops.arguments import GPU_READS, chosen_experts, fit, latent_channels, latent_values

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
        first = x if isinstance(x, Tensor) else next(iter(x), None)
        if first is None or not first.is_cuda or first.get_device() == torch.cuda.current_device():
            return run(x, *rest)
        with torch.cuda.device(first.device):
            return run(x, *rest)

    return there


def _project(xs: list[Tensor], weights: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    from palimpsest.ops.gpu.triton import projections

    if not 1 <= len(weights) <= projections.MOST or len(xs) != len(weights):
        raise ValueError(
            f"there are {len(xs)} xs and {len(weights)} weights; expected as many, {projections.MOST} at most"
        )
    if dtype not in GPU_READS:
        raise ValueError(f"dtype is {dtype}; expected bfloat16, float16 or float32")
    sizes: dict[str, int] = {}
    for i, (x, w) in enumerate(zip(xs, weights)):
        if x.dtype != xs[0].dtype:
            raise ValueError(f"xs[{i}] is {x.dtype} and xs[0] {xs[0].dtype}; expected one dtype")
        found = fit("gpu_project", (x, w), **sizes)
        sizes = {letter: found[letter] for letter in "ND"}
        if x.data_ptr() % 16 or w.data_ptr() % 16:
            raise ValueError(f"xs[{i}] or weights[{i}] does not begin at a multiple of 16 bytes; pass a clone")
    return projections.project(xs, weights, dtype)


def _add_norm(x: Tensor, parts: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from palimpsest.ops.gpu.triton import add_norm

    fit("gpu_add_norm", (x, parts, weight))
    return add_norm.add_norm(x, parts, weight, eps)


def _memory_layer_step_(
    q, k, v, weights, windows, decay, A_log, dt_bias, beta, gate, norm, state, eps, beta_max, kind, floor, silu
) -> Tensor:
    from palimpsest.ops.gpu.triton import memory_layer_step

    if len(weights) != 3 or len(windows) != 3:
        raise ValueError(f"there are {len(weights)} weights and {len(windows)} windows; expected three, for q, k and v")
    rows = (q, k, v, *weights, *windows, decay, A_log, dt_bias, beta, gate, norm, state)
    sizes = fit("gpu_memory_layer_step_", rows)
    if sizes["K"] > 256 or sizes["W"] < 2 or kind not in (1, 2):
        raise ValueError(
            f"state has heads of {sizes['K']} channels, weights {sizes['W']} taps, kind is {kind}; "
            "the kernel holds at most 256 channels, 2 taps or more, and 1 or 2"
        )
    return memory_layer_step.memory_layer_step_(
        q, k, v, weights, windows, decay, A_log.reshape(-1), dt_bias.reshape(-1), beta, gate, norm, state, eps, beta_max,
        kind, floor, silu,
    )  # fmt: skip


def _latent_step(q: Tensor, rows: Tensor, length: Tensor, value_dim: int) -> Tensor:
    from palimpsest.ops.gpu.triton import latent_step

    sizes = fit("gpu_latent_step", (q, rows, length))
    latent_values(value_dim, sizes["C"])
    return latent_step.latent_step(q, rows, length, value_dim)


def _latent_layer_step_(
    q: Tensor, latent: Tensor, norm: Tensor, weights: Tensor, rows: Tensor, length: Tensor, eps: float
) -> Tensor:
    from palimpsest.ops.gpu.triton import latent_step

    latent_channels(fit("gpu_latent_layer_step_", (q, latent, norm, weights, rows, length)))
    return latent_step.latent_layer_step_(q, latent, norm, weights, rows, length, eps)


def _route(logits: Tensor, bias: Tensor, k: int, scaling: float, renormalize: bool, biased: bool):
    from palimpsest.ops.gpu.triton import experts_step

    chosen_experts(k, fit("gpu_route", (logits, bias))["E"])
    return experts_step.route(logits, bias, k, scaling, renormalize, biased)


def _experts_step(x, experts, weights, gate, up, down, shared) -> Tensor:
    from palimpsest.ops.gpu.triton import experts_step

    if len(shared) not in (0, 3):
        raise ValueError(f"shared holds {len(shared)} matrices; expected gate, up and down, or none")
    sizes = fit("gpu_experts", (x, experts, weights, gate, up, down, *(shared or (None,) * 3)))
    if not sizes["N"]:
        return x.new_empty(0, sizes["k"] + bool(shared), sizes["D"], dtype=torch.float32)
    return experts_step.experts_step(x, experts, weights, gate, up, down, shared)


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
