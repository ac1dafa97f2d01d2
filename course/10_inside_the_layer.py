import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium")

with app.setup:
    import marimo as mo
    import matplotlib.pyplot as plt
    import torch
    from lesson import exercise, solutions, tell, text, verdict, yours
    from style import BLUE, MUTED, ORANGE

    from palimpsest import KimiDeltaAttention, backends, kda
    from palimpsest.ops.backends import Problem
    from palimpsest.ops.gates import l2norm


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    # 10. Inside the layer, and inside the kernels

    After this lesson you can

    - follow a token through every part of a Kimi Delta Attention layer and say what each is for,
    - ask the library which implementation runs a call, and why,
    - judge whether two implementations differ by rounding or by mistake.

    *15 minutes.*
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## The idea

    Around the memory stands a little machinery, and each part has one job.

    1. **Projections** make query, key and value from the token.
    2. A **short convolution** mixes each channel with the three tokens before: enough to tell *New York* from *York*
       before anything is written, so that the board need not remember it.
    3. **SiLU** bends the numbers a little.
    4. Queries and keys are brought to **length one**. A key of length one makes the eraser exact (lesson 4), and a board
       that cannot grow.
    5. The **gate** sets the decays (lesson 7); **beta** sets the strength.
    6. **Fade, erase, write, read.**
    7. Each head's answer is brought to one scale, and an **output gate**, computed from the token, decides how much of
       it to let through. A token that had no question may close it.
    8. A last projection mixes the heads.

    The memory itself runs in one of several implementations, *backends*: the law in a loop, chunks in plain PyTorch, a
    compiled kernel for the processor, kernels for graphics cards. They differ in speed only, and every one answers to the
    law.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## The mathematics

    $$q, k = \mathrm{norm}(\mathrm{silu}(\mathrm{conv}(W_q x))), \ \mathrm{norm}(\mathrm{silu}(\mathrm{conv}(W_k x))), \qquad v = \mathrm{silu}(\mathrm{conv}(W_v x))$$

    $$\log \alpha = - e^{A} \, \mathrm{softplus}(W_b W_a x + b), \qquad \beta = \mathrm{sigmoid}(W_{\beta} x)$$

    $$y = W_o \left( \mathrm{rmsnorm}(o) \odot \mathrm{sigmoid}(G_b G_a x) \right)$$

    The same layer in flash-linear-attention is `fla/layers/kda.py`, and it can be read line by line beside ours:

    | there | here |
    |---|---|
    | `q_proj`, `k_proj`, `v_proj`, `q_conv1d`, `k_conv1d`, `v_conv1d` | the same names: checkpoints fit both |
    | `f_proj`, `A_log`, `dt_bias` | `f_a_proj`, `f_b_proj`, `A_log`, `dt_bias`: as in the released weights |
    | `b_proj`, then a sigmoid | the same |
    | `g_proj`, `o_norm`, `o_proj` | `g_a_proj`, `g_b_proj`, `o_norm`, `o_proj` |
    | `chunk_kda(..., use_gate_in_kernel=True, use_qk_l2norm_in_kernel=True)` to train | `kda_from_logits`, which fuses the same steps |
    | `fused_recurrent_kda` for up to 64 tokens | `kda_step_` for one token, the state edited in place |
    | `past_key_values` | `state=` in, state out |

    What rounding may cost: a number in 32 bits is off by up to $6 \cdot 10^{-8}$ of itself, and a thousand operations by
    some ten times that. A difference of $10^{-6}$ between two implementations is rounding. One of $10^{-3}$, in 32 bits, is a
    mistake, however good the model looks.
    """)
    return


@app.cell
def _():
    torch.manual_seed(0)
    layer = KimiDeltaAttention(hidden_size=64, num_heads=2, head_dim=32)
    x = torch.randn(1, 50, 64)
    with torch.no_grad():
        y, state = layer(x)
        q, k, v, log_decay, beta = layer.recurrence_inputs(x)  # what the layer tells its memory
        o, _ = kda(q, k, v, log_decay, beta)
        by_hand = layer.o_norm(o) * layer.g_b_proj(layer.g_a_proj(x)).view_as(o).sigmoid()
        by_hand = layer.o_proj(by_hand.flatten(-2))
    tell("the layer in parts, against whole:", (by_hand - y).abs().max().item())
    tell("length of keys:", k.norm(dim=-1).min().item(), "to", k.norm(dim=-1).max().item())
    tell("state:", tuple(state.memory.shape), "and windows of", tuple(state.conv[0].shape))
    return beta, k, log_decay, q, v


@app.cell
def _():
    # Which implementation would run this call, and why not the others?
    problem = Problem("kda", "kda", "cpu", torch.float32, 32, 32, tokens=50, sequences=1, heads=2, value_heads=2)
    tell(backends.explain(problem))
    return (problem,)


@app.cell
def _(beta, k, log_decay, problem, q, v):
    # All that can, against the law in double precision.
    double = [t.double() for t in (q, k, v, log_decay, beta)]
    truth = kda(*double, backend="reference").output
    errors = {}
    for line in backends.explain(problem).splitlines():
        name, found = line.split(maxsplit=1)
        if found == "ok":
            output = kda(q, k, v, log_decay, beta, backend=name).output
            errors[name] = ((output - truth).abs().max() / truth.abs().max()).item()
    for name, wrong in {
        "decay in 16 bits": log_decay.bfloat16().float(),
        "decay a token late": log_decay.roll(1, 1),
    }.items():
        output = kda(q, k, v, wrong, beta).output
        errors[name] = ((output - truth).abs().max() / truth.abs().max()).item()
    tell({name: f"{error:.0e}" for name, error in errors.items()})
    return (errors,)


@app.cell
def _(beta, k, log_decay, q, v):
    # FLA's two names, over our kernels: one law, so the same numbers whichever is called.
    from palimpsest.compat.fla import chunk_kda, fused_recurrent_kda

    by_chunks, after = chunk_kda(q, k, v, log_decay, beta, output_final_state=True)
    by_tokens, _ = fused_recurrent_kda(q, k, v, log_decay, beta)
    tell(
        "chunk_kda against fused_recurrent_kda:",
        (by_chunks - by_tokens).abs().max().item(),
        " state",
        tuple(after.shape),
    )
    return


@app.cell(hide_code=True)
def _(errors):
    figure, _ax = plt.subplots(figsize=(7.2, 2.6))
    _colours = [ORANGE if error > 1e-5 else BLUE for error in errors.values()]
    _ax.barh(list(errors), list(errors.values()), color=_colours, left=1e-9)
    _ax.axvline(6e-8, color=MUTED, linewidth=1, linestyle="--")
    _ax.text(7e-8, -0.75, "one rounding", color=MUTED, fontsize=9)
    _ax.set(xscale="log", xlim=(1e-9, 3), xlabel="error against the law in double precision")
    _ax.invert_yaxis()
    figure
    return (figure,)


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## How a kernel keeps every factor small

    The compiled kernel for the processor uses chunks of 16 tokens and a trick that is worth knowing. It keeps each key
    *as it stands in the memory*: when a new token fades the board by $\alpha$, every key of the chunk that was already written is
    multiplied by $\alpha$ too. A product of a decayed key with a new key is then an entry of $A$ directly: no sums of logarithms,
    no differences of them, no exponent of either sign. At the end of the chunk the decayed keys are just what the update
    of the board needs. The header of `palimpsest/ops/cpu/delta_memory.c` tells it in twenty lines.

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
    def answer_1(x):
        """Bring vectors to length one as the layer does: x [..., K], with 1e-6 added inside the root."""
        return None  # yours

    return (answer_1,)


@app.cell(hide_code=True)
def _(answer_1, here_1):
    def check_1(function):
        x = torch.stack((torch.tensor([3.0, 4.0]), torch.tensor([3e-4, 4e-4]), torch.zeros(2)))
        found = function(x)
        if found is None:
            return "Not yet: return the vectors."
        if found.shape == x.shape and torch.allclose(found, l2norm(x), atol=1e-6):
            return "Right: a short key stays short, so that a token with nothing to say writes little."
        if not bool(found.isfinite().all()):
            return "Not yet: a key of length zero must not become infinite."
        if torch.allclose(found[0], l2norm(x)[0], atol=1e-6):
            return "Not yet: right for a long vector. Add 1e-6 to the sum of squares, before the root."
        return "Not yet: divide by the root of the sum of squares."

    verdict(check_1, yours(here_1, answer_1))
    return (check_1,)


@app.cell(hide_code=True)
def _(answer_2):
    here_2 = exercise(2, answer_2)
    here_2
    return (here_2,)


@app.cell
def _():
    def answer_2(error):
        """Is a relative error of a 32-bit implementation "rounding" or "mistake"?"""
        return None  # yours

    return (answer_2,)


@app.cell(hide_code=True)
def _(answer_2, here_2):
    def check_2(function):
        found = [function(e) for e in (1e-7, 8e-7, 1e-3, 0.3)]
        if found[0] is None:
            return "Not yet: return one of the two words."
        if found == ["rounding", "rounding", "mistake", "mistake"]:
            return "Right: and in between, measure an honest peer of the same precision, as the library's budgets do."
        return "Not yet: one rounding is 6e-8; a thousand in a row are still far below 1e-5."

    verdict(check_2, yours(here_2, answer_2))
    return (check_2,)


@app.cell(hide_code=True)
def _():
    def solution_1(x):
        return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()

    def solution_2(error):
        return "rounding" if error < 1e-5 else "mistake"

    wrong_1 = [lambda x: x / x.norm(dim=-1, keepdim=True), lambda x: torch.nn.functional.normalize(x, dim=-1)]
    wrong_2 = [lambda error: "rounding", lambda error: "rounding" if error < 5e-8 else "mistake"]
    solutions(solution_1, solution_2)
    return solution_1, solution_2, wrong_1, wrong_2


@app.cell(hide_code=True)
def _():
    text(r"""
    ## Where to look next

    `palimpsest/layers/kimi_delta_attention.py` from top to bottom; `palimpsest/ops/backends.py` for how a backend is
    chosen; `palimpsest/testing/` for budgets and wrong memories.

    Next: [the hybrid model](11_the_hybrid_model.md).
    """)
    return


if __name__ == "__main__":
    app.run()
