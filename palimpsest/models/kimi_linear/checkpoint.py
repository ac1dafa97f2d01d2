"""Models on disk, in the official layout: config.json beside safetensors, in one file or in shards with an index.

Names and shapes are the official ones because the modules are named so, experts aside: see official_names.py.
What is written here also carries, in each file's metadata, a SHA-256 of its tensors and the number of the save that it
belongs to, so that a damaged file or a mixture of two saves is found before it is used. Official files have neither.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from palimpsest.files import flush, flush_list, give_usual_mode
from palimpsest.layers.precision import Float32Tensors
from palimpsest.models.kimi_linear.config import KimiLinearConfig
from palimpsest.models.kimi_linear.official_names import PROJECTIONS, official_tensors, place_of

if TYPE_CHECKING:
    from palimpsest.models.kimi_linear.model import KimiLinearForCausalLM

STACKED = tuple(f".experts.{projection}" for projection in PROJECTIONS)
CONFIG, WHOLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
DIGEST, SAVE = "palimpsest.sha256", "palimpsest.save"
OURS = re.compile(  # every name that a save gives to a file of weights, or to any file while it is being written
    r"model(-[0-9a-f]{16})?(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|\.(model|config).*\.[0-9a-f]{16}"
)


def save(
    model: KimiLinearForCausalLM,
    folder: str | os.PathLike,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a model. A kill or a full disk at any moment leaves the model that was in the folder, or the new one.

    Args:
        model: gives the config, and the tensors unless state_dict does.
        folder: made if missing. Other files in it are left alone.
        state_dict: tensors gathered elsewhere, from a model whose weights are spread over processes.
        max_shard_bytes: files beyond this are split.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    safetensors = _safetensors()
    folder = Path(folder)
    tensors = {name: tensor.detach() for name, tensor in official_tensors(state_dict or model.state_dict())}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    shards = _shards(tensors, max_shard_bytes)
    number = secrets.token_hex(8)
    names = _names(folder, len(shards), number)
    dtype = str(tensors["model.embed_tokens.weight"].dtype).removeprefix("torch.")

    staged: dict[str, Path] = {}  # final name -> the whole file under another name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, shard in zip(names, shards):
            staged[name] = folder / f".{name}.{number}"
            shard = {key: tensor.cpu().contiguous() for key, tensor in shard.items()}
            metadata = {"format": "pt", DIGEST: digest(shard), SAVE: number}
            safetensors.torch.save_file(shard, staged[name], metadata=metadata)
            give_usual_mode(staged[name])
            flush(staged[name])
        if len(shards) > 1:
            weight_map = {key: name for name, shard in zip(names, shards) for key in shard}
            size = sum(tensor.nbytes for tensor in tensors.values())
            _stage(folder, INDEX, number, staged, {"metadata": {"total_size": size}, "weight_map": weight_map})
        _stage(folder, CONFIG, number, staged, model.config.to_dict() | {"dtype": dtype})
        for name, path in staged.items():
            os.replace(path, folder / name)
        flush_list(folder)  # the new names, before the old files go
        # What earlier saves left, the index first: as long as there is one, it says which files count.
        for path in sorted(folder.iterdir(), key=lambda path: path.name != INDEX):
            if path.name not in staged and OURS.fullmatch(path.name):
                path.unlink()
        flush_list(folder)
    except (OSError, safetensors.SafetensorError) as error:
        for path in staged.values():
            path.unlink(missing_ok=True)
        raise OSError(
            f"saving the model to {str(folder)!r} failed ({error}); free space or choose another folder"
        ) from error


def load(
    folder: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    verify: bool = True,
) -> KimiLinearForCausalLM:
    """Read a model; it is in evaluation mode.

    Args:
        folder: holds config.json and the weights.
        dtype: of the weights; as stored if None. Decay rates and biases and router biases stay float32.
        device: where to.
        verify: check each file against its own digest, where it has one.

    Raises:
        ValueError: something is missing, damaged, of another model, or does not fit the config.
    """
    from palimpsest.models.kimi_linear.model import KimiLinearForCausalLM

    config = read_config(folder)
    with torch.device("meta"):
        model = KimiLinearForCausalLM(config)
    _fill(model, Path(folder), dtype, torch.device(device), verify)
    return model.eval()


def load_into_(model: KimiLinearForCausalLM, folder: str | os.PathLike, *, verify: bool = True) -> None:
    """Replace the weights of a model by those of a folder; dtypes and device stay the model's.

    Raises:
        ValueError: as load; also if the folder's config is another. The model is then unchanged.
    """
    theirs, ours = read_config(folder).to_dict(), model.config.to_dict()
    for name in {**ours, **theirs}:
        if theirs.get(name) != ours.get(name):
            raise ValueError(
                f"the checkpoint in {str(folder)!r} is of another config: {name} is {theirs.get(name)!r} there and "
                f"{ours.get(name)!r} in this model"
            )
    files = _check_names(model, Path(folder))
    tensors = [pair for file, keys in files.items() for pair in _read(file, keys, verify).items()]  # all, before any
    ours = model.state_dict()
    for official, tensor in tensors:
        name, expert = place_of(official)
        (ours[name] if expert is None else ours[name][expert]).copy_(tensor)


def read_config(folder: str | os.PathLike) -> KimiLinearConfig:
    """The config of a folder.

    Raises:
        ValueError: there is none, it is not JSON, or it is not this model's.
    """
    path = Path(folder) / CONFIG
    try:
        official = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"cannot read {str(path)!r} ({error.strerror}); a model's folder has {CONFIG} and {WHOLE}"
        ) from error
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not JSON ({error}); fetch or save the model again") from error
    try:
        return KimiLinearConfig.from_dict(official)
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error}") from error


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes, in the order of the names."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        held = tensor.contiguous()
        total.update((ctypes.c_char * held.nbytes).from_address(held.data_ptr()))
    return total.hexdigest()


def _fill(
    model: KimiLinearForCausalLM, folder: Path, dtype: torch.dtype | None, device: torch.device, verify: bool
) -> None:
    """Replace the meta tensors of a model by those of the folder, file by file."""
    kept = {
        f"{prefix}.{name}" for prefix, module in model.named_modules() if isinstance(module, Float32Tensors)
        for name in module.float32_names
    }  # fmt: skip
    stacks = {name: len(tensor) for name, tensor in model.state_dict().items() if name.endswith(STACKED)}
    filled: dict[str, Tensor] = {}
    for file, keys in _check_names(model, folder).items():
        whole = {}
        for official, tensor in _read(file, keys, verify).items():
            wanted = tensor.dtype if dtype is None else dtype
            if official in kept and wanted != torch.float64:
                wanted = torch.float32
            name, expert = place_of(official)
            if expert is None:  # a copy: the file's own pages are not ours to edit
                whole[name] = tensor.to(device=device, dtype=wanted, copy=True)
                continue
            if name not in filled:
                filled[name] = torch.empty(stacks[name], *tensor.shape, device=device, dtype=wanted)
            filled[name][expert].copy_(tensor)
        model.load_state_dict(whole, strict=False, assign=True)
    model.load_state_dict(filled, strict=False, assign=True)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    for module in model.modules():  # buffers that no checkpoint holds: counts of tokens
        for name in module._non_persistent_buffers_set:
            setattr(module, name, torch.zeros_like(getattr(module, name), device=device))


def _check_names(model: KimiLinearForCausalLM, folder: Path) -> dict[Path, dict[str, str]]:
    """File -> {our name: name in the file}, after making sure that together they hold exactly the model's tensors."""
    expected = {name: tuple(tensor.shape) for name, tensor in official_tensors(model.state_dict())}
    if model.config.tie_word_embeddings:
        expected.pop("lm_head.weight")
    files, found, saves = {}, {}, set()
    for file in _files(folder):
        with _open(file) as opened:
            saves.add((opened.metadata() or {}).get(SAVE))
            names = opened.keys()
            files[file] = {_our_name(name, expected): name for name in names}
            shapes = {ours: tuple(opened.get_slice(name).get_shape()) for ours, name in files[file].items()}
        _refuse(folder, "holds these tensors twice", found.keys() & shapes.keys())
        found |= shapes
    if len(saves) > 1:
        raise ValueError(
            f"{str(folder)!r} holds files of different saves, one of them incomplete; save the model again"
        )
    _refuse(folder, "lacks these tensors", expected.keys() - found.keys())
    _refuse(folder, "has these tensors, unknown to its config", found.keys() - expected.keys())
    wrong = {f"{name} {found[name]} instead of {shape}" for name, shape in expected.items() if found[name] != shape}
    _refuse(folder, "has tensors of other shapes than its config", wrong)
    return files


def _our_name(name: str, expected: Mapping[str, Any]) -> str:
    """transformers 5 writes the dense MLP under the name of the sparse one; every other reader calls it mlp."""
    dense = name.replace(".block_sparse_moe.", ".mlp.")
    return dense if name not in expected and dense in expected else name


def _files(folder: Path) -> list[Path]:
    """The weight files: what the index names, or the one file."""
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{str(index)!r} is not an index of weights ({error!r}); fetch or save the model again"
            ) from error
        outside = [name for name in names if not isinstance(name, str) or Path(name).name != name]
        if outside:
            raise ValueError(f"{str(index)!r} names {outside[0]!r}; weights must lie beside their index")
    else:
        names = [WHOLE]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{str(folder)!r} lacks {', '.join(missing[:3])}; fetch or save the model again")
    return [folder / name for name in names]


def _read(file: Path, keys: Mapping[str, str], verify: bool) -> dict[str, Tensor]:
    with _open(file) as opened:
        theirs = {name: opened.get_tensor(name) for name in keys.values()}
        expected = (opened.metadata() or {}).get(DIGEST)
    if verify and expected is not None and digest(theirs) != expected:
        raise ValueError(
            f"{str(file)!r} is damaged: its tensors do not match its digest; fetch or save the model again"
        )
    return {ours: theirs[name] for ours, name in keys.items()}


def _open(file: Path):
    safetensors = _safetensors()
    try:
        return safetensors.safe_open(file, framework="pt")
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(
            f"{str(file)!r} is damaged or not safetensors ({error}); fetch or save the model again"
        ) from error


def _names(folder: Path, count: int, number: str) -> list[str]:
    """Names for the shards; never those of shards already there, which stay whole until the new index replaces theirs."""
    if count == 1:
        return [WHOLE]
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    if any((folder / name).exists() for name in names):
        names = [name.replace("model-", f"model-{number}-") for name in names]
    return names


def _shards(tensors: Mapping[str, Tensor], max_bytes: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def _stage(folder: Path, name: str, number: str, staged: dict[str, Path], content: Any) -> None:
    staged[name] = folder / f".{name}.{number}"
    staged[name].write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    flush(staged[name])


def _refuse(folder: Path, what: str, names: Iterable[str]) -> None:
    listed = sorted(names)
    if listed:
        more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
        raise ValueError(f"the checkpoint in {str(folder)!r} {what}: {', '.join(listed[:3])}{more}")


def _safetensors():
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "reading and writing checkpoints needs safetensors: pip install palimpsest-kda[hf]"
        ) from error
    return safetensors
