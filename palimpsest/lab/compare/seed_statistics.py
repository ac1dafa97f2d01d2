"""Numbers over seeds: never a mean without how far the seeds lie apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from palimpsest.lab.framework.experiment import Record, Row, Table


@dataclass(frozen=True)
class Spread:
    """The values of several seeds.

    >>> print(Spread((0.98, 1.0)).percent())
    99.0 % (98.0 to 100.0)
    >>> Spread((0.98, 1.0)).above(Spread((0.5, 0.97)))
    True
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    @property
    def low(self) -> float:
        return min(self.values)

    @property
    def high(self) -> float:
        return max(self.values)

    def above(self, other: Spread) -> bool:
        """Every seed of this one is above every seed of the other. One seed proves nothing: False."""
        return min(len(self.values), len(other.values)) > 1 and self.low > other.high

    def percent(self) -> str:
        return self.text(lambda x: f"{100 * x:.1f}", " %")

    def text(self, form: Callable[[float], str] = lambda x: f"{x:.3g}", unit: str = "") -> str:
        spread = f" ({form(self.low)} to {form(self.high)})" if len(self.values) > 1 else ""
        return form(self.mean) + unit + spread


def by_luck(one: int, other: int) -> str:
    """How often all of so many seeds of one lie above all of the other's where there is no difference, in words.

    >>> by_luck(2, 2), by_luck(3, 3)
    ('1 time in 6', '1 time in 20')
    """
    return f"1 time in {math.comb(one + other, one):,}"


def fisher(one: int, of_one: int, other: int, of_other: int) -> float:
    """How often two shares as far apart as these come up where there is no difference: Fisher's exact test, two-sided.

    Args:
        one, other: successes. of_one, of_other: runs.

    >>> round(fisher(6, 6, 0, 6), 4), fisher(3, 6, 3, 6)
    (0.0022, 1.0)
    """
    both, runs = one + other, of_one + of_other
    ways = lambda k: math.comb(of_one, k) * math.comb(of_other, both - k)
    possible = range(max(0, both - of_other), min(both, of_one) + 1)
    seen = ways(one)
    return sum(ways(k) for k in possible if ways(k) <= seen) / math.comb(runs, both)


def power(runs: int, level: float = 0.05) -> str:
    """From which difference on so many runs of each of two tell them apart, in words.

    >>> power(6)
    'with 6 runs each, 6 successes are told from at most 1'
    """
    most = max((b for b in range(runs) if fisher(runs, runs, b, runs) <= level), default=None)
    if most is None:
        return f"with {runs} runs each, no difference in successes could be told"
    return f"with {runs} runs each, {runs} successes are told from at most {most}"


def tuned(
    records: Iterable[Record], by: Sequence[str], value: str = "best_accuracy", *, larger: bool = True
) -> dict[tuple, tuple[Spread, float]]:
    """For each combination of the columns `by`: the seeds' values at the learning rate with the best mean, and that rate.

    Every contestant is given the same rates to choose from.
    """
    by_rate: dict[tuple, dict[float, list[float]]] = {}
    for record in records:
        row = record.rows[0]
        by_rate.setdefault(tuple(row[name] for name in by), {}).setdefault(row.get("lr", 0.0), []).append(row[value])
    sign = 1 if larger else -1
    best = {}
    for key, rates in by_rate.items():
        lr = max(rates, key=lambda r: sign * sum(rates[r]) / len(rates[r]))
        best[key] = (Spread(tuple(rates[lr])), lr)
    return best


def against(a: str, one: Spread, b: str, other: Spread) -> str:
    """A sentence fragment that compares two contestants' accuracies and says how sure that is."""
    if one.low >= 0.99 and other.low >= 0.99:
        return f"{a} and {b} both solve it"
    points = 100 * abs(one.mean - other.mean)
    if one.above(other):
        return f"{a} is ahead of {b} by {points:.1f} points, in every seed"
    if other.above(one):
        return f"{b} is ahead of {a} by {points:.1f} points, in every seed"
    if len(one.values) == 1:
        return f"{a} is at {one.percent()} and {b} at {other.percent()}, in one seed"
    return f"{a} and {b} differ by {points:.1f} points, less than their seeds do"


def diverged(records: Iterable[Record]) -> list[str]:
    """A sentence on runs whose loss was no number in the end, if there are any."""
    runs: dict[tuple, list[bool]] = {}
    for record in records:
        row = record.rows[0]
        runs.setdefault((row["contestant"], row["task"], row["length"]), []).append(row["diverged"])
    words = [
        f"{who} on {task} {n} ({sum(ended)} of {len(ended)} runs)"
        for (who, task, n), ended in runs.items()
        if any(ended)
    ]
    return [f"Diverged: {', '.join(words)}."] if words else []


def grid(title: str, cells: dict[tuple[str, str], str], corner: str) -> Table:
    """A table from (row, column) -> text, in order of appearance."""
    rows, columns = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    return Table(title, [corner, *columns], [[r, *(cells.get((r, c), "") for c in columns)] for r in rows])


def contestants_table(records: Iterable[Record]) -> Table:
    """Parameters and state of everyone who took part, per model."""
    seen: dict[tuple, Row] = {}
    for record in records:
        row = record.rows[0]
        seen.setdefault((row["contestant"], row["task"], row["length"]), row)
    largest: dict[str, dict[str, Any]] = {}
    for (who, _, length), row in seen.items():
        sizes = largest.setdefault(who, {"parameters": set(), "state": {}})
        sizes["parameters"].add(row["parameters"])
        sizes["state"][length] = row["state_numbers"]
    spell = lambda numbers: " to ".join(dict.fromkeys(f"{n:,}" for n in (min(numbers), max(numbers))))
    rows = [[who, spell(s["parameters"]), spell(s["state"].values())] for who, s in largest.items()]
    return Table("Contestants", ["contestant", "parameters", "numbers in the state of a sequence"], rows)
