"""`palimpsest chat`, and conversations as values: a turn reads its own words alone, and the way back is exact."""

import io
import json

import pytest
import torch

from palimpsest import cli
from palimpsest.generate import Conversation, Sampling, generate, reply
from palimpsest.models.kimi_linear import KimiLinearConfig, KimiLinearForCausalLM
from palimpsest.text import ByteTokenizer, ChatTemplate, tokenizer_files

TEMPLATE = ChatTemplate(
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content | trim }};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
LIKE = {"tokenizer": ByteTokenizer(), "max_new_tokens": 6, "sampling": Sampling(temperature=1.0), "end_tokens": ()}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return KimiLinearForCausalLM(KimiLinearConfig.tiny("KKM")).eval()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    place = tmp_path_factory.mktemp("chat")
    model.save_pretrained(place)
    for name, content in tokenizer_files(ByteTokenizer()).items():
        (place / name).write_bytes(content)
    return place


def said(pieces):
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return end.value


def talk(model, *turns, template=None, start=None, **changes):
    conversation = start or Conversation()
    for number, words in enumerate(turns):
        conversation = said(reply(model, conversation, words, template=template, seed=number, **{**LIKE, **changes}))
    return conversation


def same(state, again):
    assert state.state.position.equal(again.state.position)
    torch.testing.assert_close(state.logits, again.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_the_state_is_that_of_the_whole_text(model, template):
    conversation = talk(model, "one", "two", "three", template=template)
    assert [m["role"] for m in conversation.messages] == ["user", "assistant"] * 3
    whole = generate(model, list(conversation.text.encode("utf-8", "surrogateescape")), max_new_tokens=1, end_tokens=())
    if "\ufffd" not in conversation.text:  # bytes that are no text come back as another text
        assert conversation.num_tokens == whole.state.position.item() - 1


def test_a_turn_reads_its_own_words_alone(model, monkeypatch):
    from palimpsest.generate import conversation as module

    lengths = []
    original = module.prefill
    monkeypatch.setattr(module, "prefill", lambda *a, **k: (lengths.append(len(a[1])), original(*a, **k))[1])
    talk(model, "x" * 50, "y" * 7, "z" * 3)
    assert lengths == [50, 7, 3]


def test_undo_is_exact_and_goes_turn_by_turn(model):
    two = talk(model, "one", "two")
    one = two.undo()
    assert one.messages == talk(model, "one").messages
    assert one.state.state.same(talk(model, "one").state.state)
    assert one.undo() == Conversation()
    with pytest.raises(ValueError, match="nothing can be taken back"):
        one.undo().undo()
    again = said(reply(model, one, "two", seed=1, **LIKE))
    assert again.messages == two.messages  # the state taken back was not touched


def test_a_template_that_writes_the_past_otherwise_is_read_again(model):
    """As templates that leave out the thoughts of earlier replies: the longest part that still stands is gone on from."""
    forgetful = ChatTemplate("{% for m in messages %}{{ 'u:' + m.content if m.role == 'user' else 'a.' }};{% endfor %}")
    conversation = talk(model, "one", "two", template=forgetful)
    assert conversation.text.startswith("u:one;a.;u:two;")
    read = generate(
        model, "u:one;a.;u:two;", max_new_tokens=6, seed=1, **{k: v for k, v in LIKE.items() if k != "max_new_tokens"}
    )
    same(conversation.state, read.decode_state)


def test_save_and_load(model, tmp_path):
    before = talk(model, "one", "two", template=TEMPLATE)
    before.save(tmp_path / "talk", model)
    after = Conversation.load(tmp_path / "talk", model)
    assert (after.messages, after.text) == (before.messages, before.text)
    assert after.state.state.same(before.state.state)
    assert talk(model, "more", start=after).messages == talk(model, "more", start=before).messages
    with pytest.raises(ValueError, match="has not begun"):
        Conversation().save(tmp_path / "none", model)
    before.state.save(tmp_path / "state", model)
    with pytest.raises(ValueError, match="holds a state without its words"):
        Conversation.load(tmp_path / "state", model)


def test_an_interrupt_keeps_what_was_written(model, monkeypatch):
    from palimpsest.generate import conversation as module

    def interrupted(*arguments, **options):
        pieces = original(*arguments, **options)
        yield next(pieces)
        yield next(pieces)
        raise KeyboardInterrupt

    original = module.stream
    monkeypatch.setattr(module, "stream", interrupted)
    conversation = talk(model, "one")
    assert conversation.reason == "interrupted"
    assert conversation.num_tokens == 3 + 2


def chat(capsys, monkeypatch, folder, lines, *options):
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    code = cli.run(["chat", str(folder), "-n", "4", *options])
    return code, *capsys.readouterr()


def test_the_command(capsys, monkeypatch, folder, tmp_path):
    lines = "one\n/fork a\ntwo \\\nlines\n/state\n/undo\n/state\n/go a\n/forks\n/save {0}/s\n/retry\n/load {0}/s\n/quit\nnever\n"
    code, out, err = chat(capsys, monkeypatch, folder, lines.format(tmp_path), "--json", "-t", "1.0")
    replies = [json.loads(line) for line in out.splitlines()]
    assert code == 0, err
    assert [r["tokens"] for r in replies] == [8, 8 + 11 + 4, 8]
    for words in (
        "kept as a",
        "2 turns, 23 tokens, a state of",
        "taken back; 1 turns, 8 tokens",
        "saved; 1 turns",
        "loaded; 1 turns",
    ):
        assert words in err
    assert "never" not in out
    code, out, err = chat(capsys, monkeypatch, folder, "more\n", "--load", tmp_path / "s", "--json")
    assert json.loads(out)["tokens"] == 8 + 5 + 4


@pytest.mark.parametrize(
    ("lines", "options", "words"),
    [
        ("/frobnicate\n", [], "/frobnicate is unknown; /help lists"),
        ("/go x\n", [], "'x' is not kept; there are none"),
        ("/undo\n", [], "nothing can be taken back"),
        ("/save\n", [], "'/save' needs a file"),
        ("hello\n", ["--system", "Be kind."], "has no chat template to say it with"),
    ],
)
def test_what_cannot_be_done_is_a_sentence(capsys, monkeypatch, folder, lines, options, words):
    code, _, err = chat(capsys, monkeypatch, folder, lines, *options)
    assert code == 1
    assert words in err


def test_a_template_without_a_system_role_says_so(capsys, monkeypatch, model, folder, tmp_path):
    import shutil

    shutil.copytree(folder, tmp_path / "x")
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}x"
    (tmp_path / "x" / "chat_template.jinja").write_text(refusing)
    code, _, err = chat(capsys, monkeypatch, tmp_path / "x", "hello\n", "--system", "Be kind.")
    assert code == 1
    assert "System role not supported; it may know no system role: leave the system message out" in err
    assert chat(capsys, monkeypatch, tmp_path / "x", "hello\n")[0] == 0
