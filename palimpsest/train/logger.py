"""What a run logs: metrics.jsonl, TensorBoard if asked, the loss curve, and events for whoever shows progress."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from palimpsest.files import write_json
from palimpsest.train.evaluate import compressors
from palimpsest.train.plots import draw_loss_curve
from palimpsest.train.progress import Progress, Result
from palimpsest.train.run_folder import RunFolder, finite

Report = Callable[[dict[str, Any]], None]


class RunLogger:
    """Turns what the loop knows into lines of metrics.jsonl, TensorBoard and events.

    Args:
        run: the folder that metrics go to.
        report: called with each event.
        tokens_per_byte: of the training text.
        silent: log nothing: another process does.
    """

    def __init__(self, run: RunFolder, report: Report, *, tokens_per_byte: float, silent: bool):
        self.run, self.report, self.silent = run, report, silent
        self.bits_per_nat = tokens_per_byte / math.log(2)
        self.baselines: dict[str, float] = {}
        self.tensorboard = _tensorboard(run.path) if run.recipe.output.tensorboard and not silent else None
        self._tokens, self._busy, self._since = 0, 0.0, time.monotonic()  # since the last line, without evaluations

    def start(self, progress: Progress, **facts: Any) -> None:
        if not self.silent:
            self.run.rewind(progress.step)
            self.report({"event": "start", "step": progress.step, **facts})
        self._since = time.monotonic()

    def step(self, progress: Progress, num_tokens: int, *, loss: float, **facts: Any) -> None:
        """After each optimiser step; every `log_every`th becomes a line."""
        now = time.monotonic()
        self._tokens, self._busy, self._since = self._tokens + num_tokens, self._busy + now - self._since, now
        if self.silent:
            return
        event = {
            "event": "step",
            "step": progress.step,
            "tokens": progress.tokens,
            "seconds": round(progress.seconds, 3),
        }
        event |= {"loss": loss, "bits_per_byte": loss * self.bits_per_nat, "skipped": progress.skipped, **facts}
        self.report(finite(event))
        if progress.step % self.run.recipe.output.log_every == 0:
            self._line(event | {"event": "train", "tokens_per_second": round(self._tokens / max(self._busy, 1e-9), 1)})
            self._tokens, self._busy = 0, 0.0

    def evaluate(self, progress: Progress, bits: float, content: bytes, *, final: bool = False) -> None:
        """After an evaluation on content, which the compressors are given too; the final one ends the run."""
        if not self.silent:
            self.baselines = compressors(content)
            event = {"event": "evaluate", "step": progress.step, "tokens": progress.tokens, "final": final}
            event |= {"heldout_bits_per_byte": bits, "heldout_bytes": len(content), "compressors": self.baselines}
            self._line(event)
        self._since = time.monotonic()

    def interrupt(self, progress: Progress, signal: str) -> None:
        """When Ctrl-C or SIGTERM came: the step that is being done will be finished and saved."""
        if not self.silent:
            self.report({"event": "interrupt", "signal": signal, "step": progress.step})

    def checkpoint(self, progress: Progress, path: Path) -> None:
        if not self.silent:
            draw_loss_curve(self.run.records(), self.baselines, self.run.path)
            self.report({"event": "checkpoint", "step": progress.step, "path": str(path)})
        self._since = time.monotonic()

    def end(self, result: Result) -> None:
        if not self.silent:
            draw_loss_curve(self.run.records(), self.baselines, self.run.path)
            write_json(self.run.path / "result.json", finite(result.as_dict()))
            self.report({"event": "end", **finite(result.as_dict())})
        if self.tensorboard is not None:
            self.tensorboard.close()

    def _line(self, event: dict[str, Any]) -> None:
        self.run.record(event)
        self.report(finite(event))
        if self.tensorboard is None:
            return
        for name, value in event.items():
            if isinstance(value, float):
                self.tensorboard.add_scalar(f"{event['event']}/{name}", value, event["step"])
            elif isinstance(value, list):
                self.tensorboard.add_scalars(
                    f"{event['event']}/{name}", {str(i): x for i, x in enumerate(value)}, event["step"]
                )


def _tensorboard(folder: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("output.tensorboard=true needs tensorboard: pip install tensorboard") from error
    return SummaryWriter(str(folder / "tensorboard"))
