"""llama.cpp's own logits of a converted model. Run where the llama_cpp module is installed; see docs/how-to/convert.md."""

import pytest
import torch

llama = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
pytest.importorskip("gguf")

from palimpsest.convert import convert  # noqa: E402
from palimpsest.models.kimi_linear import KimiLinearConfig, KimiLinearForCausalLM  # noqa: E402
from palimpsest.text import ByteTokenizer, tokenizer_files  # noqa: E402

TEXT = "def read_lines(path): return [line for line in open(path)]"
SIZES = {
    "hidden_size": 128, "linear_num_heads": 4, "linear_head_dim": 32, "num_attention_heads": 4, "kv_lora_rank": 64,
    "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32, "num_experts": 8,
}  # fmt: skip


def theirs(file, ids, prompt):
    """Logits [T, vocabulary] of llama.cpp: a prompt at once, then token by token."""
    model = llama.llama_model_load_from_file(str(file).encode(), llama.llama_model_default_params())
    assert model, "llama.cpp does not load the file"
    settings = llama.llama_context_default_params()
    settings.n_threads = settings.n_threads_batch = 1
    settings.n_ctx = settings.n_batch = settings.n_ubatch = 256
    settings.type_k = settings.type_v = llama.GGML_TYPE_F32
    settings.flash_attn_type = 0
    context = llama.llama_init_from_model(model, settings)
    found = (llama.llama_token * 256)()
    words = llama.llama_model_get_vocab(model)
    count = llama.llama_tokenize(words, TEXT.encode(), len(TEXT.encode()), found, 256, False, False)
    assert list(found[:count]) == ids
    batch, rows = llama.llama_batch_init(256, 0, 1), []
    for start, stop in [(0, prompt), *((t, t + 1) for t in range(prompt, len(ids)))]:
        batch.n_tokens = stop - start
        for i, token in enumerate(ids[start:stop]):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, start + i, 1, 1
            batch.seq_id[i][0] = 0
        assert llama.llama_decode(context, batch) == 0
        rows += [torch.tensor(llama.llama_get_logits_ith(context, i)[:257]) for i in range(stop - start)]
    return torch.stack(rows)


def test_llama_cpp_reads_what_we_write(tmp_path):
    torch.manual_seed(0)
    model = KimiLinearForCausalLM(KimiLinearConfig.tiny("KKKMKKKM", **SIZES)).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not any(part in name for part in ("norm", "A_log", "dt_bias", "load")):
                tensor.normal_(0, 0.1)
    model.save_pretrained(tmp_path / "model")
    for name, content in tokenizer_files(ByteTokenizer()).items():
        (tmp_path / "model" / name).write_bytes(content)
    convert(tmp_path / "model", tmp_path / "model.gguf", "gguf")
    ids = ByteTokenizer().encode(TEXT)
    with torch.no_grad():
        ours = model(torch.tensor([ids])).logits[0]
    logits = theirs(tmp_path / "model.gguf", ids, prompt=40)
    assert (logits - ours).abs().max() < 2e-3 * ours.abs().max()  # theirs multiplies in half precision here and there
    assert torch.equal(logits.argmax(-1), ours.argmax(-1))
