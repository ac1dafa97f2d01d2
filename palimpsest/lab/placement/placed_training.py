"""Trainings in which where to attend is itself learned: points of the experiment `placement`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from palimpsest.checks import check
from palimpsest.lab.framework.experiment import Progress, Row
from palimpsest.lab.model_variants import MODEL_VARIANTS, build
from palimpsest.lab.placement.gated_pair import AttentionBudget, pair_up
from palimpsest.lab.placement.routed_attention import RoutedLatentAttention
from palimpsest.lab.side_by_side import learn_together
from palimpsest.lab.training import Training


@dataclass(frozen=True, kw_only=True)
class PlacedTraining(Training):
    """A training whose model has penalties of its own, and tells what it chose.

    Attributes:
        choose: "layers": all layers hold a memory and attention, `who` is the memories' pattern, and the gates share a budget of
            `budget` layers. "tokens": the attention layers of `who` keep the tokens that a router chooses, a share `budget` of
            them free of charge.
    """

    choose: str = "layers"
    budget: float = 1.0

    def prepare(self) -> None:
        """As Training's."""
        super().prepare()
        check(self.choose in ("layers", "tokens"), f"placement: choose is {self.choose!r}; it is 'layers' or 'tokens'")
        with torch.device("meta"):
            self.make()

    def to_dict(self) -> Row:
        """As Training's."""
        return super().to_dict() | {"kind": "placed training"}

    def material(self) -> str:
        """That of the trainings beside it whose layers are fixed."""
        fixed = {name: getattr(self, name) for name in Training.__dataclass_fields__}
        return Training(**fixed).material()

    def make(self) -> nn.Module:
        """As Training's, with what chooses."""
        model = build(self.who, self.size, self.vocab_size)
        if self.choose == "layers":
            pair_up(model, build(MODEL_VARIANTS["softmax"], self.size, self.vocab_size), self.budget)
            return model
        routed = 0
        for layer, kind in zip(model.model.layers, model.config.layer_types):
            if kind == "mla":
                layer.self_attn = RoutedLatentAttention(layer.self_attn, self.budget)  # type: ignore[assignment, arg-type]
                routed += 1
        check(
            routed > 0, f"placement: {self.who.name!r} has no latent attention layer to route; give a pattern with an M"
        )
        return model

    def loss(self, model: Any, tokens: Tensor, labels: Tensor, scored: Tensor) -> Tensor:
        """As Training's, and the penalties."""
        loss = super().loss(model, tokens, labels, scored)
        return loss + sum(
            m.penalty() for m in model.modules() if isinstance(m, AttentionBudget | RoutedLatentAttention)
        )

    @torch.no_grad()
    def report(self, model: Any, curve: list[Row], tests: Any, device: str) -> Row:
        """As Training's, with the shares of layers or of kept tokens in every row."""
        result = super().report(model, curve, tests, device)
        chosen: Row = {}
        for module in model.modules():
            if isinstance(module, AttentionBudget):
                chosen |= {f"share_{i + 1}": float(share) for i, share in enumerate(module())}
        routers = [m for m in model.modules() if isinstance(m, RoutedLatentAttention)]
        if routers:
            for row, test in zip(result["rows"], tests):
                self.score(model, *(x.to(device) for x in test.batches[0][:3]))
                row["kept"] = float(torch.stack([m.kept_BT.mean() for m in routers]).mean())
            model_tokens = tests[0].batches[0].tokens[:1].to(device)
            self.score(model, model_tokens, model_tokens, torch.ones_like(model_tokens, dtype=torch.bool))
            result["kept_tokens"] = [model_tokens[0].tolist(), routers[0].kept_BT[0].int().tolist()]
        result["rows"] = [row | chosen for row in result["rows"]]
        return result

    def run(self, device: str, progress: Progress, unfinished: Path | None = None) -> Row:
        """As a point's; an interrupt loses it."""
        return next(learn_together([self], device, lambda lesson, share, word: progress(share, word)))[1]


def placed(point: Training, **changes: Any) -> PlacedTraining:
    """The same training with something chosen.

    Args:
        point: with everything else. changes: `choose`, `budget`, and fields of Training.
    """
    fixed = {name: getattr(point, name) for name in Training.__dataclass_fields__}
    return PlacedTraining(**{**fixed, **changes})
