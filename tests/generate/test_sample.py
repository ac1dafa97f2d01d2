"""Generation: the same tokens alone, in a batch, in one run or several, and as reading everything again at each token."""

import subprocess
import sys

import pytest
import torch

from palimpsest.generate import DecodeState, Sampling, generate, prefill, prompt_lookup, stream
from palimpsest.generate.sampling import choose_tokens
from palimpsest.models.kimi_linear import KimiLinearConfig, KimiLinearForCausalLM, ModelState
from palimpsest.models.kimi_linear.history import StateHistory
from palimpsest.models.kimi_linear.state_file import save_state
from palimpsest.text import ByteTokenizer

PROMPTS = [[1, 2, 3], list(range(50, 90)), [7], list(range(100, 117))]
SAMPLINGS = [Sampling(), Sampling(0.9, top_k=40, top_p=0.9), Sampling(1.0, repetition_penalty=1.5)]
REST = {"end_tokens": (), "max_new_tokens": 12}


class Scripted(KimiLinearForCausalLM):
    """A real model with real states whose logits ask for the bytes of a given text, by position."""

    def __init__(self, text: bytes):
        super().__init__(KimiLinearConfig.tiny("KM"))
        self.text = [*text, 256]

    def forward(self, input_ids, *, state=None, mask=None, cu_seqlens=None, labels=None, last_only=False):
        output = super().forward(input_ids, state=state, mask=mask, last_only=last_only)
        T = output.logits.shape[1]
        return output._replace(logits=torch.stack([self.say(output.state.position - T + 1 + t) for t in range(T)], 1))

    def step_(self, input_ids, state, mask=None):
        _, state = super().step_(input_ids, state, mask)
        return self.say(state.position), state

    def say(self, position):
        wanted = torch.tensor([self.text[min(p, len(self.text) - 1)] for p in position.tolist()])
        return torch.nn.functional.one_hot(wanted, 257).float()


def say(text: str, **rest):
    """Generate `text` after its first byte."""
    rest = {"tokenizer": ByteTokenizer(), "max_new_tokens": 99} | rest
    return generate(Scripted(text.encode()), [[text.encode()[0]]], **rest)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=repr)
def test_every_token_is_the_one_that_reading_all_again_would_choose(model, sampling):
    tokens, found = list(PROMPTS[0]), generate(model, [PROMPTS[0]], sampling=sampling, seed=5, **REST).tokens[0]
    for _ in range(12):
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[:, -1]
        seen = torch.zeros(1, 257, dtype=torch.bool)
        seen[0, tokens] = True
        tokens += choose_tokens(logits, sampling, seeds=[5], positions=[len(tokens)], seen=seen).tolist()
    assert found == tokens[3:]
    assert len(set(found)) > 6  # a model that repeats itself would hide mistakes


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=repr)
def test_a_batch_gives_what_its_sequences_give_alone(model, sampling):
    together = generate(model, PROMPTS, sampling=sampling, prefill_chunk=16, seed=3, **REST)
    for i, prompt in enumerate(PROMPTS):
        alone = generate(model, [prompt], sampling=sampling, prefill_chunk=16, seed=3 + i, **REST)
        assert alone.tokens[0] == together.tokens[i]
        assert alone.state.position[0] == together.state.position[i] == len(prompt) + 12
        for name, x in together.state.select([i]).tensors().items():
            torch.testing.assert_close(x, alone.state.tensors()[name], atol=1e-4, rtol=1e-4)


def test_padding_on_either_side_and_lists_are_the_same(model):
    lists = generate(model, PROMPTS, **REST)
    for left in (True, False):
        longest = max(map(len, PROMPTS))
        fill = [[0] * (longest - len(p)) for p in PROMPTS]
        ids = torch.tensor([f + p if left else p + f for f, p in zip(fill, PROMPTS)])
        place = torch.arange(longest)
        lengths = torch.tensor([len(p) for p in PROMPTS])[:, None]
        mask = place >= longest - lengths if left else place < lengths
        padded = generate(model, ids, mask=mask, **REST)
        assert padded.tokens == lists.tokens
        assert padded.state.same(lists.state)


def test_sequences_that_end_early_leave_the_others_alone(model):
    free = generate(model, PROMPTS, **REST)
    end = free.tokens[1][4]
    ended = generate(model, PROMPTS, max_new_tokens=12, end_tokens=[end])
    for i, tokens in enumerate(free.tokens):
        expected = tokens[: tokens.index(end) + 1] if end in tokens else tokens
        assert ended.tokens[i] == expected
        assert ended.reasons[i] == ("end" if end in tokens else "length")
        assert ended.state.position[i] == len(PROMPTS[i]) + len(expected)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_prompts_are_read_in_chunks_of_the_size_asked_for(model, chunk, monkeypatch):
    sizes, forward = [], model.forward

    def spy(ids, **rest):
        sizes.append(ids.shape[1])
        return forward(ids, **rest)

    monkeypatch.setattr(model, "forward", spy)
    tokens = generate(model, PROMPTS, prefill_chunk=chunk, **REST).tokens
    assert max(sizes, default=1) == min(chunk, 40)
    monkeypatch.undo()
    assert tokens == generate(model, PROMPTS, **REST).tokens


def test_seeds_differ_by_sequence_and_can_be_given_one_by_one(model):
    sampling = Sampling(1.0)
    a = generate(model, [[5]] * 3, sampling=sampling, seed=1, **REST).tokens
    b = generate(model, [[5]] * 3, sampling=sampling, seed=[3, 2, 1], **REST).tokens
    assert a[0] != a[1] != a[2]
    assert a == b[::-1]


def test_memory_of_a_memory_layer_does_not_grow(model):
    accounts = [generate(model, [[1]], max_new_tokens=n, end_tokens=()).state.account() for n in (3, 203)]
    for short, long in zip(*accounts):
        if short.kind == "kda":
            assert short.total == long.total
        else:
            assert long.total - short.total == 200 * long.bytes_per_token


def test_a_model_in_training_is_left_as_it_was(model):
    model.train()
    model.model.norm.eval()
    try:
        tokens = generate(model, [[5]], **REST).tokens
        flags = {module.training for module in model.modules() if module is not model.model.norm}
        assert flags == {True}
        assert not model.model.norm.training
    finally:
        model.eval()
    assert tokens == generate(model, [[5]], **REST).tokens


# Going on


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=repr)
def test_two_runs_are_one_run(model, sampling):
    whole = generate(model, PROMPTS, sampling=sampling, **REST)
    first = generate(model, PROMPTS, sampling=sampling, end_tokens=(), max_new_tokens=5)
    again = [
        generate(model, first.decode_state, sampling=sampling, end_tokens=(), max_new_tokens=7).tokens for _ in range(2)
    ]
    assert [a + b for a, b in zip(first.tokens, again[0])] == whole.tokens
    assert again[0] == again[1]  # the first continuation did not write into what it was given


def test_a_prompt_after_a_state_is_one_long_prompt(model):
    state = prefill(model, [PROMPTS[1][:30]]).state
    assert (
        generate(model, [PROMPTS[1][30:]], state=state, **REST).tokens == generate(model, [PROMPTS[1]], **REST).tokens
    )


def test_a_prompt_after_a_ready_remembers_which_tokens_occurred(model):
    rest = {"sampling": Sampling(repetition_penalty=0.3)} | REST  # likes to repeat what it saw
    ready = prefill(model, [PROMPTS[1][:30]])
    whole = generate(model, [PROMPTS[1]], **rest).tokens
    assert generate(model, [PROMPTS[1][30:]], state=ready, **rest).tokens == whole
    assert generate(model, [PROMPTS[1][30:]], state=ready.state, **rest).tokens != whole


def test_one_prompt_many_continuations(model):
    ready = prefill(model, [PROMPTS[1]])
    forked = generate(model, ready.select([0, 0, 0]), sampling=Sampling(1.0), seed=9, **REST)
    alone = generate(model, [PROMPTS[1]], sampling=Sampling(1.0), seed=11, **REST)
    assert forked.tokens[2] == alone.tokens[0] != forked.tokens[0]


CONTINUE = """
import sys
from palimpsest.generate import DecodeState, Sampling, generate
from palimpsest.models.kimi_linear import KimiLinearForCausalLM
model = KimiLinearForCausalLM.from_pretrained(sys.argv[1])
ready = DecodeState.load(sys.argv[2], model)
sampling = Sampling(0.9, top_p=0.95, repetition_penalty=1.3)
print(generate(model, ready, sampling=sampling, max_new_tokens=12, end_tokens=(), seed=4).tokens)
"""


def test_a_saved_prompt_continues_in_another_process(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    prefill(model, PROMPTS, prefill_chunk=16).save(tmp_path / "ready.safetensors", model)
    command = [sys.executable, "-c", CONTINUE, tmp_path / "model", tmp_path / "ready.safetensors"]
    elsewhere = subprocess.run(command, capture_output=True, text=True, timeout=120)
    sampling = Sampling(0.9, top_p=0.95, repetition_penalty=1.3)
    here = generate(model, PROMPTS, sampling=sampling, prefill_chunk=16, seed=4, **REST)
    assert elsewhere.stdout.strip() == str(here.tokens), elsewhere.stderr


# Text


@pytest.mark.parametrize("text", ["Hello, world", "näïve 東京 🙂!", "\n\n\t"])
def test_text_comes_out_as_it_is_and_never_in_parts_of_characters(text):
    pieces = list(stream(Scripted(text.encode()), text[0], tokenizer=ByteTokenizer(), max_new_tokens=99))
    assert "".join(piece.text for piece in pieces) == text[1:]
    assert all("\ufffd" not in piece.text for piece in pieces)
    assert [piece.reason for piece in pieces] == [None] * (len(pieces) - 1) + ["end"]
    assert [piece.token for piece in pieces] == [*text.encode()[len(text[0].encode()) :], 256]


@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [
        (["world"], "ello, ", "stop"),
        (["rld", "🙂"], "ello, wo", "stop"),
        (["🙂"], "ello, world ", "stop"),
        (["worlds"], "ello, world 🙂 end", "end"),
        ("d 🙂", "ello, worl", "stop"),
    ],
)
def test_stop_strings_across_tokens_and_bytes(stop, text, reason):
    found = say("Hello, world 🙂 end", stop=stop)
    assert (found.texts, found.reasons) == ([text], [reason])
    pieces = stream(
        Scripted("Hello, world 🙂 end".encode()), "H", tokenizer=ByteTokenizer(), max_new_tokens=99, stop=stop
    )
    assert "".join(piece.text for piece in pieces) == text


def test_the_limit_and_the_state_count_every_token():
    found = say("Hello, world", max_new_tokens=4)
    assert (found.texts, found.reasons, found.tokens) == (["ello"], ["length"], [list(b"ello")])
    assert found.state.position.tolist() == [5]


def test_a_limit_inside_a_character_shows_it_as_unfinished():
    assert say("a🙂", max_new_tokens=2).texts == ["\ufffd"]


# Drafts and history


@pytest.mark.parametrize(
    "sampling", [*SAMPLINGS, Sampling(repetition_penalty=0.5)], ids=repr
)  # the last likes to repeat
@pytest.mark.parametrize("wrong_after", [0, 2, 99])
def test_drafts_change_no_token(model, sampling, wrong_after):
    truth = generate(model, [PROMPTS[0]], sampling=sampling, **REST)

    def draft(known):  # the truth for some tokens, then something else
        coming = truth.tokens[0][len(known) - 3 :][:5]
        return [t if i < wrong_after else (t + 1) % 257 for i, t in enumerate(coming)]

    drafted = generate(model, [PROMPTS[0]], sampling=sampling, draft=draft, **REST)
    assert drafted.tokens == truth.tokens
    assert drafted.state.position.equal(truth.state.position)
    for name, x in drafted.state.tensors().items():
        torch.testing.assert_close(x, truth.state.tensors()[name], atol=1e-4, rtol=1e-4)
    assert truth.num_calls == 13
    assert drafted.num_calls == {0: 24, 2: 8, 99: 3}[wrong_after]  # each wrong guess is one call to go back


def test_looking_up_the_prompt_saves_calls_where_text_repeats():
    text = "def add(a, b):\n    return a + b\n" * 4
    plain, drafted = say(text, max_new_tokens=99), say(text, max_new_tokens=99, draft=prompt_lookup)
    assert drafted.texts == plain.texts
    assert drafted.num_calls < plain.num_calls / 2


@pytest.mark.parametrize("draft", [None, prompt_lookup])
def test_a_history_kept_on_the_way_goes_back_and_on(model, draft):
    start = StateHistory.start(ModelState.empty(model.config), every=8, keep=3)
    run = generate(model, [PROMPTS[1]], history=start, draft=draft, **REST)
    assert run.history is not None
    assert len(run.history.checkpoints) == 3
    _, back = run.history.rollback(model, 45)
    rest = generate(model, [run.tokens[0][5:6]], history=back, end_tokens=(), max_new_tokens=6)
    assert rest.tokens[0] == run.tokens[0][6:]


# Numbers that stop being finite


@pytest.fixture
def breaks_at_77(model):
    """Token 77 makes the values of layer 1, head 1 NaN."""
    where = {}
    layer = model.model.layers[1].self_attn

    def remember(_, args, __):
        where["bad"] = args[0] == 77

    def break_values(_, __, output):
        output = output.clone()
        bad = where["bad"].reshape(output.shape[:-1])
        output[..., 16:32] = output[..., 16:32].masked_fill(bad[..., None], torch.nan)
        return output

    handles = [
        model.model.embed_tokens.register_forward_hook(remember),
        layer.v_proj.register_forward_hook(break_values),
    ]
    yield model
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("at", [0, 5, 33])
def test_a_fault_in_a_prompt_is_named(breaks_at_77, at):
    prompt = list(range(100, 140))
    prompt[at] = 77
    message = f"sequence 1 is not finite from token 77 at position {at} on, first in layer 1, head 1"
    with pytest.raises(ArithmeticError, match=message):
        generate(breaks_at_77, [[1, 2], prompt, [3]], prefill_chunk=16, **REST)


def test_stop_keeps_what_came_before_the_fault_and_the_other_sequences(breaks_at_77):
    prompt = list(range(100, 140))
    prompt[33] = 77
    found = generate(breaks_at_77, [[1, 2], prompt, [3]], prefill_chunk=16, on_nonfinite="stop", **REST)
    assert found.reasons == ["length", "nonfinite", "length"]
    assert found.tokens[1] == []
    assert (found.faults[1].position, found.faults[1].layer, found.faults[1].head) == (33, 1, 1)
    assert not found.state.nonfinite()
    assert found.state.position.tolist() == [14, 33, 13]
    for i, rest in ((0, [1, 2]), (2, [3])):
        assert found.tokens[i] == generate(breaks_at_77, [rest], **REST).tokens[0]
    before = prefill(breaks_at_77, [prompt[:33]]).state.select([0])
    for name, x in found.state.select([1]).tensors().items():
        torch.testing.assert_close(x, before.tensors()[name], atol=1e-4, rtol=1e-4)


def test_a_fault_while_generating_takes_back_what_followed(breaks_at_77):
    free = generate(breaks_at_77, [[11]], max_new_tokens=40, end_tokens=(), on_nonfinite="stop")
    model, logits = breaks_at_77, []
    step = model.step_

    def say_77_later(ids, state, mask=None):
        out, state = step(ids, state, mask)
        logits.append(out)
        return (torch.nn.functional.one_hot(torch.tensor([77]), 257).float() if len(logits) == 9 else out), state

    model.step_ = say_77_later
    try:
        pieces = list(stream(model, [[11]], max_new_tokens=40, end_tokens=(), on_nonfinite="stop"))
        logits.clear()
        found = generate(model, [[11]], max_new_tokens=40, end_tokens=(), on_nonfinite="stop")
        logits.clear()
        with pytest.raises(ArithmeticError, match="token 77 at position 9 on, first in layer 1, head 1"):
            generate(model, [[11]], max_new_tokens=40, end_tokens=())
    finally:
        del model.step_
    assert [p.token for p in pieces] == [*free.tokens[0][:8], 77, None]
    assert pieces[-1].reason == found.reasons[0] == "nonfinite"
    assert found.tokens[0] == free.tokens[0][:8]
    assert found.state.position.tolist() == [9]


# Bad input


BAD = {
    "no prompt": ([], {}, "prompts is empty"),
    "an empty prompt": ([[1], []], {}, "prompt 1 is empty; give at least one token"),
    "an empty text": ("", {"tokenizer": ByteTokenizer()}, "prompt 0 is empty"),
    "a token too large": ([[1], [2, 300]], {}, "prompt 1 has token 300 at place 1; the model's tokens are 0 to 256"),
    "a token below zero": ([[-1]], {}, "has token -1 at place 0"),
    "a token that is no number": ([[1, 2.5]], {}, "has token 2.5 at place 1"),
    "text without a tokenizer": ("hello", {}, "prompts is text and tokenizer is None"),
    "a tensor of floats": (torch.ones(1, 2), {}, "expected whole numbers"),
    "a mask of another shape": (
        torch.ones(1, 2).long(),
        {"mask": torch.ones(1, 3).bool()},
        "mask is torch.bool of shape",
    ),
    "a mask that leaves nothing": (torch.ones(1, 2).long(), {"mask": torch.zeros(1, 2).bool()}, "prompt 0 is empty"),
    "a mask with lists": ([[1]], {"mask": torch.ones(1, 1).bool()}, "belongs to ids"),
    "no new tokens": ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0; it must be a whole number >= 1"),
    "a chunk of nothing": ([[1]], {"prefill_chunk": 0}, "prefill_chunk is 0; it must be"),
    "a stop string without tokenizer": ([[1]], {"stop": ["x"]}, "stop was given without a tokenizer"),
    "an empty stop string": ("a", {"stop": [""], "tokenizer": ByteTokenizer()}, "at least one character"),
    "an unknown policy": ([[1]], {"on_nonfinite": "ignore"}, "on_nonfinite is 'ignore'; it must be 'raise' or 'stop'"),
    "too few seeds": ([[1], [2]], {"seed": [1]}, r"seed is \[1\]; it must be a number, or 2 of them"),
    "a draft for two": ([[1], [2]], {"draft": prompt_lookup}, "draft was given with 2 sequences; it takes one"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused_in_a_sentence(model, case):
    prompts, rest, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, **({"max_new_tokens": 2} | rest))


def test_states_that_do_not_fit_are_refused_in_a_sentence(model):
    other = KimiLinearForCausalLM(KimiLinearConfig.tiny("KM"))
    with pytest.raises(ValueError, match="the state is not one of this model's: one has 3 layers, another 2"):
        generate(model, [[1]], state=ModelState.empty(other.config), max_new_tokens=2)
    with pytest.raises(ValueError, match="the state is of 3 sequences and 1 came"):
        generate(model, [[1]], state=ModelState.empty(model.config, 3), max_new_tokens=2)
    with pytest.raises(ValueError, match="not one of this model's"):
        generate(model, prefill(other, [[1]]), max_new_tokens=2)
    with pytest.raises(ValueError, match="prompts is a DecodeState, which has its own state"):
        generate(model, prefill(model, [[1]]), state=ModelState.empty(model.config), max_new_tokens=2)
    broken = ModelState.empty(model.config)
    broken.layers[0].memory[0, 1, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="state is not finite in layer 0, before any prompt"):
        generate(model, [[1]], state=broken, max_new_tokens=2)


def test_a_state_alone_is_not_a_ready(model, tmp_path):
    save_state(tmp_path / "state", ModelState.empty(model.config), model)
    with pytest.raises(ValueError, match="holds a state alone"):
        DecodeState.load(tmp_path / "state", model)
