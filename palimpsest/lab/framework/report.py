"""One page that says what was found, how sure that is, and how to find it again; and two results side by side."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from palimpsest.checks import check
from palimpsest.lab.compare.plots import save
from palimpsest.lab.compare.seed_statistics import Spread
from palimpsest.lab.framework.experiment import Experiment, Record, Table
from palimpsest.lab.framework.results import failures, read_numbers, read_sweep


def write_report(folder: Path, experiment: Experiment, records: Sequence[Record]) -> None:
    """report.md and the plots."""
    sweep, verdict = read_sweep(folder), experiment.judge(records)
    drawn = save(experiment.draw(records), folder)
    lines = [f"# {experiment.name}: {experiment.question}", "", f"**Claim.** {experiment.claim}", ""]
    lines += [f"**Verdict: {verdict.outcome}.** {' '.join(verdict.because)}", ""]
    left = len(sweep["points"]) - len(records)
    if left > 0:
        lines += [f"*{left} of {len(sweep['points'])} points are not run yet; the verdict is of the rest.*", ""]
    for name in drawn:
        lines += [f"![{name}]({name}.png)", ""]
    for table in verdict.tables:
        lines += [table.markdown(), ""]
    failed = failures(folder)
    if failed:
        lines += [Table("Points that failed", ["point", "reason"], failed).markdown(), ""]
    lines += ["**How it was done.** " + experiment.setting, ""] if experiment.setting else []
    seeds = sorted({r.label["seed"] for r in records if "seed" in r.label})
    seconds = sum(r.seconds for r in records)
    lines += [
        f"Scale `{sweep['scale']}`: {experiment.scales[sweep['scale']]}. Seeds: {', '.join(map(str, seeds)) or 'none'}. "
        f"Time, summed over points: {_duration(seconds)}.",
        "",
    ]
    sessions = {}
    for s in sweep["sessions"]:
        sessions.setdefault((s["command"], s["machine"], s["note"]), []).append(s["began"])
    for (command, machine, note), began in sessions.items():
        lines += [
            f"- {began[0]}: `{command or 'palimpsest.lab.framework.sweep'}` on {machine}{'; ' + note if note else ''}"
        ]
    lines += [
        "",
        "Every number is in `results.csv`; a run leaves curves and settings in `results.jsonl` beside it.",
        "",
    ]
    (folder / "report.md").write_text("\n".join(lines), encoding="utf-8")


def verdict_of(folder: Path) -> tuple[str, str]:
    """What the report in a folder found and why: "shown", "not shown", "undecided" or "measured", and sentences.

    Args:
        folder: with a report.md.
    """
    text = (folder / "report.md").read_text(encoding="utf-8", errors="replace")
    found = re.search(r"^\*\*Verdict: ([^*]+)\.\*\* (.*)$", text, re.MULTILINE)
    return (found[1], found[2]) if found else ("none", "")


def compare(folders: Sequence[Path]) -> list[Table]:
    """The points that the folders' results have in common, side by side: seeds as a spread, differences in the open.

    Raises:
        ValueError: fewer than two folders, one without results, or nothing in common.
    """
    check(len(folders) >= 2, f"compare takes at least two results folders; {len(folders)} given")
    tables = []
    measured = [{key: Spread(tuple(v)) for key, v in read_numbers(folder).items()} for folder in folders]
    shared = [key for key in measured[0] if all(key in other for other in measured[1:])]
    check(
        bool(shared),
        f"the results of {' and '.join(map(str, folders))} have no point in common; compare results of one experiment",
    )
    for metric in dict.fromkeys(metric for _, metric in shared):
        rows = []
        for label, name in shared:
            if name != metric:
                continue
            spreads = [other[label, name] for other in measured]
            change = spreads[-1].mean - spreads[0].mean
            sure = "" if spreads[-1].above(spreads[0]) or spreads[0].above(spreads[-1]) else " (within the spread)"
            rows.append([label, *(s.text() for s in spreads), f"{change:+.3g}{sure}"])
        tables.append(Table(metric, ["point", *map(str, folders), "last minus first"], rows))
    return tables


def _duration(seconds: float) -> str:
    """A length of time in words.

    >>> _duration(75), _duration(7500)
    ('1.2 minutes', '2.1 hours')
    """
    if seconds < 60:
        return f"{seconds:.1f} seconds"
    return f"{seconds / 60:.1f} minutes" if seconds < 3600 else f"{seconds / 3600:.1f} hours"
