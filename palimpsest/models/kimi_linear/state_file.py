"""A model's state as a file: safetensors, never pickle, with a digest over every byte.

Tensors   `ModelState.tensors()` by name; "extra.<name>" for what a caller adds.
Metadata  format, version, config (the official JSON), weights (fingerprint of the model), positions, digest.
Digest    SHA-256 of the whole file, its own digits read as zeros: a file cut short or changed is found before use.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from palimpsest.checks import shown
from palimpsest.files import replacing
from palimpsest.layers.precision import Float32Tensors
from palimpsest.models.kimi_linear.config import KimiLinearConfig
from palimpsest.models.kimi_linear.model import KimiLinearForCausalLM
from palimpsest.models.kimi_linear.model_state import ModelState

FORMAT, VERSION = "palimpsest.model_state", "2"
NO_DIGEST = "0" * 64
SAMPLE = 4096  # numbers of each tensor that the fingerprint reads, about
# What a state does not depend on: two configs that differ only here continue alike. head_dim follows from others.
WITHOUT_EFFECT = {"initializer_range", "model_max_length", "bos_token_id", "eos_token_id", "pad_token_id", "head_dim"}


def save_state(
    path: str | Path, state: ModelState, model: KimiLinearForCausalLM, *, extra: Mapping[str, Tensor] | None = None
) -> None:
    """Write state to path. The file is whole or not there: a failure leaves what was at path before.

    Args:
        path: the file to write; its folder must exist.
        state: the state to save.
        model: the model it belongs to; its config and a fingerprint of its weights go into the file.
        extra: more tensors to keep beside it, by name.

    Raises:
        ValueError: the folder does not exist, or the state is not one of model's.
        OSError: the file cannot be written, for example because the disk is full.
    """
    safetensors = _safetensors()
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"the folder of {str(path)!r} does not exist; make it first")
    check_state(state, model)
    named = state.tensors() | {f"extra.{name}": tensor for name, tensor in (extra or {}).items()}
    named = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "config": json.dumps(model.config.to_dict(), sort_keys=True),
        "weights": weights_fingerprint(model),
        "positions": json.dumps(state.position.tolist()),
        "digest": NO_DIGEST,
    }
    with replacing(path) as partial:
        try:
            safetensors.torch.save_file(_unshared(named), partial, metadata)
        except safetensors.SafetensorError as error:
            raise OSError(f"cannot write {str(path)!r}: {error}; nothing was changed there") from error
        _write_digest(partial)


def load_state(path: str | Path, model: KimiLinearForCausalLM) -> ModelState:
    """The state saved at path, on the device of model.

    Raises:
        ValueError: no such file, not a saved state, cut short or changed, or the state of another model.
    """
    return read_state(path, model)[0]


def read_state(path: str | Path, model: KimiLinearForCausalLM) -> tuple[ModelState, dict[str, Tensor]]:
    """The state saved at path and the extra tensors saved with it; raises as `load_state`."""
    safetensors = _safetensors()
    path = Path(path)
    metadata = _checked_metadata(path)
    _check_same_config(path, metadata["config"], model.config)
    if metadata["weights"] != weights_fingerprint(model):
        raise ValueError(
            f"{str(path)!r} was saved with other weights of the same config; load the checkpoint it was made with"
        )
    try:
        named = safetensors.torch.load_file(path, device=str(next(model.parameters()).device))
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{str(path)!r} is damaged or not safetensors ({error})") from error
    try:
        state = _from_tensors(named, model)
        check_state(state, model)
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error}") from error
    return state, {name.removeprefix("extra."): x for name, x in named.items() if name.startswith("extra.")}


def check_state(state: ModelState, model: KimiLinearForCausalLM, batch_size: int | None = None) -> None:
    """Raise ValueError, in a sentence, unless state is one that model can continue from, for batch_size sequences."""
    weight = next(model.parameters())
    expected = ModelState.empty(model.config, 1, device="meta", dtype=weight.dtype)
    if problem := expected.differs(state):
        raise ValueError(f"the state is not one of this model's: {problem}; make it with this model")
    position = state.position
    if position.dtype != torch.int64 or position.ndim != 1 or not len(position):
        raise ValueError(
            f"the state is not one of this model's: its position is {position.dtype} of shape {tuple(position.shape)}; "
            "expected torch.int64 [sequences]"
        )
    for name, x in state.tensors().items():
        if x.shape[:1] != position.shape:
            raise ValueError(
                f"the state is not one of this model's: {name} has shape {tuple(x.shape)} and there are {len(position)} "
                "sequences; expected a row for each"
            )
    if batch_size is not None and state.batch_size != batch_size:
        raise ValueError(
            f"the state is of {state.batch_size} sequences and {batch_size} came; "
            "use state.select(rows), or state.fork(count) for several continuations of each"
        )
    if state.device != weight.device:
        raise ValueError(f"the state is on {state.device} and the model on {weight.device}; use state.to(device)")


@torch.no_grad()
def weights_fingerprint(model: KimiLinearForCausalLM) -> str:
    """A name for the weights, the same in bfloat16 and float32 and on any device.

    A hash over numbers of every tensor, some 4096 of each spread over all its columns: what trains, merges, prunes or
    replaces a tensor changes it. Tensors that every precision keeps in float32 count in full width, others as bfloat16.
    """
    wide = {
        f"{prefix}.{name}" for prefix, module in model.named_modules() if isinstance(module, Float32Tensors)
        for name in module.float32_names
    }  # fmt: skip
    names, samples = [], []
    for name, tensor in sorted(model.state_dict().items()):
        sample = _sample(tensor.detach()).float()
        samples.append(sample if name in wide else sample.bfloat16().float())
        names.append(f"{name} {tuple(tensor.shape)} {len(sample)}\n")
    digest = hashlib.sha256("".join(names).encode())
    digest.update(torch.cat(samples).cpu().numpy().tobytes())  # one transfer, whatever the number of tensors
    return digest.hexdigest()


def _sample(x: Tensor) -> Tensor:
    """Some SAMPLE numbers of x: every so many, by a step that shares no factor with the length of a row.

    Such a step comes to another column each time until it has been to all of them.
    """
    flat, columns = x.reshape(-1), x.shape[-1] if x.ndim else 1
    step = max(1, flat.numel() // max(SAMPLE, columns))
    while math.gcd(step, columns) != 1:
        step -= 1
    return flat[::step]


_OF_LAYER = re.compile(r"layers\.(\d{1,6})\.(.+)")


def _from_tensors(named: Mapping[str, Tensor], model: KimiLinearForCausalLM) -> ModelState:
    """The state whose tensors are named so, each layer's by the class that its mixer has.

    Raises:
        ValueError: tensors are missing, unknown, or not what this layer's are.
    """
    expected = ModelState.empty(model.config, 1, device="meta", dtype=next(model.parameters()).dtype).layers
    of_layer: list[dict[str, Tensor]] = [{} for _ in expected]
    for name, tensor in named.items():
        if name == "position" or name.startswith("extra."):
            continue
        place = _OF_LAYER.fullmatch(name)
        if place is None or int(place[1]) >= len(expected):
            raise ValueError(f"it holds {shown(name)}, which is no tensor of a state of {len(expected)} layers")
        of_layer[int(place[1])][place[2]] = tensor
    if "position" not in named:
        raise ValueError("it lacks the tensor 'position'")
    for i, (layer, tensors) in enumerate(zip(expected, of_layer)):
        for name, like in layer.tensors().items():
            came = tensors.get(name, like)
            if came.ndim != like.ndim or came.dtype.is_floating_point != like.dtype.is_floating_point:
                raise ValueError(
                    f"layers.{i}.{name} is {came.dtype} of shape {tuple(came.shape)}; expected {like.dtype} in "
                    f"{like.ndim} dimensions"
                )
    layers = (type(layer).from_tensors(tensors) for layer, tensors in zip(expected, of_layer))
    return ModelState(tuple(layers), named["position"])


def _unshared(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """safetensors refuses tensors that share storage, such as views of one buffer."""
    seen: set[int] = set()
    result = {}
    for name, x in named.items():
        pointer = x.untyped_storage().data_ptr()
        whole = x.untyped_storage().nbytes() == x.nbytes
        result[name] = x if whole and pointer not in seen else x.clone()
        seen.add(pointer)
    return result


def _write_digest(file: Path) -> None:
    with open(file, "r+b") as f:
        header, _ = _read_header(f)
        offset = 8 + header.index(f'"digest":"{NO_DIGEST}"'.encode()) + len('"digest":"')
        digest = _digest(f, NO_DIGEST)
        f.seek(offset)
        f.write(digest.encode())


def _checked_metadata(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise ValueError(f"the state file {str(path)!r} does not exist")
    with open(path, "rb") as f:
        try:
            _, parsed = _read_header(f)
        except (ValueError, OverflowError, RecursionError) as error:
            raise ValueError(f"{str(path)!r} is not a saved state: it has no safetensors header") from error
        metadata = parsed.get("__metadata__")
        if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
            raise ValueError(f"{str(path)!r} is a safetensors file but not a saved state; save_state makes one")
        if metadata.get("version") != VERSION:
            raise ValueError(
                f"{str(path)!r} is a saved state of version {shown(metadata.get('version'))}; this release reads "
                f"{VERSION!r}: read the text again and save its state"
            )
        missing = [name for name in ("config", "weights", "digest") if not isinstance(metadata.get(name), str)]
        if missing:
            raise ValueError(f"{str(path)!r} is not a saved state: its metadata has no {missing[0]}")
        if _digest(f, metadata.get("digest", "")) != metadata.get("digest"):
            raise ValueError(f"{str(path)!r} was cut short or changed after it was saved (its digest differs)")
    return metadata


def _read_header(f) -> tuple[bytes, dict]:
    f.seek(0)
    size = int.from_bytes(f.read(8), "little")
    if not 0 < size < 100_000_000:  # the limit of the format itself
        raise ValueError("no header")
    header = f.read(size)
    parsed = json.loads(header)
    if len(header) != size or not isinstance(parsed, dict):
        raise ValueError("no header")
    return header, parsed


def _digest(f, written: str) -> str:
    header, _ = _read_header(f)
    digest = hashlib.sha256(header.replace(written.encode(), NO_DIGEST.encode(), 1) if written else header)
    while block := f.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _check_same_config(path: Path, text: str, config: KimiLinearConfig) -> None:
    try:
        saved = json.loads(text)
    except (ValueError, RecursionError):
        saved = None
    if not isinstance(saved, dict):
        raise ValueError(f"{str(path)!r} is not a saved state: its config is {shown(text)}")
    ours = json.loads(json.dumps(config.to_dict()))
    for name in sorted(saved.keys() | ours.keys()):
        if saved.get(name) != ours.get(name) and name not in WITHOUT_EFFECT:
            raise ValueError(
                f"{str(path)!r} is the state of another model: {name} is {shown(saved.get(name))} there and "
                f"{shown(ours.get(name))} here"
            )


def _safetensors():
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError("saved states need safetensors: pip install palimpsest-kda[hf]") from error
    return safetensors
