"""One model through every layout and back, byte for byte; against transformers' and llama.cpp's own names and shapes."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from palimpsest.convert import Report, convert, detect, validate
from palimpsest.convert.layouts import official_shapes, tensors_of
from palimpsest.models.kimi_linear import KimiLinearConfig, KimiLinearForCausalLM

CONFIG = KimiLinearConfig.tiny("KKMKM", v_head_dim=12, num_experts=4)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = KimiLinearForCausalLM(CONFIG).eval()
    for name, tensor in model.state_dict().items():
        if "e_score" in name:
            tensor.normal_()
    return model


@pytest.fixture(scope="module")
def official(model, tmp_path_factory):
    from palimpsest.text import ByteTokenizer, tokenizer_files

    folder = tmp_path_factory.mktemp("official")
    model.save_pretrained(folder)
    for name, content in tokenizer_files(ByteTokenizer()).items():
        (folder / name).write_bytes(content)
    return folder


def tensors(folder):
    return {name: x for path in sorted(folder.glob("*.safetensors")) for name, x in load_file(path).items()}


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.mark.parametrize("layout", ["official", "native", "fla"])
def test_there_and_back_is_the_same_bytes(official, tmp_path, layout):
    there, back = tmp_path / "there", tmp_path / "back"
    report = convert(official, there, layout, shard_bytes=100_000)
    assert isinstance(report, Report)
    assert (report.layout_from, report.layout_to) == ("official", layout)
    assert {t.to for t in report.tensors} == set(tensors(there)) == {made.name for made in tensors_of(CONFIG, layout)}
    assert detect(there) == layout
    assert validate(there) == []
    assert len(list(there.glob("*.safetensors"))) > 2
    convert(there, back, "official")
    before, after = tensors(official), tensors(back)
    assert list(before) == list(after) or set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (back / "tokenizer.json").read_bytes() == (official / "tokenizer.json").read_bytes()


def test_what_is_written_is_read_by_the_library(model, official, tmp_path):
    convert(official, tmp_path / "native", "native")
    convert(tmp_path / "native", tmp_path / "back", "official", shard_bytes=50_000)
    ids = torch.arange(20)[None]
    assert torch.equal(KimiLinearForCausalLM.from_pretrained(tmp_path / "back")(ids).logits, model(ids).logits)


def test_native_is_what_transformers_has_in_memory(official, tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5.17")
    convert(official, tmp_path / "native", "native")
    ours, theirs = (
        tensors(tmp_path / "native"),
        transformers.AutoModelForCausalLM.from_pretrained(official).state_dict(),
    )
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "native", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_official_names_and_shapes_are_those_that_servers_load():
    """The released 48B: 20,493 tensors, as vLLM's and SGLang's loaders expect them."""
    shapes = official_shapes(KimiLinearConfig.official_48b())
    assert len(shapes) == 20_493
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 49_122_681_728
    assert shapes["model.layers.1.block_sparse_moe.experts.255.w2.weight"] == (2304, 1024)
    assert shapes["model.layers.0.self_attn.A_log"] == (1, 1, 32, 1)
    assert shapes["model.layers.3.self_attn.kv_a_proj_with_mqa.weight"] == (576, 2304)


def test_fla_names_are_flas(official, tmp_path):
    convert(official, tmp_path, "fla")
    there = tensors(tmp_path)
    layer = {
        name.removeprefix("model.layers.0.attn."): tuple(x.shape) for name, x in there.items() if ".0.attn." in name
    }
    D, H, K = CONFIG.hidden_size, CONFIG.linear_num_heads, CONFIG.linear_head_dim
    assert layer == {
        **{f"{x}_proj.weight": (H * K, D) for x in "qkv"}, **{f"{x}_conv1d.weight": (H * K, 1, 4) for x in "qkv"},
        "f_proj.0.weight": (K, D), "f_proj.1.weight": (H * K, K), "g_proj.0.weight": (K, D), "g_proj.1.weight": (H * K, K),
        "g_proj.1.bias": (H * K,), "b_proj.weight": (H, D), "A_log": (H,), "dt_bias": (H * K,), "o_norm.weight": (K,),
        "o_proj.weight": (D, H * K),
    }  # fmt: skip
    from safetensors.torch import save_file

    there["model.layers.0.attn.g_proj.1.bias"][0] = 1
    save_file(there, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="is not zero; Kimi Linear has no such bias"):
        convert(tmp_path, tmp_path / "back", "official")


def test_gguf_there_and_back(official, tmp_path):
    gguf = pytest.importorskip("gguf")
    file = tmp_path / "model.gguf"
    report = convert(official, file, "gguf")
    assert json.loads((tmp_path / "model.convert.json").read_text())["layout_to"] == "gguf"
    assert report.remarks == ()
    assert validate(file) == []
    reader = gguf.GGUFReader(file)
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.KIMI_LINEAR, CONFIG.num_hidden_layers)
    theirs = set()  # names by llama.cpp's own table, for what it does not rename itself
    for name in official_shapes(CONFIG):
        if ".experts." not in name and "kv_b_proj" not in name and "dt_bias" not in name:
            theirs.add(known.get_name(name, try_suffixes=(".weight", ".bias")))
    written = {tensor.name for tensor in reader.tensors}
    assert {n for n in theirs if n} <= written | {n.removesuffix(".bias") for n in written}
    shapes = {
        tensor.name: tensor.shape.tolist() for tensor in reader.tensors
    }  # first the fastest dimension, as ggml has it
    H, K, D = CONFIG.linear_num_heads, CONFIG.linear_head_dim, CONFIG.hidden_size
    assert shapes["blk.0.ssm_conv1d_q.weight"] == [4, 1, H * K, 1]
    assert shapes["blk.0.ssm_a"] == [1, H, 1, 1]
    assert shapes["blk.2.attn_k_b.weight"] == [CONFIG.qk_nope_head_dim, CONFIG.kv_lora_rank, CONFIG.num_attention_heads]
    assert shapes["blk.2.attn_v_b.weight"] == [CONFIG.kv_lora_rank, CONFIG.v_head_dim, CONFIG.num_attention_heads]
    assert shapes["blk.1.ffn_gate_exps.weight"] == [D, CONFIG.moe_intermediate_size, CONFIG.num_experts]
    values = {name: field.contents() for name, field in reader.fields.items()}
    assert values["kimi-linear.attention.head_count_kv"] == [0, 0, 1, 0, 1]
    assert values["tokenizer.ggml.tokens"][97] == "a"
    assert len(values["tokenizer.ggml.tokens"]) == 257

    convert(file, tmp_path / "back", "official")
    before, after = tensors(official), tensors(tmp_path / "back")
    assert set(before) == set(after)
    for name in before:
        if name.endswith("A_log"):  # through exp and log
            torch.testing.assert_close(before[name], after[name])
        else:
            assert torch.equal(before[name], after[name]), name
    read = KimiLinearConfig.from_dict(json.loads((tmp_path / "back" / "config.json").read_text()))
    assert read == CONFIG


def test_half_precision_keeps_its_dtype_where_llama_cpp_takes_it(official, tmp_path):
    gguf = pytest.importorskip("gguf")
    model = KimiLinearForCausalLM.from_pretrained(official, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    convert(tmp_path / "half", tmp_path / "half.gguf", "gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "half.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == kinds["blk.1.ffn_up_exps.weight"] == kinds["blk.2.attn_k_b.weight"] == "BF16"
    assert {kinds[f"blk.0.{n}"] for n in ("ssm_a", "ssm_dt.bias", "ssm_conv1d_q.weight", "attn_norm.weight")} == {"F32"}
    assert kinds["blk.1.ffn_gate_inp.weight"] == "F32"


def test_a_call_that_was_cut_short_goes_on(official, tmp_path):
    def stop(share, file):
        if share > 0.4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(official, tmp_path, "native", shard_bytes=100_000, progress=stop)
    assert not (tmp_path / "config.json").exists()  # no checkpoint yet
    with pytest.raises(ValueError, match=r"config\.json"):
        validate(tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    assert before
    convert(official, tmp_path, "native", shard_bytes=100_000)
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    assert before.items() <= after.items()  # kept as they were
    assert len(after) > len(before)
    assert validate(tmp_path) == []


def test_what_is_wrong_is_named(official, tmp_path):
    from safetensors.torch import save_file

    shutil.copytree(official, tmp_path / "x")
    there = tensors(official)
    there["model.layers.0.self_attn.extra"] = there.pop("model.layers.0.self_attn.dt_bias")
    there["model.norm.weight"] = torch.ones(3)
    save_file(there, tmp_path / "x" / "model.safetensors")
    findings = {finding.kind: finding.sentence for finding in validate(tmp_path / "x")}
    assert findings["missing"] == "model.layers.0.self_attn.dt_bias of shape [32] is missing"
    assert findings["extra"] == "model.layers.0.self_attn.extra has no place in the official layout"
    assert findings["misshapen"] == "model.norm.weight has shape [3]; expected [64]"
    with pytest.raises(
        ValueError, match="is no whole official checkpoint: .*and 2 more; palimpsest validate lists them"
    ):
        convert(tmp_path / "x", tmp_path / "y", "native")
    assert not (tmp_path / "y").exists()


def test_bad_input_is_a_sentence(official, tmp_path):
    with pytest.raises(ValueError, match="layout 'onnx' is unknown"):
        convert(official, tmp_path / "a", "onnx")
    with pytest.raises(ValueError, match="source and target are both"):
        convert(official, official, "native")
    convert(official, tmp_path / "b", "native")
    with pytest.raises(ValueError, match="holds a model already"):
        convert(official, tmp_path / "b", "fla")
    with pytest.raises(ValueError, match=r"is no \.gguf; name a new file"):
        convert(official, tmp_path / "c", "gguf")
    (tmp_path / "no.gguf").write_bytes(b"GGUF nothing")
    with pytest.raises(ValueError, match="is no whole GGUF file"):
        validate(tmp_path / "no.gguf")
    shutil.copytree(official, tmp_path / "cut")
    content = (official / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="is no whole safetensors file"):
        validate(tmp_path / "cut")
    KimiLinearForCausalLM(KimiLinearConfig.tiny("KG")).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="has places for the released layers alone"):
        convert(tmp_path / "other", tmp_path / "d", "native")
    convert(tmp_path / "other", tmp_path / "e", "official")  # which has
    KimiLinearForCausalLM(KimiLinearConfig.tiny(tie_word_embeddings=True)).save_pretrained(tmp_path / "tied")
    assert validate(tmp_path / "tied") == []
    convert(tmp_path / "tied", tmp_path / "f", "native")  # the one matrix under both names
    there = tensors(tmp_path / "f")
    assert torch.equal(there["lm_head.weight"], there["model.embed_tokens.weight"])


def test_another_architecture_is_refused(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="is of architecture 'llama'; expected 'kimi-linear'"):
        validate(tmp_path / "x.gguf")


def test_a_pipe_keeps_order_and_says_what_went_wrong(tmp_path):
    import hashlib

    from palimpsest.convert import pipe as module
    from palimpsest.convert.pipe import PIECE, pipe

    content = torch.randint(0, 255, (3 * PIECE + 5,), dtype=torch.uint8).numpy().tobytes()
    starts = range(0, len(content), PIECE)

    def reads():
        for start in starts:

            def fill(buffer, start=start):
                part = content[start : start + PIECE]
                buffer[: len(part)] = part
                return len(part)

            yield fill

    digest, monkey = hashlib.sha256(), pytest.MonkeyPatch()
    monkey.setattr(module, "SYNC", PIECE)  # to the disk on the way
    with open(tmp_path / "x", "wb", buffering=0) as out, pipe(out) as into:
        into.put(b"head", digest)
        into.fill(reads(), digest)
        into.fill(reads(), digest)  # buffers again
        into.put(b"tail", digest)
    monkey.undo()
    assert (tmp_path / "x").read_bytes() == b"head" + content + content + b"tail"
    assert digest.hexdigest() == hashlib.sha256(b"head" + content + content + b"tail").hexdigest()

    class Full:
        def write(self, content):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"), pipe(Full()) as into:
        into.put(b"x")


def test_a_source_that_shrinks_meanwhile_leaves_nothing_half_written(official, tmp_path, monkeypatch):
    from palimpsest.convert.sources import Source

    shutil.copytree(official, tmp_path / "x")
    original = Source.pieces

    def shrunk(self, name, *arguments):
        if name.endswith("lm_head.weight"):
            (tmp_path / "x" / "model.safetensors").write_bytes(b"short")
        return original(self, name, *arguments)

    monkeypatch.setattr(Source, "pieces", shrunk)
    with pytest.raises(ValueError, match="is cut short in tensor 'lm_head.weight'; fetch it again"):
        convert(tmp_path / "x", tmp_path / "y", "native")
    assert list((tmp_path / "y").iterdir()) == []


def test_large_tensors_pass_in_pieces(official, tmp_path):
    """Memory holds pieces, whatever the size of a tensor: none is read whole where nothing is done to it."""
    from palimpsest.convert.sources import Source

    asked = []
    original = Source.read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Source, "read", lambda self, name, *a: (asked.append(name), original(self, name, *a))[1])
        convert(official, tmp_path / "native", "native")
        assert asked == []
        convert(tmp_path / "native", tmp_path / "back", "official")
    assert all("A_log" in name or "conv" in name or "g_proj" in name for name in asked), asked


def test_the_released_tokenizer_goes_along_as_others_read_it(official, tmp_path):
    import base64

    gguf = pytest.importorskip("gguf")
    KimiLinearForCausalLM(KimiLinearConfig.tiny(vocab_size=513)).save_pretrained(tmp_path / "x")
    tokens = [bytes([b]) for b in range(256)] + [b"ab"]
    lines = [base64.b64encode(token) + f" {rank}".encode() for rank, token in enumerate(tokens)]
    (tmp_path / "x" / "tiktoken.model").write_bytes(b"\n".join(lines))
    convert(tmp_path / "x", tmp_path / "y", "native")
    assert (tmp_path / "y" / "tiktoken.model").is_file()
    assert json.loads((tmp_path / "y" / "tokenizer.json").read_text())["model"]["merges"] == [["a", "b"]]
    report = convert(tmp_path / "x", tmp_path / "z.gguf", "gguf")
    values = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "z.gguf").fields.items()}
    assert report.remarks == ()
    assert (values["tokenizer.ggml.pre"], values["tokenizer.ggml.merges"]) == ("kimi-k2", ["a b"])
    assert values["tokenizer.ggml.tokens"][256] == "ab"
