"""How far from the fp64 law: outputs, states and every gradient, relative to their own size, over inputs that hurt.

    python -m benchmarks.accuracy [--fresh]

Writes accuracy.json and accuracy.md to benchmarks/results/<gpu>. Inputs are those of palimpsest.testing.
"""

import argparse

import torch

from benchmarks._timing import Results, contestants, relative_error
from palimpsest import kda
from palimpsest.testing import DECAYS, KEYS, Case

NAMES = "output d_q d_k d_v d_log_decay d_beta".split()


def measure(key: str) -> dict:
    where, name = key.split(" | ")
    keys, decay = where.split(", ")
    case = Case(keys, "sigmoid", decay, tokens=500, sequences=1, heads=2, key_dim=128, value_dim=128)
    inputs = [x.cuda() for x in case.kda(torch.bfloat16)[:5]]
    weights = torch.randn(inputs[2].shape, generator=torch.Generator().manual_seed(1)).bfloat16().cuda()

    def everything(run, inputs):
        leaves = [x.requires_grad_() for x in inputs]
        output = run(*leaves)
        return [output.detach(), *torch.autograd.grad(output, leaves, weights.to(output.dtype))]

    truth = everything(lambda *x: kda(*x, backend="chunked").output, [x.double() for x in inputs])
    ours = everything(contestants()[name], [x.detach().clone() for x in inputs])
    return {part: relative_error(a, t) for part, a, t in zip(NAMES, ours, truth)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    results, names = Results("accuracy", parser.parse_args().fresh), list(contestants())
    rows = [f"{keys}, {decay}" for keys in KEYS for decay in DECAYS]
    results.fill([f"{row} | {name}" for row in rows for name in names], measure)
    show = lambda cell: f"{cell['output']:.1e}, worst {max(cell, key=cell.get)} {max(cell.values()):.1e}"
    results.write(results.table(rows, names, show, "Relative error in bf16: output, and the worst of all"))


if __name__ == "__main__":
    main()
