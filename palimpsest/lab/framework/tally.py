"""How far a sweep is, and what it tells of that."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from palimpsest.lab.framework.experiment import Row
from palimpsest.lab.framework.results import title

Report = Callable[[Row], None]  # takes an event, a dict with its name under "event"


class Tally:
    """How far the sweep is, and when it will end at the pace so far."""

    def __init__(self, plan: Mapping[str, Any], left: Mapping[str, Any], report: Report):
        self.work = {i: p.work() for i, p in left.items()}
        self.titles = {i: title(p.label()) for i, p in plan.items()}
        self.share = dict.fromkeys(left, 0.0)
        self.report, self.began, self.failed = report, time.monotonic(), 0

    def progress(self, identity: str, share: float, word: str) -> None:
        self.share[identity] = share
        self.report(
            {"event": "progress", "point": self.titles[identity], "share": share, "word": word, **self.outlook()}
        )

    def point(self, identity: str, outcome: Row, seconds: float) -> None:
        self.share[identity] = 1.0  # early stopping ends a point before its time
        self.failed += "error" in outcome
        event = {"event": "point", "point": self.titles[identity], "seconds": seconds, **outcome, **self.outlook()}
        self.report(event)

    def outlook(self) -> Row:
        total = sum(self.work.values())
        done = sum(self.work[i] * share for i, share in self.share.items())
        elapsed = time.monotonic() - self.began
        eta = elapsed * (total - done) / done if done > 0.002 * total else None  # a guess from less misleads
        return {"done": done / total if total else 1.0, "elapsed": elapsed, "eta": eta}
