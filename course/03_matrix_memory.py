import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium")

with app.setup:
    import marimo as mo
    import matplotlib.pyplot as plt
    import torch
    from lesson import exercise, solutions, tell, text, verdict, yours
    from style import BLUE, GREY, ORANGE, TEAL, board

    from palimpsest import delta_rule, gated_linear_attention, linear_attention


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    # 3. A matrix that remembers

    After this lesson you can

    - write into a matrix with an outer product and read from it with a vector,
    - say what a row of the memory is (a feature of the keys) and what it is not (a word),
    - tell from the norm of a memory over time whether it forgets, replaces, or only adds.

    *10 minutes.*
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## The idea

    The oldest recurrent networks remember with a *vector*: a few hundred numbers into which everything must be mixed. A
    vector can be scaled and added to, and that is about all. Ask it two questions and it gives the same answer.

    A *matrix* can be asked. It has $K$ rows and $V$ columns; a question is a vector of $K$ numbers, the answer one of $V$. It
    takes up the question row by row: each row is a pattern of values, and the question says how much of each row is
    wanted. Different questions, different answers, from one board.

    It is tempting to think of a row as a slot in which one word lies. It is not. A key is a list of *features*, say
    animate, plural, red, and each row belongs to one feature. A word with three features is written into three rows at
    once, a share in each, and shares those rows with every other word that has them. The memory holds $K$ rows, and many
    more facts than $K$, each smeared over all rows in its own proportions.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## The mathematics

    To write a value $v$ under a key $k$, add the outer product, the table of all products of one number of each:

    $$S \leftarrow S + k v^{\top}, \qquad (k v^{\top})_{c d} = k_c v_d .$$

    To read with a query $q$, add up the rows, each times its number of the query: $o = S^{\top} q$. After writes of $k_s, v_s$,

    $$o = \sum_s (k_s^{\top} q) \, v_s .$$

    If the keys have length one and stand at right angles, a query equal to one of them gets exactly its value. There is
    room for $K$ such keys. Other keys answer too, by as much as they resemble the query: that is at once how the memory
    generalises and how it confuses.
    """)
    return


@app.cell
def _():
    # The key [0, 1, 0] has one feature, the second: only row 2 is written.
    k = torch.tensor([0.0, 1.0, 0.0]).view(1, 1, 1, 3)
    v = torch.tensor([5.0, 5.0, 5.0]).view(1, 1, 1, 3)
    one_row = linear_attention(k, k, v, feature_map=lambda x: x, normalise=False).state[0, 0]
    tell(one_row)

    # The key [0.6, 0.8, 0] has two: the value lies in two rows, a share in each, and reads back whole.
    k2 = torch.tensor([0.6, 0.8, 0.0]).view(1, 1, 1, 3)
    result = linear_attention(k2, k2, v, feature_map=lambda x: x, normalise=False)
    two_rows = result.state[0, 0]
    tell(two_rows, "read:", result.output.flatten().tolist())
    return one_row, two_rows


@app.cell(hide_code=True)
def _(one_row, two_rows):
    figure, _axes = plt.subplots(1, 2, figsize=(6, 2.6))
    board(_axes[0], one_row, "k = [0, 1, 0]", limit=5)
    board(_axes[1], two_rows, "k = [0.6, 0.8, 0]", limit=5)
    for _ax in _axes:
        _ax.set_yticks(range(3), ["row 1", "row 2", "row 3"])
        _ax.tick_params(length=0)
    figure
    return (figure,)


@app.cell
def _():
    # Three memories read the same 400 tokens, with 16 features and keys of length one.
    T, K = 400, 16
    draw = torch.Generator().manual_seed(0)
    keys = torch.nn.functional.normalize(torch.randn(1, T, 1, K, generator=draw), dim=-1)
    values = torch.randn(1, T, 1, 8, generator=draw)
    fade = torch.full((1, T, 1, K), 0.97).log()

    def norms(run):
        """The size of the memory after each token."""
        S, sizes = None, []
        for t in range(T):
            S = run(t, S).state
            sizes.append(S.norm().item())
        return sizes

    tokens = lambda t: (keys[:, t : t + 1], keys[:, t : t + 1], values[:, t : t + 1])
    adds = norms(lambda t, S: linear_attention(*tokens(t), feature_map=lambda x: x, normalise=False, state=S))
    fades = norms(lambda t, S: gated_linear_attention(*tokens(t), fade[:, t : t + 1], state=S))
    replaces = norms(lambda t, S: delta_rule(*tokens(t), torch.ones(1, 1, 1), state=S))
    return adds, fades, replaces


@app.cell(hide_code=True)
def _(adds, fades, replaces):
    over_time, _ax = plt.subplots(figsize=(7.2, 2.8))
    for _sizes, _name, _colour in (
        (adds, "only adds", ORANGE),
        (fades, "adds and fades", TEAL),
        (replaces, "replaces", BLUE),
    ):
        _ax.plot(_sizes, color=_colour)
        _ax.text(405, _sizes[-1], _name, color=_colour, va="center")
    _ax.axhline(0, color=GREY, linewidth=0.5)
    _ax.set(xlabel="token", ylabel="size of the memory", xlim=(0, 400))
    over_time
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    The memory that only adds grows with the square root of what it has read, like a walk with random steps; its answers
    drown in one another. The one that fades settles where each write replaces what faded. The one that replaces settles
    by itself, because a write first takes away what it finds.

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
    def answer_1(pairs):
        """The memory after writing each (key, value) of a list by outer products: [K, V]."""
        return None  # yours

    return (answer_1,)


@app.cell(hide_code=True)
def _(answer_1, here_1):
    def check_1(function):
        draw = torch.Generator().manual_seed(1)
        pairs = [(torch.randn(4, generator=draw), torch.randn(2, generator=draw)) for _ in range(3)]
        k, v = (torch.stack(x).view(1, 3, 1, -1) for x in zip(*pairs))
        truth = linear_attention(k, k, v, feature_map=lambda x: x, normalise=False).state[0, 0]
        found = function(pairs)
        if found is None:
            return "Not yet: return the matrix."
        if found.shape == truth.T.shape and torch.allclose(found, truth.T, atol=1e-5):
            return "Not yet: rows belong to the key's features, columns to the value's."
        if found.shape == truth.shape and torch.allclose(found, truth, atol=1e-5):
            return "Right: a sum of outer products, in any order."
        return "Not yet: add one outer product for each pair."

    verdict(check_1, yours(here_1, answer_1))
    return (check_1,)


@app.cell(hide_code=True)
def _(answer_2):
    here_2 = exercise(2, answer_2)
    here_2
    return (here_2,)


@app.cell
def _():
    def answer_2(K):
        """How many keys of length one can a memory with K rows hold so that each reads back exactly its value?"""
        return None  # yours

    return (answer_2,)


@app.cell(hide_code=True)
def _(answer_2, here_2):
    def check_2(function):
        found = [function(K) for K in (1, 16, 128)]
        if found[0] is None:
            return "Not yet: return a number."
        if found == [1, 16, 128]:
            return (
                "Right: as many as there are right angles in K dimensions. After that, keys must resemble each other."
            )
        return "Not yet: they have to stand at right angles to each other."

    verdict(check_2, yours(here_2, answer_2))
    return (check_2,)


@app.cell(hide_code=True)
def _():
    def solution_1(pairs):
        return sum(torch.outer(k, v) for k, v in pairs)

    def solution_2(K):
        return K

    wrong_1 = [lambda pairs: sum(torch.outer(v, k) for k, v in pairs), lambda pairs: torch.outer(*pairs[-1])]
    wrong_2 = [lambda K: K * K, lambda K: 2**K]
    solutions(solution_1, solution_2)
    return solution_1, solution_2, wrong_1, wrong_2


@app.cell(hide_code=True)
def _():
    text(r"""
    ## Where to look next

    `palimpsest/ops/reference.py`: the line with `k`, `w_BHV` and an outer product is the write. `palimpsest explain` shows
    it on a page.

    Next: [the delta rule](04_the_delta_rule.md), which looks before it writes.
    """)
    return


if __name__ == "__main__":
    app.run()
