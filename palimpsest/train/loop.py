"""The training loop: a page, standing on accelerate for device, precision, accumulation, processes and checkpoints.

Reading order: `train` below, then recipe.py, data.py, optim.py, run_folder.py, checkpoints.py.
"""

import math
import time
from collections.abc import Iterable
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from palimpsest.layers.moe import busiest_shares, update_router_bias
from palimpsest.models.kimi_linear import KimiLinearForCausalLM
from palimpsest.train import checkpoints
from palimpsest.train.captured import CapturedGradients
from palimpsest.train.checkpoints import NonFiniteError
from palimpsest.train.data import Batch, Corpus, Heldout, steps_ahead
from palimpsest.train.evaluate import bits_per_byte
from palimpsest.train.interrupts import interrupts
from palimpsest.train.late import LateNumbers
from palimpsest.train.logger import Report, RunLogger
from palimpsest.train.optim import build_optimizer, rate_factor
from palimpsest.train.parallel import agree, as_scalar, start_accelerator, total
from palimpsest.train.progress import Progress, Result
from palimpsest.train.recipe import Recipe
from palimpsest.train.run_folder import RunFolder, best, latest


def train(
    recipe: Recipe,
    folder: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    report: Report = lambda event: None,
) -> Result:
    """Runs a recipe to its end, or to the first Ctrl-C or SIGTERM, which saves before it returns.

    Args:
        recipe: what to do.
        folder: where metrics, checkpoints and the loss curve go.
        resume: go on with the run in folder, if there is one; on a CPU, to the same bits as if it had never stopped. A
            run that had finished is not begun again: its result is returned.
        overwrite: remove the run in folder, if there is one, as soon as recipe, data and model are known to be usable.
        report: called by the main process with each event, a dict; its "event" is start, step, train, evaluate,
            checkpoint, interrupt, end, or finished if there was nothing left to do.

    Raises:
        ValueError: recipe, data or folder cannot be used.
        NonFiniteError: more than `max_nonfinite` steps in a row had no finite gradient, or weights that are not finite
            would be saved; the last checkpoint is whole and finite.
        CheckpointError: a checkpoint could not be written or read; earlier ones are whole.
    """
    accelerator = start_accelerator(recipe)
    corpus = Corpus(recipe.data, recipe.seed)
    if corpus.tokenizer.vocab_size > recipe.model.vocab_size:
        raise ValueError(
            f"model.vocab_size is {recipe.model.vocab_size}; tokenizer {recipe.data.tokenizer!r} needs at least "
            f"{corpus.tokenizer.vocab_size}"
        )
    run = RunFolder(folder, recipe, corpus.digest, resume=resume, overwrite=overwrite)
    accelerator.wait_for_everyone()  # all have looked before one writes
    with run.held() if accelerator.is_main_process else nullcontext():
        done, saved = (None, None) if overwrite else (run.result(), latest(folder))
        if done and saved and (result := Result.from_dict(done, saved, _other_best(run))):
            if accelerator.is_main_process:
                report({"event": "finished", **result.as_dict()})
            return result
        return _train(accelerator, corpus, run, saved, report)


def _train(accelerator: Accelerator, corpus: Corpus, run: RunFolder, saved: Path | None, report: Report) -> Result:
    recipe, on_gpu = run.recipe, accelerator.device.type == "cuda"

    @cache
    def heldout(max_bytes: int) -> Heldout:
        piece_bytes = recipe.evaluate.piece_bytes
        return Heldout(corpus.heldout, corpus.tokenizer, piece_bytes=piece_bytes, max_bytes=max_bytes)

    heldout(recipe.evaluate.max_bytes)  # refuses what cannot be measured before anything is trained or removed
    set_seed(recipe.seed)
    plain = KimiLinearForCausalLM(recipe.model)
    if saved:
        checkpoints.read_weights_(plain, saved)  # before they are sharded
    model, optimizer = accelerator.prepare(plain, build_optimizer(plain, recipe.optim, fused=on_gpu))
    progress = checkpoints.restore(accelerator, plain, optimizer, saved) if saved else Progress()
    if accelerator.is_main_process:
        run.start()
    accelerator.wait_for_everyone()
    logger = RunLogger(run, report, tokens_per_byte=corpus.tokens_per_byte, silent=not accelerator.is_main_process)
    logger.start(progress, **_facts(accelerator, plain, corpus), resumed=saved is not None)
    began = time.monotonic() - progress.seconds

    def evaluate(max_bytes: int, *, final: bool = False) -> float | None:
        text = heldout(max_bytes)
        bits = bits_per_byte(accelerator, model, text, batch_size=recipe.evaluate.batch_size)
        logger.evaluate(progress, bits, text.content, final=final)
        return bits if math.isfinite(bits) else None

    def save() -> Path:
        path = checkpoints.save(accelerator, plain, optimizer, corpus.tokenizer, progress, run)
        logger.checkpoint(progress, path)
        return path

    def log(steps: Iterable[tuple[StepFacts, list[float]]]) -> None:
        for facts, (loss, norm, skipped, *loads) in steps:
            progress.count(skipped=bool(skipped))
            if progress.skipped_in_a_row > recipe.max_nonfinite:
                raise NonFiniteError(_not_finite(progress, loss, norm, latest(run.path)))
            then = replace(facts.progress, skipped=progress.skipped, skipped_in_a_row=progress.skipped_in_a_row)
            rest = {"rate": facts.rate, "share": facts.share, "expert_load": [round(load, 4) for load in loads]}
            logger.step(then, facts.num_tokens, loss=loss, gradient_norm=norm, **rest)

    can_compile = on_gpu and find_spec("triton") is not None  # which torch.compile writes its GPU code in
    if can_compile if recipe.compile is None else recipe.compile:
        plain.compile_layers()
    plain.model.gradient_checkpointing = recipe.recompute
    alone = accelerator.num_processes == 1 and accelerator.scaler is None
    capture = on_gpu and alone if recipe.capture is None else recipe.capture
    captured = CapturedGradients(model, share=1 / recipe.data.accumulate) if capture else None
    late: LateNumbers[StepFacts] = LateNumbers(accelerator.device)
    process = accelerator.process_index, accelerator.num_processes
    model.train()
    with (
        interrupts(lambda signal: logger.interrupt(progress, signal)) as interrupted,
        closing(steps_ahead(corpus, progress.step, *process, pin=on_gpu)) as ahead,
    ):
        while True:
            stop, progress.seconds = agree(accelerator, float(interrupted()), time.monotonic() - began)
            share = progress.share(recipe)
            if stop or share >= 1:
                break
            factor = rate_factor(recipe.schedule, share)
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            parts, num_tokens = next(ahead)
            numbers = _step(accelerator, model, plain, optimizer, captured, parts, recipe)
            progress.advance(num_tokens)
            late.push(StepFacts(replace(progress), num_tokens, factor, share), numbers)
            log(late.ready())
            if progress.share(recipe) < 1:  # the end evaluates and saves once more
                if progress.step % recipe.evaluate.every == 0:
                    log(late.all())
                    progress.latest_heldout_bits = evaluate(recipe.evaluate.max_bytes)
                if progress.step % recipe.output.checkpoint_every == 0:
                    log(late.all())
                    save()
        log(late.all())
        checkpoint = save()
        bits = None if stop else evaluate(recipe.evaluate.final_max_bytes, final=True)
    result = Result(not stop, checkpoint, progress, bits, logger.baselines, _other_best(run))
    logger.end(result)
    return result


def _other_best(run: RunFolder) -> Path | None:
    """The best checkpoint along the way, if it is not the newest."""
    return None if (newest_best := best(run.path)) == latest(run.path) else newest_best


def _facts(accelerator: Accelerator, model: nn.Module, corpus: Corpus) -> dict[str, Any]:
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "documents": corpus.num_documents,
        "bytes": corpus.num_bytes,
        "heldout_documents": len(corpus.heldout),
        "heldout_bytes": sum(len(d.content) for d in corpus.heldout),
        "device": str(accelerator.device),
        "processes": accelerator.num_processes,
        "precision": str(accelerator.mixed_precision),
    }


class StepFacts(NamedTuple):
    """What the host knows of a step whose numbers are still on their way."""

    progress: Progress  # after it
    num_tokens: int
    rate: float
    share: float


def _step(
    accelerator: Accelerator,
    model: nn.Module,
    plain: nn.Module,
    optimizer: Any,
    captured: CapturedGradients | None,
    parts: list[Batch],
    recipe: Recipe,
) -> Tensor:
    """Forward, backward and optimiser.

    Returns:
        On the device: the mean loss, the gradient's norm, 1 if the step was left out since these are not finite, and for each
        mixture of experts the busiest expert's tokens over the mean, in this process.
    """
    loss = torch.zeros((), device=accelerator.device)
    for i, part in enumerate(parts):
        part_loss = None if captured is None else captured(part, first=i == 0)
        if part_loss is None:
            tokens, labels, cu_seqlens, weight = part.to(accelerator.device)
            with accelerator.accumulate(model), accelerator.autocast():
                part_loss = model(tokens, labels=labels, cu_seqlens=cu_seqlens).loss * weight
                accelerator.backward(part_loss)
        loss += part_loss.detach() / len(parts)
    loss = total(accelerator, loss) / accelerator.num_processes
    norm = as_scalar(accelerator.clip_grad_norm_(model.parameters(), recipe.optim.clip)).to(loss)
    broken = ~(loss.isfinite() & norm.isfinite())
    shares = busiest_shares(plain)
    if accelerator.scaler is not None:  # of fp16; it skips by itself, and must learn of it
        optimizer.step()
    elif loss.is_cuda:
        optimizer.optimizer.found_inf = broken.float()
        optimizer.step()
    elif not broken:
        optimizer.step()
    update_router_bias(plain, recipe.router_bias_rate * (~broken).float())
    optimizer.zero_grad(set_to_none=captured is None)
    return torch.cat((torch.stack((loss, norm, broken.to(loss))), shares.to(loss)))


def _not_finite(progress: Progress, loss: float, norm: float, last: Path | None) -> str:
    return (
        f"{progress.skipped_in_a_row} steps in a row up to step {progress.step} had no finite gradient (loss {loss}, norm "
        f"{norm}); try a smaller optim.lr or a longer schedule.warmup"
        + (f"; checkpoint {last.name!r} is whole and finite" if last else "")
    )
