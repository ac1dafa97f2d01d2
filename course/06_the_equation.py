import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium")

with app.setup:
    import marimo as mo
    import matplotlib.pyplot as plt
    import torch
    from lesson import exercise, solutions, tell, text, verdict, yours
    from style import MUTED, board

    from palimpsest import kda, trace


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    # 6. The Equation

    After this lesson you can

    - read the one equation of Kimi Delta Attention from right to left, as four things that happen to a board,
    - work a token through it by hand and get the library's numbers,
    - say why the order of the four matters.

    *15 minutes.*
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## The idea

    The last two lessons gave the memory two ways to let go. *Decay* fades: every row of the board, every token, by an
    amount of its own. The *eraser* wipes: only along one direction, the key that is about to be written, and only what
    is found there. Decay needs no key and cannot aim. The eraser aims and touches nothing else.

    Kimi Delta Attention does both, then writes, then reads. One token, four beats:

    1. **Fade.** Row $c$ keeps the share $\alpha_c$ of what it holds.
    2. **Erase.** Ask the faded board what it holds under $k$, and take the share $\beta$ of that answer off again.
    3. **Write.** Put the share $\beta$ of the new value there.
    4. **Read.** Ask the board with $q$.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## The mathematics

    $$S_t = (I - \beta_t k_t k_t^{\top}) \, \mathrm{Diag}(\alpha_t) \, S_{t-1} + \beta_t k_t v_t^{\top}, \qquad o_t = S_t^{\top} q_t$$

    Read it from the right. $\mathrm{Diag}(\alpha_t) S_{t-1}$ multiplies row $c$ by $\alpha_{t,c}$: the fade. Call the result $S'$.
    Then $(I - \beta_t k_t k_t^{\top}) S' = S' - \beta_t k_t (S'^{\top} k_t)^{\top}$, where $S'^{\top} k_t$ is what the faded board answers to the
    key: the eraser takes it off. Last, $\beta_t k_t v_t^{\top}$ is the outer product that writes.

    Erase and write carry the same $\beta_t k_t$, so they are one correction: with $h_t = S'^{\top} k_t$,

    $$S_t = S' + \beta_t k_t (v_t - h_t)^{\top}.$$

    The board is moved towards answering $v_t$ under $k_t$, by the difference between what it should say and what it
    says. That is the gradient step of lesson 4, taken on a board that has faded first.

    The library keeps $\log \alpha_t$ instead of $\alpha_t$, because products of many decays are sums of their logarithms.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## A token by hand

    Two rows, two columns. The board holds $[10, 10]$ in its first row and $[2, 2]$ in its second. A token arrives with
    key $k = [0, 1]$, value $v = [5, 5]$, decays $\alpha = [1, \tfrac12]$ and $\beta = 1$.

    - Fade: the first row keeps all, the second keeps half: $[[10, 10], [1, 1]]$.
    - Erase: under the key $[0, 1]$ the board holds $[1, 1]$, and all of it goes: $[[10, 10], [0, 0]]$.
    - Write: $k v^{\top}$ puts $[5, 5]$ into the second row: $[[10, 10], [5, 5]]$.

    The first row was never touched: its decay was 1 and the key does not point at it. Now the same by the library:
    """)
    return


@app.cell
def _():
    S = torch.tensor([[10.0, 10.0], [2.0, 2.0]]).view(1, 1, 2, 2)  # [sequences, heads, rows, columns]
    k = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)  # [sequences, tokens, heads, channels]
    v = torch.tensor([5.0, 5.0]).view(1, 1, 1, 2)
    log_decay = torch.tensor([1.0, 0.5]).log().view(1, 1, 1, 2)
    beta = torch.ones(1, 1, 1)

    beats = trace(k, k, v, log_decay, beta, state=S, scale=1.0)
    faded, erased, written = (beat[0, 0, 0] for beat in (beats.decayed, beats.erased, beats.written))
    tell(faded.tolist(), erased.tolist(), written.tolist(), beats.read.flatten().tolist())
    return S, beta, erased, faded, k, log_decay, v, written


@app.cell
def _(S, beta, k, log_decay, v, written):
    # `kda` is what models call: the same result without the stops on the way.
    assert torch.equal(kda(k, k, v, log_decay, beta, state=S).state[0, 0], written)
    return


@app.cell(hide_code=True)
def _(S, erased, faded, written):
    figure, _axes = plt.subplots(1, 4, figsize=(8, 2.4))
    _titles = ("before", "faded", "erased", "written")
    for _ax, _S, _title in zip(_axes, (S[0, 0], faded, erased, written), _titles):
        board(_ax, _S, _title, limit=10)
    figure.get_layout_engine().set(wspace=0.3)
    for _ax in _axes[1:]:
        _ax.text(-0.2, 0.5, "→", transform=_ax.transAxes, ha="center", va="center", fontsize=16, color=MUTED)
    figure
    return (figure,)


@app.cell(hide_code=True)
def _():
    strength = mo.ui.slider(0.0, 2.0, 0.25, value=1.0, label="beta", show_value=True)
    strength
    return (strength,)


@app.cell
def _(S, k, log_decay, strength, v):
    # Move beta. 0 leaves the faded board; 1 replaces what the key held; 2 goes as far beyond the value as it was off.
    _beta = torch.full((1, 1, 1), strength.value)
    after, _ax = plt.subplots(figsize=(2.4, 2.4))
    board(
        _ax, kda(k, k, v, log_decay, _beta, state=S).state[0, 0], f"after, beta {strength.value:g}", limit=10, digits=1
    )
    after
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## Why this order

    Fading first means that the eraser meets the board as it now is, and takes off exactly what is left under the key.
    Were the board faded after the write, the new value would fade before anyone could read it; were it erased before
    the fade, the two would no longer commute when $k$ points across several rows, and $S^{\top} k = v$ would not hold
    after a write with $\beta = 1$. In this order it always does, for every key of length one.

    ## Exercises

    Fill in the functions; the checks tell you how it went.
    """)
    return


@app.cell(hide_code=True)
def _(answer_1):
    here_1 = exercise(1, answer_1)
    here_1
    return (here_1,)


@app.cell
def _():
    def answer_1(S, k, v, alpha, beta):
        """The board after one token, from the equation, with S [K, V], k and alpha [K], v [V] and a number beta."""
        return None  # yours

    return (answer_1,)


@app.cell(hide_code=True)
def _(answer_1, here_1):
    def check_1(function):
        draw = torch.Generator().manual_seed(0)
        S, k, v = (torch.randn(*n, generator=draw) for n in ((3, 2), (3,), (2,)))
        k, alpha, beta = k / k.norm(), torch.tensor([1.0, 0.5, 0.0]), 0.75
        shaped = [x.view(1, 1, 1, -1) for x in (k, k, v, alpha.log())]
        truth = kda(*shaped, torch.full((1, 1, 1), beta), state=S[None, None]).state[0, 0]
        found = function(S.clone(), k, v, alpha, beta)
        if found is None:
            return "Not yet: return the new board."
        if found.shape != truth.shape:
            return f"Not yet: the board is {tuple(truth.shape)}, yours is {tuple(found.shape)}."
        if torch.allclose(found, truth, atol=1e-5):
            return "Right: that is the whole of Kimi Delta Attention."
        if torch.allclose(found, S + beta * torch.outer(k, v - S.T @ k), atol=1e-5):
            return "Not yet: that is the delta rule. Fade the rows first."
        return "Not yet: fade, then ask the faded board what it holds under k, then correct that answer."

    verdict(check_1, yours(here_1, answer_1))
    return (check_1,)


@app.cell(hide_code=True)
def _(answer_2):
    here_2 = exercise(2, answer_2)
    here_2
    return (here_2,)


@app.cell
def _():
    def answer_2():
        """After a write with beta = 1 and a key of length one, the board answers the key with what?
        Return "v", "v + what was held", or "v faded"."""
        return None  # yours

    return (answer_2,)


@app.cell(hide_code=True)
def _(answer_2, here_2):
    def check_2(function):
        found = function()
        if found == "v":
            return "Right: (I - k k^T) leaves nothing under k, so that the new value stands alone."
        if found is None:
            return "Not yet: return one of the three texts."
        return "Not yet: multiply the equation by k^T from the left, with k^T k = 1 and beta = 1."

    verdict(check_2, yours(here_2, answer_2))
    return (check_2,)


@app.cell(hide_code=True)
def _():
    def solution_1(S, k, v, alpha, beta):
        faded = alpha[:, None] * S
        return faded + beta * torch.outer(k, v - faded.T @ k)

    def solution_2():
        return "v"

    wrong_1 = [
        lambda S, k, v, alpha, beta: S + beta * torch.outer(k, v - S.T @ k),  # no fade
        lambda S, k, v, alpha, beta: alpha[:, None] * (S + beta * torch.outer(k, v - S.T @ k)),  # fade last
        lambda S, k, v, alpha, beta: alpha[:, None] * S + beta * torch.outer(k, v),  # no eraser
    ]
    wrong_2 = [lambda: "v faded", lambda: "v + what was held"]
    solutions(solution_1, solution_2)
    return solution_1, solution_2, wrong_1, wrong_2


@app.cell(hide_code=True)
def _():
    text(r"""
    ## Where to look next

    The equation as five lines of code: `palimpsest/ops/reference.py`. The paper: *Kimi Linear*, arXiv:2510.26692,
    equation 1; its section 6.2 multiplies the two factors out, $\mathrm{Diag}(\alpha) - \beta k (k \odot \alpha)^{\top}$, and so finds in it a
    special case of `dplr`. `palimpsest explain` opens a page where these four beats can be stepped through.

    Next: [heads and learned decay](07_heads_and_learned_decay.md), or who decides how fast each row fades.
    """)
    return


if __name__ == "__main__":
    app.run()
