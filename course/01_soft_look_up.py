import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium")

with app.setup:
    import marimo as mo
    import matplotlib.pyplot as plt
    import torch
    from lesson import exercise, solutions, tell, text, verdict, yours
    from style import BLUE, SIGNED

    from palimpsest import softmax_lookup


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    # 1. A dictionary that answers softly

    After this lesson you can

    - turn a dictionary look-up into arithmetic that can be learned,
    - ask many questions at once with one matrix product, and keep each from seeing the future,
    - read the shapes that the library uses everywhere.

    *10 minutes.*
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## The idea

    A dictionary answers a key with its value, and a key that is not in it with an error. That is too brittle for words.
    Nobody who reads *the old captain* wants to hear that only *the captain* is on file.

    So let every entry answer, each by as much as its key resembles the question. The answer is a mixture of values: a
    question that matches one key closely gets nearly its value, one between two keys gets a bit of both. Nothing is ever
    missing. And because the mixture changes smoothly with question, keys and values, all three can be learned.

    This is attention. Each token of a text asks one question, and answers everyone else's: it brings a *query*, a *key*
    and a *value*.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## The mathematics

    Resemblance is a dot product, and a softmax turns resemblances into shares that add up to one:

    $$o = \sum_s w_s v_s, \qquad w_s = \frac{\exp(q^{\top} k_s)}{\sum_r \exp(q^{\top} k_r)}.$$

    With all queries as rows of a matrix $Q$, all keys as rows of $K$, values as rows of $V$, every look-up is done at once:

    $$O = \mathrm{softmax}(Q K^{\top}) \, V .$$

    Row $t$ of $Q K^{\top}$ compares the question of token $t$ with every key. A model that predicts the next token must not see it,
    so entries with $s > t$ are struck out before the softmax: the *causal* mask, a lower triangle. It is usual to divide by
    the square root of the number of channels first, so that long vectors do not make every answer hard.
    """)
    return


@app.cell
def _():
    # Three entries, and a question between the first two.
    keys = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    values = torch.tensor([[10.0], [20.0], [30.0]])
    question = torch.tensor([2.0, 2.0])
    weights = (keys @ question).softmax(-1)
    tell("weights", [round(w, 3) for w in weights.tolist()], " answer", round((weights @ values).item(), 2))

    # The same by the library. Tensors are [sequences, tokens, heads, channels]; the state is all keys and values so far.
    scroll = (keys.view(1, 3, 1, 2), values.view(1, 3, 1, 1))
    ask = lambda q, k, v: softmax_lookup(
        q.view(1, 1, 1, 2), k.view(1, 1, 1, 2), v.view(1, 1, 1, 1), state=scroll, scale=1.0
    )
    output, (all_keys, _) = ask(question, torch.tensor([-50.0, -50.0]), torch.tensor([0.0]))
    tell("answer", round(output.item(), 2), " keys in the scroll now", all_keys.shape[1])
    return


@app.cell
def _():
    # A sentence: every token asks, all at once, and none sees the future.
    words = "the door is red . the door is".split()
    kinds = {word: i for i, word in enumerate(dict.fromkeys(words))}
    T = len(words)
    spelled = torch.nn.functional.one_hot(torch.tensor([kinds[w] for w in words]), len(kinds)).float()
    q, k = 3 * spelled.view(1, T, 1, -1), spelled.view(1, T, 1, -1)
    positions = torch.eye(T).view(1, T, 1, T)  # as values: the answer then shows whom each token heard
    heard = softmax_lookup(q, k, positions, scale=1.0)[0][0, :, 0]
    tell(
        "the last token hears",
        {f"{i} {w}": round(x, 2) for i, (w, x) in enumerate(zip(words, heard[-1].tolist())) if x > 0.1},
    )
    return heard, words


@app.cell(hide_code=True)
def _(heard, words):
    figure, _ax = plt.subplots(figsize=(4.6, 4))
    _ax.imshow(heard.numpy(), cmap=SIGNED, vmin=-1, vmax=1)
    _ax.set_xticks(range(len(words)), words, rotation=60)
    _ax.set_yticks(range(len(words)), words)
    _ax.tick_params(length=0)
    _ax.spines[:].set_visible(False)
    _ax.set(xlabel="who is heard", ylabel="who asks")
    figure
    return (figure,)


@app.cell(hide_code=True)
def _():
    length = mo.ui.slider(0.0, 6.0, 0.5, value=2.0, label="length of the question", show_value=True)
    length
    return (length,)


@app.cell(hide_code=True)
def _(length):
    _angle = torch.linspace(-torch.pi, torch.pi, 200)
    _keys = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    _questions = length.value * torch.stack((_angle.cos(), _angle.sin()), -1)
    answers, _ax = plt.subplots(figsize=(7.2, 2.4))
    _answers = (_questions @ _keys.T).softmax(-1) @ torch.tensor([10.0, 20.0, 30.0])
    _ax.plot(_angle.rad2deg().numpy(), _answers.numpy(), color=BLUE)
    for _at, _value in ((0, 10), (90, 20), (180, 30)):
        _ax.plot(_at, _value, "o", color=BLUE, mfc="none")
    _ax.set(xlabel="direction of the question, degrees", ylabel="answer", ylim=(8, 32), xlim=(-180, 185))
    answers
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    The circles are the three entries. A long question gets a hard answer, a short one the average of everything.

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
    def answer_1(question, keys, values):
        """The soft look-up: question [K], keys [S, K], values [S, V] -> [V]."""
        return None  # yours

    return (answer_1,)


@app.cell(hide_code=True)
def _(answer_1, here_1):
    def check_1(function):
        draw = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(*n, generator=draw) for n in ((4,), (5, 4), (5, 2)))
        found = function(q, k, v)
        if found is None:
            return "Not yet: return the mixture of values."
        if found.shape == (2,) and torch.allclose(found, (k @ q).softmax(-1) @ v, atol=1e-5):
            return "Right: resemblance, shares, mixture."
        if found.shape == (2,) and torch.allclose(found, (k @ q) @ v, atol=1e-5):
            return "Not yet: the resemblances still have to become shares that add up to one."
        return "Not yet: compare the question with every key, take the softmax, mix the values."

    verdict(check_1, yours(here_1, answer_1))
    return (check_1,)


@app.cell(hide_code=True)
def _(answer_2):
    here_2 = exercise(2, answer_2)
    here_2
    return (here_2,)


@app.cell
def _():
    def answer_2(Q, K, V):
        """All tokens at once, none seeing the future: [T, channels] each -> [T, channels of V]."""
        return None  # yours

    return (answer_2,)


@app.cell(hide_code=True)
def _(answer_2, here_2):
    def check_2(function):
        draw = torch.Generator().manual_seed(1)
        Q, K, V = (torch.randn(6, n, generator=draw) for n in (4, 4, 3))
        truth = softmax_lookup(*(x.view(1, 6, 1, -1) for x in (Q, K, V)), scale=1.0)[0][0, :, 0]
        found = function(Q, K, V)
        if found is None:
            return "Not yet: return one answer for each token."
        if found.shape == truth.shape and torch.allclose(found, truth, atol=1e-5):
            return "Right: struck out before the softmax, so that the shares of what is left add up to one."
        if found.shape == truth.shape and torch.allclose(found[-1], truth[-1], atol=1e-5):
            return "Not yet: the last token is right, since it may see all. The others see too much, or their shares are off."
        return "Not yet: minus infinity above the diagonal, then softmax over each row."

    verdict(check_2, yours(here_2, answer_2))
    return (check_2,)


@app.cell(hide_code=True)
def _():
    def solution_1(question, keys, values):
        return (keys @ question).softmax(-1) @ values

    def solution_2(Q, K, V):
        future = torch.ones(len(Q), len(Q), dtype=torch.bool).triu(1)
        return (Q @ K.T).masked_fill(future, -torch.inf).softmax(-1) @ V

    wrong_1 = [lambda q, k, v: (k @ q) @ v, lambda q, k, v: v[(k @ q).argmax()]]
    wrong_2 = [lambda Q, K, V: (Q @ K.T).softmax(-1) @ V, lambda Q, K, V: (Q @ K.T).softmax(-1).tril() @ V]
    solutions(solution_1, solution_2)
    return solution_1, solution_2, wrong_1, wrong_2


@app.cell(hide_code=True)
def _():
    text(r"""
    ## Where to look next

    The law of the scroll: `softmax_lookup` in `palimpsest/ops/reference.py`.

    Next: [from softmax to linear attention](02_from_softmax_to_linear.md), or how to stop unrolling the scroll.
    """)
    return


if __name__ == "__main__":
    app.run()
