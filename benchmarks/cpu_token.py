"""One token of a small model on this CPU, ours beside transformers' native model: the same weights, turn by turn.

    python -m benchmarks.cpu_token [--threads 1] [--rounds 30]

KKKM of width 256 (4 heads of 64, 4 experts), batch 1, greedy, after a prompt of 64. A turn is 8 tokens; what counts is the
median over turns, and of the ratio the median over rounds, in each of which both took one turn. The logits of the two are
compared first. `load` is how many processes wanted the processors meanwhile: the ratio is the figure to trust. Writes
token.json and token.md to benchmarks/results/cpu.
"""

import argparse
import importlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date

import torch

from benchmarks.cpu import HERE
from palimpsest import KimiLinearConfig, KimiLinearForCausalLM
from palimpsest.files import write_json
from palimpsest.machine import machine

PROMPT, TURN = 64, 8


def contestants() -> tuple[dict[str, Callable[[], None]], float]:
    """What reads one more token, by name, and how far apart the two models' logits are, over their size."""
    torch.manual_seed(0)
    config = KimiLinearConfig.tiny("KKKM", hidden_size=256, linear_num_heads=4, linear_head_dim=64)
    with tempfile.TemporaryDirectory() as folder:
        KimiLinearForCausalLM(config).save_pretrained(folder)
        ours = KimiLinearForCausalLM.from_pretrained(folder)
        theirs = importlib.import_module("transformers").AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.randint(256, (1, PROMPT))
    first, state, _ = ours(ids)
    read = theirs(ids, use_cache=True)
    assert first is not None
    assert state is not None
    apart = float((first - read.logits).norm() / first.norm())
    now = {"state": state.snapshot(), "token": first[:, -1].argmax(-1)}
    then = {"cache": read.past_key_values, "token": read.logits[:, -1].argmax(-1)}

    def palimpsest() -> None:
        logits, now["state"] = ours.step_(now["token"], now["state"])
        now["token"] = logits.argmax(-1)

    def transformers() -> None:
        output = theirs(then["token"][:, None], past_key_values=then["cache"], use_cache=True)
        then["cache"], then["token"] = output.past_key_values, output.logits[:, -1].argmax(-1)

    return {"palimpsest": palimpsest, "transformers": transformers}, apart


def timed(run: Callable[[], None]) -> float:
    """Milliseconds a token over one turn."""
    began = time.perf_counter()
    for _ in range(TURN):
        run()
    return (time.perf_counter() - began) / TURN * 1e3


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="turns of each")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="on a busy machine use 1")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    runs, apart = contestants()
    for run in runs.values():
        timed(run)
    rounds = [{name: timed(run) for name, run in runs.items()} for _ in range(options.rounds)]
    ms = {name: statistics.median(one[name] for one in rounds) for name in runs}
    ratio = statistics.median(one["transformers"] / one["palimpsest"] for one in rounds)
    facts = machine() | {
        "load": round(os.getloadavg()[0], 1),
        "transformers": importlib.import_module("transformers").__version__,
        "date": str(date.today()),
    }
    HERE.mkdir(parents=True, exist_ok=True)
    write_json(HERE / "token.json", {"machine": facts, "ratio": ratio, "apart": apart, "rounds": rounds}, indent=1)
    where = ", ".join(f"{name} {value}" for name, value in facts.items())
    text = (
        f"`python -m benchmarks.cpu_token`: {where}\n\n### One token, KKKM of width 256, batch 1\n\n"
        "| palimpsest | transformers | ratio | logits apart |\n|---|---|---|---|\n"
        f"| {ms['palimpsest']:.2f} ms | {ms['transformers']:.2f} ms | {ratio:.1f} x | {apart:.0e} |\n"
    )
    (HERE / "token.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
