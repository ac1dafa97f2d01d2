import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium")

with app.setup:
    import marimo as mo
    import matplotlib.pyplot as plt
    import torch
    from lesson import exercise, solutions, tell, text, verdict, yours
    from style import BLUE, GREY, ORANGE, TEAL

    from palimpsest import gated_delta, kda, trace


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    # 5. Forgetting, scalar and per channel

    After this lesson you can

    - say what the eraser cannot do, and why a memory of fixed size needs decay as well,
    - compute how long a row lives from its decay, and the other way round,
    - show by experiment what one decay per channel can hold that one decay per head cannot.

    *15 minutes.*
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## The idea

    The delta rule of the last lesson keeps the board consistent: a key that comes again replaces its old value. But it
    only ever cleans under keys that come again. What was written under a key that nobody uses any more stays, for ever,
    and every later read that is not exactly at right angles to it picks up a little of it. A board that is never wiped
    fills with residue.

    *Decay* wipes without being asked. With every token the board keeps a share $\alpha$ of itself. After $n$ tokens a
    thing once written is down to $\alpha^n$. Nothing has to be named.

    One $\alpha$ for the whole head (Gated DeltaNet) forces one speed on everything: the subject of the paragraph and the
    last bracket fade together. One $\alpha$ for every row (Kimi Delta Attention) lets some rows be a notepad and others an
    archive. A row is a *feature* of the keys, not a word: what fades slowly is a kind of question.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## The mathematics

    With a decay per head and per channel,

    $$S_t = \alpha_t \, S_{t-1} + \dots \qquad\qquad S_t = \mathrm{Diag}(\alpha_t) \, S_{t-1} + \dots$$

    Seen as training (lesson 4), a decay is *weight decay*: before each gradient step the weights shrink towards zero, by an
    amount that the token chooses. One name of the line is still missing. Mamba-2 has a decay per head and no eraser,
    $S_t = \alpha_t S_{t-1} + k_t v_t^{\top}$; gated linear attention a decay per channel and no eraser; DeltaNet an eraser and no
    decay; Gated DeltaNet both, per head; Kimi Delta Attention both, per channel. At the end of the line stands any diagonal
    plus any matrix of rank one, $D - a b^{\top}$ (DPLR): more general, and about twice the work.

    The half life $n$ of a row with a constant decay solves $\alpha^n = \tfrac12$, so

    $$n = \frac{\log \tfrac12}{\log \alpha} \approx \frac{0.69}{-\log \alpha}.$$

    A decay of 0.9 halves a row in 6.6 tokens, one of 0.999 in 693. The interesting decays lie close to 1, where numbers
    of low precision are coarse: bfloat16 has nothing between 0.996 and 1. That is why the library keeps
    $\log \alpha$, in 32 bits.

    Between token $j$ and token $i$ a row keeps $\alpha_{j+1} \alpha_{j+2} \cdots \alpha_i$: a product, so the logarithms add up.
    """)
    return


@app.cell
def _():
    # An archive and a notepad. Two facts are written into row 0 and row 1; then 40 tokens come that write elsewhere.
    T, K, V = 42, 4, 1
    k = torch.zeros(1, T, 1, K)
    k[0, 0, 0, 0], k[0, 1, 0, 1] = 1.0, 1.0
    k[0, 2:, 0, 2:] = torch.nn.functional.normalize(
        torch.randn(T - 2, 2, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    v, beta = torch.ones(1, T, 1, V), torch.ones(1, T, 1)

    per_channel = torch.tensor([0.999, 0.8, 0.9, 0.9]).log().expand(1, T, 1, K)
    per_head = per_channel.mean(-1)  # one speed for all
    archive = trace(k, k, v, per_channel, beta, scale=1.0).written[0, :, 0, :, 0]
    average = trace(k, k, v, per_head[..., None].expand_as(k), beta, scale=1.0).written[0, :, 0, :, 0]
    tell("after 40 tokens, per channel:", archive[-1, :2].tolist())
    tell("after 40 tokens, per head:   ", average[-1, :2].tolist())
    return archive, average, beta, k, per_channel, per_head, v


@app.cell
def _(beta, k, per_channel, per_head, v):
    # What models call: `kda` takes a log-decay per channel, `gated_delta` one per head.
    tell(kda(k, k, v, per_channel, beta).state.shape, gated_delta(k, k, v, per_head, beta).state.shape)
    return


@app.cell(hide_code=True)
def _(archive, average):
    figure, _axes = plt.subplots(1, 2, sharey=True)
    for _ax, _rows, _title in zip(_axes, (archive, average), ("a decay per channel", "one decay per head")):
        _ax.plot(_rows[:, 0], color=BLUE, label="row 0, the archive")
        _ax.plot(_rows[:, 1], color=ORANGE, label="row 1, the notepad")
        _ax.set(title=_title, xlabel="token", ylim=(-0.02, 1.05))
    _axes[0].set_ylabel("what the row still holds")
    _axes[0].legend(loc="center right")
    figure
    return (figure,)


@app.cell(hide_code=True)
def _():
    share = mo.ui.slider(0.5, 0.999, 0.001, value=0.9, label="alpha", show_value=True)
    share
    return (share,)


@app.cell(hide_code=True)
def _(share):
    _n = torch.arange(200)
    lives, _ax = plt.subplots(figsize=(7.2, 2.4))
    for _alpha, _colour in ((0.8, GREY), (0.99, GREY), (share.value, TEAL)):
        _ax.plot(_n, _alpha**_n, color=_colour)
        _half = torch.log(torch.tensor(0.5)) / torch.log(torch.tensor(_alpha))
        _ax.plot(_half, 0.5, "o", color=_colour)
    _ax.set(
        xlabel="tokens since the write", ylabel="share left", title="half lives of 0.8, 0.99 and yours", ylim=(0, 1.05)
    )
    lives
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## Feel the difference

    Decay and eraser are easily confused, since both make numbers smaller. Keep this picture: **decay fades every row by
    its own amount, whatever the key; the eraser wipes one direction, whatever the row.** A key that points across all
    rows is erased across all rows, and two keys at right angles to each other can share every row without ever erasing
    each other. No choice of decays can do that. And no eraser can reach what lies under a key that never comes again.

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
    def answer_1(tokens):
        """The decay, a number below 1, with which a row is down to half after so many tokens."""
        return None  # yours

    return (answer_1,)


@app.cell(hide_code=True)
def _(answer_1, here_1):
    def check_1(function):
        found = [function(n) for n in (1, 7, 1000)]
        if found[0] is None:
            return "Not yet: return a number."
        if all(abs(float(a) ** n - 0.5) < 1e-3 for a, n in zip(found, (1, 7, 1000))):
            return "Right: 1000 tokens need a decay of 0.9993, which bfloat16 rounds to 1: that row would never fade."
        return "Not yet: alpha to the power of the tokens must be one half."

    verdict(check_1, yours(here_1, answer_1))
    return (check_1,)


@app.cell(hide_code=True)
def _(answer_2):
    here_2 = exercise(2, answer_2)
    here_2
    return (here_2,)


@app.cell
def _():
    def answer_2(log_decay):
        """How much of what was written at token 0 each row still holds after the last token: [T, K] -> [K]."""
        return None  # yours

    return (answer_2,)


@app.cell(hide_code=True)
def _(answer_2, here_2):
    def check_2(function):
        log_decay = -torch.rand(6, 3, generator=torch.Generator().manual_seed(1))
        found = function(log_decay)
        if found is None:
            return "Not yet: return one share for each row."
        if found.shape == (3,) and torch.allclose(found, log_decay[1:].sum(0).exp(), atol=1e-5):
            return "Right: what token 0 wrote has met the decays of tokens 1 to 5, and not its own."
        if found.shape == (3,) and torch.allclose(found, log_decay.sum(0).exp(), atol=1e-5):
            return "Not yet: token 0 fades the board before it writes, so its own decay does not touch its value."
        return "Not yet: logarithms of shares add up over the tokens after the write."

    verdict(check_2, yours(here_2, answer_2))
    return (check_2,)


@app.cell(hide_code=True)
def _():
    def solution_1(tokens):
        return 0.5 ** (1 / tokens)

    def solution_2(log_decay):
        return log_decay[1:].sum(0).exp()

    wrong_1 = [lambda tokens: 1 - 0.5 / tokens, lambda tokens: 0.5]
    wrong_2 = [lambda log_decay: log_decay.sum(0).exp(), lambda log_decay: log_decay[1:].exp().sum(0)]
    solutions(solution_1, solution_2)
    return solution_1, solution_2, wrong_1, wrong_2


@app.cell(hide_code=True)
def _():
    text(r"""
    ## Where to look next

    `palimpsest/ops/variants.py` lists the family by what each member fades, erases and writes. Papers: gated linear
    attention, arXiv:2312.06635 (decay per channel, no eraser); Gated DeltaNet, arXiv:2412.06464 (decay per head, with
    eraser).

    Next: [the Equation](06_the_equation.md), which does both.
    """)
    return


if __name__ == "__main__":
    app.run()
