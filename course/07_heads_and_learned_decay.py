import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium")

with app.setup:
    import marimo as mo
    import matplotlib.pyplot as plt
    import torch
    from lesson import exercise, solutions, tell, text, verdict, yours
    from style import BLUE, GREY, ORANGE, TEAL

    from palimpsest import KimiDeltaAttention, gates


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    # 7. Heads, and a decay that is learned

    After this lesson you can

    - say why a layer has many small boards instead of one large one,
    - follow a decay from the token to the number: low-rank projection, bias, softplus, rate,
    - choose between the unbounded and the bounded gate, and say what each gives up.

    *15 minutes.*
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## The idea

    One board of 4096 rows and columns would hold sixteen million numbers, and every token would have to touch them all.
    Thirty-two boards of 128 rows and columns hold half a million. Each has keys, values and queries of its own, and
    learns a speciality: one follows who is speaking, another which brackets are open. They are *heads*.

    Who sets the decays? The token itself. A full stop may clear the notepad of the sentence; a name may be worth
    keeping. So the layer computes each row's decay from the token, by a small network, anew for every token and channel.
    That is what *gated* means here.

    Two learned numbers set the scene in which the token plays. The *rate* of a head says how fast its board lives on the
    whole. The *bias* of a channel says where that row stands when the token has no opinion. Training starts with biases
    spread out, so that from the first step there are notepads and archives to choose from.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## The mathematics

    From the token $x$ two thin matrices make a logit for each channel; then

    $$\log \alpha = - e^{A} \, \mathrm{softplus}(W_b W_a x + b), \qquad \mathrm{softplus}(z) = \log(1 + e^z).$$

    $e^{A}$ is the rate of the head, $b$ the bias of the channel. Softplus is never negative, so $\log \alpha$ is never positive: nothing
    can grow. It has no lower end either: a token may wipe a row completely, and trained models use that, with
    log-decays of minus a thousand.

    Some kernels cannot bear that, so later models bound it:

    $$\log \alpha = f \cdot \mathrm{sigmoid}(e^{A} (W_b W_a x + b)), \qquad f = -5 .$$

    Now a token can at most divide a row by 148. Wiping takes two or three tokens; in return every factor stays within
    range. The two gates are different functions: weights trained with one do not work with the other.

    The projection has low rank, 128 numbers between 2304 and 4096: decays of the channels of a head go together more
    often than not, and a full matrix would cost as much as the keys.
    """)
    return


@app.cell
def _():
    logits = torch.linspace(-12, 12, 200).view(1, 200, 1, 1)
    zero = torch.zeros(1)
    unbounded = gates.softplus_decay(logits, A_log=zero, dt_bias=zero)
    bounded = gates.sigmoid_decay(logits, A_log=zero, dt_bias=zero, floor=-5.0)
    tell(
        "lowest:",
        unbounded.min().item(),
        bounded.min().item(),
        " highest:",
        unbounded.max().item(),
        bounded.max().item(),
    )
    return bounded, logits, unbounded


@app.cell(hide_code=True)
def _():
    rate = mo.ui.slider(-2.0, 3.0, 0.25, value=0.0, label="A, the logarithm of the rate", show_value=True)
    rate
    return (rate,)


@app.cell(hide_code=True)
def _(bounded, logits, rate, unbounded):
    figure, (_left, _right) = plt.subplots(1, 2, figsize=(7.6, 3))
    _z = logits.flatten()
    _left.plot(_z, unbounded.flatten(), color=BLUE, label="softplus, unbounded")
    _left.plot(_z, bounded.flatten(), color=ORANGE, label="sigmoid, floor -5")
    _left.set(xlabel="logit", ylabel="log-decay", ylim=(-12, 0.5))
    _left.legend(fontsize=9)
    _A = torch.tensor([rate.value])
    for _gate, _colour in ((gates.softplus_decay, BLUE), (gates.sigmoid_decay, ORANGE)):
        _right.plot(_z, _gate(logits, _A, torch.zeros(1)).exp().flatten(), color=_colour)
    _right.set(xlabel="logit", ylabel="share that a row keeps", title=f"rate {rate.value:+.2f}", ylim=(-0.03, 1.03))
    figure
    return (figure,)


@app.cell
def _():
    # A fresh layer, as training begins: how long do its rows live?
    torch.manual_seed(0)
    layer = KimiDeltaAttention(64, num_heads=4, head_dim=32)
    with torch.no_grad():
        edits = layer.recurrence_inputs(0.1 * torch.randn(1, 200, 64))
    half_lives = 0.693 / -edits.log_decay.mean(1)[0]  # [heads, channels], in tokens
    tell("half lives from", round(half_lives.min().item(), 1), "to", round(half_lives.max().item(), 1), "tokens")
    tell("parameters of the gate:", layer.A_log.numel(), "rates,", layer.dt_bias.numel(), "biases")
    return (half_lives,)


@app.cell(hide_code=True)
def _(half_lives):
    spread, _ax = plt.subplots(figsize=(7.2, 2.4))
    for _head, _colour in zip(range(4), (BLUE, ORANGE, TEAL, GREY)):
        _ax.plot(half_lives[_head].sort().values, [_head] * 32, "|", color=_colour, markersize=14)
    _ax.set(xscale="log", xlabel="half life of a row, tokens", ylabel="head", yticks=range(4), ylim=(-0.6, 3.6))
    spread
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    Each tick is a row. Before any training, some forget within a token or two and some remember for more than a hundred.

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
    def answer_1(logit, A, b):
        """The log-decay of the unbounded gate, for numbers."""
        return None  # yours

    return (answer_1,)


@app.cell(hide_code=True)
def _(answer_1, here_1):
    def check_1(function):
        inputs = [(0.3, 0.0, -1.0), (-2.0, 1.5, 0.5), (4.0, -1.0, 0.0)]
        found = [function(*(torch.tensor(x) for x in case)) for case in inputs]
        if found[0] is None:
            return "Not yet: return a number."
        shaped = [(torch.tensor(z).view(1, 1, 1, 1), torch.tensor([A]), torch.tensor([b])) for z, A, b in inputs]
        truth = [gates.softplus_decay(*case).item() for case in shaped]
        if all(abs(float(x) - t) < 1e-5 for x, t in zip(found, truth)):
            return "Right: rate times softplus, with a minus sign."
        if any(float(x) > 0 for x in found):
            return "Not yet: a log-decay is never positive."
        return "Not yet: the bias belongs inside the softplus, and the rate is e to the power of A."

    verdict(check_1, yours(here_1, answer_1))
    return (check_1,)


@app.cell(hide_code=True)
def _(answer_2):
    here_2 = exercise(2, answer_2)
    here_2
    return (here_2,)


@app.cell
def _():
    def answer_2(share, floor):
        """With the bounded gate: the fewest tokens after which a row can be down to `share` of what it was."""
        return None  # yours

    return (answer_2,)


@app.cell(hide_code=True)
def _(answer_2, here_2):
    def check_2(function):
        found = [function(0.5, -5.0), function(1e-4, -5.0), function(1e-9, -5.0), function(1e-4, -1.0)]
        if found[0] is None:
            return "Not yet: return a whole number."
        if [int(x) for x in found] == [1, 2, 5, 10]:
            return "Right: every token adds at most the floor to the logarithm."
        return "Not yet: the logarithms add up, and each is at best the floor; round up."

    verdict(check_2, yours(here_2, answer_2))
    return (check_2,)


@app.cell(hide_code=True)
def _():
    def solution_1(logit, A, b):
        return -A.exp() * torch.nn.functional.softplus(logit + b)

    def solution_2(share, floor):
        return int(torch.ceil(torch.tensor(share, dtype=torch.float64).log() / floor))

    wrong_1 = [
        lambda logit, A, b: A.exp() * torch.nn.functional.softplus(logit + b),
        lambda logit, A, b: -A * (logit + b).exp(),
    ]
    wrong_2 = [lambda share, floor: 1, lambda share, floor: int(torch.tensor(share).log() / floor)]
    solutions(solution_1, solution_2)
    return solution_1, solution_2, wrong_1, wrong_2


@app.cell(hide_code=True)
def _():
    text(r"""
    ## Where to look next

    `palimpsest/ops/gates.py` for the two gates, and `KimiDeltaAttention` in `palimpsest/layers/kimi_delta_attention.py` for
    the projections. `palimpsest lab run spectra` shows what the gates of a trained model learned.

    Next: [gate and position](08_gate_and_position.md), or why this model needs no position code.
    """)
    return


if __name__ == "__main__":
    app.run()
