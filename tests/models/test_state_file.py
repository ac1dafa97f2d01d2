"""A saved state is the state, whole and unchanged, or it is refused in one sentence."""

import errno
import json

import pytest
import safetensors.torch
import torch

from palimpsest.models.kimi_linear import KimiLinearConfig, KimiLinearForCausalLM, ModelState
from palimpsest.models.kimi_linear.state_file import (
    SAMPLE,
    _sample,
    load_state,
    read_state,
    save_state,
    weights_fingerprint,
)


def build(pattern="KMK", seed=0, **changes):
    torch.manual_seed(seed)
    return KimiLinearForCausalLM(KimiLinearConfig.tiny(pattern, **changes)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture
def saved(model, tmp_path):
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    state = model(torch.arange(10).view(2, 5), mask=mask).state
    path = tmp_path / "state.safetensors"
    save_state(path, state, model)
    return state, path


def test_a_state_returns_to_the_bit(model, saved):
    state, path = saved
    assert load_state(path, model).same(state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_every_type_returns(dtype, tmp_path):
    model = build().to(dtype)
    state = model(torch.arange(5)[None]).state
    save_state(tmp_path / "state", state, model)
    assert load_state(tmp_path / "state", model).same(state)


def test_views_of_larger_caches_and_empty_ones_return(model, tmp_path):
    state = ModelState.empty(model.config)
    for _ in range(4):
        save_state(tmp_path / "state", state, model)
        assert load_state(tmp_path / "state", model).same(state)
        _, state = model.step_(torch.tensor([3]), state)


def test_the_file_is_plain_safetensors_with_its_facts(model, saved):
    state, path = saved
    with safetensors.safe_open(path, "pt") as f:
        metadata = f.metadata()
        assert set(f.keys()) == set(state.tensors())
    assert json.loads(metadata["positions"]) == [5, 2]
    assert json.loads(metadata["config"])["hidden_size"] == 64


def test_extra_tensors_come_back(model, tmp_path):
    state = ModelState.empty(model.config)
    save_state(tmp_path / "state", state, model, extra={"note": torch.arange(3)})
    again, extra = read_state(tmp_path / "state", model)
    assert again.same(state)
    assert extra["note"].tolist() == [0, 1, 2]


def test_the_fingerprint_follows_the_weights_and_not_their_precision(model):
    assert weights_fingerprint(build()) == weights_fingerprint(build().to(torch.bfloat16))
    for pattern in ("KM", "M"):
        assert weights_fingerprint(build(pattern)) != weights_fingerprint(build(pattern, seed=1))


@torch.no_grad()
def test_the_fingerprint_follows_every_tensor():
    model = build("KMPR", tie_word_embeddings=False)
    whole = weights_fingerprint(model)
    for name, tensor in model.state_dict().items():
        before = tensor.clone()
        tensor.mul_(1.5).add_(0.5)
        assert weights_fingerprint(model) != whole, name
        tensor.copy_(before)
    embedding = model.model.embed_tokens.weight
    for column in range(embedding.shape[1]):
        before = embedding[:, column].clone()
        embedding[:, column] += 0.5
        assert weights_fingerprint(model) != whole, column
        embedding[:, column] = before
    assert weights_fingerprint(model) == whole


@pytest.mark.parametrize(
    "shape", [(2304, 8192), (8192, 2304), (100, 3 * 5 * 7 * 11), (7, 5, 4096), (12,), (1,), (), (0, 3)]
)
def test_a_sample_meets_every_column(shape):
    x = torch.arange(shape[-1]).expand(shape) if shape else torch.tensor(1)
    sample = _sample(x)
    assert len(sample.unique()) == (x.numel() and x.shape[-1] if shape else 1)
    assert len(sample) <= 3 * max(SAMPLE, shape[-1] if shape else 1)


def test_any_cut_is_found(model, saved):
    _, path = saved
    whole = path.read_bytes()
    for size in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut short or changed|no safetensors header"):
            load_state(path, model)


def test_any_changed_byte_is_found(model, saved):
    _, path = saved
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for at in [0, 3, 9, 100, header - 5, *range(header, len(whole), 997), len(whole) - 1]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ValueError, match="state"):
            load_state(path, model)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="cut short or changed"):
        load_state(path, model)


def test_foreign_files_are_refused_in_a_sentence(model, tmp_path):
    path = tmp_path / "x"
    with pytest.raises(ValueError, match="does not exist"):
        load_state(path, model)
    with pytest.raises(ValueError, match="does not exist"):
        load_state(tmp_path, model)
    path.write_bytes(b"hello")
    with pytest.raises(ValueError, match="no safetensors header"):
        load_state(path, model)
    safetensors.torch.save_file({"a": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="is a safetensors file but not a saved state"):
        load_state(path, model)
    safetensors.torch.save_file({"a": torch.ones(2)}, path, {"format": "palimpsest.model_state", "version": "1"})
    with pytest.raises(ValueError, match="saved state of version '1'; this release reads '2': read the text again"):
        load_state(path, model)


def test_another_models_state_is_refused_by_what_differs(saved):
    _, path = saved
    with pytest.raises(ValueError, match="another model: hidden_size is 64 there and 32 here"):
        load_state(path, build(hidden_size=32))
    with pytest.raises(ValueError, match="another model: linear_attn_config"):
        load_state(path, build("KKM"))
    with pytest.raises(ValueError, match="other weights of the same config"):
        load_state(path, build(seed=1))
    with pytest.raises(ValueError, match="float32 in one and .* bfloat16|bfloat16.* in one and .* float32"):
        load_state(path, build().to(torch.bfloat16))


def test_a_state_is_not_saved_under_another_model(saved, tmp_path):
    state, _ = saved
    with pytest.raises(ValueError, match="not one of this model's"):
        save_state(tmp_path / "other", state, build("KM"))
    assert not (tmp_path / "other").exists()


def test_a_full_disk_leaves_the_file_that_was_there(model, saved, monkeypatch):
    state, path = saved
    before = path.read_bytes()

    def full(tensors, file, metadata):
        with open(file, "wb") as f:
            f.write(b"half")
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="cannot write .* No space left on device"):
        save_state(path, model(torch.tensor([[1]]), state=state.select([0])).state, model)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_failing_sync_leaves_the_file_that_was_there(model, saved, monkeypatch):
    state, path = saved
    before = path.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_state(path, state.select([0]), model)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_folder_that_does_not_exist_is_named(model, tmp_path):
    with pytest.raises(ValueError, match="the folder of .* does not exist; make it first"):
        save_state(tmp_path / "no" / "state", ModelState.empty(model.config), model)
