"""Checkpoints that are whole or absent, finite, and safe to read: written beside their place, then renamed.

    step-00000200/config.json, model.safetensors    a model folder that `from_pretrained` reads; large ones in several files
                  tokenizer.json, ...               what other readers need: the tokenizer, how tokens are chosen
                  optimizer.safetensors             momenta by "key/parameter"; large ones in several files, too
                  random.json                       the states of the random numbers, a list over the processes
                  training.json                     progress, scaler, SHA-256 of the files above and of itself

Nothing here is unpickled, so that a folder from anybody may be resumed: it can hold wrong numbers and no code. A kill at
any moment leaves either the new name or only the old ones; what was half written has a name that starts with a dot, and
the next run removes it. Files are the same however many processes wrote them, each its own rows, and each reads its own
rows of them: no memory holds the whole model. What is not finite is not
saved, so that no rotation takes the last good checkpoint away.
"""

from __future__ import annotations

import base64
import binascii
import errno
import hashlib
import json
import random
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from palimpsest.checks import check, is_a
from palimpsest.files import read_object, write_json
from palimpsest.models.kimi_linear import KimiLinearForCausalLM
from palimpsest.models.kimi_linear.checkpoint import (
    CONFIG,
    DIGEST,
    EMBEDDING,
    FLOATS,
    HEAD,
    INDEX,
    SAVE,
    check_config,
    check_digest,
    check_names,
    check_tied,
    digest,
)  # fmt: skip
from palimpsest.models.kimi_linear.generation_config import GENERATION_CONFIG, generation_config
from palimpsest.models.kimi_linear.official_names import place_of
from palimpsest.parallel.pieces import (
    Piece,
    Stretch,
    create,
    official_stretches,
    pieces,
    read_rows,
    replace_in_header,
    split,
    write_rows,
)  # fmt: skip
from palimpsest.parallel.spread import Spread
from palimpsest.text import Tokenizer, tokenizer_files
from palimpsest.train.processes import agree, settle
from palimpsest.train.progress import Progress
from palimpsest.train.run_folder import STATE, RunFolder, checkpoints_of, latest, number_of

FORMAT, VERSION = "palimpsest.training", 1
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LARGEST_FILE = 5 * 10**9  # bytes
MOMENTA = re.compile(r"optimizer(-\d{5}-of-\d{5})?\.safetensors")
OLD = "custom_checkpoint_0.pkl"  # of releases that pickled


class CheckpointError(ValueError):
    """A checkpoint could not be written or read; the sentence says which, why, and what is still whole."""


class NonFiniteError(ValueError):
    """A run's numbers became infinite or NaN; the last checkpoint is whole and finite."""


def save(
    accelerator: Accelerator,
    model: KimiLinearForCausalLM,
    spread: Spread,
    optimizer: torch.optim.Optimizer,
    tokenizer: Tokenizer,
    progress: Progress,
    run: RunFolder,
) -> Path:
    """Writes the checkpoint of this step and drops the oldest beyond the recipe's number. All processes call this.

    Raises:
        NonFiniteError: weights or momenta hold NaN or infinity; nothing is written or removed.
        CheckpointError: it could not be written; earlier checkpoints are whole.
    """
    final, half = run.place(progress.step), run.half(progress.step)
    if final in checkpoints_of(run.path):  # the run resumed here and did no step
        return final
    refuse_nonfinite(accelerator, model, optimizer, progress.step, latest(run.path))
    failure: Exception | None = None
    for stage in _stages(accelerator, model, spread, optimizer, tokenizer, progress, half):
        try:
            stage()
        except Exception as error:  # torch, safetensors and the system each have their own for a full disk
            failure = error
        if agree(accelerator, float(failure is not None))[0]:  # one that failed is waited for by none
            if accelerator.is_main_process:
                room = shutil.disk_usage(run.path).free
                shutil.rmtree(half, ignore_errors=True)
                if failure is not None:
                    raise CheckpointError(_sentence(failure, final, latest(run.path), room)) from failure
            reason = "" if failure is None else f": {failure}"
            raise CheckpointError(
                f"checkpoint {str(final)!r} could not be written by all processes{reason}"
            ) from failure
    if accelerator.is_main_process:
        try:
            run.keep(half, progress.step)
        except OSError as error:
            raise CheckpointError(
                _sentence(error, final, latest(run.path), shutil.disk_usage(run.path).free)
            ) from error
    accelerator.wait_for_everyone()
    return final


def read_weights_(accelerator: Accelerator, model: KimiLinearForCausalLM, spread: Spread, folder: Path) -> None:
    """Puts the weights of a checkpoint into a model, each process its own rows. All processes call this.

    Raises:
        CheckpointError: a file is missing, damaged, or of another model.
    """
    try:
        _read_weights_(accelerator, model, spread, folder)
        problem = None
    except (ValueError, OSError) as error:
        problem = CheckpointError(_unreadable(folder, error))
        problem.__cause__ = error
    settle(accelerator, problem)


def restore(
    accelerator: Accelerator,
    model: KimiLinearForCausalLM,
    spread: Spread,
    optimizer: torch.optim.Optimizer,
    folder: Path,
) -> Progress:
    """Puts optimiser, scaler and random numbers back as they were, and returns the progress. All processes call this.

    Raises:
        CheckpointError: a file is missing, damaged, or of another run.
    """
    problem, progress = None, Progress()
    try:
        state = _read_state(accelerator, folder)
        progress = Progress.from_dict(state["progress"])
        check(progress.step == number_of(folder), f"it is of step {progress.step}")
        _restore_optimizer(model, spread, optimizer, [folder / n for n in state["files"] if MOMENTA.fullmatch(n)])
        if accelerator.scaler is not None and state["scaler"] is not None:
            accelerator.scaler.load_state_dict(_like(accelerator.scaler.state_dict(), state["scaler"]))
        states = read_object(folder / "random.json")["processes"]
        if accelerator.process_index < len(states):  # else there are more processes now, which start from the seed
            _restore_random(states[accelerator.process_index], accelerator.device)
        found = _nonfinite(model, optimizer)
        check(found is None, f"{found}: it is not worth resuming")
    except Exception as error:  # each library has its own for a damaged file
        problem = CheckpointError(_unreadable(folder, error))
        problem.__cause__ = error
    settle(accelerator, problem)
    return progress


def refuse_nonfinite(
    accelerator: Accelerator, model: KimiLinearForCausalLM, optimizer: torch.optim.Optimizer, step: int,
    last: Path | None,
) -> None:  # fmt: skip
    """Raises NonFiniteError, in all processes, if a weight or a momentum is infinite or NaN in one of them."""
    problem = _nonfinite(model, optimizer)
    if agree(accelerator, float(problem is not None))[0]:
        whole = f"{last.name!r} is whole and finite" if last else "there is no checkpoint before it"
        raise NonFiniteError(
            f"{problem or 'another process has numbers that are not finite'} after step {step}, so nothing was saved "
            f"({whole}); start anew with a smaller optim.lr or a longer schedule.warmup"
        )


def _nonfinite(model: KimiLinearForCausalLM, optimizer: torch.optim.Optimizer) -> str | None:
    """The first weight or momentum that is not finite, as a phrase; one question to the device."""
    named = [(f"weight {name}", tensor) for name, tensor in model.state_dict().items()]
    named += [(f"the optimiser's {name}", tensor) for name, tensor in _optimizer_state(model, optimizer)]
    named = [(name, x.to_local() if isinstance(x, DTensor) else x) for name, x in named]
    named = [(name, x) for name, x in named if x.is_floating_point() and x.numel()]
    device = next(model.parameters()).device
    flags = torch.stack([x.isfinite().all().to(device) for _, x in named]).tolist()
    return next((f"{name} holds NaN or infinity" for (name, _), fine in zip(named, flags) if not fine), None)


def _optimizer_state(model: KimiLinearForCausalLM, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """("key/parameter", tensor) of what the optimiser holds, in the same order in every process."""
    for name, parameter in model.named_parameters():
        for key, value in sorted(optimizer.state.get(parameter, {}).items()):
            assert isinstance(value, Tensor), f"{key} of {name} is {type(value).__name__}"
            yield f"{key}/{name}", value


def _stages(
    accelerator: Accelerator,
    model: KimiLinearForCausalLM,
    spread: Spread,
    optimizer: torch.optim.Optimizer,
    tokenizer: Tokenizer,
    progress: Progress,
    folder: Path,
) -> Iterator[Callable[[], None]]:
    """What writes a checkpoint, in stages that all processes begin together: each rests on the one before in all of them."""
    main = accelerator.is_main_process
    held = pieces(model, spread)
    number = gather_object([secrets.token_hex(8)])[0]
    unknown = hashlib.sha256(number.encode()).hexdigest()  # stands for the digest until all is written
    weights = {DIGEST: unknown, SAVE: number, "format": "pt"}
    files = _files_of(list(_weights(model, held)), "model", weights)
    files += _files_of(list(_momenta(model, held, optimizer)), "optimizer", {"format": "pt"})
    states = gather_object([_random_state(accelerator.device)])

    def begin() -> None:
        if main:
            if folder.exists():
                shutil.rmtree(folder)
            folder.mkdir(parents=True)
            for name, stretches, metadata in files:
                create(folder / name, stretches, metadata)

    def write() -> None:
        for name, stretches, metadata in files:
            write_rows(folder / name, stretches, metadata)

    digests: dict[str, str] = {}

    def judge() -> None:
        for i, (name, _, metadata) in enumerate(files):
            if i % accelerator.num_processes == accelerator.process_index:
                if DIGEST in metadata:
                    replace_in_header(folder / name, unknown, digest(safetensors.torch.load_file(folder / name)))
                else:
                    digests[name] = _sha256(folder / name)

    def end() -> None:
        every = {name: value for theirs in gather_object([digests]) for name, value in theirs.items()}
        if not main:
            return
        models = [(name, stretches) for name, stretches, _ in files if name.startswith("model")]
        if len(models) > 1:
            weight_map = {s.name: name for name, stretches in models for s in stretches}
            size = sum(s.nbytes for _, stretches in models for s in stretches)
            write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
        dtype = str(held["model.embed_tokens.weight"].held.dtype).removeprefix("torch.")
        write_json(folder / CONFIG, model.config.to_dict() | {"dtype": dtype})
        write_json(folder / "random.json", {"processes": states}, indent=None)
        for name, content in tokenizer_files(tokenizer).items():
            (folder / name).write_bytes(content)
        write_json(folder / GENERATION_CONFIG, generation_config(model.config))
        state = {"format": FORMAT, "version": VERSION, "progress": asdict(progress)}
        state |= {"scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict()}
        others = [p for p in sorted(folder.iterdir()) if not p.name.startswith("model") and p.name not in every]
        state |= {"files": every | {p.name: _sha256(p) for p in others}}  # weights carry their own digests
        write_json(folder / STATE, state | {"digest": _digest(state)})

    yield from (begin, write, judge, end)


def _weights(model: KimiLinearForCausalLM, held: Mapping[str, Piece]) -> Iterator[Stretch]:
    """This process's rows of the weights, under the official names."""
    embedding = None
    for stretch in official_stretches(held):
        if stretch.name == EMBEDDING:
            embedding = stretch
        if stretch.name == HEAD and model.config.tie_word_embeddings:  # written all the same: some readers do not tie
            assert embedding is not None
            stretch = replace(embedding, name=HEAD)
        yield stretch


def _momenta(
    model: KimiLinearForCausalLM, held: Mapping[str, Piece], optimizer: torch.optim.Optimizer
) -> Iterator[Stretch]:
    """This process's rows of what the optimiser holds."""
    keys = {name: sorted(optimizer.state.get(p, {})) for name, p in model.named_parameters()}
    parameters = dict(model.named_parameters())
    for i, (name, key) in enumerate([(name, key) for name, found in keys.items() for key in found]):
        piece = held[name].of(optimizer.state[parameters[name]][key])
        if not piece.held.ndim:  # a count of steps, the same in all
            piece = Piece(piece.held, (), 0, (0, 1))
        mine = i % piece.copy[1] == piece.copy[0]
        yield Stretch(f"{key}/{name}", piece.held.dtype, piece.shape, piece.first, piece.held if mine else None)


def _files_of(
    stretches: list[Stretch], stem: str, metadata: dict[str, str]
) -> list[tuple[str, list[Stretch], dict[str, str]]]:
    """(name, content, metadata) of each file."""
    parts = split(stretches, LARGEST_FILE)
    if len(parts) == 1:
        return [(f"{stem}.safetensors", parts[0], metadata)]
    return [(f"{stem}-{i + 1:05}-of-{len(parts):05}.safetensors", part, metadata) for i, part in enumerate(parts)]


def _read_weights_(accelerator: Accelerator, model: KimiLinearForCausalLM, spread: Spread, folder: Path) -> None:
    held = pieces(model, spread)
    with torch.device("meta"):
        whole = KimiLinearForCausalLM(model.config)
    check_config(model, folder)
    files = check_names(whole, folder)
    for i, file in enumerate(files):
        if i % accelerator.num_processes == accelerator.process_index:  # each file is judged by one process
            check_digest(file)
    if model.config.tie_word_embeddings and accelerator.is_main_process:
        check_tied(folder)
    for file, keys in files.items():
        with safe_open(file, framework="pt") as opened:
            for official, theirs in keys.items():
                if official == HEAD and model.config.tie_word_embeddings:
                    continue
                name, expert = place_of(official)
                piece = held[name]
                if expert is None:
                    piece.held.copy_(read_rows(opened, theirs, piece.first, len(piece.held) if piece.shape else 1))
                elif piece.first <= expert < piece.first + len(piece.held):
                    piece.held[expert - piece.first].copy_(opened.get_tensor(theirs))


def _read_state(accelerator: Accelerator, folder: Path) -> dict[str, Any]:
    """training.json, after every file that it lists was compared with its digest; each file by one process."""
    if not (folder / STATE).exists() and (folder / OLD).exists():
        raise ValueError(
            "an earlier release wrote its training state by pickle, which can run code and is not read any more; its "
            "weights can still be used"
        )
    state = read_object(folder / STATE)
    check(
        state.get("format") == FORMAT and state.get("version") == VERSION,
        f"{STATE} is of format {state.get('format')!r}, version {state.get('version')!r}; this release reads "
        f"{FORMAT!r}, version {VERSION}",
    )
    found = state.pop("digest", None)
    check(found == _digest(state), f"{STATE} was changed after it was written: its digest differs")
    for i, (name, known) in enumerate(state["files"].items()):
        check(Path(name).name == name and (folder / name).is_file(), f"{name} is missing")
        if i % accelerator.num_processes == accelerator.process_index:
            check(_sha256(folder / name) == known, f"{name} was cut short or changed: its digest differs")
    momenta = any(MOMENTA.fullmatch(name) for name in state["files"])
    check("random.json" in state["files"] and momenta, "files are missing from its list")
    return state


def _restore_optimizer(
    model: KimiLinearForCausalLM, spread: Spread, optimizer: torch.optim.Optimizer, files: Sequence[Path]
) -> None:
    parameters, held = dict(model.named_parameters()), pieces(model, spread)
    places = {p: i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    state: dict[int, dict[str, Tensor]] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # no dict
                key, _, owner = name.partition("/")
                check(
                    owner in parameters and parameters[owner] in places, f"it holds momenta of {owner!r}, no parameter"
                )
                parameter, piece, stored = parameters[owner], held[owner], opened.get_slice(name)
                shape = tuple(stored.get_shape())
                check(stored.get_dtype() in FLOATS, f"{name} is {stored.get_dtype()}, no floating point")
                check(shape in (piece.shape, ()), f"{name} is {shape}, not {piece.shape}")
                value = read_rows(opened, name, piece.first, len(piece.held)) if shape else opened.get_tensor(name)
                value = value.clone()  # the file's own pages are not ours to edit
                if isinstance(parameter, DTensor) and shape:
                    value = DTensor.from_local(
                        value.to(parameter.device), parameter.device_mesh, parameter.placements, run_check=False,
                        shape=parameter.shape, stride=parameter.stride(),
                    )  # fmt: skip
                state.setdefault(places[parameter], {})[key] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def _random_state(device: torch.device) -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's random numbers, as JSON would hold them."""
    kind, keys, place, has_gauss, gauss = np.random.get_state(legacy=True)
    version, numbers, gauss_next = random.getstate()
    return {
        "python": [version, list(numbers), gauss_next],
        "numpy": [kind, np.asarray(keys).tolist(), place, has_gauss, gauss],
        "torch": _text(torch.get_rng_state()),
        "cuda": _text(torch.cuda.get_rng_state(device)) if device.type == "cuda" else None,
    }


def _restore_random(state: Mapping[str, Any], device: torch.device) -> None:
    version, numbers, gauss_next = state["python"]
    random.setstate((version, tuple(numbers), gauss_next))
    kind, keys, place, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), place, has_gauss, gauss))
    torch.set_rng_state(_tensor(state["torch"]))
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(_tensor(state["cuda"]), device)


def _text(state: Tensor) -> str:
    return base64.b64encode(bytes(state.tolist())).decode()


def _tensor(text: str) -> Tensor:
    try:
        return torch.tensor(list(base64.b64decode(text, validate=True)), dtype=torch.uint8)
    except (binascii.Error, TypeError) as error:
        raise ValueError(f"the state of the random numbers is damaged ({error})") from error


def _like(own: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    check(own.keys() == saved.keys(), "the scaler of fp16 has other fields")
    check(all(is_a(value, float) for value in saved.values()), "the scaler of fp16 holds no numbers")
    return dict(saved)


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _digest(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _unreadable(folder: Path, error: Exception) -> str:
    first = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
    before = [path.name for path in checkpoints_of(folder.parents[1]) if number_of(path) < number_of(folder)]
    way = f"move it away to resume from {before[-1]}" if before else "it is the only one"
    return f"checkpoint {str(folder)!r} cannot be resumed ({first}); {way}, or start anew in another folder"


def _sentence(failure: BaseException | None, final: Path, before: Path | None, room: int) -> str:
    whole = f"{before.name} is whole" if before else "there is none before it"
    codes = {getattr(failure, "errno", None), getattr(failure.__cause__, "errno", None)} if failure else set()
    if codes & set(NO_ROOM) or room < 1 << 20 or "No space left" in str(failure):
        return f"no room to write checkpoint {str(final)!r}: {room >> 20} MiB are free; make room and resume ({whole})"
    return f"checkpoint {str(final)!r} could not be written: {failure}; {whole}"
