import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium")

with app.setup:
    import marimo as mo
    import matplotlib.pyplot as plt
    import torch
    from lesson import exercise, solutions, tell, text, verdict, yours
    from style import BLUE, MUTED

    from palimpsest import delta_rule, linear_attention


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    # 4. The delta rule

    After this lesson you can

    - say what goes wrong when a key is written twice, and how the eraser mends it,
    - derive the delta rule as one step of gradient descent, taken at every token while the model runs,
    - check with automatic differentiation that the library takes just that step.

    *15 minutes.*
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## The idea

    The door is red. The door is blue. What colour is the door?

    A memory that only adds answers *red and blue*: both values were written under one key, and a read returns their sum.
    What we want is that a write first looks. What does the board say under this key now? Red. What should it say? Blue.
    Then write the *difference*: take red away, put blue there. That is all that the delta rule does, and "delta" is the
    difference.

    Seen from another side, the board is a tiny model that is trained while it is used. Its input is a key, its output
    what it holds there, its target the value. Each token is one training example and one step of gradient descent. Such
    weights, written while a text is read, are *fast weights* (Schmidhuber, 1992); that a delta rule should write them is
    due to Schlag, Irie and Schmidhuber (*Linear transformers are secretly fast weight programmers*, arXiv:2102.11174).
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## The mathematics

    The board $S$ answers a key by $S^{\top} k$. Its error on the present example is

    $$L(S) = \tfrac12 \, \lVert S^{\top} k - v \rVert^2, \qquad \nabla_S L = k \, (S^{\top} k - v)^{\top}.$$

    A step of size $\beta$ down the gradient is

    $$S_t = S_{t-1} - \beta_t k_t (S_{t-1}^{\top} k_t - v_t)^{\top} = (I - \beta_t k_t k_t^{\top}) S_{t-1} + \beta_t k_t v_t^{\top}.$$

    The first form says *correct the answer*, the second *erase, then write*. They are the same numbers.

    With a key of length one, $S_t^{\top} k_t = (1 - \beta_t) S_{t-1}^{\top} k_t + \beta_t v_t$: a mixture of the old answer and the new value.
    Linear attention is the same walk on another hill. Its update $S + k v^{\top}$ is a gradient step on
    $L(S) = -\langle S^{\top} k, v \rangle$, which rewards agreement without end: that objective has no lowest point, so nothing ever
    tells the board to stop, or to take anything back. The square has one.

    $I - \beta k k^{\top}$ is a *Householder* matrix when $\beta = 2$, the reflection in the plane at right angles to the key; for other
    strengths it is called a generalised one. A product of many of them has a short form, which lesson 9 lives on.

    $\beta = 0$ ignores the token, $\beta = 1$ replaces the answer, $\beta = 2$ reflects it: as far beyond the value as it was short of
    it. Beyond 2 every step makes the error larger, and the board explodes.

    One reflection can swap two things; two make a rotation. *Gated DeltaProduct*, `palimpsest.gated_delta_product`, lets each
    token erase and write several times before it reads, and so carry a step of a larger group than parity.
    """)
    return


@app.cell
def _():
    # Sixteen facts under four keys: each key is written four times, with another value each time.
    draw = torch.Generator().manual_seed(0)
    keys = torch.nn.functional.normalize(torch.randn(4, 8, generator=draw), dim=-1)
    k = keys.repeat(4, 1).view(1, 16, 1, 8)
    v = torch.randn(1, 16, 1, 3, generator=draw)

    only_adds = linear_attention(k, k, v, feature_map=lambda x: x, normalise=False).state[0, 0]
    erases = delta_rule(k, k, v, beta=torch.ones(1, 16, 1)).state[0, 0]
    last = v[0, -4:, 0]  # what each key should answer now
    for name, S in (("only adds", only_adds), ("erases first", erases)):
        tell(f"{name:13} error of the answers {(keys @ S - last).norm() / last.norm():.2f}")
    return k, keys, last, v


@app.cell
def _(k, v):
    # One step by the library, one by automatic differentiation.
    S0 = torch.randn(8, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    loss = (S0.T @ k[0, 0, 0] - v[0, 0, 0]).square().sum() / 2
    loss.backward()
    stepped = S0 - 0.3 * S0.grad
    ours = delta_rule(k[:, :1], k[:, :1], v[:, :1], torch.full((1, 1, 1), 0.3), state=S0.detach()[None, None]).state[
        0, 0
    ]
    tell("largest difference:", (ours - stepped).abs().max().item())
    return


@app.cell(hide_code=True)
def _():
    strength = mo.ui.slider(0.05, 2.0, 0.05, value=1.0, label="beta", show_value=True)
    strength
    return (strength,)


@app.cell(hide_code=True)
def _(k, keys, last, strength, v):
    def _errors(beta, rounds=12):
        S, errors = torch.zeros(1, 1, 8, 3), []
        for _ in range(rounds):  # the same four facts again and again
            errors.append(((keys @ S[0, 0] - last).norm() / last.norm()).item())
            S = delta_rule(k[:, -4:], k[:, -4:], v[:, -4:], torch.full((1, 4, 1), beta), state=S).state
        return errors

    figure, _ax = plt.subplots(figsize=(7.2, 2.8))
    for _beta, _colour, _line in ((0.25, MUTED, "--"), (1.75, MUTED, ":"), (strength.value, BLUE, "o-")):
        _ax.plot(_errors(_beta), _line, color=_colour, markersize=4, label=f"beta {_beta:g}")
    _ax.set(xlabel="times that the four facts were seen", ylabel="error of the answers", yscale="log")
    _ax.legend()
    figure
    return (figure,)


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    The keys of the figure are not at right angles, so that mending one answer spoils the others a little, and it takes
    several rounds. With keys at right angles one round with $\beta = 1$ would do.

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
    def answer_1(S, k, v, beta):
        """The board after one step of the delta rule: S [K, V], k [K], v [V], beta a number."""
        return None  # yours

    return (answer_1,)


@app.cell(hide_code=True)
def _(answer_1, here_1):
    def check_1(function):
        draw = torch.Generator().manual_seed(2)
        S, k, v = (torch.randn(*n, generator=draw) for n in ((3, 2), (3,), (2,)))
        truth = S - 0.5 * torch.outer(k, S.T @ k - v)
        found = function(S.clone(), k, v, 0.5)
        if found is None:
            return "Not yet: return the new board."
        if found.shape == truth.shape and torch.allclose(found, truth, atol=1e-5):
            return "Right: one example, one step."
        if found.shape == truth.shape and torch.allclose(found, S + 0.5 * torch.outer(k, v), atol=1e-5):
            return "Not yet: that only adds. First ask the board what it says under k."
        return "Not yet: the correction is an outer product of k with the error of the answer."

    verdict(check_1, yours(here_1, answer_1))
    return (check_1,)


@app.cell(hide_code=True)
def _(answer_2):
    here_2 = exercise(2, answer_2)
    here_2
    return (here_2,)


@app.cell
def _():
    def answer_2(k):
        """The largest beta for which a step with this key does not make the error larger."""
        return None  # yours

    return (answer_2,)


@app.cell(hide_code=True)
def _(answer_2, here_2):
    def check_2(function):
        found = [function(torch.tensor(key)) for key in ([1.0, 0.0], [3.0, 4.0])]
        if found[0] is None:
            return "Not yet: return a number."
        if abs(float(found[0]) - 2) < 1e-4 and abs(float(found[1]) - 2 / 25) < 1e-4:
            return "Right: 2 over the squared length. That is why layers bring their keys to length one."
        if abs(float(found[0]) - 2) < 1e-4:
            return "Not yet: right for a key of length one; what does the step do along a longer key?"
        return "Not yet: after the step the error along k is (1 - beta k.k) times what it was."

    verdict(check_2, yours(here_2, answer_2))
    return (check_2,)


@app.cell(hide_code=True)
def _():
    def solution_1(S, k, v, beta):
        return S + beta * torch.outer(k, v - S.T @ k)

    def solution_2(k):
        return 2 / (k @ k)

    wrong_1 = [
        lambda S, k, v, beta: S + beta * torch.outer(k, v),
        lambda S, k, v, beta: S - beta * torch.outer(k, v - S.T @ k),
    ]
    wrong_2 = [lambda k: 2.0, lambda k: 1 / (k @ k)]
    solutions(solution_1, solution_2)
    return solution_1, solution_2, wrong_1, wrong_2


@app.cell(hide_code=True)
def _():
    text(r"""
    ## Where to look next

    `delta_rule` in `palimpsest/ops/variants.py`; the test that its update is one gradient step stands in
    `tests/ops/test_variants.py`. Papers: fast weight programmers, arXiv:2102.11174; the parallel
    delta rule, arXiv:2406.06484; *Kimi Linear*, section 2.2, and its table 7 for the objectives of the whole family.

    Next: [forgetting](05_forgetting.md), for what lies under keys that never come again.
    """)
    return


if __name__ == "__main__":
    app.run()
