import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium")

with app.setup:
    import marimo as mo
    import matplotlib.pyplot as plt
    import torch
    from lesson import exercise, solutions, tell, text, verdict, yours
    from style import BLUE, GREY, ORANGE

    from palimpsest import KimiLinearConfig, KimiLinearForCausalLM, ModelState


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    # 11. The hybrid model

    After this lesson you can

    - say what the one layer in four that looks back is for, and why it needs no positions,
    - compute what a model must carry along at a given length, and compare it with full attention,
    - run the model in pieces: read a prompt, keep its state, go on in two directions.

    *15 minutes.*
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## The idea

    A whiteboard of fixed size cannot hold a telephone book. Whatever the eraser and the decays do, a text with more
    unrelated facts than the board has room for must lose some. A scroll loses nothing and grows without end.

    Kimi Linear takes both: three layers with a board to one that looks back, again and again, twenty-seven layers deep.
    The boards do the everyday work, what was just said and what belongs together. The layers that look back are there
    for the rare exact question about something far away.

    Two economies make them cheap. They keep not keys and values for each head but one short *latent* vector for each
    token, out of which every head makes its own (multi-head latent attention). And they carry **no positions**: the
    boards around them, with their decays, already know what is near and what is far (lesson 8). Nothing in a layer that
    looks back depends on how long the text is, so nothing has to be stretched when it grows.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## The mathematics

    For the released model: $H = 32$ heads of $128 \times 128$ in each of 20 memory layers, in 32 bits,

    $$20 \cdot 32 \cdot 128 \cdot 128 \cdot 4 \text{ bytes} = 41.9 \text{ MB},$$

    whatever the length, and a few inputs of the short convolutions. Each of the 7 layers that look back keeps $512 + 64$
    numbers of 16 bits a token, 8,064 bytes for all seven. At a million tokens these are 8.5 GB, against 32.6 GB if all 27
    layers were of that kind, and many times that with ordinary keys and values. Seven of twenty-seven: the saving
    tends to three quarters, and the board's part to nothing.
    """)
    return


@app.cell
def _():
    config = KimiLinearConfig.official_48b()
    tell("".join("K" if kind == "kda" else "M" for kind in config.layer_types), len(config.layer_types), "layers")

    boards, latents = config.layer_types.count("kda"), config.layer_types.count("mla")
    H, K = config.linear_num_heads, config.linear_head_dim
    latent = config.kv_lora_rank + config.qk_rope_head_dim
    keys_and_values = config.num_attention_heads * (
        config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    )

    def carried(tokens):
        """Bytes after so many tokens: the hybrid, all layers latent, all layers with plain keys and values."""
        board = boards * H * K * K * 4 + boards * 3 * H * K * 3 * 2  # memories, and the windows of the convolutions
        return board + latents * latent * 2 * tokens, 27 * latent * 2 * tokens, 27 * keys_and_values * 2 * tokens

    for tokens in (4096, 131072, 2**20):
        tell(f"{tokens:8} tokens:", *(f"{x / 1e9:8.2f} GB" for x in carried(tokens)))
    return (carried,)


@app.cell(hide_code=True)
def _(carried):
    figure, _ax = plt.subplots(figsize=(7.2, 3))
    _tokens = [2**n for n in range(8, 21)]
    _names = ("three boards to one latent", "all latent", "plain keys and values")
    for _i, (_name, _colour) in enumerate(zip(_names, (BLUE, ORANGE, GREY))):
        _ax.plot(_tokens, [carried(n)[_i] / 1e9 for n in _tokens], color=_colour, label=_name)
    _ax.set(xscale="log", yscale="log", xlabel="tokens read", ylabel="GB carried along")
    _ax.legend()
    figure
    return (figure,)


@app.cell
def _():
    # The same model in small: three boards, one layer that looks back. Untrained, but it carries its state like the big one.
    torch.manual_seed(0)
    model = KimiLinearForCausalLM(KimiLinearConfig.tiny("KKKM")).eval()
    prompt = torch.tensor([list(b"The door is red. The door is")])
    with torch.no_grad():
        _, whole, _ = model(prompt)
        _, half, _ = model(prompt[:, :10])  # the state is a value: in and out
        _, both, _ = model(prompt[:, 10:], state=half)
    difference = (whole.layers[0].memory - both.layers[0].memory).abs().max()
    tell("read in two pieces, the first board differs by", difference.item())
    return both, model


@app.cell
def _(both, model):
    with torch.no_grad():
        for word in (b" blue", b" open"):  # two futures of one past
            _, after, _ = model(torch.tensor([list(word)]), state=both)
            tell(word.decode(), "->", after.position.item(), "tokens,", after.nbytes, "bytes")
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
    def answer_1(pattern, tokens, heads=32, head_dim=128, latent=576):
        """Bytes carried along by a model such as "KKKM": boards in 32 bits, latents in 16, without the convolutions."""
        return None  # yours

    return (answer_1,)


@app.cell(hide_code=True)
def _(answer_1, here_1):
    def check_1(function):
        found = [function("KKKM", 0), function("KKKM", 1000), function("KM" * 3, 10)]
        if found[0] is None:
            return "Not yet: return a number of bytes."
        truth = [3 * 32 * 128 * 128 * 4, 3 * 32 * 128 * 128 * 4 + 576 * 2000, 3 * (32 * 128 * 128 * 4 + 576 * 20)]
        if [int(x) for x in found] == truth:
            return "Right: only the letters M have anything to do with the length."
        if int(found[0]) != truth[0]:
            return (
                "Not yet: at length 0 there are the boards alone, head_dim x head_dim numbers of 4 bytes for each head."
            )
        return "Not yet: each M keeps one latent vector of 2-byte numbers a token, for all heads together."

    verdict(check_1, yours(here_1, answer_1))
    return (check_1,)


@app.cell(hide_code=True)
def _(answer_2):
    here_2 = exercise(2, answer_2)
    here_2
    return (here_2,)


@app.cell
def _():
    def answer_2(model, prompt, endings):
        """The model's states after the prompt with each ending, reading the prompt only once: a list of ModelState."""
        return None  # yours

    return (answer_2,)


@app.cell(hide_code=True)
def _(answer_2, here_2, model):
    def check_2(function):
        prompt = torch.tensor([list(b"The door is")])
        endings = [torch.tensor([list(word)]) for word in (b" red", b" blue")]
        read = []
        handle = model.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].shape[1]))
        try:
            with torch.no_grad():
                found = function(model, prompt, endings)
                num_read = sum(read)
                truth = [model(torch.cat((prompt, ending), 1)).state for ending in endings]
        finally:
            handle.remove()
        if found is None or not all(isinstance(state, ModelState) for state in found):
            return "Not yet: return a list of states."
        same = [torch.allclose(a.layers[0].memory, b.layers[0].memory, atol=1e-5) for a, b in zip(found, truth)]
        if len(found) != 2 or not all(same):
            return "Not yet: the states differ from those of reading each whole text."
        if num_read > prompt.shape[1] + sum(e.shape[1] for e in endings):
            return "Not yet: the prompt was read more than once."
        return "Right: a call gives a new state and leaves the old one as it was, so it can be used twice."

    verdict(check_2, yours(here_2, answer_2))
    return (check_2,)


@app.cell(hide_code=True)
def _():
    def solution_1(pattern, tokens, heads=32, head_dim=128, latent=576):
        return pattern.count("K") * heads * head_dim**2 * 4 + pattern.count("M") * latent * 2 * tokens

    def solution_2(model, prompt, endings):
        state = model(prompt).state
        return [model(ending, state=state).state for ending in endings]

    wrong_1 = [
        lambda pattern, tokens, **_: pattern.count("K") * 32 * 128 * 128 * 2 + pattern.count("M") * 576 * 2 * tokens,
        lambda pattern, tokens, **_: len(pattern) * 576 * 2 * tokens,
    ]
    wrong_2 = [
        lambda model, prompt, endings: [model(torch.cat((prompt, ending), 1)).state for ending in endings],
        lambda model, prompt, endings: [model(ending).state for ending in endings],
    ]
    solutions(solution_1, solution_2)
    return solution_1, solution_2, wrong_1, wrong_2


@app.cell(hide_code=True)
def _():
    text(r"""
    ## Where to look next

    `palimpsest/models/kimi_linear/model.py`, top to bottom; `palimpsest info 48b` prints the arithmetic of this
    lesson for the released model. The paper measures a cache smaller by up to three quarters and up to six times faster
    decoding at a million tokens.

    Next: [questions for research](12_questions.md).
    """)
    return


if __name__ == "__main__":
    app.run()
