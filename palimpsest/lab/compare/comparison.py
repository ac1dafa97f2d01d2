"""Contestants ranked on several tests: the judge and the plots that the training experiments share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from palimpsest.lab.compare.plots import FAINT, band, figure, learning_curves, legend_below, style
from palimpsest.lab.compare.seed_statistics import Spread, contestants_table, diverged, grid
from palimpsest.lab.framework.experiment import Record, Row, Table, Verdict

PERCENT: Callable[[float], str] = lambda x: f"{100 * x:.1f}"


class Measure:
    """What counts on a test: bits a byte of text (less is better), whole answers of a needle, else answers."""

    def __init__(self, task: str):
        self.column = "bits" if task == "text" else "exact" if task.startswith("needle") else "accuracy"
        self.larger = task != "text"
        self.unit = "bits a byte" if task == "text" else "%"
        self.factor = 1 if task == "text" else 100
        self.form = (lambda x: f"{x:.3f}") if task == "text" else PERCENT

    def score(self, records: Sequence[Record]) -> float:
        """Of one learning rate's runs, the larger the better; runs that diverged are the worst."""
        values = [r.rows[0][self.column] for r in records]
        mean = sum(values) / len(values)
        return -math.inf if math.isnan(mean) else mean if self.larger else -mean

    def text(self, spread: Spread) -> str:
        return spread.text(self.form, "" if self.unit != "%" else " %")


def best(records: Sequence[Record]) -> dict[tuple[str, str], Spread]:
    """(test, contestant) -> values over seeds, at the learning rate that was best on that training task's first test."""
    by: dict[tuple, dict[float, list[Record]]] = {}
    for record in records:
        label = record.label
        key = label["contestant"], label["task"], label["length"]
        by.setdefault(key, {}).setdefault(label["lr"], []).append(record)
    scores: dict[tuple[str, str], Spread] = {}
    for (who, task, _), rates in by.items():
        first = Measure(task)
        chosen = max(rates.values(), key=first.score)
        for i, row in enumerate(chosen[0].rows):
            column = Measure(row["test_task"]).column
            scores[test_name(row), who] = Spread(tuple(r.rows[i][column] for r in chosen))
    return scores


def test_name(row: Row) -> str:
    return f"{row['test_task']} {row['test_length']}"


def versus(baseline: str, others: Mapping[str, str]) -> Callable[[Sequence[Record]], Verdict]:
    """A judge: is the baseline better than each of the others?

    others: contestant -> the words for it, such as "one decay a head".
    """

    def judge(records: Sequence[Record]) -> Verdict:
        scores = best(records)
        because, better, worse = [], 0, 0
        for test in dict.fromkeys(test for test, _ in scores):
            measure, base = Measure(test.rpartition(" ")[0]), scores.get((test, baseline))
            if base is None:
                continue
            if measure.larger and all(spread.high == 0 for (t, _), spread in scores.items() if t == test):
                because.append(f"{test}: nobody has any right.")
                continue
            ahead, behind, level = [], [], []
            for who, words in others.items():
                other = scores.get((test, who))
                if other is None:
                    continue
                up, down = (
                    (base.above(other), other.above(base)) if measure.larger else (other.above(base), base.above(other))
                )
                (ahead if up else behind if down else level).append(f"{words} ({measure.text(other)})")
            better, worse = better + len(ahead), worse + len(behind)
            parts = [
                f"{word} {', '.join(names)}"
                for word, names in (("ahead of", ahead), ("level with", level), ("behind", behind))
                if names
            ]
            because.append(f"{test}: {baseline} at {measure.text(base)} is {'; '.join(parts)}." if parts else "")
        outcome = "shown" if better and better > 2 * worse else "not shown" if worse > better else "undecided"
        because += diverged(records)
        because.append("Level means that the ranges over seeds overlap; one seed cannot progress.")
        return Verdict(outcome, [b for b in because if b], (results_table(scores), contestants_table(records)))

    return judge


def results_table(scores: Mapping[tuple[str, str], Spread]) -> Table:
    cells = {
        (who, f"{test}, {m.unit}"): m.text(s)
        for (test, who), s in scores.items()
        for m in [Measure(test.rpartition(" ")[0])]
    }
    return grid("Results at the best learning rate, mean and range over seeds", cells, "contestant")


def draw_bars(records: Sequence[Record]):
    """A row of panels, one a test: each contestant's mean, its seeds as dots; and the learning curves."""
    scores = best(records)
    tests, names = (list(dict.fromkeys(key[i] for key in scores)) for i in (0, 1))
    styles = style(names)
    bars, axes = figure(-(-len(tests) // 4), min(len(tests), 4), width=4.2, height=0.8 + 0.32 * len(names))
    for ax, test in zip(axes, tests):
        m = Measure(test.rpartition(" ")[0])
        here = [name for name in names[::-1] if (test, name) in scores]
        for i, name in enumerate(here):
            spread = scores[test, name]
            if m.unit == "%":
                ax.barh(i, m.factor * spread.mean, color=styles[name]["color"], alpha=0.75, height=0.7)
            else:  # no zero in sight, so no bar
                ax.plot(m.factor * spread.mean, i, "|", color=styles[name]["color"], markersize=14, markeredgewidth=4)
            ax.plot([m.factor * v for v in spread.values], [i] * len(spread.values), "o", color="black", markersize=3)
            ax.annotate(f" {m.form(spread.mean)}", (m.factor * spread.high, i), va="center", fontsize=8)
        ax.set_yticks(range(len(here)), here, fontsize=8)
        ax.set_title(test, fontsize=10)
        ax.set_xlabel("bits a byte (less is better)" if m.unit != "%" else "accuracy, %")
        low = min(m.factor * scores[test, n].low for n in here)
        high = max(m.factor * scores[test, n].high for n in here)
        ax.set_xlim((low - 0.1 * (high - low) - 0.01, high + 0.35 * (high - low) + 0.01) if m.unit != "%" else (0, 118))
        ax.set_ylim(-0.6, len(here) - 0.4)
    for ax in axes[len(tests) :]:
        ax.set_visible(False)
    return {"results": bars, "curves": draw_curves(records, styles)}


def draw_curves(records: Sequence[Record], styles: Mapping[str, dict]):
    tasks = list(dict.fromkeys((r.label["task"], r.label["length"]) for r in records))
    curves, axes = figure(1, len(tasks))
    for ax, (task, length) in zip(axes, tasks):
        m = Measure(task)
        here = [r for r in records if (r.label["task"], r.label["length"]) == (task, length)]
        learning_curves(ax, _at_best_rate(here, m), styles, "bits" if m.column == "bits" else m.column)
        ax.set_title(f"{task}, length {length}", fontsize=10)
        if m.column == "bits":
            ax.set_ylabel("bits a byte")
    legend_below(curves, axes)
    return curves


def _at_best_rate(records: Sequence[Record], measure: Measure) -> list[Record]:
    by: dict[str, dict[float, list[Record]]] = {}
    for record in records:
        by.setdefault(record.label["contestant"], {}).setdefault(record.label["lr"], []).append(record)
    return [record for rates in by.values() for record in max(rates.values(), key=measure.score)]


def draw_lengths(records: Sequence[Record]):
    """A panel a task: each contestant against the length of the test, trained at the dotted line."""
    scores = best(records)
    names = list(dict.fromkeys(who for _, who in scores))
    styles = style(names)
    trained = sorted({r.label["length"] for r in records})
    tasks = list(dict.fromkeys(test.rpartition(" ")[0] for test, _ in scores))
    lengths, axes = figure(1, len(tasks))
    for ax, task in zip(axes, tasks):
        m = Measure(task)
        for who in names:
            have = sorted(
                int(test.rpartition(" ")[2]) for test, w in scores if w == who and test.rpartition(" ")[0] == task
            )
            spreads = [scores[f"{task} {n}", who] for n in have]
            seeds = min((len(s.values) for s in spreads), default=0)
            if seeds:
                band(ax, have, [[m.factor * s.values[i] for s in spreads] for i in range(seeds)], who, styles[who])
        for length in trained:
            ax.axvline(length, color=FAINT, linestyle=":", linewidth=1)
        ax.set(title=task, xlabel="length of the test (dotted: of training)", xscale="log")
        ticks = sorted({int(test.rpartition(" ")[2]) for test, _ in scores if test.rpartition(" ")[0] == task})
        ax.set_xticks(ticks, [str(n) for n in ticks])
        ax.minorticks_off()
        ax.set_ylabel("bits a byte" if m.unit != "%" else "accuracy, %")
        if m.unit == "%":
            ax.set_ylim(-3, 103)
    legend_below(lengths, axes)
    return {"lengths": lengths, "curves": draw_curves(records, styles)}
