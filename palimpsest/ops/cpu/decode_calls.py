"""The compiled functions of decoding, by the names of ops/decode.py: a call each, so that a token costs few calls.

Each holds what it is given to its rows in ops/arguments.py before any address is used, and says None where the tensors are not
for it: then torch runs.
"""

import ctypes
import functools
from ctypes import c_double, c_int64, c_void_p

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from palimpsest.ops.arguments import fits
from palimpsest.ops.cpu import jit
from palimpsest.ops.cpu.register import MAX_K

MOST_ROWS = 4  # beyond, torch's products of matrices are faster


class LayerStep(ctypes.Structure):
    """`LayerStep` of delta_memory.c, field for field."""

    _fields_ = (
        *((name, c_int64) for name in ("B", "H", "K", "W", "threads", "kind", "silu", "bf16", "bf16_weights")),
        *((name, c_double) for name in ("eps", "floor", "beta_max")),
        *((name, c_void_p * 3) for name in ("x", "weight", "window")),
        *((name, c_void_p) for name in ("decay", "beta", "gate", "norm", "out", "A_log", "dt_bias", "state")),
    )


MAX_TAPS = 64


def memory_layer_step_(
    q, k, v, weights, windows, decay, A_log, dt_bias, beta, gate, norm, state, eps, beta_max, kind, floor, silu
) -> Tensor | None:
    """One token through a KDA layer in place, as ops/decode.py says; None if this is not for the kernel."""
    if jit.refusal():
        return None
    rows = (q, k, v, *weights, *windows, decay, A_log, dt_bias, beta, gate, norm, state)
    sizes = fits("cpu_memory_layer_step_", rows) if len(rows) == 16 and q.is_cpu else None
    if sizes is None or sizes["K"] > MAX_K or not 2 <= sizes["W"] <= MAX_TAPS or kind not in (1, 2):
        return None
    B, H, K, W = (sizes[letter] for letter in "BHKW")
    dtype, wide = q.dtype, weights[0].dtype
    out = torch.empty_like(q)
    three = c_void_p * 3
    call = LayerStep(
        B, H, K, W, torch.get_num_threads(), kind, silu, dtype is torch.bfloat16, wide is torch.bfloat16, eps, floor,
        beta_max, three(q.data_ptr(), k.data_ptr(), v.data_ptr()), three(*(x.data_ptr() for x in weights)),
        three(*(x.data_ptr() for x in windows)), decay.data_ptr(), beta.data_ptr(), gate.data_ptr(), norm.data_ptr(),
        out.data_ptr(), A_log.data_ptr(), dt_bias.data_ptr(), state.data_ptr(),
    )  # fmt: skip
    jit.library().memory_layer_step(ctypes.byref(call))
    if not state.is_inference():
        increment_version((state, *windows))  # autograd sees that tensors which it has kept were edited
    return out


def project(xs: list[Tensor], weights: list[Tensor], dtype: torch.dtype) -> list[Tensor] | None:
    if not xs or len(xs) != len(weights) or not xs[0].is_cpu or dtype is not torch.float32 or jit.refusal():
        return None
    sizes: dict[str, int] = {}
    for x, w in zip(xs, weights):
        found = fits("cpu_project", (x, w), **sizes)
        if found is None or found["N"] > MOST_ROWS:
            return None
        sizes = {letter: found[letter] for letter in "ND"}
    N, D = sizes.values()
    count = len(xs)
    ys = [x.new_empty(N, len(w)) for x, w in zip(xs, weights)]
    pointers = c_void_p * count
    _function("decode_project", "iiiipppp")(
        count, N, D, torch.get_num_threads(), (c_int64 * count)(*map(len, weights)),
        *(pointers(*(t.data_ptr() for t in tensors)) for tensors in (xs, weights, ys)),
    )  # fmt: skip
    return ys


def add_norm(x: Tensor, parts: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor] | None:
    sizes = fits("cpu_add_norm", (x, parts, weight)) if x.is_cpu and not jit.refusal() else None
    if sizes is None:
        return None
    N, J, D = (sizes[letter] for letter in "NJD")
    sums, y = torch.empty_like(x), torch.empty_like(x)
    _function("decode_add_norm", "iiidppppp")(
        N, J, D, eps, x.data_ptr(), parts.data_ptr(), weight.data_ptr(), sums.data_ptr(), y.data_ptr()
    )
    return sums, y


def route(
    logits: Tensor, bias: Tensor, k: int, scaling: float, renormalize: bool, biased: bool
) -> tuple[Tensor, Tensor] | None:
    sizes = fits("cpu_route", (logits, bias)) if logits.is_cpu and not jit.refusal() else None
    if sizes is None or not 1 <= k <= sizes["E"]:
        return None
    N, E = sizes["N"], sizes["E"]
    experts, weights, scratch = (
        logits.new_empty(N, k, dtype=torch.int64),
        logits.new_empty(N, k),
        logits.new_empty(2 * E),
    )
    _function("decode_route", "iiiiidppppp")(
        N, E, k, renormalize, biased, scaling, logits.data_ptr(), bias.data_ptr(), scratch.data_ptr(),
        experts.data_ptr(), weights.data_ptr(),
    )  # fmt: skip
    return experts, weights


def experts(
    x: Tensor, chosen: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor, shared: list[Tensor]
) -> Tensor | None:
    if len(shared) not in (0, 3) or any(w is None for w in shared) or not x.is_cpu or jit.refusal():
        return None
    sizes = fits("cpu_experts", (x, chosen, weights, gate, up, down, *(shared or (None,) * 3)))
    if sizes is None or not sizes["N"]:
        return None
    N, k, E, D, W = (sizes[letter] for letter in "NkEDW")
    S = sizes.get("S", 0)
    parts = x.new_empty(N, k + bool(shared), D)
    three = (c_void_p * 3)(*(w.data_ptr() for w in shared))
    if _function("decode_experts", "iiiiiiipppppppp")(
        N, k, E, D, W, S, torch.get_num_threads(), x.data_ptr(), chosen.data_ptr(), weights.data_ptr(), gate.data_ptr(),
        up.data_ptr(), down.data_ptr(), three, parts.data_ptr(),
    ):  # fmt: skip
        raise MemoryError(f"the CPU kernel found no memory for its scratch space, {8 * N * (k + 1) * max(W, S)} bytes")
    return parts


class TokenLayer(ctypes.Structure):
    """`TokenLayer` of delta_memory.c, field for field."""

    _fields_ = (
        *((name, c_int64) for name in ("latent", "sparse", "length_stride")),
        ("norm_in", c_void_p),
        ("norm_post", c_void_p),
        ("inward", c_void_p * 6),
        *((name, c_void_p) for name in ("f_b", "g_b", "out")),
        ("memory", LayerStep),
        ("rows", c_void_p),
        ("row_stride", c_int64),
        *((name, c_void_p) for name in ("length", "router", "bias", "gate", "up", "down")),
        ("shared", c_void_p * 3),
    )


class Token(ctypes.Structure):
    """`Token` of delta_memory.c, field for field."""

    _fields_ = (
        *(
            (name, c_int64)
            for name in ("B", "layers", "D", "heads", "N", "P", "V", "R", "E", "k", "I", "S", "dense", "low")
        ),
        *((name, c_int64) for name in ("renormalize", "biased", "threads")),
        *((name, c_double) for name in ("eps", "latent_eps", "scaling")),
        *((name, c_void_p) for name in ("ids", "embedding", "norm", "layer", "out")),
    )


class TokenPlan:
    """A whole model as addresses: `run` reads a token in one call. Holds the weights it was made of; see ops/decode.py.

    Args:
        embedding: [any, D]. norm: [D]. sizes: the fields of `Token` up to `scaling`, but for B, layers and threads.
        layers: for each its tensors by name, and `latent` and `sparse` as 0 or 1; a memory layer also H, K, W, kind, silu,
            eps, floor and beta_max.

    Raises:
        ValueError: a tensor is not what `sizes` says, in fp32, contiguous, on the CPU.
    """

    def __init__(self, embedding: Tensor, norm: Tensor, sizes: dict, layers: list[dict]):
        self.sizes, self.layers, self.kept = sizes, layers, (embedding, norm)
        self.vocabulary, D = embedding.shape
        heads, N, P, V, R = (sizes[name] for name in ("heads", "N", "P", "V", "R"))
        E, I, S, low = (sizes[name] for name in ("E", "I", "S", "low"))
        _require("embedding", embedding, (self.vocabulary, D))
        _require("norm", norm, (D,))
        three = c_void_p * 3
        self._layers = (TokenLayer * len(layers))()
        for at, (layer, to) in enumerate(zip(layers, self._layers)):

            def address(name: str, *shape: int, layer: dict = layer, at: int = at) -> int:
                _require(f"{name} of layer {at}", layer[name], shape)
                return layer[name].data_ptr()

            to.latent, to.sparse = layer["latent"], layer["sparse"]
            to.norm_in, to.norm_post = address("norm_in", D), address("norm_post", D)
            if layer["latent"]:
                inward = (
                    address("q", heads * (N + P), D), address("kv_a", R + P, D), address("kv_norm", R),
                    address("kv_b", heads * (N + V), R), 0, 0,
                )  # fmt: skip
                to.out = address("out", D, heads * V)
            else:
                H, K, W = (layer[name] for name in ("H", "K", "W"))
                if not (K <= MAX_K and 2 <= W <= MAX_TAPS):
                    raise ValueError(
                        f"layer {at} has {K} channels a head and {W} taps; expected {MAX_K} and {MAX_TAPS} at most"
                    )
                inward = (
                    *(address(name, H * K, D) for name in "qkv"), address("f_a", low, D), address("g_a", low, D),
                    address("b", H, D),
                )  # fmt: skip
                to.f_b, to.g_b, to.out = (
                    address("f_b", H * K, low),
                    address("g_b", H * K, low),
                    address("out", D, H * K),
                )
                memory = to.memory
                for name in ("H", "K", "W", "kind", "silu", "eps", "floor", "beta_max"):
                    setattr(memory, name, layer[name])
                memory.weight = three(*(address(f"{name}_conv", H * K, 1, W) for name in "qkv"))
                memory.norm, memory.dt_bias = address("o_norm", K), address("dt_bias", H * K)
                memory.A_log = address("A_log", 1, 1, H, 1)
            to.inward = (c_void_p * 6)(*inward)
            if layer["sparse"]:
                to.router, to.bias = address("router", E, D), address("bias", E)
                to.gate, to.up, to.down = address("gate", E, I, D), address("up", E, I, D), address("down", E, D, I)
                if S:
                    shared = address("shared_gate", S, D), address("shared_up", S, D), address("shared_down", D, S)
                    to.shared = three(*shared)
            else:
                dense = sizes["dense"]
                to.gate, to.up, to.down = address("gate", dense, D), address("up", dense, D), address("down", D, dense)

    def run(self, ids: Tensor, states: list[tuple]) -> Tensor | None:
        """The hidden states [B, D] after the final norm; None, and nothing done, if this is not for the kernel.

        Args:
            ids: [B], int64.
            states: for each layer (memory, windows) or (rows [B, any, R + P], length), which are edited in place: a length
                is a number, rows filled before, or [B] int64. A number stays what it is.
        """
        B = len(ids)
        if B > MOST_ROWS or not _is(ids, (B,), torch.int64):
            return None
        if not all(0 <= token < self.vocabulary for token in ids.tolist()):
            raise ValueError(f"ids is {ids.tolist()}; the model's tokens are 0 to {self.vocabulary - 1}")
        width, numbers, lengths = self.sizes["R"] + self.sizes["P"], [], []
        layers = type(self._layers).from_buffer_copy(self._layers)  # of this call alone: threads may share a model
        for layer, to, state in zip(self.layers, layers, states, strict=True):
            if layer["latent"]:
                rows, length = state
                number = isinstance(length, int)
                most = length if number else max(length.tolist())
                if rows.ndim != 3 or rows.shape[0] != B or rows.shape[2] != width or rows.dtype is not torch.float32:
                    return None
                if rows.stride()[1:] != (width, 1) or not rows.is_cpu or not 0 <= most < rows.shape[1]:
                    return None
                if number:
                    numbers.append(c_int64(length))
                    to.length, to.length_stride = ctypes.addressof(numbers[-1]), 0
                elif _is(length, (B,), torch.int64) and min(length.tolist()) >= 0:
                    lengths.append(length)
                    to.length, to.length_stride = length.data_ptr(), 1
                else:
                    return None
                to.rows, to.row_stride = rows.data_ptr(), rows.stride(0)
            else:
                memory, windows = state
                H, K, W = layer["H"], layer["K"], layer["W"]
                if not _is(memory, (B, H, K, K)) or not all(_is(window, (B, H * K, W - 1)) for window in windows):
                    return None
                if len(windows) != 3:
                    return None
                call = to.memory
                call.B, call.threads, call.state = B, torch.get_num_threads(), memory.data_ptr()
                call.window = (c_void_p * 3)(*(window.data_ptr() for window in windows))
        embedding, norm = self.kept
        out = embedding.new_empty(B, embedding.shape[1])
        call = Token(
            B=B, layers=len(self.layers), threads=torch.get_num_threads(), ids=ids.data_ptr(),
            embedding=embedding.data_ptr(), norm=norm.data_ptr(), layer=ctypes.addressof(layers), out=out.data_ptr(),
            **self.sizes,
        )  # fmt: skip
        if _function("decode_token", "p")(ctypes.addressof(call)):
            raise MemoryError("the CPU kernel found no memory for a token's scratch space")
        for length in lengths:
            length.add_(1)
        return out


def token_plan(embedding: Tensor, norm: Tensor, sizes: dict, layers: list[dict]) -> TokenPlan | None:
    """The plan, or None on a machine without a compiler."""
    return None if jit.refusal() else TokenPlan(embedding, norm, sizes, layers)


def _require(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if not _is(x, shape):
        raise ValueError(
            f"{name} is {x.dtype} of shape {tuple(x.shape)} on {x.device}; expected contiguous fp32 {shape}"
        )


ON_CPU = {f.__name__: f for f in (project, add_norm, memory_layer_step_, route, experts, token_plan)}


def _is(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> bool:
    """Whether the kernel may read x: also no view that torch would have to negate first."""
    return x.shape == shape and x.dtype is dtype and x.is_contiguous() and x.is_cpu and not x.is_neg()


@functools.cache
def _function(name: str, kinds: str):
    function = getattr(jit.library(), name)
    function.argtypes = [{"i": c_int64, "d": c_double, "p": c_void_p}[kind] for kind in kinds]
    function.restype = ctypes.c_int
    return function
