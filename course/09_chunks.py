import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium")

with app.setup:
    import marimo as mo
    import matplotlib.pyplot as plt
    import torch
    from lesson import exercise, solutions, tell, text, verdict, yours
    from style import BLUE, GREY, ORANGE, SIGNED

    from palimpsest import kda
    from palimpsest.ops import chunked, reference


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    # 9. Chunks: a loop becomes matrix products

    After this lesson you can

    - explain why a token-by-token loop is slow on any machine, and what a chunk buys,
    - derive the triangular system behind $W$ and $U$, and solve it by forward substitution,
    - say where the textbook form overflows, and how a tree of blocks avoids every large number.

    *20 minutes.*
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## The idea

    The law is a loop: each token needs the board that the one before it left. A processor that could do thousands of
    multiplications at once waits for one small correction after another.

    Cut the text into *chunks* of, say, 32 tokens. Inside a chunk no token needs the whole board of the one before it. It
    needs two things: what the board held *when the chunk began*, which is one matrix product for all 32 at once, and what
    the *other tokens of the chunk* did in the meantime, and those are few. Only between chunks does the board have to be
    carried, one step instead of 32.

    The catch is the eraser. What token 5 writes depends on what it erases, which depends on what token 4 wrote, which
    depends on what it erased. It is a chain of unknowns, each defined by those before it: a triangular system of
    equations, the kind that is solved from the top down.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## The mathematics

    Call $u_i$ what token $i$ really adds to the board under its key: the difference between its value and what the board
    held. Write $\gamma(j, i)$ for the product of the decays of tokens $j+1$ to $i$, channel by channel, and $S$ for the board on entry.
    Then the board that token $i$ finds is $\mathrm{Diag}(\gamma(0, i)) \, S$ and, for each earlier token $j$ of the chunk, $\gamma(j, i) \odot k_j$ times $u_j$:

    $$u_i = \beta_i v_i - \beta_i \, (k_i \odot \gamma(0, i))^{\top} S - \sum_{j < i} A_{ij} u_j, \qquad A_{ij} = \beta_i \sum_c k_{i c} \, k_{j c} \, \gamma_c(j, i).$$

    As matrices, $(I + A) \, u = \beta v - (\beta k \gamma) \, S$. With $M = (I + A)^{-1}$,

    $$U = M \, (\beta v), \qquad W = M \, (\beta k \gamma), \qquad u = U - W S .$$

    $U$ and $W$ do not know the board: they can be computed for all chunks of a text at the same time. Only $U - W S$ waits.
    The reads are the same with $q_i$ in place of $\beta_i k_i$, the diagonal included: $o = (q \gamma) S + P u$.

    In the paper: equation 2 unrolls a chunk, 3 to 5 give $w$ and $u$ token by token, 6 is $M$ (with $\beta$ inside), 7 is $W$ and $U$, 8
    the board after the chunk, 9 the outputs; Listing 1 is the code. The paper calls this the WY form, after a way to multiply many reflections, and the triangular inverse the UT
    transform. $A$ is strictly lower triangular, so $I + A$ always has an inverse.
    """)
    return


@app.cell
def _():
    T, K, V = 32, 8, 4
    draw = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)
    q, v = normal(1, T, 1, K) / K**0.5, normal(1, T, 1, V)
    k = torch.nn.functional.normalize(normal(1, T, 1, K), dim=-1)
    log_decay, beta = -0.1 * normal(1, T, 1, K).abs(), normal(1, T, 1, 1).sigmoid()
    S = normal(1, 1, K, V)

    chunk = chunked.products(q, k, beta * k, beta * v, log_decay)  # one chunk: [sequences, heads, chunks, ...]
    A, M, W, U, P, q_since = (x[0, 0, 0] for x in (chunk.A, chunk.M, chunk.W, chunk.U, chunk.P, chunk.q))
    u = U - W @ S[0, 0]
    output = q_since @ S[0, 0] + P @ u

    truth, _ = reference.delta_memory(q, k, beta * k, beta * v, log_decay, S)
    tell("against the loop:", (output - truth[0, :, 0]).abs().max().item())
    return A, M, P


@app.cell(hide_code=True)
def _(A, M, P):
    figure, _axes = plt.subplots(1, 3, figsize=(7.6, 2.8))
    for _ax, _X, _title in zip(
        _axes, (A, M, P), ("A: who erases whom", "M: the inverse of I + A", "P: who reads whom")
    ):
        _ax.imshow(_X.numpy(), cmap=SIGNED, vmin=-0.8, vmax=0.8)
        _ax.set(title=_title, xticks=[], yticks=[])
    figure
    return (figure,)


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## Where the textbook form breaks

    $\gamma(j, i)$ is a product of up to 32 decays for each channel and each pair: too many to store. The textbook trick takes it
    apart. With $G_i$ the sum of the log-decays up to token $i$, $\gamma(j, i) = e^{G_i} \cdot e^{-G_j}$, so that $A$ is one product of the rows $k_i e^{G_i}$ with
    the rows $k_j e^{-G_j}$. The first factor is small. The second is *large*: when a channel forgets quickly, $e^{-G_j}$ leaves what a
    32-bit number can hold, and infinity times zero is not a number. Decays of trained models reach far below that.

    Shorter chunks only move the wall. The way out is never to form a factor above one. Take two neighbouring blocks of
    tokens and let their *border* be the reference: rows of the later block carry the decay *since* the border, rows of the
    earlier one the decay *up to* it. Both are products of decays, at most 1. Start with blocks of one token and join
    neighbours: 1, 2, 4, 8, 16, 32. Each joining fills one square of $A$ below the diagonal, and the same joining puts the
    inverse together,

    $$(I + A)^{-1} = \begin{pmatrix} M_1 & 0 \\ -M_2 \, X \, M_1 & M_2 \end{pmatrix}, \qquad X \text{ the new square.}$$

    That is the whole of `palimpsest/ops/chunked.py`.
    """)
    return


@app.cell(hide_code=True)
def _():
    speed = mo.ui.slider(0.5, 10.0, 0.5, value=4.0, label="log-decay of a token, negative", show_value=True)
    speed
    return (speed,)


@app.cell
def _(speed):
    # In 32 bits, one channel, every token forgets at the same speed.
    g = torch.full((32,), -speed.value)
    G = g.cumsum(0)
    tell("largest e^-G:", (-G).exp().max().item(), " smallest e^G:", G.exp().min().item())
    pairs = (G.exp()[:, None] * (-G).exp()[None]).tril(-1)
    tell("pairs that are not a number:", pairs.isnan().sum().item(), " infinite:", pairs.isinf().sum().item())

    shape = (1, 32, 1, 1)
    x = torch.ones(shape)
    out = kda(x, x, x, g.view(shape), torch.ones(1, 32, 1)).output
    tell("the library:", bool(out.isfinite().all()))
    return


@app.cell(hide_code=True)
def _():
    _rates = torch.linspace(0.1, 10, 60)
    overflow, _ax = plt.subplots(figsize=(7.2, 2.6))
    for _C, _colour in ((16, BLUE), (32, ORANGE), (64, GREY)):
        _ax.plot(-_rates, _rates * _C / torch.log(torch.tensor(10.0)), color=_colour, label=f"chunk of {_C}")
    _ax.axhline(38.5, color="black", linewidth=0.8)
    _ax.text(-9.9, 44, "beyond this line 32-bit numbers are infinite", fontsize=9)
    _ax.set(xlabel="log-decay of each token", ylabel="digits of the largest factor", ylim=(0, 150))
    _ax.legend()
    overflow
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
    def answer_1(A, B):
        """Solve (I + A) X = B from the top down; A [C, C] strictly lower triangular, B [C, V]. No inverse, no solver."""
        return None  # yours

    return (answer_1,)


@app.cell(hide_code=True)
def _(answer_1, here_1):
    def check_1(function):
        draw = torch.Generator().manual_seed(1)
        A = torch.randn(6, 6, generator=draw, dtype=torch.float64).tril(-1)
        B = torch.randn(6, 2, generator=draw, dtype=torch.float64)
        found = function(A.clone(), B.clone())
        if found is None:
            return "Not yet: return X."
        if found.shape == B.shape and torch.allclose(A @ found + found, B):
            return "Right: each row needs only the rows above it."
        if found.shape == B.shape and torch.allclose(found[:2], (B - A @ B)[:2]):
            return "Not yet: the first rows are right. Use the rows of X that you have found, not those of B."
        return "Not yet: row i is B_i minus the sum of A_ij X_j over earlier j."

    verdict(check_1, yours(here_1, answer_1))
    return (check_1,)


@app.cell(hide_code=True)
def _(answer_2):
    here_2 = exercise(2, answer_2)
    here_2
    return (here_2,)


@app.cell
def _():
    def answer_2(log_decay, j, i):
        """The product of the decays of tokens j + 1 to i, for each channel, without large numbers: [T, K] -> [K]."""
        return None  # yours

    return (answer_2,)


@app.cell(hide_code=True)
def _(answer_2, here_2):
    def check_2(function):
        slow, fast = torch.full((40, 2), -0.1), torch.tensor([-50.0, -0.01]).expand(40, 2)
        found = function(slow, 3, 5), function(fast, 10, 30)
        if found[0] is None:
            return "Not yet: return one factor for each channel."
        if not torch.allclose(found[0], torch.tensor(-0.2).exp().expand(2), atol=1e-5):
            return "Not yet: tokens 3 + 1 to 5, that is two decays."
        if not bool(found[1].isfinite().all()):
            return "Not yet: right for slow decays, but infinite or no number for fast ones. Do not divide."
        if torch.allclose(found[1], torch.tensor([0.0, 0.8187]), atol=1e-3):
            return "Right: sum the logarithms between the two tokens first, then take one exponential, at most 1."
        return "Not yet: the second channel should keep a share of exp(-0.2)."

    verdict(check_2, yours(here_2, answer_2))
    return (check_2,)


@app.cell(hide_code=True)
def _():
    def solution_1(A, B):
        rows = []
        for i in range(len(B)):
            rows.append(B[i] - sum((A[i, j] * rows[j] for j in range(i)), torch.zeros_like(B[i])))
        return torch.stack(rows)

    def solution_2(log_decay, j, i):
        return log_decay[j + 1 : i + 1].sum(0).exp()

    wrong_1 = [lambda A, B: B - A @ B, lambda A, B: B]
    wrong_2 = [
        lambda log_decay, j, i: log_decay.cumsum(0)[i].exp() * (-log_decay.cumsum(0)[j]).exp(),
        lambda log_decay, j, i: log_decay[j : i + 1].sum(0).exp(),
    ]
    solutions(solution_1, solution_2)
    return solution_1, solution_2, wrong_1, wrong_2


@app.cell(hide_code=True)
def _():
    text(r"""
    ## Where to look next

    `palimpsest/ops/chunked.py`, whose first screen is this lesson. Papers: the parallel delta rule, arXiv:2406.06484; *Kimi
    Linear*, arXiv:2510.26692, section 3. The page of `palimpsest explain` shows these matrices for a trained model.

    Next: [inside the layer and the kernels](10_inside_the_layer.md).
    """)
    return


if __name__ == "__main__":
    app.run()
