"""Models on disk: there and back to the bit, the official names, and folders that are not what they should be."""

import contextlib
import errno
import json
import os
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch

from palimpsest.models.kimi_linear import KimiLinearConfig, KimiLinearForCausalLM
from palimpsest.models.kimi_linear.checkpoint import INDEX, WHOLE, load_into_, save
from palimpsest.models.kimi_linear.official_names import official_tensors
from tests.disk import Journal

load = KimiLinearForCausalLM.from_pretrained


def build(seed=0, **changes):
    torch.manual_seed(seed)
    model = KimiLinearForCausalLM(KimiLinearConfig.tiny("KM", hidden_size=32, **changes))
    model.model.layers[1].block_sparse_moe.gate.e_score_correction_bias.normal_()
    return model


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and a[n].equal(b[n]) for n in a)


@pytest.mark.parametrize("shard", [10**9, 20_000])
@pytest.mark.parametrize("tied", [False, True])
def test_there_and_back_to_the_bit(tmp_path, shard, tied):
    model = build(tie_word_embeddings=tied).bfloat16()
    model.save_pretrained(tmp_path / "new" / "folder", max_shard_bytes=shard)
    again = KimiLinearForCausalLM.from_pretrained(tmp_path / "new" / "folder")
    assert again.config == model.config
    assert same(again, model)
    assert not again.training
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert again(ids).logits.equal(model.eval()(ids).logits)
    again.train()(ids, labels=ids).loss.backward()  # counts of tokens and all else are real tensors


def test_the_files_are_the_official_ones(tmp_path):
    model = build().bfloat16()
    model.save_pretrained(tmp_path, max_shard_bytes=20_000)
    index = json.loads((tmp_path / INDEX).read_text())
    names = sorted(path.name for path in tmp_path.iterdir())
    shards = [name for name in names if name.startswith("model-")]
    assert names == sorted([*shards, "config.json", INDEX])
    assert shards == [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    assert set(index["weight_map"].values()) == set(shards)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in model.state_dict().values())
    stored = {}
    for shard in shards:
        tensors = safetensors.torch.load_file(tmp_path / shard)
        assert all(index["weight_map"][name] == shard for name in tensors)
        stored |= tensors
    assert {n: t.dtype for n, t in stored.items()} == {n: t.dtype for n, t in official_tensors(model.state_dict())}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["linear_attn_config"]["kda_layers"] == [1]


def test_a_later_save_leaves_its_own_files_and_others_alone(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    for shard, seed in [(20_000, 0), (10**9, 1), (40_000, 2), (20_000, 3)]:
        build(seed).save_pretrained(tmp_path, max_shard_bytes=shard)
        assert same(load(tmp_path), build(seed))
        assert (tmp_path / INDEX).exists() != (tmp_path / WHOLE).exists()
        assert (tmp_path / "tokenizer.json").exists()
        assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("dtype", "wide"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)]
)
def test_loading_in_a_dtype_keeps_the_contract(tmp_path, dtype, wide):
    model = build()
    model.save_pretrained(tmp_path)
    tensors = load(tmp_path, dtype=dtype).state_dict()
    for name, tensor in model.state_dict().items():
        kept = name.endswith(("A_log", "dt_bias", "e_score_correction_bias"))
        assert tensors[name].dtype == (wide if kept else dtype), name
        assert tensors[name].equal(tensor.to(tensors[name].dtype))


def test_a_checkpoint_stored_in_bfloat16_alone_is_widened(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    narrow = {name: tensor.bfloat16() for name, tensor in official_tensors(model.state_dict())}
    safetensors.torch.save_file(narrow, tmp_path / WHOLE)
    assert load(tmp_path).model.layers[0].self_attn.A_log.dtype == torch.float32


def test_weights_do_not_live_in_the_file(tmp_path):
    build().save_pretrained(tmp_path)
    model = load(tmp_path)
    before = model.lm_head.weight.clone()
    with (tmp_path / WHOLE).open("rb+") as file:
        file.seek(0)
        file.write(bytes(os.path.getsize(tmp_path / WHOLE)))
    assert model.lm_head.weight.equal(before)
    with torch.no_grad():
        model.lm_head.weight.add_(1)


def test_tensors_gathered_elsewhere_are_saved(tmp_path):
    model, other = build(0), build(1)
    save(model, tmp_path, state_dict=other.state_dict())
    assert same(load(tmp_path), other)


def test_a_tied_head_may_be_absent_and_must_not_differ(tmp_path):
    model = build(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: t.pop("lm_head.weight"))
    assert same(load(tmp_path), model)
    load_into_(model, tmp_path)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    for read in (load, lambda folder: load_into_(model, folder)):
        with pytest.raises(ValueError, match="has tie_word_embeddings and a lm_head.weight other than its model.embed"):
            read(tmp_path)


def test_load_into_replaces_weights_and_refuses_another_config(tmp_path):
    build(1).save_pretrained(tmp_path)
    model = build(0)
    load_into_(model, tmp_path)
    assert same(model, build(1))
    other = build(0, num_experts_per_token=1)
    with pytest.raises(ValueError, match="of another config: num_experts_per_token is 2 there and 1 in this model"):
        load_into_(other, tmp_path)
    assert same(other, build(0, num_experts_per_token=1))


def rewrite(folder, change):
    tensors = safetensors.torch.load_file(folder / WHOLE)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / WHOLE)


def config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def flip_a_bit(folder):
    data = bytearray((folder / WHOLE).read_bytes())
    data[-1000] ^= 1
    (folder / WHOLE).write_bytes(data)


def cut_short(folder):
    data = (folder / WHOLE).read_bytes()
    (folder / WHOLE).write_bytes(data[: len(data) // 2])


def shard(folder, change=lambda folder, index: None):
    build().save_pretrained(folder, max_shard_bytes=20_000)
    index = json.loads((folder / INDEX).read_text())
    change(folder, index)
    (folder / INDEX).write_text(json.dumps(index))


def mix_saves(folder, index):
    other = folder / "other"
    build(1).save_pretrained(other, max_shard_bytes=20_000)
    first = sorted(set(index["weight_map"].values()))[0]
    os.replace(other / first, folder / first)


def escape(folder, index):
    index["weight_map"]["lm_head.weight"] = "../elsewhere.safetensors"


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (flip_a_bit, "model.safetensors' is damaged: its tensors do not match its digest"),
        (cut_short, "model.safetensors' is damaged or not safetensors"),
        (lambda f: (f / WHOLE).write_bytes(b""), "is damaged or not safetensors"),
        (lambda f: (f / WHOLE).write_bytes(struct.pack("<Q", 2**62) + b"{}"), "is damaged or not safetensors"),
        (lambda f: (f / WHOLE).unlink(), "lacks model.safetensors; fetch or save the model again"),
        (lambda f: (f / "config.json").unlink(), r"cannot read .*config.json' \(No such file"),
        (lambda f: (f / "config.json").write_text("{"), "config.json' is not JSON"),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json' is not JSON"),
        (lambda f: (f / "config.json").write_text('{"model_type": "llama"}'), "config.json': .* of model_type 'llama'"),
        (lambda f: rewrite(f, lambda t: t.pop("model.norm.weight")), "lacks these tensors: model.norm.weight"),
        (
            lambda f: rewrite(f, lambda t: [t.pop(n) for n in list(t) if "experts.0" in n or "norm" in n]),
            "lacks these tensors: model.layers.0.input_layernorm.weight, .* and [0-9]+ more",
        ),
        (
            lambda f: rewrite(f, lambda t: t.update({"model.rotary.inv_freq": torch.ones(3)})),
            "has these tensors, unknown to its config: model.rotary.inv_freq",
        ),
        (
            lambda f: rewrite(f, lambda t: t.update({"model.norm.weight": torch.ones(31)})),
            r"other shapes than its config: model.norm.weight \(31,\) instead of \(32,\)",
        ),
        (lambda f: shard(f, lambda f, i: next(f.glob("model-00002*")).unlink()), "lacks model-00002-of-"),
        (
            lambda f: rewrite(f, lambda t: t.update({"model.layers.0.self_attn.A_log": torch.ones(1, 1, 2, 1).to(torch.int8)})),
            "has tensors that are not of floating point: model.layers.0.self_attn.A_log I8",
        ),
        (
            lambda f: rewrite(f, lambda t: t.update({"model.norm.weight": torch.ones(32).to(torch.complex64)})),
            "has tensors that are not of floating point: model.norm.weight C64",
        ),
        (lambda f: config(f, vocab_size=10**9), r"embed_tokens.weight \(257, 32\) instead of \(1000000000, 32\)"),
        (lambda f: config(f, num_experts=300_000), "lacks tensors: its files hold [0-9]+ and its config, with 2 layers and"),
        (lambda f: config(f, intermediate_size=2**62), "makes no model .*its sizes are too large"),
        (lambda f: shard(f, mix_saves), "holds files of different saves"),
        (lambda f: shard(f, escape), "names '../elsewhere.safetensors'; weights must lie beside their index"),
        (lambda f: shard(f) or (f / INDEX).write_text("[]"), "holds a JSON list; expected an object"),
        (lambda f: shard(f) or (f / INDEX).write_text('{"weight_map": 7}'), "is not an index of weights"),
    ],
)  # fmt: skip
def test_damaged_and_foreign_folders_are_refused_in_a_sentence(tmp_path, harm, message):
    build().save_pretrained(tmp_path)
    harm(tmp_path)
    with pytest.raises(ValueError, match=message) as raised:
        load(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_folder_that_is_no_folder(tmp_path):
    with pytest.raises(ValueError, match="cannot read .*nowhere/config.json"):
        load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="saving the model to .*file' failed"):
        build().save_pretrained(tmp_path / "file")


@pytest.mark.parametrize("at", [0, 1])
def test_a_full_disk_leaves_the_old_model_whole(tmp_path, monkeypatch, at):
    build(0).save_pretrained(tmp_path, max_shard_bytes=60_000)
    before = sorted(path.name for path in tmp_path.iterdir())
    whole, calls = safetensors.torch.save_file, []

    def full(tensors, path, metadata=None):
        calls.append(path)
        if len(calls) > at:
            path.write_bytes(b"half a file")
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(tensors, path, metadata=metadata)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match=r"saving the model to .* failed \(.*No space left on device\); free space"):
        build(1).save_pretrained(tmp_path, max_shard_bytes=60_000)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert same(load(tmp_path), build(0))


@pytest.mark.parametrize("max_shard_bytes", [10**9, 70_000])
def test_a_power_cut_finds_every_file_on_the_disk(tmp_path, monkeypatch, max_shard_bytes):
    journal = Journal(monkeypatch)
    build(0).save_pretrained(tmp_path, max_shard_bytes=max_shard_bytes)
    assert not journal.lost
    assert not journal.moved


WHOLE_FILE, FEW, MANY = 10**9, 120_000, 70_000


@pytest.mark.parametrize(
    ("before", "after"), [(WHOLE_FILE, WHOLE_FILE), (MANY, MANY), (WHOLE_FILE, MANY), (MANY, WHOLE_FILE), (MANY, FEW)]
)
def test_a_kill_at_any_file_leaves_the_old_model_or_the_new(tmp_path, monkeypatch, before, after):
    models, outcomes = [build(0), build(1)], []
    replace, unlink = os.replace, Path.unlink
    for stop in range(40):
        folder = tmp_path / str(stop)
        models[0].save_pretrained(folder, max_shard_bytes=before)
        moves = iter(range(100))

        def killed(act, moves=moves, stop=stop):
            def run(*args, **kwargs):
                if next(moves) == stop:
                    raise KeyboardInterrupt
                act(*args, **kwargs)

            return run

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killed(replace))
            patch.setattr(Path, "unlink", killed(unlink))
            with contextlib.suppress(KeyboardInterrupt):
                models[1].save_pretrained(folder, max_shard_bytes=after)
        loaded = load(folder)
        outcomes.append(next(i for i in (0, 1) if same(loaded, models[i])))
        if next(moves) <= stop:  # this one ran to its end
            break
        models[1].save_pretrained(folder, max_shard_bytes=after)  # the next save cleans up
        assert same(load(folder), models[1])
        assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {0, 1}


def test_safetensors_missing_is_told_with_the_remedy(tmp_path, monkeypatch):
    build().save_pretrained(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"needs safetensors: pip install palimpsest-kda\[hf\]"):
        load(tmp_path)


def test_the_48b_model_has_the_released_names_shapes_and_size():
    with torch.device("meta"):
        tensors = dict(official_tensors(KimiLinearForCausalLM(KimiLinearConfig.official_48b()).state_dict()))
    D, H, E = 2304, 4096, 1024
    linear = lambda prefix, **sizes: {f"{prefix}{name}.weight": shape for name, shape in sizes.items()}
    expected = linear("", lm_head=(163840, D)) | linear("model.", embed_tokens=(163840, D), norm=(D,))
    for i in range(27):
        at = f"model.layers.{i}."
        expected |= linear(at, input_layernorm=(D,), post_attention_layernorm=(D,))
        if i in (3, 7, 11, 15, 19, 23, 26):
            expected |= linear(
                at + "self_attn.", q_proj=(6144, D), kv_a_proj_with_mqa=(576, D), kv_a_layernorm=(512,),
                kv_b_proj=(8192, 512), o_proj=(D, H),
            )  # fmt: skip
        else:
            expected |= {f"{at}self_attn.A_log": (1, 1, 32, 1), f"{at}self_attn.dt_bias": (H,)} | linear(
                at + "self_attn.", q_proj=(H, D), k_proj=(H, D), v_proj=(H, D), q_conv1d=(H, 1, 4), k_conv1d=(H, 1, 4),
                v_conv1d=(H, 1, 4), f_a_proj=(128, D), f_b_proj=(H, 128), b_proj=(32, D), g_a_proj=(128, D),
                g_b_proj=(H, 128), o_norm=(128,), o_proj=(D, H),
            )  # fmt: skip
        if i == 0:
            expected |= linear(at + "mlp.", gate_proj=(9216, D), up_proj=(9216, D), down_proj=(D, 9216))
        else:
            at += "block_sparse_moe."
            expected |= linear(at, gate=(256, D)) | {at + "gate.e_score_correction_bias": (256,)}
            expected |= linear(at + "shared_experts.", gate_proj=(E, D), up_proj=(E, D), down_proj=(D, E))
            for e in range(256):
                expected |= linear(f"{at}experts.{e}.", w1=(E, D), w3=(E, D), w2=(D, E))
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    assert len(tensors) == 20_493
    assert sum(tensor.numel() for tensor in tensors.values()) == 49_122_681_728
