"""The training loop: a page, standing on accelerate for device, precision, accumulation, processes and checkpoints.

Reading order: `train` below, then recipe.py, data.py, optim.py, run_folder.py, checkpoints.py.
"""

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from palimpsest.layers.moe import busiest_shares, gather_loads, update_router_bias
from palimpsest.models.kimi_linear import KimiLinearForCausalLM
from palimpsest.parallel.gradients import Gradients, copies
from palimpsest.parallel.plan import make_mesh
from palimpsest.parallel.spread import Spread, parallelize
from palimpsest.train import checkpoints
from palimpsest.train.captured import CapturedGradients
from palimpsest.train.checkpoints import NonFiniteError
from palimpsest.train.data import Batch, Corpus, Heldout, steps_ahead
from palimpsest.train.evaluate import bits_per_byte
from palimpsest.train.interrupts import interrupts
from palimpsest.train.late import LateNumbers
from palimpsest.train.logger import Report, RunLogger
from palimpsest.train.optim import build_optimizer, rate_factor
from palimpsest.train.processes import settle, start_accelerator, together, total
from palimpsest.train.progress import Progress, Result
from palimpsest.train.recipe import Recipe, as_dict
from palimpsest.train.run_folder import RunFolder, best, latest
from palimpsest.train.stretch import own_part, predictions_of


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
    try:
        corpus, problem = _corpus(recipe), None
        corpus.refuse(accelerator.num_processes // recipe.parallel.context)
        run = RunFolder(folder, recipe, corpus.digest, resume=resume, overwrite=overwrite)
    except (ValueError, OSError, ImportError) as error:
        corpus = run = None
        problem = error
    settle(accelerator, problem, recipe=as_dict(recipe), data=corpus and corpus.digest)
    assert corpus is not None
    assert run is not None
    with together(accelerator), _held(accelerator, run):
        done, saved = (None, None) if overwrite else (run.result(), latest(folder))
        if done and saved and (result := Result.from_dict(done, saved, _other_best(run))):
            if accelerator.is_main_process:
                report({"event": "finished", **result.as_dict()})
            return result
        return _train(accelerator, corpus, run, saved, report)


@contextmanager
def _held(accelerator: Accelerator, run: RunFolder) -> Iterator[None]:
    """The run's folder, held by the first process for all."""
    holding = run.held() if accelerator.is_main_process else nullcontext()
    try:
        holding.__enter__()
        problem = None
    except ValueError as error:
        problem = error
    settle(accelerator, problem)
    with ExitStack() as stack:
        stack.push(holding)
        yield


def _corpus(recipe: Recipe) -> Corpus:
    corpus = Corpus(recipe.data, recipe.seed)
    if corpus.tokenizer.vocab_size > recipe.model.vocab_size:
        raise ValueError(
            f"model.vocab_size is {recipe.model.vocab_size}; tokenizer {recipe.data.tokenizer!r} needs at least "
            f"{corpus.tokenizer.vocab_size}"
        )
    return corpus


def _train(accelerator: Accelerator, corpus: Corpus, run: RunFolder, saved: Path | None, report: Report) -> Result:
    recipe, on_gpu = run.recipe, accelerator.device.type == "cuda"

    @cache
    def heldout(max_bytes: int) -> Heldout:
        piece_bytes = recipe.evaluate.piece_bytes
        return Heldout(corpus.heldout, corpus.tokenizer, piece_bytes=piece_bytes, max_bytes=max_bytes)

    heldout(recipe.evaluate.max_bytes)  # refuses what cannot be measured before anything is trained or removed
    set_seed(recipe.seed)
    plain = KimiLinearForCausalLM(recipe.model)
    can_compile = on_gpu and find_spec("triton") is not None  # which torch.compile writes its GPU code in
    compile = can_compile if recipe.compile is None else recipe.compile
    mesh = make_mesh(recipe.parallel, accelerator.device.type) if accelerator.num_processes > 1 else None
    where = {"device": accelerator.device, "recompute": recipe.recompute, "compile": compile}
    spread = parallelize(plain, mesh, recipe.parallel, **where)
    if saved:
        checkpoints.read_weights_(accelerator, plain, spread, saved)
    model = accelerator.prepare_model(
        plain, device_placement=False, evaluation_mode=True
    )  # autocast alone: processes are spread's
    gradients = Gradients(plain, spread)
    optimizer = build_optimizer(plain, recipe.optim, fused=on_gpu, copies=copies(plain, spread))
    optimizer = accelerator.prepare_optimizer(optimizer)
    progress = checkpoints.restore(accelerator, plain, spread, optimizer, saved) if saved else Progress()
    if accelerator.is_main_process:
        run.start()
    accelerator.wait_for_everyone()
    logger = RunLogger(run, report, tokens_per_byte=corpus.tokens_per_byte, silent=not accelerator.is_main_process)
    logger.start(progress, **_facts(accelerator, plain, corpus), resumed=saved is not None)
    began = time.monotonic() - progress.seconds

    def evaluate(max_bytes: int, *, final: bool = False) -> float | None:
        text = heldout(max_bytes)
        bits = bits_per_byte(accelerator, model, text, batch_size=recipe.evaluate.batch_size, spread=spread)
        logger.evaluate(progress, bits, text.content, final=final)
        return bits if math.isfinite(bits) else None

    def save() -> Path:
        path = checkpoints.save(accelerator, plain, spread, optimizer, corpus.tokenizer, progress, run)
        logger.checkpoint(progress, path)
        return path

    def log(steps: Iterable[tuple[StepFacts, list[float]]]) -> None:
        for facts, (loss, norm, skipped, told, seconds, *loads) in steps:
            agreed.stop, agreed.seconds = bool(told), seconds
            progress.count(skipped=bool(skipped))
            if progress.skipped_in_a_row > recipe.max_nonfinite:
                raise NonFiniteError(_not_finite(progress, loss, norm, latest(run.path)))
            then = replace(facts.progress, skipped=progress.skipped, skipped_in_a_row=progress.skipped_in_a_row)
            ranks = loads[len(loads) // 2 :] if spread.group("expert") else []  # of processes, after those of experts
            rest = {"rate": facts.rate, "share": facts.share}
            rest |= {"expert_load": [round(load, 4) for load in loads[: len(loads) - len(ranks)]]}
            rest |= {"process_load": [round(load, 4) for load in ranks]} if ranks else {}
            logger.step(then, facts.num_tokens, loss=loss, gradient_norm=norm, **rest)

    alone = accelerator.num_processes == 1
    # What shards or dealt experts exchange depends on the host, and so does fp16's scale: no graph holds that.
    still = accelerator.scaler is None and (alone or (gradients.keeps and not _exchanges(spread)))
    capture = on_gpu and still if recipe.capture is None else recipe.capture
    captured = CapturedGradients(model, share=1 / recipe.data.accumulate) if capture else None
    late: LateNumbers[StepFacts] = LateNumbers(accelerator.device)
    agreed = Agreed(False, progress.seconds)
    part_of = partial(_own, spread=spread)
    model.train()
    with (
        interrupts(lambda signal: logger.interrupt(progress, signal)) as interrupted,
        closing(steps_ahead(corpus, progress.step, *spread.rows, pin=on_gpu, change=part_of)) as ahead,
    ):
        while True:
            told, seconds = interrupted(), time.monotonic() - began
            stop = told if alone else agreed.stop  # several processes stop at the same step: when all have heard of it
            progress.seconds = seconds if alone else agreed.seconds
            share = progress.share(recipe)
            if stop or share >= 1:
                break
            factor = rate_factor(recipe.schedule, share)
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            parts, num_tokens = next(ahead)
            numbers = _step(accelerator, model, plain, optimizer, gradients, captured, parts, recipe, told, seconds)
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


def _exchanges(spread: Spread) -> bool:
    """Whether processes talk to each other inside the forward pass."""
    return spread.group("expert") is not None or spread.group("context") is not None


def _own(part: Batch, spread: Spread) -> Batch:
    return own_part(part, predictions_of(part), spread)[0] if spread.group("context") else part


@dataclass
class Agreed:
    """What several processes know of each other, some steps late: all act on the same numbers at the same step."""

    stop: bool
    seconds: float


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
    gradients: Gradients,
    captured: CapturedGradients | None,
    parts: list[Batch],
    recipe: Recipe,
    told: bool,
    seconds: float,
) -> Tensor:
    """Forward, backward and optimiser.

    Returns:
        On the device: the mean loss, the gradient's norm, 1 if the step was left out since these are not finite, how many
        processes were told to stop, the first one's seconds, and for each mixture of experts the busiest expert's tokens over
        the mean; then, where experts are dealt to processes, the busiest process's.
    """
    loss = torch.zeros((), device=accelerator.device)
    for i, part in enumerate(parts):
        part_loss = None if captured is None else captured(part, first=i == 0)
        if part_loss is None:
            tokens, labels, cu_seqlens, weight = part.to(accelerator.device)
            with accelerator.autocast():
                part_loss = model(tokens, labels=labels, cu_seqlens=cu_seqlens).loss * weight
            accelerator.backward(part_loss / len(parts))
        loss += part_loss.detach() / len(parts)
    gradients.sum_()
    if accelerator.scaler is not None:
        accelerator.unscale_gradients(optimizer)
    norm = gradients.clip_(recipe.optim.clip).to(loss)
    mine = torch.tensor([float(told), seconds if accelerator.is_main_process else 0.0], dtype=torch.float64)
    if loss.is_cuda:
        mine = mine.pin_memory().to(loss.device, non_blocking=True)
    shared = total(accelerator, torch.cat((loss.double()[None] / accelerator.num_processes, mine)))
    loss = shared[0].to(loss)
    broken = ~(loss.isfinite() & norm.isfinite())
    gather_loads(plain)
    shares = [busiest_shares(plain)]
    if recipe.parallel.expert > 1:
        shares.append(busiest_shares(plain, recipe.parallel.expert))
    if accelerator.scaler is not None:  # of fp16; it skips by itself, and must learn of it
        optimizer.step()
    elif loss.is_cuda:
        optimizer.optimizer.found_inf = broken.float()
        optimizer.step()
    elif not broken:
        optimizer.step()
    update_router_bias(plain, recipe.router_bias_rate * (~broken).float(), gathered=True)
    if gradients.keeps:
        gradients.zero_()
    else:
        optimizer.zero_grad(set_to_none=captured is None)
    return torch.cat((torch.stack((loss, norm, broken.to(loss))).double(), shared[1:], *(x.double() for x in shares)))


def _not_finite(progress: Progress, loss: float, norm: float, last: Path | None) -> str:
    return (
        f"{progress.skipped_in_a_row} steps in a row up to step {progress.step} had no finite gradient (loss {loss}, norm "
        f"{norm}); try a smaller optim.lr or a longer schedule.warmup"
        + (f"; checkpoint {last.name!r} is whole and finite" if last else "")
    )
