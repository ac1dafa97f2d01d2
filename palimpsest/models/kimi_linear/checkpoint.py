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
from typing import Any, Protocol

import torch
from torch import Tensor

from palimpsest.checks import shown
from palimpsest.files import flush, flush_list, give_usual_mode, read_bytes, read_object
from palimpsest.layers.precision import Float32Tensors
from palimpsest.models.kimi_linear.checkpoint_place import checkpoint_of
from palimpsest.models.kimi_linear.config import KimiLinearConfig
from palimpsest.models.kimi_linear.official_names import PROJECTIONS, official_tensors, place_of

STACKED = tuple(f".experts.{projection}" for projection in PROJECTIONS)
CONFIG, WHOLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
LARGEST_CONFIG = 1 << 24  # bytes; the released one has 2,000
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WRONG_SHAPES = "has tensors of other shapes than its config"
FLOATS = {"F64", "F32", "F16", "BF16"}  # safetensors' names of what weights may be stored as
DIGEST, SAVE = "palimpsest.sha256", "palimpsest.save"
SHARD = re.compile(r"[\w.+-]{1,200}\.safetensors")
OURS = re.compile(  # every name that a save gives to a file of weights, or to any file while it is being written
    r"model(-[0-9a-f]{16})?(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|\.(model|config).*\.[0-9a-f]{16}"
)


class SavedModel(Protocol):
    """What is saved and filled here: a module with a config."""

    config: KimiLinearConfig

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = ..., assign: bool = ...) -> Any: ...

    def named_modules(self) -> Any: ...


def save(
    model: SavedModel,
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
    if model.config.tie_word_embeddings:  # written all the same: some readers, transformers among them, do not tie
        tensors[HEAD] = tensors[EMBEDDING].clone()
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


def load_into_(model: SavedModel, folder: str | os.PathLike, *, verify: bool = True) -> None:
    """Replace the weights of a model by those of a folder; dtypes and device stay the model's.

    Raises:
        ValueError: as load; also if the folder's config is another. The model is then unchanged.
    """
    folder = checkpoint_of(folder)
    check_config(model, folder)
    files = check_names(model, Path(folder))
    tensors = [pair for file, keys in files.items() for pair in _read(file, keys, verify).items()]  # all, before any
    if model.config.tie_word_embeddings:
        _check_tied(Path(folder), dict(tensors))
    ours = model.state_dict()
    for official, tensor in tensors:
        name, expert = place_of(official)
        (ours[name] if expert is None else ours[name][expert]).copy_(tensor)


def check_config(model: SavedModel, folder: str | os.PathLike) -> None:
    """Raise ValueError unless a folder's config is the model's."""
    theirs, ours = read_config(folder).to_dict(), model.config.to_dict()
    for name in {**ours, **theirs}:
        if theirs.get(name) != ours.get(name):
            raise ValueError(
                f"the checkpoint in {str(folder)!r} is of another config: {name} is {shown(theirs.get(name))} there and "
                f"{shown(ours.get(name))} in this model"
            )


def read_config(folder: str | os.PathLike) -> KimiLinearConfig:
    """The config of a folder.

    Raises:
        ValueError: there is none, it is not JSON, or it is not this model's.
    """
    path = Path(folder) / CONFIG
    try:
        official = json.loads(read_bytes(path, limit=LARGEST_CONFIG))
    except OSError as error:
        raise ValueError(
            f"cannot read {str(path)!r} ({error.strerror}); a model's folder has {CONFIG} and {WHOLE}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is not JSON ({error}); fetch or save the model again") from error
    try:
        return KimiLinearConfig.from_dict(official)
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error}") from error


def check_files(config: KimiLinearConfig, folder: str | os.PathLike) -> None:
    """Raise ValueError unless the files of a folder may hold a model of config: before anything of its size is made.

    What is counted costs no more than the files' own headers, whatever numbers the config says.
    """
    shapes = {name: shape for tensors in _headers(Path(folder)).values() for name, (shape, _) in tensors.items()}
    layers = config.num_hidden_layers
    sparse = sum(map(config.is_sparse, range(layers))) if config.num_experts else 0
    least = 2 + 2 * layers + 3 * sparse * config.num_experts  # embedding, norm; norms; experts
    if len(shapes) < least:
        raise ValueError(
            f"the checkpoint in {str(folder)!r} lacks tensors: its files hold {len(shapes)} and its config, with {layers} "
            f"layers and {config.num_experts} experts in {sparse} of them, asks for at least {least}"
        )
    embedding = (config.vocab_size, config.hidden_size)
    if shapes.get(EMBEDDING, embedding) != embedding:
        _refuse(Path(folder), WRONG_SHAPES, [f"{EMBEDDING} {shapes[EMBEDDING]} instead of {embedding}"])


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes, in the order of the names."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        held = tensor.contiguous()
        total.update((ctypes.c_char * held.nbytes).from_address(held.data_ptr()))
    return total.hexdigest()


def fill_(
    model: SavedModel,
    folder: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    verify: bool = True,
) -> None:
    """Give a model on the meta device the tensors of a folder, file by file. Args and errors as `from_pretrained`."""
    folder = Path(folder)
    kept = {
        f"{prefix}.{name}" for prefix, module in model.named_modules() if isinstance(module, Float32Tensors)
        for name in module.float32_names
    }  # fmt: skip
    stacks = {name: len(tensor) for name, tensor in model.state_dict().items() if name.endswith(STACKED)}
    filled: dict[str, Tensor] = {}
    tied: dict[str, Tensor] = {}
    for file, keys in check_names(model, folder).items():
        whole = {}
        for official, tensor in _read(file, keys, verify).items():
            wanted = tensor.dtype if dtype is None else dtype
            if model.config.tie_word_embeddings and official in (EMBEDDING, HEAD):
                tied[official] = tensor
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
    _check_tied(folder, tied)
    modules = dict(model.named_modules())
    if model.config.tie_word_embeddings:
        modules["lm_head"].weight = modules["model.embed_tokens"].weight
    for module in modules.values():  # buffers that no checkpoint holds: counts of tokens
        for name in module._non_persistent_buffers_set:
            setattr(module, name, torch.zeros_like(getattr(module, name), device=device))


def _headers(folder: Path) -> dict[Path, dict[str, tuple[tuple[int, ...], str]]]:
    """File -> {name in the file: (shape, dtype)}, after making sure that the files are of one save."""
    files, saves = {}, set()
    for file in _files(folder):
        with _open(file) as opened:
            saves.add((opened.metadata() or {}).get(SAVE))
            names = opened.keys()
            slices = {name: opened.get_slice(name) for name in names}
            files[file] = {name: (tuple(x.get_shape()), x.get_dtype()) for name, x in slices.items()}
    if len(saves) > 1:
        raise ValueError(
            f"{str(folder)!r} holds files of different saves, one of them incomplete; save the model again"
        )
    return files


def check_names(model: SavedModel, folder: Path) -> dict[Path, dict[str, str]]:
    """File -> {our name: name in the file}, after making sure that together they hold exactly the model's tensors."""
    expected = {name: tuple(tensor.shape) for name, tensor in official_tensors(model.state_dict())}
    files, shapes, types = {}, {}, {}
    for file, tensors in _headers(folder).items():
        files[file] = {_our_name(name, expected): name for name in tensors}
        if len(files[file]) < len(tensors):
            _refuse(folder, "holds tensors under two names", tensors.keys() - files[file].values())
        _refuse(folder, "holds these tensors twice", shapes.keys() & files[file].keys())
        shapes |= {ours: tensors[name][0] for ours, name in files[file].items()}
        types |= {ours: tensors[name][1] for ours, name in files[file].items()}
    if model.config.tie_word_embeddings:  # the head may be absent, or there for readers that do not tie
        shapes.setdefault(HEAD, expected[HEAD])
    _refuse(folder, "lacks these tensors", expected.keys() - shapes.keys())
    _refuse(folder, "has these tensors, unknown to its config", shapes.keys() - expected.keys())
    wrong = {f"{name} {shapes[name]} instead of {shape}" for name, shape in expected.items() if shapes[name] != shape}
    _refuse(folder, WRONG_SHAPES, wrong)
    wrong = {f"{name} {kind}" for name, kind in types.items() if kind not in FLOATS}
    _refuse(folder, "has tensors that are not of floating point", wrong)
    return files


def check_digest(file: Path) -> None:
    """Raise ValueError if a file's tensors are not those that its own digest is of."""
    with _open(file) as opened:
        names = list(opened.keys())
    _read(file, {name: name for name in names}, True)


def check_tied(folder: str | os.PathLike) -> None:
    """Raise ValueError if the files of a model of one matrix for both hold a head that is not the embedding."""
    found: dict[str, Tensor] = {}
    for file in _files(Path(folder)):
        with _open(file) as opened:
            found |= {name: opened.get_tensor(name) for name in (EMBEDDING, HEAD) if name in opened.keys()}  # noqa: SIM118
    _check_tied(Path(folder), found)


def _check_tied(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """One matrix for both means that a head, where there is one, is the embedding: it is not read."""
    if HEAD in tensors and not tensors[HEAD].equal(tensors[EMBEDDING]):
        raise ValueError(
            f"the checkpoint in {str(folder)!r} has tie_word_embeddings and a {HEAD} other than its {EMBEDDING}; if both "
            "were trained, say tie_word_embeddings: false in its config.json"
        )


def _our_name(name: str, expected: Mapping[str, Any]) -> str:
    """transformers 5 writes the dense MLP under the name of the sparse one; every other reader calls it mlp."""
    dense = name.replace(".block_sparse_moe.", ".mlp.")
    return dense if name not in expected and dense in expected else name


def _files(folder: Path) -> list[Path]:
    """The weight files: what the index names, or the one file."""
    index = folder / INDEX
    if index.is_file():
        weight_map = read_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(
                f"{str(index)!r} is not an index of weights: weight_map is {shown(weight_map)}; "
                "fetch or save the model again"
            )
        for name in weight_map.values():
            if not isinstance(name, str) or not SHARD.fullmatch(name):
                raise ValueError(
                    f"{str(index)!r} names {shown(name)}; weights must lie beside their index, as name.safetensors"
                )
        names = sorted(set(weight_map.values()))
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
