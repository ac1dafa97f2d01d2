"""Checkpoints that are whole or absent: written beside their place, forced to the disk, then renamed.

    RUN/run.json                    the recipe and the digest of its data
    RUN/metrics.jsonl               a line a logged step and evaluation
    RUN/checkpoints/step-00000200   a model folder that `from_pretrained` reads, and beside the weights what
                                    `accelerate` needs to go on: optimiser, random numbers, progress

A kill at any moment leaves either the new name or only the old ones; what was half written has a name that starts with a
dot, and the next run removes it.
"""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType

from palimpsest.files import put, write_json, write_text
from palimpsest.models.kimi_linear import KimiLinearForCausalLM
from palimpsest.models.kimi_linear.checkpoint import load_into_
from palimpsest.models.kimi_linear.generation_config import GENERATION_CONFIG, generation_config
from palimpsest.text import Tokenizer, tokenizer_files
from palimpsest.train.parallel import agree
from palimpsest.train.recipe import Recipe, as_dict, difference

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CheckpointError(ValueError):
    """A checkpoint could not be written or read; the sentence says which, why, and what is still whole."""


class RunFolder:
    """The folder of one training run.

    Args:
        path: the folder; made if missing.
        recipe, digest: what a run in this folder must be.
        resume: go on with a run that is there. False refuses a folder that holds one.

    Raises:
        ValueError: the folder holds something else, a run already, or a run of another recipe or other data.
    """

    def __init__(self, path: str | Path, recipe: Recipe, digest: str, *, resume: bool):
        self.path, self.recipe, self.digest = Path(path), recipe, digest
        self.metrics, self.checkpoints = self.path / "metrics.jsonl", self.path / "checkpoints"
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{str(path)!r} is a file; a run needs a folder")
        entries = [entry for entry in self.path.iterdir() if entry.name != ".DS_Store"] if self.path.is_dir() else []
        if entries and not is_run(self.path):
            raise ValueError(f"folder {str(path)!r} holds files but no run; give an empty or a new folder")
        if entries and not resume:
            raise ValueError(
                f"folder {str(path)!r} holds a run already; resume it, overwrite it, or give another folder"
            )
        if entries:
            self._refuse_another(json.loads((self.path / "run.json").read_text(encoding="utf-8")))

    def start(self) -> None:
        """Makes the folder, or clears what a killed run left half written. Only the main process calls this."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            for half in [*self.checkpoints.glob(".saving-*"), *self.checkpoints.glob(".removing-*")]:
                shutil.rmtree(half, ignore_errors=True)
            write_json(self.path / "run.json", {"recipe": as_dict(self.recipe), "data": self.digest})
        except OSError as error:
            raise ValueError(f"folder {str(self.path)!r} cannot be written: {error.strerror}; give another") from error

    def rewind(self, step: int) -> None:
        """Removes the lines of metrics.jsonl after this step: the run goes on from there and writes them again."""
        if self.metrics.exists():
            lines = self.metrics.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if (at := _step(line)) is not None and at <= step]
            write_text(self.metrics, "".join(line + "\n" for line in kept))

    def record(self, line: dict[str, Any]) -> None:
        """Adds one line to metrics.jsonl."""
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; one that a kill cut short is left out."""
        lines = self.metrics.read_text(encoding="utf-8").splitlines() if self.metrics.exists() else []
        return [json.loads(line) for line in lines if _step(line) is not None]

    def _refuse_another(self, saved: dict[str, Any]) -> None:
        other = difference(self.recipe, saved["recipe"])
        if other:
            raise ValueError(f"the run in {str(self.path)!r} has another recipe: {other}; give another folder")
        if saved["data"] != self.digest:
            raise ValueError(
                f"the data changed since the run in {str(self.path)!r} began; bring the old files back, or start in "
                "another folder"
            )


def is_run(folder: str | Path) -> bool:
    """Whether a training run began in this folder."""
    return (Path(folder) / "run.json").is_file()


def latest(folder: str | Path) -> Path | None:
    """The newest whole checkpoint of a run's folder; None before the first."""
    found = sorted(p for p in (Path(folder) / "checkpoints").glob("step-*") if p.is_dir())
    return found[-1] if found else None


def save(
    accelerator: Accelerator, model: KimiLinearForCausalLM, tokenizer: Tokenizer, run: RunFolder, step: int
) -> Path:
    """Writes the checkpoint of this step and drops the oldest beyond the recipe's number. All processes call this.

    Raises:
        CheckpointError: it could not be written; earlier checkpoints are whole.
    """
    final = run.checkpoints / f"step-{step:08d}"
    if final.exists():  # the run resumed here and did no step
        return final
    half = run.checkpoints / f".saving-{final.name}"
    failure: BaseException | None = None
    try:
        half.mkdir(parents=True, exist_ok=True)
        accelerator.wait_for_everyone()
        _write(accelerator, model, tokenizer, half)
    except Exception as error:  # torch, safetensors and the system each have their own for a full disk
        failure = error
    if agree(accelerator, float(failure is not None))[0]:
        if accelerator.is_main_process:
            room = shutil.disk_usage(run.path).free
            shutil.rmtree(half, ignore_errors=True)
            raise CheckpointError(_sentence(failure, final, latest(run.path), room)) from failure
        raise CheckpointError(f"checkpoint {str(final)!r} could not be written by another process") from failure
    if accelerator.is_main_process:
        put(half, final)
        older = sorted(run.checkpoints.glob("step-*"))[: -run.recipe.output.checkpoints]
        for path in older:  # renamed first, so that a kill leaves no half checkpoint under a whole one's name
            path.rename(run.checkpoints / f".removing-{path.name}")
        for path in run.checkpoints.glob(".removing-*"):
            shutil.rmtree(path, ignore_errors=True)
    accelerator.wait_for_everyone()
    return final


def keep_weights_apart(accelerator: Accelerator, model: KimiLinearForCausalLM) -> None:
    """Has accelerate leave the weights to the model's own format, which any reader of checkpoints knows.

    Sharded models are not among the lists that accelerate passes: their shards are its own business.
    """

    def before_save(models: list, weights: list, folder: str) -> None:
        weights.clear()

    def before_load(models: list, folder: str) -> None:
        if models:
            models.clear()
            load_into_(model, folder)

    accelerator.register_save_state_pre_hook(before_save)
    accelerator.register_load_state_pre_hook(before_load)


def restore(accelerator: Accelerator, folder: Path) -> None:
    """Puts model, optimiser, progress and random numbers back as they were. All processes call this.

    Raises:
        CheckpointError: a file is missing, cut short or of another shape.
    """
    try:
        accelerator.load_state(str(folder))
    except Exception as error:  # each library has its own for a damaged file
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"checkpoint {str(folder)!r} cannot be read ({first}); remove it to resume from the one before, or start anew"
        ) from error


def _write(accelerator: Accelerator, model: KimiLinearForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    accelerator.save_state(str(folder))
    whole = model
    if accelerator.distributed_type == DistributedType.FSDP:  # shards lie beside it; the whole model is for its readers
        tensors = accelerator.get_state_dict(model)
        with torch.device("meta"):
            whole = KimiLinearForCausalLM(model.config)
        if accelerator.is_main_process:
            whole.load_state_dict(tensors, assign=True)
    if accelerator.is_main_process:
        whole.save_pretrained(folder)
        for name, content in tokenizer_files(tokenizer).items():
            (folder / name).write_bytes(content)
        write_json(folder / GENERATION_CONFIG, generation_config(whole.config))


def _sentence(failure: BaseException | None, final: Path, before: Path | None, room: int) -> str:
    whole = f"{before.name} is whole" if before else "there is none before it"
    codes = {getattr(failure, "errno", None), getattr(failure.__cause__, "errno", None)} if failure else set()
    if codes & set(NO_ROOM) or room < 1 << 20 or "No space left" in str(failure):
        return f"no room to write checkpoint {str(final)!r}: {room >> 20} MiB are free; make room and resume ({whole})"
    return f"checkpoint {str(final)!r} could not be written: {failure}; {whole}"


def _step(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None  # the last line of a killed run
