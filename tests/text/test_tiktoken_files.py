"""The released tokenizer's form: the same ids as tiktoken gives, written as files that other tools read."""

import base64
import json
import random
from collections import Counter

import pytest

from palimpsest.text import FileTokenizer, chat_template_of, tokenizer_files, tokenizer_of
from palimpsest.text.tiktoken_files import PATTERN, as_tokenizer_json, read_ranks

SAMPLE = (
    "The memory fades, erases, writes and reads; it's what we've got. 中文分词是自然语言处理的基础任务之一。"
    "深度学习deep learning模型 "
    "def read_lines(path):\n    return [line for line in open(path)]\n\n\tx = 1234567  # naïve café ΑΒΓ αβγ\r\n"
) * 3


def ranks_of(text, count):
    """Byte pairs merged by how often they occur: a vocabulary of 256 + count tokens."""
    tokens = [bytes([b]) for b in range(256)]
    words = [[bytes([b]) for b in word.encode()] for word in text.split(" ")]
    for _ in range(count):
        pairs = Counter(pair for word in words for pair in zip(word, word[1:]))
        (a, b), _ = pairs.most_common(1)[0]
        tokens.append(a + b)
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == (a, b):
                    word[i : i + 2] = [a + b]
                i += 1
    return list(dict.fromkeys(tokens))


def write(folder, tokens):
    folder.mkdir(exist_ok=True)
    lines = [base64.b64encode(token) + f" {rank}".encode() for rank, token in enumerate(tokens)]
    (folder / "tiktoken.model").write_bytes(b"\n".join(lines) + b"\n")
    end = len(tokens)
    config = {
        "tokenizer_class": "TikTokenTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
        "added_tokens_decoder": {str(end): {"content": "[BOS]"}, str(end + 1): {"content": "[EOS]"},
                                 str(end + 2): {"content": "<|im_end|>"}},
        "bos_token": "[BOS]", "eos_token": "[EOS]",
        "chat_template": "{% for m in messages %}<|im_user|>{{ m.content }}<|im_end|>{% endfor %}",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenization_kimi.py").write_text("raise SystemExit('this must never run')")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("official") / "x", ranks_of(SAMPLE, 150))


def test_ids_are_those_of_tiktoken(folder):
    tiktoken = pytest.importorskip("tiktoken")
    theirs = tiktoken.Encoding(
        "x", pat_str=PATTERN, special_tokens={},
        mergeable_ranks={token: rank for rank, token in enumerate(read_ranks(folder / "tiktoken.model"))},
    )  # fmt: skip
    ours = tokenizer_of(folder)
    random.seed(0)
    letters = [*SAMPLE, "é", "́", "ǅ", "ʰ", "٣", "​", "　", "🙂", "\x00", "'LL", "'s", "漢", "々", "ー"]
    for text in [SAMPLE, *("".join(random.choices(letters, k=40)) for _ in range(300))]:
        assert ours.encode(text) == theirs.encode_ordinary(text), text
        assert ours.decode(ours.encode(text)) == text


def test_marks_are_named_by_the_folder(folder):
    tokenizer = FileTokenizer(folder)
    first = len(read_ranks(folder / "tiktoken.model"))
    assert tokenizer.vocab_size == first + 256
    assert tokenizer.eos_id == first + 1
    assert tokenizer.encode("a<|im_end|>") == [97, first + 2]
    assert tokenizer.decode([97, first + 2]) == "a"
    assert tokenizer.text_of(first + 2) == "<|im_end|>"
    assert tokenizer.text_of(first + 9) == f"<|reserved_token_{first + 9}|>"


def test_what_travels_is_read_by_transformers(folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    for name, content in tokenizer_files(tokenizer_of(folder)).items():
        (tmp_path / name).write_bytes(content)
    assert "auto_map" not in json.loads((tmp_path / "tokenizer_config.json").read_text())
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), tokenizer_of(tmp_path)
    text = "it's 中文 and <|im_end|>"
    assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text) == tokenizer_of(folder).encode(text)
    assert (theirs.eos_token_id, theirs.bos_token) == (ours.eos_id, "[BOS]")
    messages = [{"role": "user", "content": "Hello"}]
    template = chat_template_of(tmp_path)
    assert template is not None
    assert (
        template.render(messages)
        == theirs.apply_chat_template(messages, tokenize=False)
        == "<|im_user|>Hello<|im_end|>"
    )


def test_a_piece_that_is_a_token_is_taken_whole(tmp_path):
    tokens = [bytes([b]) for b in range(256)] + [b"wxyz"]  # no merge makes it
    assert tokenizer_of(write(tmp_path / "x", tokens)).encode("wxyz") == [256]
    assert as_tokenizer_json(tmp_path / "x")["model"]["merges"] == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"YQ== 0\nnot base64!\n", "line 2 of .* is b'not base64!'; expected a token in base64 and its rank"),
        (b"YQ== 0\nYg== 0\n", "line 2 of .* gives rank 0 again"),
        (b"YQ== 0\nYg== 2\n", "has 2 tokens, whose ranks do not run from 0 on"),
        (b"YQ== 0\nYg== 1\n", "has no token for 254 of the 256 bytes"),
    ],
)
def test_a_broken_file_is_named_by_its_line(tmp_path, content, said):
    (tmp_path / "tiktoken.model").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        tokenizer_of(tmp_path)
