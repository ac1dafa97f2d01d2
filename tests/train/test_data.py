"""Data: every byte where it belongs, no document inside another, the same order on every machine, plain refusals."""

import dataclasses
import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch

from palimpsest.models.kimi_linear import KimiLinearConfig, KimiLinearForCausalLM
from palimpsest.text import ByteTokenizer
from palimpsest.train import Data, TextFiles, load_recipe, train
from palimpsest.train.data import IGNORED, Corpus, Document, Heldout, pad, read_documents

from .conftest import small_recipe

ROOT = Path(__file__).parents[2]


def corpus_of(folder, *, seed=0, source=None, **data):
    data = {"sequence_length": 32, "batch_size": 4} | data
    return Corpus(Data(source=source or TextFiles(paths=(str(folder),)), **data), seed)


def marked(folder, count=6):
    """Documents whose bytes say which document they are, of lengths on both sides of a row's."""
    folder.mkdir()
    for i in range(count):
        (folder / f"{i}.txt").write_bytes(bytes([65 + i]) * (7 + 23 * i))
    return folder


@pytest.mark.parametrize("layout", ["windows", "packed"])
def test_no_row_shows_one_document_to_another(tmp_path, layout):
    corpus = corpus_of(marked(tmp_path / "d"), layout=layout)
    for step in range(30):
        (batch,), _ = corpus.step(step)
        borders = [0, batch.tokens.shape[1]] if batch.cu_seqlens is None else batch.cu_seqlens.tolist()
        for row, labels in zip(batch.tokens, batch.labels):
            for start, end in zip(borders, borders[1:]):
                seen = row[start:end][labels[start:end] != IGNORED]
                assert len(set(seen.tolist()) - {256}) <= 1, f"two documents in one segment: {seen}"


@pytest.mark.parametrize("layout", ["windows", "packed"])
def test_an_epoch_shows_every_token(tmp_path, layout):
    corpus = corpus_of(marked(tmp_path / "d"), layout=layout, batch_size=1)
    counts = np.zeros(257, int)
    for row in range(corpus.rows_per_epoch):
        (batch,), num_tokens = corpus.step(row)
        real = batch.tokens[batch.labels != IGNORED].numpy()
        assert len(real) == num_tokens
        counts += np.bincount(real, minlength=257)
    whole = np.bincount(corpus.tokens, minlength=257)
    lost = 0 if layout == "windows" else 31  # the packed epoch leaves less than a row over
    assert (whole - counts).clip(min=0).sum() <= lost


def test_packed_documents_do_not_leak_into_each_other_through_the_model(tmp_path):
    corpus = corpus_of(marked(tmp_path / "d"), layout="packed")
    (batch,), _ = corpus.step(0)
    torch.manual_seed(0)
    model = KimiLinearForCausalLM(
        KimiLinearConfig.tiny("KM", num_experts=0)
    ).eval()  # experts batch as they come, and round so
    border = int(batch.cu_seqlens[1])
    changed = batch.tokens.clone()
    changed[:, :border] = (changed[:, :border] + 1) % 256
    with torch.no_grad():
        one, other = (model(t, cu_seqlens=batch.cu_seqlens).logits for t in (batch.tokens, changed))
        leaky = model(changed).logits
    assert torch.equal(one[:, border:], other[:, border:])
    assert not torch.allclose(one[:, border:], leaky[:, border:]), "without cu_seqlens they do: the test can fail"


def test_order_follows_from_seed_and_step_alone(texts):
    one, again, other = corpus_of(texts), corpus_of(texts), corpus_of(texts, seed=1)
    far = [one.step(step)[0][0].tokens for step in (0, 900, 3)]
    assert all(torch.equal(again.step(step)[0][0].tokens, t) for step, t in zip((0, 900, 3), far))
    assert not torch.equal(other.step(0)[0][0].tokens, far[0])


@pytest.mark.parametrize("layout", ["windows", "packed"])
def test_processes_and_parts_together_read_what_one_would(texts, layout):
    whole, num_tokens = corpus_of(texts, layout=layout).step(5)
    parts = [corpus_of(texts, layout=layout, accumulate=2).step(5, process, 2) for process in range(2)]
    assert all(n == num_tokens for _, n in parts)
    tokens = torch.cat([parts[p][0][a].tokens.flatten() for a in range(2) for p in range(2)])
    assert torch.equal(tokens, whole[0].tokens.flatten())
    assert sum(batch.weight for part, _ in parts for batch in part) == pytest.approx(4)
    assert whole[0].weight == pytest.approx(1)


def test_unequal_parts_weigh_as_much_as_their_predictions(tmp_path):
    corpus = corpus_of(marked(tmp_path / "d"), accumulate=4)
    parts, _ = corpus.step(1)
    predictions = [int((p.labels[:, 1:] != IGNORED).sum()) for p in parts]
    assert len(set(predictions)) > 1
    assert [p.weight for p in parts] == pytest.approx([4 * n / sum(predictions) for n in predictions])


def test_a_batch_that_cannot_be_dealt_is_refused(texts):
    with pytest.raises(ValueError, match="batch_size 4 cannot be dealt to 3 processes"):
        corpus_of(texts).step(0, 0, 3)


def test_files_are_held_out_by_name_whatever_else_is_there(texts):
    source = TextFiles(paths=(str(texts),), heldout=0.3)
    train, held = read_documents(source)
    names = {d.name for d in held}
    assert names
    assert len(train) + len(held) == 8
    assert not names & {d.name for d in train}
    (texts / "new.py").write_text("new = 1\n")
    _, again = read_documents(source)
    assert {d.name for d in again} - {"new.py"} == names


def test_a_single_file_gives_its_end(tmp_path):
    (tmp_path / "a.txt").write_text("ab" * 500 + "é" * 30)
    (train,), (held,) = read_documents(TextFiles(paths=(str(tmp_path / "a.txt"),), heldout=0.05))
    assert train.content + held.content == (tmp_path / "a.txt").read_bytes()
    held.content.decode()


def test_heldout_paths_are_taken_as_they_are(texts, tmp_path):
    (tmp_path / "h.txt").write_text("held out\n")
    train, held = read_documents(TextFiles(paths=(str(texts),), heldout_paths=(str(tmp_path / "h.txt"),)))
    assert len(train) == 8
    assert [d.content for d in held] == [b"held out\n"]


def test_include_and_exclude_by_name_and_by_path(texts):
    (texts / "sub").mkdir()
    (texts / "sub" / "x.py").write_text("x = 1\n")
    (texts / "y.md").write_text("y\n")
    (texts / ".hidden").write_text("z\n")
    source = TextFiles(paths=(str(texts),), include=("*.py",), exclude=("sub/*", "file0.py"))
    assert sorted(d.name for part in read_documents(source) for d in part) == [f"file{i}.py" for i in range(1, 8)]


REFUSALS = {
    "missing": (lambda d: None, "does not exist"),
    "empty folder": (lambda d: d.mkdir(), "holds no file"),
    "nothing included": (lambda d: (d.mkdir(), (d / "a.bin").write_text("x")), "holds no file"),
    "empty files": (lambda d: (d.mkdir(), (d / "a.py").write_text("")), "is empty"),
    "binary": (lambda d: (d.mkdir(), (d / "a.py").write_bytes(b"\x89PNG\0\1")), "is binary, not text"),
    "too little": (
        lambda d: (d.mkdir(), (d / "a.py").write_text("x"), (d / "b.py").write_text("y")),
        "less than one row",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_unusable_data_is_refused_in_one_sentence(tmp_path, case):
    make, sentence = REFUSALS[case]
    make(tmp_path / "d")
    source = TextFiles(paths=(str(tmp_path / "d"),), include=("*.py",))
    with pytest.raises(ValueError, match=sentence) as error:
        corpus_of(None, source=source, layout="packed")
    assert "\n" not in str(error.value)


def test_an_unreadable_file_is_named(texts, monkeypatch):
    def refuse(file, limit):
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr("palimpsest.train.data.read_bytes", refuse)  # root may read anything, so a mode will not do
    with pytest.raises(ValueError, match=r"file0\.py' cannot be read: Permission denied"):
        corpus_of(texts)


@pytest.mark.parametrize("kind", ["a pipe", "a device", "a socket", "cannot be read"])
def test_what_may_never_end_is_refused_unread(texts, kind, monkeypatch):
    place = texts / "strange.py"
    if kind == "a pipe":
        os.mkfifo(place)
    elif kind == "a device":
        place.symlink_to("/dev/zero")
    elif kind == "a socket":
        monkeypatch.chdir(texts)  # the name of a socket must be short
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind("strange.py")
    else:
        place.symlink_to(place)
    with pytest.raises(
        ValueError, match=rf"strange\.py'.*({kind}|cannot be read).*; leave it out by data.source.exclude"
    ):
        corpus_of(texts)
    assert corpus_of(texts, source=TextFiles(paths=(str(texts),), exclude=("strange*",))).num_bytes


def test_more_than_memory_holds_is_refused(texts, monkeypatch):
    monkeypatch.setattr("palimpsest.train.data._memory", lambda: 100)
    with pytest.raises(ValueError, match=r"file0\.py' is longer than 100 bytes; leave it out"):
        corpus_of(texts)


def test_a_file_name_that_is_no_utf8_will_do(texts):
    with open(os.fsencode(texts) + b"/\xff\xfe.py", "wb") as file:
        file.write(b"x = 1\n" * 20)
    corpus = corpus_of(texts)
    assert corpus.num_documents + len(corpus.heldout) == 9
    assert corpus.digest == corpus_of(texts).digest


def test_heldout_text_of_single_bytes_is_refused_before_training(texts, tmp_path):
    (tmp_path / "held").mkdir()
    for i in range(3):
        (tmp_path / "held" / f"{i}.txt").write_text("x")
    recipe = small_recipe(texts)
    source = dataclasses.replace(recipe.data.source, heldout_paths=(str(tmp_path / "held"),))
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, source=source))
    with pytest.raises(ValueError, match="the 3 held-out documents hold no two bytes in a row"):
        train(recipe, tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())


def test_pieces_hold_every_heldout_byte_once_and_tokens_match():
    documents = [Document("a", "héllo wörld".encode() * 9), Document("b", b"xyz" * 40)]
    text = Heldout(documents, ByteTokenizer(), piece_bytes=16, max_bytes=10**6)
    assert text.content == documents[0].content + documents[1].content
    assert text.num_bytes == sum(p.num_bytes for p in text.pieces) == sum(len(p.tokens) for p in text.pieces)
    few = Heldout(documents, ByteTokenizer(), piece_bytes=16, max_bytes=64)
    assert len(few.pieces) == 4
    assert sum(n for _, n in few.batches(3)) == sum(len(p.tokens) - 1 for p in few.pieces)


def test_padding_is_not_learned():
    tokens, labels = pad([np.array([5, 6, 7]), np.array([8])])
    assert labels.tolist() == [[5, 6, 7], [8, IGNORED, IGNORED]]
    assert tokens.shape == (2, 3)


def tokenizer_file(folder):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(["def f(x):\n    return x\n"] * 4, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    return str(folder / "tokenizer.json")


def test_any_tokenizer_file_will_do_and_bytes_stay_the_measure(texts, tmp_path):
    corpus = corpus_of(texts, tokenizer=tokenizer_file(tmp_path))
    decoded = corpus.tokenizer.decode(corpus.tokens[corpus.borders[0] : corpus.borders[1] - 1].tolist())
    train, _ = read_documents(corpus.data.source)
    assert decoded.encode() == train[0].content
    assert int(corpus.tokens[corpus.borders[1] - 1]) == corpus.tokenizer.eos_id
    assert corpus.tokens_per_byte < 0.9
    text = Heldout(corpus.heldout, corpus.tokenizer, piece_bytes=50, max_bytes=10**6)
    assert text.content == b"".join(d.content for d in corpus.heldout)


def test_named_data_sets_from_local_files_are_joined_as_the_wikitext_recipe_asks(tmp_path):
    pytest.importorskip("datasets")
    rows = {
        "train": ["", " = A = \n", "", " one\n", " = = History = = \n", " two\n", " = B and C = \n", " three\n"],
        "validation": [" = D = \n", " four\n"],
    }
    for split, texts in rows.items():
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    recipe = load_recipe(str(ROOT / "recipes" / "wikitext103.py"), {"data.source.config": "none"})
    source = dataclasses.replace(recipe.data.source, name=str(tmp_path))
    train, held = read_documents(source)
    assert [d.content for d in train] == [b" = A = \n one\n = = History = = \n two\n", b" = B and C = \n three\n"]
    assert [d.content for d in held] == [b" = D = \n four\n"]
    with pytest.raises(ValueError, match=r"no column 'words'; data.source.column is one of text"):
        read_documents(dataclasses.replace(source, column="words"))
    with pytest.raises(ValueError, match="split 'test', does not load"):
        read_documents(dataclasses.replace(source, heldout_split="test"))


def test_changed_data_has_another_digest(texts):
    before = corpus_of(texts).digest
    assert corpus_of(texts).digest == before
    for name in os.listdir(texts):
        old = (texts / name).read_bytes()
        (texts / name).write_bytes(old.replace(b"return", b"reTurn"))
        assert corpus_of(texts).digest != before, name
        (texts / name).write_bytes(old)
    assert corpus_of(texts).digest == before
