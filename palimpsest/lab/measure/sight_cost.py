"""What an image costs as it grows: time and memory of a vision transformer, by resolution."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from palimpsest.checks import check, check_fields
from palimpsest.lab.framework.experiment import Progress, Row
from palimpsest.lab.image_training import Seer, fitted, logits
from palimpsest.lab.measure.context_cost import timed
from palimpsest.models.vision import VisionConfig, VisionTransformer


@dataclass(frozen=True, kw_only=True)
class SightCost:
    """A point: one contestant at several resolutions, in turn; the fastest round of each counts.

    Args:
        who: the contestant. base: the model that it changes.
        resolutions: pixels of a side, multiples of the base's patches.
        tokens: as many images at once as make about so many patches.
        train: time forward and backward instead of forward.
        rounds, calls: of each resolution; calls are timed together.
    """

    who: Seer
    base: VisionConfig
    resolutions: tuple[int, ...]
    tokens: int = 16384
    train: bool = False
    rounds: int = 3
    calls: int = 5

    def label(self) -> Row:
        """As a point's."""
        return {"contestant": self.who.name, "what": "training" if self.train else "reading"}

    def to_dict(self) -> Row:
        """As a point's."""
        numbers = {name: getattr(self, name) for name in ("resolutions", "tokens", "train", "rounds", "calls")}
        return {"kind": "sight cost", "who": self.who.name, "config": asdict(fitted(self.who, self.base)), **numbers}

    def prepare(self) -> None:
        """As a point's."""
        check_fields(self, "sight cost: ")
        for name in ("tokens", "rounds", "calls"):
            check(getattr(self, name) >= 1, f"sight cost: {name} is {getattr(self, name)}; give at least 1")
        check(bool(self.resolutions), "sight cost: resolutions is empty; give at least one")
        P = self.base.patch_size
        for side in self.resolutions:
            check(
                side >= P and side % P == 0, f"sight cost: resolution {side} is no multiple of the patches' {P} pixels"
            )
        fitted(self.who, self.base)

    def work(self) -> float:
        """As a point's."""
        return float(len(self.resolutions) * self.tokens * (3 if self.train else 1))

    def bytes_needed(self) -> int:
        """As a point's, from above."""
        largest = max(self.tokens, (max(self.resolutions) // self.base.patch_size) ** 2)
        return 200 * largest * self.base.hidden_size * (self.base.num_layers if self.train else 2)

    def run(self, device: str, progress: Progress, unfinished: Path) -> Row:
        """As a point's."""
        torch.manual_seed(0)
        config = fitted(self.who, self.base)
        model = VisionTransformer(config).to(device)
        best: dict[int, float] = {}
        peak: dict[int, int] = {}
        calls = {}
        for i, side in enumerate(self.resolutions):
            calls[side] = self._call(model, side, device)
            if device.startswith("cuda"):
                torch.cuda.reset_peak_memory_stats(device)
            calls[side]()
            peak[side] = torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else 0
            progress(0.5 * i / len(self.resolutions), "")
        for turn in range(self.rounds):
            for side, call in calls.items():
                seconds = timed(call, self.calls, device)
                best[side] = min(best.get(side, seconds), seconds)
            progress(0.5 + 0.5 * turn / self.rounds, "")
        rows: list[Row] = []
        for side in self.resolutions:
            images = self._images(side)
            row: Row = {"resolution": side, "tokens": (side // config.patch_size) ** 2, "images": images}
            rows.append(row | {"milliseconds": 1e3 * best[side] / images, "images_per_second": images / best[side]})
            if peak[side]:
                rows[-1]["peak_bytes"] = peak[side]
        return {"rows": rows}

    def _images(self, side: int) -> int:
        return max(self.tokens // (side // self.base.patch_size) ** 2, 1)

    def _call(self, model: VisionTransformer, side: int, device: str) -> Callable[[], object]:
        """A call that reads the images, or also takes gradients; on a GPU as a graph, so that no host is timed."""
        images = torch.rand(self._images(side), 3, side, side, device=device)

        def call() -> object:
            with nullcontext() if self.train else torch.no_grad():
                out = logits(model, images)
            if self.train:
                for p in model.parameters():
                    p.grad = None
                out.sum().backward()
            return out

        if not device.startswith("cuda"):
            return call
        stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                call()
        torch.cuda.synchronize(device)
        with torch.cuda.graph(graph):
            call()
        return graph.replay
