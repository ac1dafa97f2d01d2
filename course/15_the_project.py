import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium")

with app.setup:
    import inspect

    import marimo as mo
    import matplotlib.pyplot as plt
    import torch
    from lesson import exercise, solutions, tell, text, verdict, yours
    from style import BLUE, ORANGE

    from palimpsest import kda
    from palimpsest.testing import CASES, judge


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    # 15. The project

    After this lesson you can

    - say that you have written Kimi Delta Attention in chunks, from the law, in forty lines,
    - and need not be believed, because the judge says so.

    *An evening, or 60 minutes.*
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## The idea

    Write `chunk_kda(q, k, v, log_decay, beta, state)`: the memory of lesson 6 in the form of lesson 9, in plain PyTorch. No loop
    over tokens; a loop over chunks, with matrix products inside. It must be exact at every gate, from none to all at once, for
    every length, with a state on the way in and out.

    Nobody grades it. `palimpsest.testing.judge` runs it over inputs that were chosen to hurt, against the law in double
    precision, and allows it twice the error of an honest implementation. It also makes sure that the same inputs would have
    caught wrong memories of many kinds, among them those that people really wrote. If it passes, it is right.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## The mathematics

    Shapes: `q`, `k`, `log_decay` [B, T, H, K], `v` [B, T, H, V], `beta` [B, T, H], `state` [B, H, K, V]; queries are not scaled.
    In a chunk, with $\gamma(j, i)$ the product of the decays of tokens $j + 1$ to $i$,

    $$A_{ij} = \beta_i \sum_c k_{ic} k_{jc} \gamma_c(j, i) \ (j < i), \qquad P_{ij} = \sum_c q_{ic} k_{jc} \gamma_c(j, i) \ (j \le i),$$

    $$(I + A) \, u = \beta v - (\beta k \odot \gamma(0, \cdot)) \, S, \qquad o = (q \odot \gamma(0, \cdot)) \, S + P u,$$

    $$S \leftarrow \mathrm{Diag}(\gamma(0, C)) \, S + (k \odot \gamma(\cdot, C))^{\top} u .$$

    The trap is $\gamma$. As $e^{G_i - G_j}$ with $G$ a running sum it never overflows, since $G_i \le G_j$; but it *cancels*, and a log-decay of
    minus ten thousand in the sum leaves nothing of its neighbours. As a product $e^{G_i} e^{-G_j}$ it overflows. Small chunks may store
    $\gamma$ for each pair and channel, as a product of shares from token to token.
    """)
    return


@app.cell
def _():
    # What the judge asks: cases by name, and how many.
    hard = CASES[::16]
    tell(len(CASES), "cases; this page uses every sixteenth:", ", ".join(str(case) for case in hard)[:400])
    return (hard,)


@app.cell
def _(hard):
    # The library's own function, judged in the same way as yours will be.
    report = judge(lambda q, k, v, g, beta, state: kda(q, k, v, g, beta, state=state, scale=1.0), cases=hard)
    tell(str(report).splitlines()[-1])
    assert report.passed
    return


@app.cell(hide_code=True)
def _():
    # Why a running sum is not enough: the decay between two neighbours, after a channel was wiped.
    figure, _ax = plt.subplots(figsize=(7.2, 2.6))
    _wipe = torch.logspace(0, 9, 40)
    _small = torch.tensor(-0.01)
    _sums = torch.stack((-_wipe, -_wipe + _small))
    _ax.plot(_wipe, (_sums[1] - _sums[0]).exp(), color=ORANGE, label="from sums, in 32 bits")
    _ax.plot(_wipe, _small.exp().expand(40), color=BLUE, label="the truth, 0.990")
    _ax.set(xscale="log", xlabel="log-decay of an earlier token, negative", ylabel="decay of the next", ylim=(0.0, 1.1))
    _ax.legend()
    figure
    return (figure,)


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
        """One chunk: all tokens at once, without a loop over them. Returns (output [B, T, H, V], state [B, H, K, V])."""
        return None  # yours

    return (answer_1,)


@app.cell(hide_code=True)
def _(answer_1, hard, here_1):
    def check_1(function):
        case = hard[2]
        inputs = [x[:, :8] for x in case.kda(torch.float64)[:5]]
        B, _, H, K = inputs[0].shape
        state = torch.randn(
            B, H, K, inputs[2].shape[-1], dtype=torch.float64, generator=torch.Generator().manual_seed(0)
        )
        found = function(*inputs, state)
        if found is None:
            return "Not yet: return the outputs and the state."
        truth = kda(*inputs, state=state, scale=1.0, backend="reference")
        wrong = [
            name
            for name, a, b in zip(("outputs", "state"), found, truth)
            if a.shape != b.shape or not torch.allclose(a, b)
        ]
        return (
            f"Not yet: wrong are the {' and the '.join(wrong)}." if wrong else "Right: eight tokens in a few products."
        )

    verdict(check_1, yours(here_1, answer_1))
    return (check_1,)


@app.cell(hide_code=True)
def _(answer_2):
    here_2 = exercise(2, answer_2)
    here_2
    return (here_2,)


@app.cell
def _():
    def answer_2(q, k, v, log_decay, beta, state):
        """The project: any length, any gate, in chunks. Returns (output [B, T, H, V], state [B, H, K, V])."""
        return None  # yours

    return (answer_2,)


@app.cell(hide_code=True)
def _(answer_2, hard, here_2):
    def check_2(function):
        if function(*(x[:, :2] for x in hard[0].kda(torch.float32)[:5]), hard[0].kda(torch.float32)[5]) is None:
            return "Not yet: return the outputs and the state."
        found = judge(function, cases=hard)
        if not found.passed:
            failed = next((str(line) for line in found.lines if not line.passed), str(found).splitlines()[0])
            return f"Not yet, says the judge: {failed}"
        lines = len(
            [x for x in inspect.getsource(function).splitlines() if x.strip() and not x.strip().startswith("#")]
        )
        many = "" if lines <= 40 else f" It has {lines} lines; forty are enough."
        return f"Right, says the judge: within budget on every case, in {lines} lines.{many} You have built the memory of Kimi Linear."

    verdict(check_2, yours(here_2, answer_2))
    return (check_2,)


@app.cell(hide_code=True)
def _():
    def solution_1(q, k, v, log_decay, beta, state):
        q, k, v, g = (x.transpose(1, 2) for x in (q, k, v, log_decay))  # [B, H, C, *]
        beta, C = beta.transpose(1, 2)[..., None], q.shape[2]
        shares = g.exp()
        gamma = torch.ones_like(shares[..., :, None, :]).expand(*shares.shape[:2], C, C, -1).clone()
        for i in range(1, C):  # [i, j]: the product of the decays of j + 1 .. i
            gamma[..., i, :i, :] = gamma[..., i - 1, :i, :] * shares[..., i : i + 1, :]
        since, until = gamma[..., :, 0, :] * shares[..., :1, :], gamma[..., -1, :, :]
        A = beta * torch.einsum("bhik,bhjk,bhijk->bhij", k, k, gamma).tril(-1)
        P = torch.einsum("bhik,bhjk,bhijk->bhij", q, k, gamma).tril()
        u = torch.linalg.solve_triangular(
            torch.eye(C, dtype=A.dtype) + A, beta * (v - (k * since) @ state), upper=False, unitriangular=True
        )
        output = (q * since) @ state + P @ u
        return output.transpose(1, 2), since[..., -1, :, None] * state + (k * until).mT @ u

    def solution_2(q, k, v, log_decay, beta, state):
        wide = state.dtype
        outputs, rows = [], [x.to(wide) for x in (q, k, v, log_decay, beta)]
        for start in range(0, q.shape[1], 16):
            output, state = solution_1(*(x[:, start : start + 16] for x in rows), state)
            outputs.append(output)
        return torch.cat(outputs, 1).to(v.dtype) if outputs else torch.zeros_like(v), state

    def _no_decay(q, k, v, log_decay, beta, state):
        return solution_2(q, k, v, 0 * log_decay, beta, state)

    def _forgets_the_state(q, k, v, log_decay, beta, state):
        return solution_2(q, k, v, log_decay, beta, torch.zeros_like(state))

    def _erases_before_the_fade(q, k, v, log_decay, beta, state):
        late = torch.cat((log_decay[:, 1:], 0 * log_decay[:, :1]), 1)
        return solution_2(q, k, v, late, beta, state)

    wrong_1 = [_no_decay, _forgets_the_state]
    wrong_2 = [_no_decay, _forgets_the_state, _erases_before_the_fade]
    solutions(solution_1, solution_2)
    return solution_1, solution_2, wrong_1, wrong_2


@app.cell(hide_code=True)
def _():
    text(r"""
    ## Where to look next

    `palimpsest/ops/chunked.py` does the same for chunks of 32 without storing $\gamma$; then the kernels, `palimpsest/ops/cpu/`
    first. To have yours judged for speed, too: `python -m benchmarks.cpu`. If it beats ours, `CONTRIBUTING.md` says where it goes.

    Back to [the beginning](01_soft_look_up.md).
    """)
    return


if __name__ == "__main__":
    app.run()
