"""One contestant learns to see: fresh images every step, accuracy on held-out ones along the way. A lesson of side_by_side.

All contestants have the parameters of the first one, to within a percent: what a mixer saves goes to the MLPs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from palimpsest.checks import check, check_fields
from palimpsest.lab.framework.experiment import Progress, Row
from palimpsest.lab.images.image_task import ImageTask
from palimpsest.lab.side_by_side import learn_together
from palimpsest.lab.tasks.task import Key
from palimpsest.lab.training import TEST_SEED
from palimpsest.models.vision import VisionConfig, VisionTransformer, memory_left


@dataclass(frozen=True)
class Seer:
    """A contestant: what it changes of the model that all share.

    Attributes:
        name: in tables and plots.
        changes: of VisionConfig's fields, such as {"mixer": "kda", "scan": "four"}.

    >>> Seer("softmax", {"mixer": "softmax"}).name
    'softmax'
    """

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        VisionConfig(**{"num_heads": 4, **self.changes})  # raises for what there is not
        object.__setattr__(self, "changes", MappingProxyType(dict(self.changes)))

    def __reduce__(self):  # a read-only mapping does not travel to other processes by itself
        return Seer, (self.name, dict(self.changes))

    def __hash__(self):
        return hash((self.name, tuple(self.changes.items())))


@dataclass(frozen=True, kw_only=True)
class ImageTraining:
    """A point: who learns to see what, and how.

    Attributes:
        who: the contestant. base: the model that it changes; its parameters are everybody's.
        task: what is seen.
        seed: of weights and training images.
        lr, weight_decay, warmup, decay, steps, evaluate_every, stop_at: as of Training.
        images_per_step, test_images: so many at a time; so many held out.
        pictures: of how many test images to keep what the last layer's memory holds of each patch.
    """

    who: Seer
    task: ImageTask
    base: VisionConfig
    seed: int = 0
    lr: float = 1e-3
    weight_decay: float = 0.1
    warmup: float = 0.05
    decay: float = 0.2
    steps: int = 1000
    evaluate_every: int = 100
    images_per_step: int = 32
    test_images: int = 512
    stop_at: float = 2.0
    pictures: int = 0

    def label(self) -> Row:
        """As a point's."""
        patches = math.prod(self.config.grid)
        names = {"contestant": self.who.name, "task": self.task.name, "length": patches}
        return {**names, "lr": self.lr, "seed": self.seed}

    def to_dict(self) -> Row:
        """As a point's."""
        own = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("who", "task", "base")}
        config = asdict(self.config)
        return {"kind": "image training", "who": self.who.name, "config": config, "task": self._task(), **own}

    def _task(self) -> Row:
        return {"task": self.task.name, **asdict(self.task)}  # type: ignore[call-overload]  # tasks are dataclasses

    @property
    def config(self) -> VisionConfig:
        """The contestant's model, with as many parameters as the base."""
        return fitted(self.who, self._base)

    @property
    def _base(self) -> VisionConfig:
        sizes = {
            "image_size": self.task.size,
            "image_channels": self.task.channels,
            "num_classes": self.task.num_classes,
        }
        return replace(self.base, **sizes)

    def prepare(self) -> None:
        """As a point's."""
        check_fields(self, "image training: ")
        for name in ("lr", "steps", "evaluate_every", "images_per_step", "test_images", "stop_at"):
            check(getattr(self, name) > 0, f"image training: {name} is {getattr(self, name)}; give more than 0")
        for name in ("seed", "weight_decay", "warmup", "decay", "pictures"):
            check(getattr(self, name) >= 0, f"image training: {name} is {getattr(self, name)}; give 0 or more")
        check(
            self.warmup + self.decay <= 1,
            f"image training: warmup {self.warmup} and decay {self.decay} are more than the run",
        )
        check(isinstance(self.task, ImageTask), f"image training: task is {self.task!r:.60}; give a task on images")
        _ = self.config

    def work(self) -> float:
        """As a point's."""
        return float(self.steps * self.images_per_step * math.prod(self.config.grid) * self.base.num_layers)

    def bytes_needed(self) -> int:
        """As a point's: weights with gradients and moments, activations of a step; from above."""
        c = self.config
        tokens = self.images_per_step * math.prod(c.grid)
        layer = 12 * c.hidden_size + 24 * c.num_heads * c.head_dim + 6 * c.intermediate_size
        states = tokens / 64 * c.num_heads * c.head_dim**2 * 4
        return int(16 * parameters(c) + c.num_layers * (4 * tokens * layer + states))

    def run(self, device: str, progress: Progress, unfinished: Path | None = None) -> Row:
        """As a point's."""
        return next(learn_together([self], device, lambda lesson, share, word: progress(share, word)))[1]

    def material(self) -> str:
        """As a lesson's."""
        own = ("who", "config", "lr", "weight_decay", "warmup", "decay", "stop_at", "pictures")
        return json.dumps({k: v for k, v in self.to_dict().items() if k not in own}, sort_keys=True)

    def make(self) -> VisionTransformer:
        """As a lesson's."""
        return VisionTransformer(self.config)

    def draw(self, step: int) -> tuple[Tensor, Tensor]:
        """As a lesson's: images and labels."""
        return self.task.draw(self.images_per_step, Key("train", self.seed, step))[:2]

    def loss(self, model: Any, images: Tensor, labels: Tensor) -> Tensor:
        """As a lesson's."""
        return F.cross_entropy(logits(model, images), labels)

    def draw_tests(self, device: str) -> list[tuple[Tensor, Tensor, Tensor]]:
        """As a lesson's: images, labels and kinds, in parts of the size of a training batch or somewhat more."""
        drawn = self.task.draw(self.test_images, Key("test", TEST_SEED, 0))
        at_once = max(self.images_per_step, 64)
        return [tuple(x.to(device) for x in part) for part in zip(*(x.split(at_once) for x in drawn))]  # type: ignore[misc]

    def score_inputs(self, tests: Any) -> list[tuple[Tensor, ...]]:
        """As a lesson's."""
        return [part[:2] for part in tests]

    def score(self, model: Any, images: Tensor, labels: Tensor) -> Tensor:
        """As a lesson's."""
        found = logits(model, images)
        nats = F.cross_entropy(found, labels, reduction="sum")
        right, count = (found.argmax(-1) == labels).sum().float(), torch.full_like(nats, len(labels))
        return torch.stack([right, count, nats, right, count])

    @torch.no_grad()
    def report(self, model: Any, curve: list[Row], tests: Any, device: str) -> Row:
        """As a lesson's: a row for all images, and one a kind where there are several."""
        found = torch.cat([logits(model, images) for images, _, _ in tests]).cpu()
        labels, kinds = (torch.cat([part[i] for part in tests]).cpu() for i in (1, 2))
        right, nats = found.argmax(-1) == labels, F.cross_entropy(found, labels, reduction="none")
        names = [self.task.name, *(self.task.kinds if len(self.task.kinds) > 1 else ())]
        best = max(curve, key=lambda c: c["accuracy"])
        shared = {
            "steps": curve[-1]["step"],
            "best_accuracy": best["accuracy"],
            "best_step": best["step"],
            "step_at_99": next((c["step"] for c in curve if c["accuracy"] >= 0.99), None),
            "diverged": not math.isfinite(curve[-1]["train_loss"]),
            "parameters": parameters(self.config),
            "state_numbers": state_numbers(self.config),
        }
        rows = []
        for i, name in enumerate(names):
            of = torch.ones_like(right) if i == 0 else kinds == i - 1
            scores = {"accuracy": float(right[of].double().mean()), "loss": float(nats[of].mean())}
            rows.append({"test": i, "test_task": name, "test_length": math.prod(self.config.grid), **scores, **shared})
        result: Row = {"rows": rows, "curve": curve, "slices": []}
        if self.pictures:
            result["pictures"] = [self._picture(model, tests[0][0][i : i + 1]) for i in range(self.pictures)]
        return result

    def _picture(self, model: Any, image: Tensor) -> Row:
        left = memory_left(model, image)
        return {"image": image[0].tolist(), "left": {name: x[0].cpu().tolist() for name, x in left.items()}}


def logits(model: Any, images: Tensor) -> Tensor:
    """The model's, in bfloat16 under autocast on a GPU; [B, num_classes], fp32."""
    half = torch.autocast("cuda", torch.bfloat16) if images.is_cuda else nullcontext()
    with half:
        return model(images).float()


@cache
def fitted(who: Seer, base: VisionConfig) -> VisionConfig:
    """The contestant's model, its MLPs as wide as gives it the parameters of the base.

    Raises:
        ValueError: it has too many without any MLP.
    """
    config = replace(base, **who.changes)
    step = 8 if base.intermediate_size >= 128 else 1
    spare = parameters(replace(base, positions=config.positions)) - parameters(
        config
    )  # a table of positions is no mixer's
    width = base.intermediate_size + step * round(spare / (3 * base.hidden_size * base.num_layers * step))
    check(
        width >= 1,
        f"contestant {who.name!r} has {-spare} parameters more than the base, and MLPs of {base.intermediate_size} channels "
        f"cannot make up for it; give intermediate_size at least {base.intermediate_size - width + 1}",
    )
    return replace(config, intermediate_size=width)


@cache
def parameters(config: VisionConfig) -> int:
    """Of a model, without building it: its layers have equally many."""
    if config.num_layers > 2:
        one, two = (parameters(replace(config, num_layers=n)) for n in (1, 2))
        return one + (config.num_layers - 1) * (two - one)
    with torch.device("meta"):
        return sum(p.numel() for p in VisionTransformer(config).parameters())


def state_numbers(config: VisionConfig) -> int:
    """What a layer's mixer holds of one image while it reads it, all layers together: memories, or keys and values."""
    width = config.num_heads * config.head_dim
    tokens = math.prod(config.grid)
    return config.num_layers * (2 * tokens * width if config.mixer == "softmax" else width * config.head_dim)
