"""Checkpoints that are whole or absent, finite, and safe to read: written beside their place, then renamed.

    step-00000200/config.json, model.safetensors    a model folder that `from_pretrained` reads
                  tokenizer.json, ...               what other readers need: the tokenizer, how tokens are chosen
                  optimizer.safetensors             momenta by "key/parameter", whole, however many processes there were
                  random.json                       the states of the random numbers, a list over the processes
                  training.json                     progress, scaler, SHA-256 of the files above and of itself

Nothing here is unpickled, so that a folder from anybody may be resumed: it can hold wrong numbers and no code. A kill at
any moment leaves either the new name or only the old ones; what was half written has a name that starts with a dot, and
the next run removes it. What is not finite is not saved, so that no rotation takes the last good checkpoint away.
"""

from __future__ import annotations

import base64
import binascii
import errno
import hashlib
import json
import random
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import gather_object
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from palimpsest.checks import check, is_a
from palimpsest.files import read_object, write_json
from palimpsest.models.kimi_linear import KimiLinearForCausalLM
from palimpsest.models.kimi_linear.checkpoint import load_into_
from palimpsest.models.kimi_linear.generation_config import GENERATION_CONFIG, generation_config
from palimpsest.text import Tokenizer, tokenizer_files
from palimpsest.train.parallel import agree
from palimpsest.train.progress import Progress
from palimpsest.train.run_folder import STATE, RunFolder, checkpoints_of, latest, number_of

FORMAT, VERSION = "palimpsest.training", 1
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
OLD = "custom_checkpoint_0.pkl"  # of releases that pickled


class CheckpointError(ValueError):
    """A checkpoint could not be written or read; the sentence says which, why, and what is still whole."""


class NonFiniteError(ValueError):
    """A run's numbers became infinite or NaN; the last checkpoint is whole and finite."""


def save(
    accelerator: Accelerator,
    model: KimiLinearForCausalLM,
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
    try:
        _write(accelerator, model, optimizer, tokenizer, progress, half)
    except Exception as error:  # torch, safetensors and the system each have their own for a full disk
        failure = error
    if agree(accelerator, float(failure is not None))[0]:
        if accelerator.is_main_process:
            room = shutil.disk_usage(run.path).free
            shutil.rmtree(half, ignore_errors=True)
            raise CheckpointError(_sentence(failure, final, latest(run.path), room)) from failure
        raise CheckpointError(f"checkpoint {str(final)!r} could not be written by another process") from failure
    if accelerator.is_main_process:
        try:
            run.keep(half, progress.step)
        except OSError as error:
            raise CheckpointError(
                _sentence(error, final, latest(run.path), shutil.disk_usage(run.path).free)
            ) from error
    accelerator.wait_for_everyone()
    return final


def read_weights_(model: KimiLinearForCausalLM, folder: Path) -> None:
    """Puts the weights of a checkpoint into a model that is not sharded yet.

    Raises:
        CheckpointError: a file is missing, damaged, or of another model.
    """
    try:
        load_into_(model, folder)
    except (ValueError, OSError) as error:
        raise CheckpointError(_unreadable(folder, error)) from error


def restore(
    accelerator: Accelerator, model: KimiLinearForCausalLM, optimizer: torch.optim.Optimizer, folder: Path
) -> Progress:
    """Puts optimiser, scaler and random numbers back as they were, and returns the progress. All processes call this.

    Raises:
        CheckpointError: a file is missing, damaged, or of another run.
    """
    try:
        state = _read_state(folder)
        progress = Progress.from_dict(state["progress"])
        check(progress.step == number_of(folder), f"it is of step {progress.step}")
        _restore_optimizer(model, optimizer, folder / "optimizer.safetensors")
        if accelerator.scaler is not None and state["scaler"] is not None:
            accelerator.scaler.load_state_dict(_like(accelerator.scaler.state_dict(), state["scaler"]))
        states = read_object(folder / "random.json")["processes"]
        if accelerator.process_index < len(states):  # else there are more processes now, which start from the seed
            _restore_random(states[accelerator.process_index], accelerator.device)
        problem = _nonfinite(model, optimizer)
        check(problem is None, f"{problem}: it is not worth resuming")
    except Exception as error:  # each library has its own for a damaged file
        raise CheckpointError(_unreadable(folder, error)) from error
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


def _write(
    accelerator: Accelerator,
    model: KimiLinearForCausalLM,
    optimizer: torch.optim.Optimizer,
    tokenizer: Tokenizer,
    progress: Progress,
    folder: Path,
) -> None:
    main = accelerator.is_main_process
    whole = model
    if (
        accelerator.distributed_type == DistributedType.FSDP
    ):  # brought together: a checkpoint is of no number of processes
        tensors = accelerator.get_state_dict(model)
        with torch.device("meta"):
            whole = KimiLinearForCausalLM(model.config)
        if main:
            whole.load_state_dict(tensors, assign=True)
    momenta: dict[str, Tensor] = {}
    for name, value in _optimizer_state(model, optimizer):  # one at a time: all of it may be too much for a device
        value = value.full_tensor() if isinstance(value, DTensor) else value
        if main:
            momenta[name] = _alone(value.detach().cpu())
    states = gather_object([_random_state(accelerator.device)])
    if not main:
        return
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    whole.save_pretrained(folder)
    safetensors.torch.save_file(momenta, folder / "optimizer.safetensors", {"format": "pt"})
    write_json(folder / "random.json", {"processes": states}, indent=None)
    for name, content in tokenizer_files(tokenizer).items():
        (folder / name).write_bytes(content)
    write_json(folder / GENERATION_CONFIG, generation_config(whole.config))
    state = {"format": FORMAT, "version": VERSION, "progress": asdict(progress)}
    state |= {"scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict()}
    files = [p for p in sorted(folder.iterdir()) if not p.name.startswith("model")]  # weights carry their own digests
    state |= {"files": {p.name: _sha256(p) for p in files}}
    write_json(folder / STATE, state | {"digest": _digest(state)})


def _read_state(folder: Path) -> dict[str, Any]:
    """training.json, after every file that it lists was compared with its digest."""
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
    digest = state.pop("digest", None)
    check(digest == _digest(state), f"{STATE} was changed after it was written: its digest differs")
    for name, digest in state["files"].items():
        check(Path(name).name == name and (folder / name).is_file(), f"{name} is missing")
        check(_sha256(folder / name) == digest, f"{name} was cut short or changed: its digest differs")
    check({"optimizer.safetensors", "random.json"} <= state["files"].keys(), "files are missing from its list")
    return state


def _restore_optimizer(model: KimiLinearForCausalLM, optimizer: torch.optim.Optimizer, file: Path) -> None:
    parameters = dict(model.named_parameters())
    places = {p: i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    state: dict[int, dict[str, Tensor]] = {}
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118  # no dict
            key, _, owner = name.partition("/")
            check(owner in parameters and parameters[owner] in places, f"it holds momenta of {owner!r}, no parameter")
            parameter, value = parameters[owner], opened.get_tensor(name)
            check(value.is_floating_point(), f"{name} is {value.dtype}")
            check(value.shape in (parameter.shape, ()), f"{name} is {tuple(value.shape)}, not {tuple(parameter.shape)}")
            if isinstance(parameter, DTensor) and value.ndim:  # each process takes its own part of the file
                value = distribute_tensor(
                    value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
                )
            state.setdefault(places[parameter], {})[key] = value.clone()  # the file's own pages are not ours to edit
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


def _alone(tensor: Tensor) -> Tensor:
    """Contiguous, in storage that it shares with no other: safetensors refuses anything else."""
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)


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
