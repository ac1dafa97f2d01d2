"""KDA on this GPU against everything else installed: one process, fast and slow gates, error beside time.

    python -m benchmarks.speed                    everything; continues where an interrupted run stopped
    python -m benchmarks.speed --quick            two shapes
    python -m benchmarks.speed --only decode      one of: forward, logits, backward, decode, family
    python -m benchmarks.speed --fresh            forget earlier results

Writes speed.json, speed.md and speed.png to benchmarks/results/<gpu>. GPU time is the median between CUDA
events over replays of a captured graph (eager where a contestant cannot be captured); host time is wall time per eager
call. `logits` is the forward as a layer calls it, with norms, gate and sigmoid inside the kernel. `family` is figure 2 of the
Kimi Linear paper (KDA against DPLR, one sequence, 16 heads, T = 2K to 64K), extended.
"""

import argparse

import torch

from benchmarks._timing import (
    GATES,
    Results,
    Shape,
    contestants,
    draw,
    gpu_ms,
    host_us,
    peak_mib,
    relative_error,
    relatives,
)  # fmt: skip
from palimpsest import kda, kda_from_logits, kda_step_
from palimpsest.ops.gates import SigmoidDecay, SoftplusDecay

SHAPES = [
    Shape(1, 8192, 96), Shape(1, 8192, 64), Shape(1, 8192, 16), Shape(1, 65536, 16), Shape(8, 2048, 32), Shape(1, 1024, 32),
]  # fmt: skip
LENGTHS = [2048 << x for x in range(6)]
RIVALS = 8192  # tokens at which rivals' cousins are timed: each takes minutes to tune itself
OURS = ["KDA", "DPLR", "Gated DeltaNet", "GLA", "softmax"]  # in the figure
BATCHES = [1, 8, 64, 256, 1024]
INSIDE = {"sigmoid gate": SigmoidDecay, "softplus gate": SoftplusDecay}
COPY_TB = 4.3  # TB/s, read and written, of an H200


def truth(inputs) -> torch.Tensor:
    """Of the first 1,024 tokens and four heads of one sequence in fp64."""
    return kda(*(x[:1, :1024, :4].double() for x in inputs), backend="chunked").output


def forward(names, shapes):
    def measure(key):
        where, name = key.split(" | ")
        _, gates, size = where.split(", ")
        inputs = draw(shapes[size], gates)
        run = contestants()[name]
        with torch.no_grad():
            error = relative_error(run(*inputs)[:1, :1024, :4], truth(inputs))
            call = lambda: run(*inputs)
            return {"ms": gpu_ms(call), "host_us": host_us(call), "peak_mib": peak_mib(call), "error": error}

    return [f"forward, {gates}, {size} | {name}" for gates in GATES for size in shapes for name in names], measure


def logits(shapes):
    def measure(key):
        size, name = key.removeprefix("logits, ").split(" | ")
        (q, k, v, g, beta), H, K = draw(shapes[size], "slow"), shapes[size].H, shapes[size].K
        gate = INSIDE[name](A_log=torch.zeros(H, device="cuda"), dt_bias=torch.zeros(H, K, device="cuda"))
        inputs = *(torch.randn_like(x) for x in (q, k, v)), torch.randn_like(g, dtype=q.dtype), torch.randn_like(beta)
        with torch.no_grad():
            return {"ms": gpu_ms(lambda: kda_from_logits(*inputs, gate=gate))}

    return [f"logits, {size} | {name}" for size in shapes for name in INSIDE], measure


def backward(names, shapes):
    def measure(key):
        where, name = key.split(" | ")
        _, gates, size = where.split(", ")
        inputs = [x.requires_grad_() for x in draw(shapes[size], gates)]
        d_output = torch.randn_like(inputs[2])
        ms = backward_ms(contestants()[name](*inputs), inputs, d_output)
        both = lambda: torch.autograd.grad(contestants()[name](*inputs), inputs, d_output)
        return {"ms": ms, "peak_mib": peak_mib(both)}

    return [f"backward, {gates}, {size} | {name}" for gates in GATES for size in shapes for name in names], measure


def backward_ms(output, inputs, d_output) -> float:
    """Of the inputs that the output depends on: cousins take only some of them."""
    gradients = lambda: torch.autograd.grad(output, inputs, d_output, retain_graph=True, allow_unused=True)
    return gpu_ms(gradients, graph=False)


def decode(heads: int = 32, K: int = 128):
    def measure(key):
        batch = int(key.split(" | ")[0].removeprefix("decode, B"))
        q, k, v, g, beta = (x[:, 0].contiguous() for x in draw(Shape(batch, 1, heads, K), "slow"))
        states = [
            torch.zeros(batch, heads, K, K, device="cuda") for _ in range(max(1, 16 // batch))
        ]  # beyond the L2 cache
        call = lambda: [kda_step_(q, k, v, g, beta, state, backend="triton") for state in states]
        ms = gpu_ms(call) / len(states)
        return {"ms": ms, "tb_s": batch * heads * K * K * 8 / ms / 1e9}

    return [f"decode, B{batch} | triton" for batch in BATCHES], measure


def family():
    def measure(key):
        where, name = key.split(" | ")
        part, length = where.split(", T")
        inputs, run = draw(Shape(1, int(length), 16), "slow"), relatives()[name]
        if part == "family":
            with torch.no_grad():
                return {"ms": gpu_ms(lambda: run(*inputs))}
        leaves = [x.requires_grad_() for x in inputs]
        output = run(*leaves)
        return {"ms": backward_ms(output, leaves, torch.randn_like(output))}

    keys = [
        f"family, T{T} | {name}" for T in LENGTHS for name in relatives() if T == RIVALS or not name.startswith("FLA")
    ]
    return keys + [f"family backward, T{RIVALS} | {name}" for name in relatives()], measure


def plot(results: Results) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullLocator

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name in OURS:
        cells = [(T, results.cells.get(f"family, T{T} | {name}", {})) for T in LENGTHS]
        points = [(T, cell["ms"]) for T, cell in cells if "ms" in cell]
        if points:
            axes.plot(*zip(*points), marker="o", label=name)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="tokens",
        ylabel="milliseconds",
        title="one sequence, 16 heads of 128 channels",
    )
    axes.set_xticks(LENGTHS, [f"{T // 1024}K" for T in LENGTHS])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(results.folder / "speed.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two shapes")
    parser.add_argument("--only", choices=["forward", "logits", "backward", "decode", "family"])
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    options = parser.parse_args()
    results, names = Results("speed", options.fresh), list(contestants())
    shapes = {str(shape): shape for shape in (SHAPES[2:3] + SHAPES[5:] if options.quick else SHAPES)}
    parts = {
        "forward": forward(names, shapes),
        "logits": logits(shapes),
        "backward": backward(names, shapes),
        "decode": decode(),
        "family": family(),
    }
    for part, (keys, measure) in parts.items():
        if options.only in (None, part):
            results.fill(keys, measure)
    rows = lambda part: list(dict.fromkeys(key.split(" | ")[0] for key in parts[part][0]))
    full = lambda cell: (
        f"{cell['ms']:.3f} ms, host {cell['host_us']:.0f} us, {cell['peak_mib']:.0f} MiB, error {cell['error']:.1e}"
    )
    results.write(
        results.table(rows("forward"), names, full, "Forward"),
        results.table(rows("logits"), list(INSIDE), lambda x: f"{x['ms']:.3f} ms", "Forward from logits"),
        results.table(rows("backward"), names, lambda x: f"{x['ms']:.3f} ms, {x['peak_mib']:.0f} MiB with forward", "Backward"),
        results.table(
            rows("decode"), ["triton"], lambda x: f"{x['ms'] * 1e3:.1f} us, {x['tb_s'] / COPY_TB:.0%} of {COPY_TB} TB/s",
            "Decode, one token, 32 heads, fp32 state",
        ),
        results.table(rows("family"), list(relatives()), lambda x: f"{x['ms']:.3f}", "Family: ms, 1xT H16"),
    )  # fmt: skip
    plot(results)


if __name__ == "__main__":
    main()
