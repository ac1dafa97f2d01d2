"""A model's state as a file: safetensors, never pickle, with a digest over every byte.

Tensors   `ModelState.tensors()` by name; "extra.<name>" for what a caller adds.
Metadata  format, version, config (the official JSON), weights (fingerprint of the model), positions, digest.
Digest    SHA-256 of the whole file, its own digits read as zeros: a file cut short or changed is found before use.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from palimpsest.files import replacing
from palimpsest.layers.layer_state import KDAState, LatentState
from palimpsest.models.kimi_linear.config import KimiLinearConfig
from palimpsest.models.kimi_linear.model_state import ModelState

if TYPE_CHECKING:
    from palimpsest.models.kimi_linear.model import KimiLinearForCausalLM

FORMAT, VERSION = "palimpsest.model_state", "1"
NO_DIGEST = "0" * 64
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
    _check_same_config(path, json.loads(metadata["config"]), model.config)
    if metadata["weights"] != weights_fingerprint(model):
        raise ValueError(
            f"{str(path)!r} was saved with other weights of the same config; load the checkpoint it was made with"
        )
    named = safetensors.torch.load_file(path, device=str(next(model.parameters()).device))
    state = _from_tensors(named)
    check_state(state, model)
    return state, {name.removeprefix("extra."): x for name, x in named.items() if name.startswith("extra.")}


def check_state(state: ModelState, model: KimiLinearForCausalLM, batch_size: int | None = None) -> None:
    """Raise ValueError, in a sentence, unless state is one that model can continue from, for batch_size sequences."""
    weight = next(model.parameters())
    expected = ModelState.empty(model.config, 1, device="meta", dtype=weight.dtype)
    if problem := expected.differs(state):
        raise ValueError(f"the state is not one of this model's: {problem}; make it with this model")
    if batch_size is not None and state.batch_size != batch_size:
        raise ValueError(
            f"the state is of {state.batch_size} sequences and {batch_size} came; "
            "use state.select(rows), or state.fork(count) for several continuations of each"
        )
    if state.device != weight.device:
        raise ValueError(f"the state is on {state.device} and the model on {weight.device}; use state.to(device)")


def weights_fingerprint(model: KimiLinearForCausalLM) -> str:
    """A name for the weights, the same in bfloat16 and float32 and on any device; every training step changes it.

    A hash over what stays float32 in every precision (decay rates, router biases) and over the embedding's first channel
    as bfloat16.
    """
    contract = ("A_log", "dt_bias", "e_score_correction_bias")
    kept = {name: x.float() for name, x in model.state_dict().items() if name.endswith(contract)}
    kept["embedding"] = model.model.embed_tokens.weight[:, 0].detach().bfloat16()
    digest = hashlib.sha256()
    for name, x in sorted(kept.items()):
        digest.update(f"{name} {x.flatten().tolist()}\n".encode())
    return digest.hexdigest()


def _from_tensors(named: Mapping[str, Tensor]) -> ModelState:
    layers: list[KDAState | LatentState] = []
    while (start := f"layers.{len(layers)}.") + "latent" in named or start + "memory" in named:
        if start + "memory" in named:
            count = sum(name.startswith(start + "conv.") for name in named)
            layers.append(KDAState(named[start + "memory"], tuple(named[f"{start}conv.{j}"] for j in range(count))))
        else:
            valid = named[start + "valid"]
            layers.append(LatentState(named[start + "latent"], None if valid.all() else valid))
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
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{str(path)!r} is not a saved state: it has no safetensors header") from error
        metadata = parsed.get("__metadata__") or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{str(path)!r} is a safetensors file but not a saved state; ModelState.save makes one")
        if metadata.get("version") != VERSION:
            raise ValueError(
                f"{str(path)!r} is a saved state of version {metadata.get('version')!r}; this release reads {VERSION!r}"
            )
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


def _check_same_config(path: Path, saved: dict, config: KimiLinearConfig) -> None:
    ours = json.loads(json.dumps(config.to_dict()))
    different = [
        k for k in sorted(saved.keys() | ours.keys()) if saved.get(k) != ours.get(k) and k not in WITHOUT_EFFECT
    ]
    if different:
        name = different[0]
        raise ValueError(
            f"{str(path)!r} is the state of another model: {name} is {saved.get(name)} there and {ours.get(name)} here"
        )


def _safetensors():
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError("saved states need safetensors: pip install palimpsest-kda[hf]") from error
    return safetensors
