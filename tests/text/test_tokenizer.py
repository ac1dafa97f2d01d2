"""Text and tokens: what goes in comes out, and no piece of a stream ends inside a character."""

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.text import ByteTokenizer, FileTokenizer, TextPieces, load_tokenizer, tokenizer_of

SAMPLE = "naïve café, 東京, 🙂🙃 and plain words; "


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """A byte-level BPE with few merges, so that most characters beyond ASCII are split over several tokens."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["</s>"], show_progress=False
    )
    tokenizer.train_from_iterator([SAMPLE * 4], trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def pieces_of(tokenizer, ids):
    pieces = TextPieces(tokenizer)
    return [pieces.push(i) for i in ids] + [pieces.end()]


@given(st.text())
def test_bytes_return_the_text(text):
    assert ByteTokenizer().decode(ByteTokenizer().encode(text)) == text


@given(st.lists(st.integers(0, 300)))
def test_pieces_of_any_bytes_join_to_the_decoded_text(ids):
    assert "".join(pieces_of(ByteTokenizer(), ids)) == ByteTokenizer().decode(ids)


def test_a_character_comes_out_whole_with_its_last_byte():
    assert pieces_of(ByteTokenizer(), "a🙂".encode()) == ["a", "", "", "", "🙂", ""]


def test_an_unfinished_character_is_shown_as_one_replacement():
    assert pieces_of(ByteTokenizer(), "🙂".encode()[:3]) == ["", "", "", "\ufffd"]


@settings(max_examples=50)
@given(st.text(max_size=20))
def test_pieces_of_a_tokenizer_file_join_to_the_text(byte_level, text):
    tokenizer = FileTokenizer(byte_level)
    pieces = pieces_of(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == tokenizer.decode(tokenizer.encode(text)) == text
    assert all("\ufffd" not in p for p in pieces) or "\ufffd" in text


def test_spaces_survive_streaming_where_the_decoder_drops_the_first(tmp_path):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"▁a": 0, "▁b": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert "".join(pieces_of(FileTokenizer(tmp_path), [0, 1, 1, 0])) == "a b b a"


def test_end_mark_from_argument_or_from_the_config_beside(byte_level, tmp_path):
    assert FileTokenizer(byte_level).eos_id is None
    assert FileTokenizer(byte_level, eos="</s>").eos_id == 0
    (tmp_path / "tokenizer.json").write_bytes((byte_level / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    assert load_tokenizer(tmp_path).eos_id == 0


def test_bad_tokenizers_are_refused_in_a_sentence(byte_level, tmp_path):
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="does not exist; give a tokenizer"):
        load_tokenizer(tmp_path / "nowhere.json")
    with pytest.raises(ValueError, match="is not a tokenizer file"):
        load_tokenizer(tmp_path / "broken.json")
    with pytest.raises(ValueError, match="'<end>' is not a token of"):
        FileTokenizer(byte_level, eos="<end>")


def test_the_files_of_the_byte_tokenizer_are_bytes_to_other_tools(tmp_path):
    pytest.importorskip("tokenizers")
    from palimpsest.text import tokenizer_files
    from palimpsest.text.tokenizer import END_OF_DOCUMENT

    for name, content in tokenizer_files(ByteTokenizer()).items():
        (tmp_path / name).write_bytes(content)
    assert isinstance(tokenizer_of(tmp_path), ByteTokenizer)
    theirs = FileTokenizer(tmp_path)
    assert (theirs.vocab_size, theirs.eos_id) == (257, 256)
    text = "def f(x):\n\treturn 'héllo \u4e16 \U0001f600'  # \x00\x7f\xad\xa0"
    assert theirs.encode(text) == ByteTokenizer().encode(text)
    assert theirs.decode(ByteTokenizer().encode(text)) == text
    every = list(range(256))
    assert FileTokenizer(tmp_path)._tokenizer.decode(every) == bytes(every).decode("utf-8", errors="replace")
    assert theirs.encode(END_OF_DOCUMENT) == [256]
    (tmp_path / "palimpsest.json").unlink()
    assert tokenizer_of(tmp_path).encode("ab") == [97, 98]
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="does not say which tokenizer it needs"):
        tokenizer_of(tmp_path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("[]", "holds a JSON list"),
        ("{", "is not JSON"),
        ('{"tokenizer": 3}', "names the tokenizer 3"),
        ('{"tokenizer": ["bytes"]}', "names the tokenizer"),
        ('{"tokenizer": "../../etc/tokenizer.json"}', "a file beside it"),
        ('{"tokenizer": "/etc/passwd"}', "a file beside it"),
        ('{"tokenizer": "absent.json"}', "does not exist"),
    ],
)
def test_a_folder_that_says_nonsense_of_its_tokenizer_is_refused_in_a_sentence(tmp_path, content, sentence):
    (tmp_path / "palimpsest.json").write_text(content)
    with pytest.raises(ValueError, match=sentence) as error:
        tokenizer_of(tmp_path)
    assert str(tmp_path) in str(error.value)
