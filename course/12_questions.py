import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium")

with app.setup:
    import marimo as mo
    import matplotlib.pyplot as plt
    import torch
    from lesson import exercise, solutions, tell, text, verdict, yours
    from style import BLUE, GREY, ORANGE

    from palimpsest import delta_rule
    from palimpsest.testing import CASES, judge


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    # 12. Questions for research

    After this lesson you can

    - name open questions about these memories, and the command that starts on each,
    - show in four lines why a strength up to 2 lets a memory count where a strength up to 1 cannot,
    - add a variant of your own and have it judged before you believe it.

    *15 minutes.*
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## The idea

    You know the whole machine now: a board, four beats, two views of the same numbers, three such layers to one that
    looks back. Most of its choices were made because they worked at one scale, in one laboratory. Each is a question that
    a small experiment can begin to answer. The lab runs them:

    | question | command |
    |---|---|
    | Does a decay per channel remember more than one per head? | `palimpsest lab run gate --scale small` |
    | Does every part of the layer earn its place? | `palimpsest lab run parts --scale small` |
    | How many memory layers may stand for one that looks back? | `palimpsest lab run ratio --scale small` |
    | Do the layers that look back need positions? | `palimpsest lab run position --scale small` |
    | How few bits may the memory keep between tokens? | `palimpsest lab run state --scale small` |
    | Which states can it track at all? | `palimpsest lab run state_tracking --scale small` |
    | What did a trained memory learn to forget? | `palimpsest lab run spectra --scale small` |
    | What does a longer context cost? | `palimpsest lab run cost --scale small` |
    | Do the paper's synthetic tasks come out the same here? | `palimpsest lab run fig4 --scale small` |

    `small` fits a laptop; `full` wants a GPU. Each leaves a table, a plot, and a page with a verdict that says how sure
    it is. `palimpsest lab show NAME` prints the page again.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## The mathematics

    One question can be settled by hand. Take a memory with one row and one column and keys equal to 1. A step of the
    delta rule is then $S_t = (1 - \beta_t) S_{t-1} + \beta_t v_t$. With values of zero only the first factor is left:

    $$S_t = (1 - \beta_t) \, S_{t-1}.$$

    The factor $1 - \beta_t$ is the eigenvalue of the transition along the key. With $\beta \le 1$ it lies between 0 and 1: the
    memory can keep its number or lose it, and never turn it round. With $\beta = 2$ it is $-1$: the number *flips*. A bit that
    flips with every 1 that is read is the parity of the text, for ever, exactly. No number of rows with $\beta \le 1$ can do
    that, because products of numbers between 0 and 1 never change sign.
    """)
    return


@app.cell
def _():
    bits = torch.randint(2, (24,), generator=torch.Generator().manual_seed(0)).float()
    T = len(bits)
    q = k = torch.ones(1, T, 1, 1)
    v, one = torch.zeros(1, T, 1, 1), torch.ones(1, 1, 1, 1)

    flips = delta_rule(q, k, v, beta=2 * bits.view(1, T, 1), state=one).output.flatten()
    fades = delta_rule(q, k, v, beta=0.9 * bits.view(1, T, 1), state=one).output.flatten()
    parity = bits.cumsum(0) % 2
    tell("parity read off the sign:", bool(((flips < 0) == parity.bool()).all()))
    return fades, flips, parity


@app.cell(hide_code=True)
def _(fades, flips, parity):
    figure, _ax = plt.subplots(figsize=(7.2, 2.6))
    _ax.step(
        range(len(parity)), 1 - 2 * parity, color=GREY, linewidth=6, alpha=0.4, where="mid", label="parity, as a sign"
    )
    _ax.step(range(len(parity)), flips, color=BLUE, where="mid", label="beta 0 or 2")
    _ax.step(range(len(parity)), fades, color=ORANGE, where="mid", label="beta 0 or 0.9")
    _ax.set(xlabel="token", ylabel="the memory", yticks=(-1, 0, 1))
    _ax.legend(loc="upper center", ncols=3, bbox_to_anchor=(0.5, 1.25))
    figure
    return (figure,)


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## Before you believe your own variant

    A wrong memory often trains well enough to look like a discovery. The library therefore judges implementations, its
    own and yours, against the law in double precision, on inputs that were chosen to hurt: keys that repeat, decays from
    none to all at once. It also makes sure that the same inputs would have caught sixteen wrong memories.
    """)
    return


@app.cell
def _():
    def mine(q, k, v, log_decay, beta, state):
        """A variant to be judged: Kimi Delta Attention, a token at a time, with a mistake in it. Can you see it?"""
        outputs = []
        for t in range(q.shape[1]):
            held = torch.einsum("bhk,bhkv->bhv", k[:, t], state)  # before the fade
            state = log_decay[:, t].exp()[..., None] * state
            state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * (v[:, t] - held))
            outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
        return torch.stack(outputs, 1), state

    report = judge(mine, cases=CASES[1:4])
    tell(report)
    return (report,)


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
    def answer_1(q, k, v, log_decay, beta, state):
        """`mine` of above, without its mistake: returns (output [B, T, H, V], state [B, H, K, V])."""
        return None  # yours

    return (answer_1,)


@app.cell(hide_code=True)
def _(answer_1, here_1):
    def check_1(function):
        if function(*CASES[1].kda(torch.float32)) is None:
            return "Not yet: return the outputs and the state."
        found = judge(function, cases=CASES[1:4])
        if all(line.passed for line in found.lines):
            return "Right: the judge has no objection. The eraser must meet the board as it is after the fade."
        return f"Not yet: {str(found).splitlines()[0]}"

    verdict(check_1, yours(here_1, answer_1))
    return (check_1,)


@app.cell(hide_code=True)
def _(answer_2):
    here_2 = exercise(2, answer_2)
    here_2
    return (here_2,)


@app.cell
def _():
    def answer_2(bits):
        """The strengths beta, one for each bit, with which a one-number memory with values 0 tracks their parity."""
        return None  # yours

    return (answer_2,)


@app.cell(hide_code=True)
def _(answer_2, here_2):
    def check_2(function):
        bits = torch.tensor([1.0, 0, 1, 1, 0, 1])
        beta = function(bits)
        if beta is None:
            return "Not yet: return one number for each bit."
        shape = (1, len(bits), 1)
        k, v = torch.ones(*shape, 1), torch.zeros(*shape, 1)
        signs = delta_rule(k, k, v, beta.reshape(shape).float(), state=torch.ones(1, 1, 1, 1)).output.flatten()
        if torch.allclose(signs, 1 - 2 * (bits.cumsum(0) % 2), atol=1e-5):
            return "Right: an eigenvalue of minus one for a 1, of plus one for a 0."
        if signs.abs().min() < 0.5:
            return "Not yet: the number fades away. Which beta makes 1 - beta equal to minus one?"
        return "Not yet: it should flip at every 1 and stand still at every 0."

    verdict(check_2, yours(here_2, answer_2))
    return (check_2,)


@app.cell(hide_code=True)
def _():
    def solution_1(q, k, v, log_decay, beta, state):
        outputs = []
        for t in range(q.shape[1]):
            state = log_decay[:, t].exp()[..., None] * state
            held = torch.einsum("bhk,bhkv->bhv", k[:, t], state)
            state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * (v[:, t] - held))
            outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
        return torch.stack(outputs, 1), state

    def solution_2(bits):
        return 2 * bits

    def _no_decay(q, k, v, log_decay, beta, state):
        return solution_1(q, k, v, 0 * log_decay, beta, state)

    def _no_erase(q, k, v, log_decay, beta, state):
        return torch.zeros_like(v), state

    wrong_1 = [_no_decay, _no_erase]
    wrong_2 = [lambda bits: bits, lambda bits: 2 - 2 * bits]
    solutions(solution_1, solution_2)
    return solution_1, solution_2, wrong_1, wrong_2


@app.cell(hide_code=True)
def _():
    text(r"""
    ## Where to look next

    - `palimpsest/lab/experiments/`: each experiment is one file; copy the nearest and `palimpsest lab run yours.py`.
    - `palimpsest/ops/variants.py`: a new member of the family is one function and one line.
    - `palimpsest/testing/`: the judge, the inputs that hurt, and the wrong memories.
    - `CONTRIBUTING.md`: where a thing goes once it has earned its place.

    Next: [a state is a value](13_a_state_is_a_value.md).
    """)
    return


if __name__ == "__main__":
    app.run()
