"""Peak GPU memory of KDA above its inputs, forward alone and with backward, for everything installed.

    python -m benchmarks.memory [--fresh]

Outputs and gradients count as the call's own. Writes memory.json and memory.md to benchmarks/results/<gpu>.
"""

import argparse

import torch

from benchmarks._timing import Results, Shape, contestants, draw, peak_mib

SHAPES = {
    str(shape): shape for shape in (Shape(1, 8192, 64), Shape(1, 8192, 16), Shape(8, 2048, 32), Shape(1, 65536, 16))
}


def measure(key: str) -> dict:
    where, name = key.split(" | ")
    part, size = where.split(", ")
    inputs, run = draw(SHAPES[size], "slow"), contestants()[name]
    if part == "forward":
        with torch.no_grad():
            return {"mib": peak_mib(lambda: run(*inputs))}
    leaves = [x.requires_grad_() for x in inputs]
    d_output = torch.randn_like(inputs[2])
    return {"mib": peak_mib(lambda: torch.autograd.grad(run(*leaves), leaves, d_output))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    results, names = Results("memory", parser.parse_args().fresh), list(contestants())
    rows = [f"{part}, {size}" for part in ("forward", "with backward") for size in SHAPES]
    results.fill([f"{row} | {name}" for row in rows for name in names], measure)
    results.write(results.table(rows, names, lambda cell: f"{cell['mib']:.0f}", "Peak memory above the inputs, MiB"))


if __name__ == "__main__":
    main()
