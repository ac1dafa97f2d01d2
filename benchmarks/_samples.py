"""What the benchmarks of a few plain samples share: one table of medians, with every sample beside it."""

import json
import statistics
from pathlib import Path

from benchmarks.cpu import facts_now

HERE = Path(__file__).parent / "results"


def publish(name: str, unit: str, samples: dict[str, list[float]]) -> None:
    """Writes <name>.json and <name>.md to benchmarks/results/<name>, and prints the table."""
    folder, where = HERE / name, facts_now()
    folder.mkdir(parents=True, exist_ok=True)
    content = {"machine": where, "unit": unit, "samples": samples}
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    lines = [f"`python -m benchmarks.{name}`: {', '.join(f'{key} {value}' for key, value in where.items())}"]
    lines += ["", f"| {unit} | median | least | most |", "|---|---|---|---|"]
    for what, found in samples.items():
        figures = (f"{x:,.3g}" if x < 1000 else f"{x:,.0f}" for x in (statistics.median(found), min(found), max(found)))
        lines.append(f"| {what} | {' | '.join(figures)} |")
    text = "\n".join(lines) + "\n"
    (folder / f"{name}.md").write_text(text)
    print(text)
