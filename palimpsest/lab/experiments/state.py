"""The stored state: how few bits may the memory keep between tokens?"""

from collections.abc import Sequence

from palimpsest.lab.compare.plots import band, figure, legend_below, style
from palimpsest.lab.compare.seed_statistics import Spread, grid
from palimpsest.lab.framework.experiment import Experiment, Record, Verdict
from palimpsest.lab.measure.state_formats import FORMATS
from palimpsest.lab.measure.state_quantization import TIMESCALES, Drift, StoredState
from palimpsest.lab.model_variants import MODEL_VARIANTS, PAPER_SIZE, Size
from palimpsest.lab.tasks import MQAR, Text
from palimpsest.lab.training import Training


def points(scale: str) -> list:
    kda = MODEL_VARIANTS["kda"]
    if scale == "tiny":
        drifts = [
            Drift(format=name, timescale=timescale, tokens=32, heads=1, channels=8)
            for name in ("bfloat16", "int8")
            for timescale in TIMESCALES
        ]
        task = MQAR(length=16, vocab_size=16, pairs=3)
        size = Size(layers=1, hidden_size=16, heads=1, head_dim=8, mlp=32)
        learned = Training(
            who=kda, train=(task,), size=size, steps=2, tokens_per_step=64, evaluate_every=1, test_batches=1
        )
        return [*drifts, StoredState(training=learned, tests=(task,), batch_size=2)]
    seeds = (0, 1, 2)
    if scale == "small":
        tokens, heads, channels, size = 4096, 4, 32, Size()
        recall, reading = MQAR(length=64, vocab_size=64, pairs=8), Text(length=128)
        shared = {
            "steps": 400,
            "tokens_per_step": 1024,
            "evaluate_every": 100,
            "test_batches": 2,
            "lr": 3e-3,
            "size": size,
        }
        tests = {"mqar": (recall,), "text": (Text(length=128), Text(length=1024))}
    else:
        tokens, heads, channels, size = 32768, 16, 128, PAPER_SIZE
        recall, reading = MQAR(length=512, vocab_size=512, pairs=64), Text(length=1024)
        shared = {
            "steps": 4000,
            "tokens_per_step": 32768,
            "evaluate_every": 500,
            "test_batches": 2,
            "lr": 1e-3,
            "size": size,
        }
        tests = {"mqar": (recall,), "text": (Text(length=1024), Text(length=8192))}
    drifts = [
        Drift(format=name, timescale=timescale, tokens=tokens, heads=heads, channels=channels, seed=seed)
        for seed in seeds
        for timescale in TIMESCALES
        for name in FORMATS
    ]
    learned = [
        StoredState(training=Training(who=kda, train=(task,), seed=seed, **shared), tests=tests[task.name])  # type: ignore[arg-type]
        for seed in seeds[:2]
        for task in (recall, reading)
    ]
    return [*drifts, *learned]


def _drift(records: Sequence[Record]) -> dict[tuple[str, str], dict[int, list[float]]]:
    """(timescale, format) -> tokens -> errors over seeds."""
    errors: dict[tuple[str, str], dict[int, list[float]]] = {}
    for record in records:
        for row in record.rows if "timescale" in record.label else ():
            by_tokens = errors.setdefault((row["timescale"], row["format"]), {})
            by_tokens.setdefault(row["tokens"], []).append(row["relative_error"])
    return errors


def _answers(records: Sequence[Record]) -> dict[tuple[str, str], tuple[Spread, Spread]]:
    """(format, test) -> accuracy and bits over seeds."""
    answers: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for record in records:
        for row in record.rows if "contestant" in record.label else ():
            test = f"{row['test_task']} {row['test_length']}"
            answers.setdefault((row["format"], test), []).append((row["accuracy"], row["bits"]))
    return {key: (Spread(tuple(a for a, _ in v)), Spread(tuple(b for _, b in v))) for key, v in answers.items()}


def judge(records: Sequence[Record]) -> Verdict:
    drift, answers, because, tables = _drift(records), _answers(records), [], []
    if drift:
        last = {key: (max(by), Spread(tuple(by[max(by)]))) for key, by in drift.items()}
        cells = {
            (how, f"{timescale} life, {tokens:,} tokens"): s.text(lambda x: f"{x:.1e}")
            for (timescale, how), (tokens, s) in last.items()
        }
        tables.append(grid("Relative error of what is read, at the end", cells, "format"))
        for timescale in dict.fromkeys(timescale for timescale, _ in drift):
            grew = {}
            for how in dict.fromkeys(how for kind, how in drift if kind == timescale):
                by = drift[timescale, how]
                middle = max(by) // 8
                if middle in by:
                    grew[how] = (sum(by[max(by)]) / len(by[max(by)])) / max(sum(by[middle]) / len(by[middle]), 1e-30)
            still = [how for how, factor in grew.items() if factor > 1.3]
            if grew:
                because.append(
                    f"{timescale} life: over the last factor of 8 in length the error still grows with "
                    f"{', '.join(f'{how} ({grew[how]:.1f}x)' for how in still) or 'no format'}."
                )
    if answers:
        tests = list(dict.fromkeys(test for _, test in answers))
        for test in tests:
            base_accuracy, base_bits = answers.get(("float32", test), (None, None))
            lost = [
                f"{how} {100 * (a.mean - base_accuracy.mean):+.1f} points, {b.mean - base_bits.mean:+.3f} bits"
                for (how, t), (a, b) in answers.items()
                if t == test and how != "float32" and base_accuracy and base_bits
            ]
            because.append(f"{test}, against float32: {'; '.join(lost)}.")
        cells = {(how, f"{test}, accuracy"): a.percent() for (how, test), (a, _) in answers.items()}
        cells |= {(how, f"{test}, bits"): b.text(lambda x: f"{x:.3f}") for (how, test), (_, b) in answers.items()}
        cells |= {
            (row["format"], "bytes a number"): f"{row['bytes_per_number']:.3g}" for r in records for row in r.rows
        }
        tables.append(grid("A model with its memories stored so", cells, "format"))
    return Verdict("measured", because, tables)


def draw(records: Sequence[Record]):
    drift, styles, figures = _drift(records), style(list(FORMATS)), {}
    timescales = list(dict.fromkeys(timescale for timescale, _ in drift))
    if timescales:
        columns = min(len(timescales), 3)
        figures["drift"], axes = figure(-(-len(timescales) // columns), columns)
        for ax in axes[len(timescales) :]:
            ax.set_visible(False)
        for ax, timescale in zip(axes, timescales):
            for how in FORMATS:
                by = drift.get((timescale, how))
                if by:
                    x = sorted(by)
                    band(ax, x, list(zip(*(by[n] for n in x))), how, styles[how])
            span = TIMESCALES[timescale]
            fades = span.shortest < span.longest
            words = f"channels live {span.shortest} to {span.longest:,} tokens" if fades else "nothing fades"
            words += f", beta up to {span.beta:g}"
            ax.set(
                xscale="log", yscale="log", xlabel="tokens read", ylabel="relative error of what is read", title=words
            )
            ax.title.set_fontsize(10)
            ticks = sorted({int(x) for line in ax.get_lines() for x in line.get_xdata()})[::2]
            ax.set_xticks(ticks, [f"{n:,}" for n in ticks])
            ax.minorticks_off()
        legend_below(figures["drift"], axes)
        for legend in figures["drift"].legends:
            legend.set_ncols(4)
    return figures


EXPERIMENT = Experiment(
    name="state",
    question="how few bits may the memory keep between tokens?",
    claim=(
        "The released models keep it in float32. In the wild an int8 state cost a large model half of its answers on a "
        "reasoning test, and feeding the rounding errors back restored them (vLLM issue 55196)."
    ),
    scales={
        "tiny": "every part in seconds, on a CPU; proves nothing",
        "small": "4,096 tokens through 4 memories of 32 x 32, 3 seeds; models of width 64, 2 seeds: minutes on a CPU",
        "full": "32,768 tokens through 16 memories of 128 x 128, 3 seeds; models of width 256, 2 seeds: about an hour on an H200",
    },
    points=points,
    judge=judge,
    draw=draw,
    setting=(
        "The memory is rounded after every token, as in decoding; arithmetic is in float32, the law in float64. float8 (e4m3) "
        "and int8 have one float32 scale a key channel. Feedback keeps four bits of each rounding error for the next token."
    ),
)
