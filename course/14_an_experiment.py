import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium")

with app.setup:
    import marimo as mo
    import matplotlib.pyplot as plt
    import torch
    from lesson import exercise, solutions, tell, text, verdict, yours
    from style import BLUE, GREY, ORANGE
    from torch import nn

    from palimpsest import delta_rule, linear_attention


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    # 14. An experiment, from recipe to verdict

    After this lesson you can

    - put a claim into a form that a small run can refuse,
    - compare two models fairly: equal data, parameters, steps and seeds,
    - tell a difference from the noise of seeds, and say "undecided" when it is.

    *20 minutes.*
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## The idea

    "The eraser helps." Helps what, at which size, against what, by how much, and how would we know if it did not? An experiment
    is a claim that was made small enough to fail.

    So choose a task that *needs* the part and costs seconds. Here: eight facts under four keys, so that keys come again; then
    each key is asked for, and only its last value is right. Choose two models that differ in the part alone. Fix everything
    else before looking: data, steps, learning rate. Run several seeds, because one run of each is one draw of each. And write
    down before the run what would count: here, that the worst seed of one beats the best seed of the other.

    That is a *recipe* and a *verdict*. The lab's experiments are the same with more of everything: `palimpsest lab run parts`
    asks it of every part of the layer, and its page says "not shown" or "undecided" as readily as "shown".
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## The mathematics

    With $n$ seeds each, if the two models were in truth alike, the chance that all $n$ results of one lie above all $n$ of the
    other is

    $$2 \cdot \frac{n! \, n!}{(2n)!}\,,$$

    one in 10 for three seeds, one in 126 for five. So three seeds that do not overlap are a hint; five are evidence. It also
    says what a single run a side is worth: nothing at all, since one of them always wins.

    A difference that is there need not matter. Report its size beside the verdict, with the range over seeds.
    """)
    return


@app.cell
def _():
    KEYS, VALUES, FACTS, STEPS = 4, 8, 8, 150

    def draw(n, seed):
        """n stories: FACTS pairs, then every key once; the answer is the last value under it."""
        source = torch.Generator().manual_seed(seed)
        keys = torch.randint(KEYS, (n, FACTS), generator=source)
        keys[:, :KEYS] = torch.arange(KEYS)  # each at least once
        values = torch.randint(VALUES, (n, FACTS), generator=source)
        last = torch.stack(
            [values.gather(1, (keys == c).long().cumsum(1).argmax(1)[:, None])[:, 0] for c in range(KEYS)], 1
        )
        return keys, values, last

    class Recall(nn.Module):
        """One head of 8 rows and columns. `erase` is the part in question; all else is the same, and equally large."""

        def __init__(self, erase):
            super().__init__()
            self.erase = erase
            self.key, self.value = nn.Embedding(KEYS, 8), nn.Embedding(VALUES, 8)
            self.strength, self.out = nn.Parameter(torch.zeros(1)), nn.Linear(8, VALUES)

        def forward(self, keys, values):
            k = nn.functional.normalize(self.key(keys), dim=-1)[:, :, None]
            beta = self.strength.sigmoid().expand(*keys.shape, 1)
            v = self.value(values)[:, :, None]
            if self.erase:
                state = delta_rule(k, k, v, beta).state
            else:
                state = linear_attention(k, k, beta[..., None] * v, feature_map=lambda x: x, normalise=False).state
            ask = nn.functional.normalize(self.key.weight, dim=-1)
            return self.out(torch.einsum("ck,bhkv->bcv", ask, state))

    def run(erase, seed):
        """The recipe: held-out accuracy along the way."""
        torch.manual_seed(seed)
        model, curve = Recall(erase), []
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
        test = draw(500, 10_000)
        for step in range(STEPS):
            keys, values, last = draw(64, 1000 * seed + step)
            loss = nn.functional.cross_entropy(model(keys, values).flatten(0, 1), last.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 10 == 9:
                with torch.no_grad():
                    curve.append((model(*test[:2]).argmax(-1) == test[2]).float().mean().item())
        return curve

    return (run,)


@app.cell
def _(run):
    curves = {erase: [run(erase, seed) for seed in range(3)] for erase in (True, False)}
    final = {erase: [curve[-1] for curve in runs] for erase, runs in curves.items()}
    for erase, found in final.items():
        tell("with the eraser   " if erase else "without the eraser", [f"{x:.1%}" for x in sorted(found)])
    apart = min(final[True]) > max(final[False])
    tell("verdict:", "shown: no seed overlaps" if apart else "undecided: the seeds overlap")
    return (curves,)


@app.cell(hide_code=True)
def _(curves):
    figure, _ax = plt.subplots(figsize=(7.2, 3))
    for _erase, _colour, _name in ((True, BLUE, "with the eraser"), (False, ORANGE, "without")):
        for _i, _curve in enumerate(curves[_erase]):
            _ax.plot(range(10, 151, 10), _curve, color=_colour, label=_name if _i == 0 else None)
    _ax.axhline(1 / 8, color=GREY, linewidth=1)
    _ax.set(xlabel="step", ylabel="accuracy on held-out stories", ylim=(0, 1.02))
    _ax.legend(loc="center right")
    figure
    return (figure,)


@app.cell(hide_code=True)
def _():
    seeds = mo.ui.slider(1, 10, 1, value=3, label="seeds a side", show_value=True)
    seeds
    return (seeds,)


@app.cell(hide_code=True)
def _(seeds):
    _n = range(1, 11)
    luck, _ax = plt.subplots(figsize=(7.2, 2.2))
    _chance = [
        2 * torch.exp(2 * torch.lgamma(torch.tensor(n + 1.0)) - torch.lgamma(torch.tensor(2 * n + 1.0))).item()
        for n in _n
    ]
    _ax.bar(_n, _chance, color=[BLUE if n == seeds.value else GREY for n in _n])
    _ax.set(yscale="log", xlabel="seeds a side", ylabel="chance of no overlap",
            title=f"two equal models, {seeds.value} seeds: no overlap in {_chance[seeds.value - 1]:.2g} of all cases")  # fmt: skip
    luck
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## Exercises
    """)
    return


@app.cell(hide_code=True)
def _(answer_1):
    here_1 = exercise(1, answer_1)
    here_1
    return (here_1,)


@app.cell
def _():
    def answer_1(ours, theirs):
        """The verdict over two lists of accuracies: "shown" if every run of ours beats every one of theirs, "refuted" if it
        is the other way round, else "undecided"."""
        return None  # yours

    return (answer_1,)


@app.cell(hide_code=True)
def _(answer_1, here_1):
    def check_1(function):
        cases = [([0.9, 0.8], [0.7, 0.6]), ([0.5, 0.6], [0.7, 0.8]), ([0.9, 0.6], [0.7, 0.8]), ([0.7], [0.7])]
        found = [function(*case) for case in cases]
        if found == ["shown", "refuted", "undecided", "undecided"]:
            return "Right: the third has the best run and the worst; only an average would have hidden it."
        return f"Not yet: of the four cases it says {', '.join(map(str, found))}."

    verdict(check_1, yours(here_1, answer_1))
    return (check_1,)


@app.cell(hide_code=True)
def _(answer_2):
    here_2 = exercise(2, answer_2)
    here_2
    return (here_2,)


@app.cell
def _():
    def answer_2(n):
        """With n seeds a side and two equal models: the chance that the runs do not overlap."""
        return None  # yours

    return (answer_2,)


@app.cell(hide_code=True)
def _(answer_2, here_2):
    def check_2(function):
        found = [function(n) for n in (1, 3, 5)]
        if found[0] is None:
            return "Not yet: return a number."
        if all(abs(float(x) - t) < 1e-6 for x, t in zip(found, (1.0, 0.1, 2 / 252))):
            return "Right: with one seed it is certain, so one seed shows nothing."
        if abs(float(found[1]) - 0.05) < 1e-6:
            return "Not yet: either side may be the upper one."
        return "Not yet: of all ways to choose which n of 2n runs are ours, two have no overlap."

    verdict(check_2, yours(here_2, answer_2))
    return (check_2,)


@app.cell(hide_code=True)
def _(answer_3):
    here_3 = exercise(3, answer_3)
    here_3
    return (here_3,)


@app.cell
def _():
    def answer_3():
        """Which of these makes the comparison unfair? Return "each model its own best learning rate, from the same list",
        "more steps for the slower model", or "the same seed for both"."""
        return None  # yours

    return (answer_3,)


@app.cell(hide_code=True)
def _(answer_3, here_3):
    def check_3(function):
        found = function()
        if found == "more steps for the slower model":
            return "Right: then the steps are the difference. Equal steps, or accuracy against time, and said so."
        if found is None:
            return "Not yet: return one of the three texts."
        return "Not yet: that is fair, as long as it holds for both."

    verdict(check_3, yours(here_3, answer_3))
    return (check_3,)


@app.cell(hide_code=True)
def _():
    def solution_1(ours, theirs):
        if min(ours) > max(theirs):
            return "shown"
        return "refuted" if max(ours) < min(theirs) else "undecided"

    def solution_2(n):
        ways = 1
        for i in range(n):
            ways = ways * (2 * n - i) // (i + 1)
        return 2 / ways

    def solution_3():
        return "more steps for the slower model"

    wrong_1 = [
        lambda ours, theirs: "shown" if sum(ours) > sum(theirs) else "refuted",
        lambda ours, theirs: "shown" if max(ours) > max(theirs) else "undecided",
    ]
    wrong_2 = [lambda n: solution_2(n) / 2, lambda n: 0.5**n]
    wrong_3 = [lambda: "the same seed for both", lambda: ""]
    solutions(solution_1, solution_2, solution_3)
    return solution_1, solution_2, solution_3, wrong_1, wrong_2, wrong_3


@app.cell(hide_code=True)
def _():
    text(r"""
    ## Where to look next

    `palimpsest/lab/experiments/parts.py` is this lesson at full size; `docs/how-to/lab.md` says how to add one of yours.
    `results/lab/` has what came out so far, "undecided" included.

    Next: [the project](15_the_project.md), which decides whether you have understood it all.
    """)
    return


if __name__ == "__main__":
    app.run()
