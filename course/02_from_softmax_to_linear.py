import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium")

with app.setup:
    import time

    import marimo as mo
    import matplotlib.pyplot as plt
    import torch
    from lesson import exercise, solutions, tell, text, verdict, yours
    from style import BLUE, ORANGE

    from palimpsest import linear_attention, softmax_lookup
    from palimpsest.ops.variants import elu_plus_one


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    # 2. From softmax to linear attention

    After this lesson you can

    - rewrite a look-up so that it needs no list of past tokens, by moving one pair of brackets,
    - see the same numbers as a sum over the past and as a memory of fixed size that is updated token by token,
    - say what is lost on the way.

    *15 minutes.*
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## The idea

    The soft look-up of lesson 1 keeps a *scroll*: every key and value that ever came. Each new token unrolls it from the
    beginning. Reading a text of length $T$ so costs $T^2$, and the scroll grows without end.

    Why can we not summarise the scroll? Because of the exponential. The weight of an old token, $\exp(q \cdot k)$, mixes
    query and key in a way that cannot be taken apart: until the query is known, nothing can be added up.

    So use a weight that *can* be taken apart: a plain product $\phi(q) \cdot \phi(k)$, with some function $\phi$ that makes features of a
    key. Then everything that concerns the past can be added up before any query comes, once and for all, in a matrix.
    The scroll becomes a whiteboard.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## The mathematics

    $$o_t = \frac{\sum_{s \le t} \left( \phi(q_t)^{\top} \phi(k_s) \right) v_s}{\sum_{s \le t} \phi(q_t)^{\top} \phi(k_s)} = \frac{\left( \sum_{s \le t} \phi(k_s) v_s^{\top} \right)^{\top} \phi(q_t)}{\left( \sum_{s \le t} \phi(k_s) \right)^{\top} \phi(q_t)} = \frac{S_t^{\top} \phi(q_t)}{z_t^{\top} \phi(q_t)}$$

    The first form looks back over all tokens, the last knows only $S_t$ and $z_t$. In between, nothing happened but that
    the query was moved out of the sum. And the sums can be kept up to date:

    $$S_t = S_{t-1} + \phi(k_t) v_t^{\top}, \qquad z_t = z_{t-1} + \phi(k_t).$$

    This is the *kernel trick* of Katharopoulos, Vyas, Pappas and Fleuret (*Transformers are RNNs*, arXiv:2006.16236): any
    similarity that is an inner product of features, $\kappa(q, k) = \phi(q)^{\top} \phi(k)$, can be summed before the query comes. With $N$
    tokens and $d$ channels the scroll costs $O(N^2 d)$ and the board $O(N d^2)$.

    This is the *recurrent view*: attention that is a recurrent network, with a matrix for its state. Training still uses
    the other view, all tokens at once. Both give the same numbers, and everything in this course lives on having both.
    """)
    return


@app.cell
def _():
    T, K, V = 12, 4, 3
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, T, 1, n, generator=draw) for n in (K, K, V))

    # All at once: weights between every pair of tokens, none to the future.
    weights = (elu_plus_one(q[0, :, 0]) @ elu_plus_one(k[0, :, 0]).T).tril()
    at_once = weights @ v[0, :, 0] / weights.sum(-1, keepdim=True)

    # Token by token: a memory of fixed size goes in and comes out.
    state, outputs = None, []
    for t in range(T):
        output, state = linear_attention(q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1], state=state)
        outputs.append(output[0, 0, 0])
    tell("largest difference:", (torch.stack(outputs) - at_once).abs().max().item())
    tell("state:", tuple(state.shape), "(its last column is z)")
    return k, q, v


@app.cell
def _(k, q, v):
    # What each way must carry along: the scroll grows, the board does not.
    scroll, boards = [], []
    for n in (1, 4, 12):
        _, (keys, values) = softmax_lookup(q[:, :n], k[:, :n], v[:, :n])
        scroll.append(keys.numel() + values.numel())
        boards.append(linear_attention(q[:, :n], k[:, :n], v[:, :n]).state.numel())
    tell("numbers in the scroll:", scroll, " on the board:", boards)
    return


@app.cell
def _():
    # And the time of it, forward, in the same library: four heads of 32 channels, the shorter of two tries.
    def seconds(run, n):
        x = torch.randn(1, n, 4, 32)
        tries = []
        for _ in range(2):
            began = time.perf_counter()
            run(x, x, x)
            tries.append(time.perf_counter() - began)
        return min(tries)

    lengths = [128, 256, 512, 1024, 2048]
    times = {name: [seconds(run, n) for n in lengths] for name, run in
             {"softmax": softmax_lookup, "linear": linear_attention}.items()}  # fmt: skip
    return lengths, times


@app.cell(hide_code=True)
def _(lengths, times):
    clock, _ax = plt.subplots(figsize=(7.2, 2.6))
    for (_name, _seconds), _colour in zip(times.items(), (BLUE, ORANGE)):
        _ax.plot(lengths, [1000 * x for x in _seconds], "o-", color=_colour, label=_name)
    _ax.set(xscale="log", yscale="log", xlabel="tokens", ylabel="milliseconds, here and now")
    _ax.legend()
    clock
    return


@app.cell(hide_code=True)
def _():
    sharpness = mo.ui.slider(0.5, 8.0, 0.5, value=4.0, label="length of the query", show_value=True)
    sharpness
    return (sharpness,)


@app.cell(hide_code=True)
def _(sharpness):
    # One query that equals one of eight keys: how much weight does each way give to each key?
    _angles = torch.arange(8) * torch.pi / 8
    _keys = torch.stack((_angles.cos(), _angles.sin()), -1)
    _query = sharpness.value * _keys[3]
    _soft = (_keys @ _query).softmax(-1)
    _linear = elu_plus_one(_keys) @ elu_plus_one(_query)
    figure, _ax = plt.subplots(figsize=(7.2, 2.6))
    _x = torch.arange(8).numpy()
    _ax.bar(_x - 0.2, _soft.numpy(), 0.38, color=BLUE, label="softmax")
    _ax.bar(_x + 0.2, (_linear / _linear.sum()).numpy(), 0.38, color=ORANGE, label="linear, elu + 1")
    _ax.set(xlabel="key (the query points at key 3)", ylabel="weight", xticks=range(8))
    _ax.legend()
    figure
    return (figure,)


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## What is lost

    Move the slider. Softmax can make up its mind: with a long query nearly all weight falls on one key. The product of
    features stays soft whatever the length, because it grows only in proportion. The board has a fixed number of rows,
    so beyond that many keys must share. The rest of the course is about spending those rows better: by writing what is
    new instead of everything, and by letting go.

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
    def answer_1(tokens, K, V):
        """How many numbers must be kept after so many tokens? Return (scroll, board), the board with its column z."""
        return None  # yours

    return (answer_1,)


@app.cell(hide_code=True)
def _(answer_1, here_1):
    def check_1(function):
        found = function(1000, 64, 32)
        if found is None:
            return "Not yet: return two numbers."
        if tuple(found) == (1000 * 96, 64 * 33):
            return "Right: and at a million tokens the board is still the same."
        if tuple(found) == (1000 * 96, 64 * 32):
            return "Not yet: the board also keeps the sum of the features, one more column."
        return "Not yet: the scroll keeps a key and a value a token; the board K rows of V + 1 columns."

    verdict(check_1, yours(here_1, answer_1))
    return (check_1,)


@app.cell(hide_code=True)
def _(answer_2):
    here_2 = exercise(2, answer_2)
    here_2
    return (here_2,)


@app.cell
def _():
    def answer_2(state, key, value):
        """The next state of linear attention, without normalisation and features: S [K, V], key [K], value [V]."""
        return None  # yours

    return (answer_2,)


@app.cell(hide_code=True)
def _(answer_2, here_2):
    def check_2(function):
        draw = torch.Generator().manual_seed(3)
        S, key, value = (torch.randn(*n, generator=draw) for n in ((4, 3), (4,), (3,)))
        shaped = [x.view(1, 1, 1, -1) for x in (key, key, value)]
        truth = linear_attention(*shaped, feature_map=lambda x: x, normalise=False, state=S[None, None]).state[0, 0]
        found = function(S.clone(), key, value)
        if found is None:
            return "Not yet: return the new state."
        if found.shape == truth.shape and torch.allclose(found, truth, atol=1e-5):
            return "Right: one line, and the whole past is in it."
        return "Not yet: add the outer product of key and value to the state."

    verdict(check_2, yours(here_2, answer_2))
    return (check_2,)


@app.cell(hide_code=True)
def _():
    def solution_1(tokens, K, V):
        return tokens * (K + V), K * (V + 1)

    def solution_2(state, key, value):
        return state + torch.outer(key, value)

    wrong_1 = [lambda tokens, K, V: (tokens * (K + V), K * V), lambda tokens, K, V: (tokens**2, K * V)]
    wrong_2 = [
        lambda state, key, value: torch.outer(key, value),
        lambda state, key, value: state * torch.outer(key, value),
    ]
    solutions(solution_1, solution_2)
    return solution_1, solution_2, wrong_1, wrong_2


@app.cell(hide_code=True)
def _():
    text(r"""
    ## Where to look next

    `linear_attention` and `softmax_lookup` in `palimpsest/ops/variants.py`. Paper: linear transformers, arXiv:2006.16236.

    Next: [a matrix that remembers](03_matrix_memory.md), or what is on that board.
    """)
    return


if __name__ == "__main__":
    app.run()
