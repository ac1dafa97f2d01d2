import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium")

with app.setup:
    import marimo as mo
    import matplotlib.pyplot as plt
    import torch
    from lesson import exercise, solutions, tell, text, verdict, yours
    from style import BLUE, GREY, ORANGE, TEAL

    from palimpsest import gated_linear_attention


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    # 8. Gate and position

    After this lesson you can

    - see a product of decays as a position code, and compare it with the rotations of RoPE,
    - say what it means that this code depends on what was read, not only on how far it is,
    - explain why the layers that look back can do without positions.

    *15 minutes.*
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## The idea

    Softmax attention is blind to order. Shuffle the scroll, and every answer is the same. So its inventors had to write
    positions into it from outside. The usual way today is RoPE: turn every query and key by an angle that grows with its
    position, so that their product depends on how far apart they are.

    A memory that decays is not blind. What was written ten tokens ago has been multiplied by ten decays, what was
    written a thousand tokens ago by a thousand. Distance is written into the board by the passing of time itself.

    And it is a better clock than a ruler. RoPE turns by the same angle for every token. Decays are chosen by the tokens:
    across a long aside the gate may stay at one, so that for this row *no time passes*; at the end of a paragraph it
    may drop, and everything before is suddenly far away. The distance between two words becomes a matter of what lies
    between them.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## The mathematics

    Without the eraser, the weight that a query at $i$ gives to a value written at $j$ is

    $$q_i^{\top} \left( \prod_{s = j + 1}^{i} \mathrm{Diag}(\alpha_s) \right) k_j = \sum_c q_{i c} \, k_{j c} \prod_{s = j + 1}^{i} \alpha_{s c} .$$

    With RoPE it is

    $$q_i^{\top} \left( \prod_{s = j + 1}^{i} R \right) k_j = q_i^{\top} R^{\, i - j} k_j ,$$

    with a fixed block-diagonal matrix $R$ of rotations, a different angle for every pair of channels. The two have the
    same form: a product of one matrix for each token in between. RoPE's matrices turn, all alike, and lose nothing. The
    gate's shrink, each token choosing its own, channel by channel. With the eraser the matrices are
    $(I - \beta_s k_s k_s^{\top}) \mathrm{Diag}(\alpha_s)$: no longer diagonal, and so able to mix channels as a rotation does.

    That is why Kimi Linear has **NoPE** in the layers that look back: no position code at all. The layers below have
    already written order into what they pass on, and a layer without positions has nothing that could go wrong at a
    length that it was not trained for.
    """)
    return


@app.cell
def _():
    T, K = 128, 4
    # Constant gates first: the weight of a value against its distance, for four channels of one head.
    log_decay = -torch.tensor([0.005, 0.02, 0.08, 0.32])
    distance = torch.arange(T)
    decayed = (distance[:, None] * log_decay).exp()  # [T, K]
    angles = torch.tensor([0.02, 0.06, 0.18, 0.54])
    rotated = (distance[:, None] * angles).cos()  # RoPE, for a query that equals its key

    # The same by the library: write once, then read with a query that asks one channel.
    k = torch.zeros(1, T, 1, K)
    k[0, 0] = 1.0
    read = torch.stack([
        gated_linear_attention(torch.eye(K)[c].expand(1, T, 1, K), k, k[..., :1], log_decay.expand(1, T, 1, K), scale=1.0)
        .output.flatten() for c in range(K)
    ], -1)  # fmt: skip
    tell("largest difference:", (read - decayed).abs().max().item())
    return decayed, distance, rotated


@app.cell(hide_code=True)
def _(decayed, distance, rotated):
    figure, _axes = plt.subplots(1, 2, figsize=(7.6, 2.9), sharey=True)
    for _ax, _weights, _title in zip(_axes, (decayed, rotated), ("gate: four decays", "RoPE: four angles")):
        for _c, _colour in enumerate((BLUE, TEAL, ORANGE, GREY)):
            _ax.plot(distance, _weights[:, _c], color=_colour, linewidth=1.6)
        _ax.set(title=_title, xlabel="distance in tokens")
    _axes[0].set_ylabel("weight")
    figure
    return (figure,)


@app.cell(hide_code=True)
def _():
    aside = mo.ui.slider(0.0, 1.0, 0.05, value=1.0, label="decay inside the aside", show_value=True)
    aside
    return (aside,)


@app.cell(hide_code=True)
def _(aside):
    # A text with an aside of 40 tokens in the middle. Outside of it this row keeps 0.97 a token.
    _alpha = torch.full((100,), 0.97)
    _alpha[30:70] = aside.value
    clock, _ax = plt.subplots(figsize=(7.2, 2.4))
    _ax.axvspan(30, 70, color=GREY, alpha=0.2, linewidth=0)
    _ax.plot(_alpha.log().clamp(min=-50).cumsum(0).exp(), color=BLUE, label="gate that notices the aside")
    _ax.plot(torch.full((100,), 0.97).cumprod(0), color=GREY, label="constant decay")
    _ax.set(xlabel="token", ylabel="left of token 0", ylim=(-0.03, 1.03))
    _ax.legend()
    clock
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    At one, the aside takes no time. At zero, nothing before it is left.

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
    def answer_1(log_decay, i):
        """For a query at token i: the weight that each earlier token 0..i keeps in each row: [T, K] -> [i + 1, K]."""
        return None  # yours

    return (answer_1,)


@app.cell(hide_code=True)
def _(answer_1, here_1):
    def check_1(function):
        draw = torch.Generator().manual_seed(0)
        log_decay = -torch.rand(7, 2, generator=draw)
        found = function(log_decay, 4)
        if found is None:
            return "Not yet: return one row for each token."
        truth = torch.stack([log_decay[j + 1 : 5].sum(0).exp() for j in range(5)])
        if found.shape == truth.shape and torch.allclose(found, truth, atol=1e-5):
            return "Right: the last token has weight one, since nothing has passed since it."
        if found.shape == truth.shape and torch.allclose(found, log_decay[:5].cumsum(0).exp(), atol=1e-5):
            return "Not yet: that counts from the beginning of the text. Count back from token i."
        return "Not yet: token j has met the decays of tokens j + 1 to i."

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
        """Which of these can a product of channel-wise decays NOT express, while RoPE can?
        Return "nearer counts more", "a weight that falls and rises again with distance", or "a different speed per channel"."""
        return None  # yours

    return (answer_2,)


@app.cell(hide_code=True)
def _(answer_2, here_2):
    def check_2(function):
        found = function()
        if found is None:
            return "Not yet: return one of the three texts."
        if found == "a weight that falls and rises again with distance":
            return "Right: products of numbers up to one can only fall. The eraser, which mixes channels, brings some of it back."
        return "Not yet: look at the two figures. What do the curves on the right do that none on the left does?"

    verdict(check_2, yours(here_2, answer_2))
    return (check_2,)


@app.cell(hide_code=True)
def _():
    def solution_1(log_decay, i):
        upto = log_decay[: i + 1]
        after = upto.flip(0).cumsum(0).flip(0) - upto  # the sum of later tokens
        return after.exp()

    def solution_2():
        return "a weight that falls and rises again with distance"

    wrong_1 = [
        lambda log_decay, i: log_decay[: i + 1].cumsum(0).exp(),
        lambda log_decay, i: log_decay[: i + 1].flip(0).cumsum(0).flip(0).exp(),
    ]
    wrong_2 = [lambda: "nearer counts more", lambda: "a different speed per channel"]
    solutions(solution_1, solution_2)
    return solution_1, solution_2, wrong_1, wrong_2


@app.cell(hide_code=True)
def _():
    text(r"""
    ## Where to look next

    `MultiHeadLatentAttention` in `palimpsest/layers/latent_attention.py` has `rope=None` as its default; with a base it
    rotates, for comparison. `palimpsest lab run position` measures both, at and beyond the length of training. *Kimi
    Linear*, arXiv:2510.26692, on NoPE.

    Next: [chunks](09_chunks.md), or how the loop becomes matrix products.
    """)
    return


if __name__ == "__main__":
    app.run()
