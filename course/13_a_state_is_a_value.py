import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium")

with app.setup:
    import marimo as mo
    import matplotlib.pyplot as plt
    import torch
    from lesson import exercise, solutions, tell, text, verdict, yours
    from style import BLUE, GREY, ORANGE, TEAL

    from palimpsest import KimiLinearConfig, KimiLinearForCausalLM, delta_rule


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    # 13. A state is a value

    After this lesson you can

    - fork a state, go back to it, and score many continuations of a prompt that is read once,
    - train on such a tree and get the gradients of every whole sequence,
    - say what happens to a memory that is kept in eight bits, and why it recovers.

    *20 minutes.*
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## The idea

    Softmax attention keeps a list, and a list can be cut: to go back ten tokens, drop ten entries. A board cannot. What was
    erased is gone, and no later state remembers the earlier one.

    So keep the *value*. A board is a small matrix; keeping one costs 64 kB a head and asking for it costs nothing. Then
    everything becomes assignment. To try three endings of one beginning, read the beginning once and use its state three
    times. To undo a wrong guess, use the state of before. To serve many users of one long prompt, start each from the same
    state. In training a reward for each of many answers to one question is a tree of this kind, called a *rollout*; the
    question need not be read again for each, and the gradient still reaches it from all of them.

    A state that is kept costs bytes, so one would like to keep it in fewer bits. Rounding a list of keys is harmless: each is
    rounded once. A board is rounded *every time it is kept*, and its rounding errors are carried along. Do they pile up?
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## The mathematics

    Let $e_t$ be the error of the board after token $t$ and $r_t$ what rounding adds then. The law is linear in the board, so the
    error goes through the same transition as the board itself:

    $$e_t = (I - \beta_t k_t k_t^{\top}) \, \mathrm{Diag}(\alpha_t) \, e_{t-1} + r_t .$$

    Decay shrinks it, and the eraser removes it under the key. A write of full strength, $\beta = 1$, leaves *no* old error under its
    key. With 128 rows and keys in all directions, some 128 such writes wash everything that was there, errors included: they
    level off. With gentle writes and slow decays they grow. That is the finding of `palimpsest lab run state`.
    """)
    return


@app.cell
def _():
    # Read the beginning once; score three endings from it.
    torch.manual_seed(0)
    model = KimiLinearForCausalLM(KimiLinearConfig.tiny("KKKM")).eval()
    spell = lambda words: torch.tensor([list(words.encode())])
    beginning = model(spell("What colour is the door? The door is")).state
    endings = [" red.", " blue.", " open."]
    three = beginning.fork(3)  # each sequence three times, side by side
    padded = torch.cat([spell(e.ljust(6)) for e in endings])
    mask = torch.tensor([[i < len(e) for i in range(6)] for e in endings])
    with torch.no_grad():
        after = model(padded, mask=mask, state=three).state
        alone = model(spell("What colour is the door? The door is blue.")).state
    tell("tokens read by each:", after.position.tolist())
    tell("the fork against the whole:", (after.layers[0].memory[1] - alone.layers[0].memory[0]).abs().max().item())
    return beginning, model, spell


@app.cell
def _():
    # A board kept in few bits: rounded after every token, for gentle and for full writes.
    def drift(beta_value, bits, tokens=400, K=32):
        draw = torch.Generator().manual_seed(0)
        k = torch.nn.functional.normalize(torch.randn(1, tokens, 1, K, generator=draw), dim=-1)
        v = torch.randn(1, tokens, 1, K, generator=draw)
        beta = torch.full((1, tokens, 1), beta_value)
        exact = kept = torch.zeros(1, 1, K, K)
        errors = []
        for t in range(tokens):
            now = [x[:, t : t + 1] for x in (k, k, v, beta)]
            exact, kept = delta_rule(*now, state=exact).state, delta_rule(*now, state=kept).state
            step = kept.abs().amax(-1, keepdim=True).clamp(min=1e-9) / (2 ** (bits - 1) - 1)
            kept = (kept / step).round() * step
            errors.append(((kept - exact).norm() / exact.norm()).item())
        return errors

    drifts = {(beta, bits): drift(beta, bits) for beta in (1.0, 0.05) for bits in (8, 4)}
    tell("error after 400 tokens:", {f"beta {b}, {n} bits": round(x[-1], 3) for (b, n), x in drifts.items()})
    return drift, drifts


@app.cell(hide_code=True)
def _(drifts):
    figure, _ax = plt.subplots(figsize=(7.2, 3))
    for ((_beta, _bits), _errors), _colour in zip(drifts.items(), (BLUE, TEAL, ORANGE, GREY)):
        _ax.plot(_errors, color=_colour, label=f"beta {_beta:g}, {_bits} bits")
    _ax.set(xlabel="token", ylabel="error of the board", yscale="log")
    _ax.legend(ncols=2, fontsize=9)
    figure
    return (figure,)


@app.cell(hide_code=True)
def _():
    strength = mo.ui.slider(0.05, 1.0, 0.05, value=0.3, label="beta of the writes", show_value=True)
    strength
    return (strength,)


@app.cell(hide_code=True)
def _(drift, strength):
    yours_drifts, _ax = plt.subplots(figsize=(7.2, 2.2))
    _ax.plot(drift(strength.value, 8), color=BLUE)
    _ax.set(xlabel="token", ylabel="error, 8 bits", title=f"writes of strength {strength.value:g}", ylim=(0, None))
    yours_drifts
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
    def answer_1(model, prompt, endings):
        """The log-likelihood of each ending after the prompt, reading the prompt once: prompt [1, T], endings a list of [1, n]."""
        return None  # yours

    return (answer_1,)


@app.cell(hide_code=True)
def _(answer_1, here_1, model, spell):
    def check_1(function):
        prompt, endings = spell("The door is"), [spell(" red"), spell(" blue")]
        read = []
        handle = model.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].numel()))
        try:
            with torch.no_grad():
                found = function(model, prompt, endings)
                num_read = sum(read)
                truth = []
                for ending in endings:
                    logits = model(torch.cat((prompt, ending), 1)).logits[0].log_softmax(-1)
                    truth.append(
                        sum(logits[prompt.shape[1] - 1 + i, x].item() for i, x in enumerate(ending[0].tolist()))
                    )
        finally:
            handle.remove()
        if found is None:
            return "Not yet: return one number for each ending."
        if any(abs(float(a) - b) > 1e-3 for a, b in zip(found, truth, strict=True)):
            return "Not yet: the first token of an ending is predicted by the last logits of the prompt."
        if num_read > prompt.numel() + sum(e.numel() for e in endings):
            return "Not yet: the numbers are right, but the prompt was read more than once."
        return "Right: this is how a question is read once and a hundred answers are graded."

    verdict(check_1, yours(here_1, answer_1))
    return (check_1,)


@app.cell(hide_code=True)
def _(answer_2):
    here_2 = exercise(2, answer_2)
    here_2
    return (here_2,)


@app.cell
def _():
    def answer_2(decay, beta):
        """A number of a one-row board is rounded after every token, with an error of 1 each time. The transition multiplies by
        decay * (1 - beta). Where does the error level off? (None if it never does.)"""
        return "yours"

    return (answer_2,)


@app.cell(hide_code=True)
def _(answer_2, here_2):
    def check_2(function):
        cases = [(1.0, 0.5), (0.9, 0.0), (1.0, 1.0), (0.5, 0.5)]
        found = [function(*case) for case in cases]
        if any(isinstance(x, str) for x in found):
            return "Not yet: return a number."
        truth = [2.0, 10.0, 1.0, 1 / 0.75]
        if any(x is None or abs(float(x) - t) > 1e-6 for x, t in zip(found, truth)):
            return "Not yet: e = a e + 1, solved for e, with a the factor of the transition."
        if function(1.0, 0.0) is not None:
            return "Not yet: without decay and without an eraser, errors add up for ever."
        return "Right: a geometric series. A write of full strength leaves only the last rounding."

    verdict(check_2, yours(here_2, answer_2))
    return (check_2,)


@app.cell(hide_code=True)
def _(answer_3):
    here_3 = exercise(3, answer_3)
    here_3
    return (here_3,)


@app.cell
def _():
    def answer_3(heads, head_dim, layers, gigabytes):
        """How many states of so many layers fit into so many gigabytes (10^9 bytes), at 4 bytes a number?"""
        return None  # yours

    return (answer_3,)


@app.cell(hide_code=True)
def _(answer_3, here_3):
    def check_3(function):
        found = function(32, 128, 20, 80)
        if found is None:
            return "Not yet: return a whole number."
        if int(found) == 80 * 10**9 // (32 * 128 * 128 * 4 * 20):
            return "Right: 1907 conversations on one card, whatever their length; in 8 bits four times as many."
        return "Not yet: heads x rows x columns x 4 bytes, times the layers."

    verdict(check_3, yours(here_3, answer_3))
    return (check_3,)


@app.cell(hide_code=True)
def _():
    def solution_1(model, prompt, endings):
        logits, state, _ = model(prompt)
        scores = []
        for ending in endings:
            after = torch.cat((logits[:, -1:], model(ending, state=state).logits[:, :-1]), 1)[0].log_softmax(-1)
            scores.append(after.gather(1, ending[0][:, None]).sum().item())
        return scores

    def solution_2(decay, beta):
        factor = decay * (1 - beta)
        return None if factor >= 1 else 1 / (1 - factor)

    def solution_3(heads, head_dim, layers, gigabytes):
        return gigabytes * 10**9 // (heads * head_dim**2 * 4 * layers)

    wrong_1 = [
        lambda model, prompt, endings: [0.0 for _ in endings],
        lambda model, prompt, endings: [
            solution_1(model, torch.cat((prompt, e[:, :1]), 1), [e[:, 1:]])[0] for e in endings
        ],
    ]
    wrong_2 = [lambda decay, beta: 1 / decay, lambda decay, beta: 1.0]
    wrong_3 = [
        lambda *_: 1000,
        lambda heads, head_dim, layers, gigabytes: gigabytes * 10**9 // (heads * head_dim**2 * 4),
    ]
    solutions(solution_1, solution_2, solution_3)
    return solution_1, solution_2, solution_3, wrong_1, wrong_2, wrong_3


@app.cell(hide_code=True)
def _():
    text(r"""
    ## Where to look next

    `docs/how-to/state.md` for forks, files and rewinding; `palimpsest/models/kimi_linear/model_state.py` for the value itself;
    `results/lab/state-small/` for rounding in trained models.

    Next: [one experiment, from recipe to verdict](14_an_experiment.md).
    """)
    return


if __name__ == "__main__":
    app.run()
