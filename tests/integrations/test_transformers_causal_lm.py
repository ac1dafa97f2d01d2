"""Our model in the tools of transformers, on tiny weights."""

import dataclasses

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.17")

from palimpsest.integrations.transformers.causal_lm import (  # noqa: E402
    CACHE,
    PalimpsestConfig,
    PalimpsestForCausalLM,
    RouterBalance,
)
from palimpsest.integrations.transformers.state_cache import StateCache  # noqa: E402
from palimpsest.models.kimi_linear import KimiLinearConfig, KimiLinearForCausalLM  # noqa: E402
from palimpsest.text import ByteTokenizer, tokenizer_files  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.randint(0, 255, (2, 20), generator=torch.Generator().manual_seed(0))


def build(pattern="KKKM", **changes):
    torch.manual_seed(0)
    model = PalimpsestForCausalLM(PalimpsestConfig(KimiLinearConfig.tiny(pattern, **changes).to_dict())).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and "A_log" not in name and "dt_bias" not in name:
                parameter.normal_(0, 0.1)
    return model


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    for name, content in tokenizer_files(ByteTokenizer()).items():
        (folder / name).write_bytes(content)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def test_it_is_the_librarys_own_model(model, tmp_path):
    own = model.own()
    assert own.model.layers is model.model.layers  # not a copy
    assert torch.equal(own(IDS).logits, model(IDS).logits)
    model.save_official(tmp_path)
    again = PalimpsestForCausalLM.from_official(tmp_path)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert torch.equal(KimiLinearForCausalLM.from_pretrained(tmp_path)(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("tied", [False, True])
def test_saved_and_loaded_by_its_own_name(tmp_path, tied):
    model = build(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is PalimpsestForCausalLM
    assert not any(report.values())
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    assert again.model.layers[1].block_sparse_moe.total_load.tolist() == [0, 0, 0, 0]
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half.model.layers[0].self_attn.A_log, model.model.layers[0].self_attn.A_log)


def test_a_fresh_model_is_initialised_like_the_librarys(model):
    fresh = PalimpsestForCausalLM(PalimpsestConfig(KimiLinearConfig.tiny().to_dict()))
    layer = fresh.model.layers[0].self_attn
    assert 0.015 < layer.q_proj.weight.std() < 0.025
    assert layer.A_log.exp().min() >= 1
    assert layer.A_log.exp().max() <= 16
    assert (fresh.model.norm.weight == 1).all()


def test_padding_packing_and_labels(model):
    mask = torch.ones_like(IDS)
    mask[0, 12:] = 0
    mask[1, :5] = 0
    padded = model(IDS, attention_mask=mask, labels=IDS)
    rows = [model(IDS[:1, :12], labels=IDS[:1, :12]), model(IDS[1:, 5:], labels=IDS[1:, 5:])]
    torch.testing.assert_close(padded.logits[0, :12], rows[0].logits[0])
    torch.testing.assert_close(padded.logits[1, 5:], rows[1].logits[0])
    torch.testing.assert_close(padded.loss, (11 * rows[0].loss + 14 * rows[1].loss) / 25)

    places = torch.cat((torch.arange(12), torch.arange(8)))[None]
    packed = model(IDS[:1], position_ids=places, labels=IDS[:1])
    parts = [model(IDS[:1, :12], labels=IDS[:1, :12]), model(IDS[:1, 12:], labels=IDS[:1, 12:])]
    torch.testing.assert_close(packed.logits[0], torch.cat([part.logits[0] for part in parts]))
    torch.testing.assert_close(packed.loss, (11 * parts[0].loss + 7 * parts[1].loss) / 18)
    assert getattr(packed, CACHE) is None
    torch.testing.assert_close(model(IDS, logits_to_keep=3).logits, model(IDS).logits[:, -3:])


def greedy(model, ids, count):
    for _ in range(count):
        ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)), 1)
    return ids


OPTIONS = {"do_sample": False, "pad_token_id": 0}


def test_generate(model):
    truth = greedy(model, IDS, 12)
    mask = torch.ones_like(IDS)
    assert torch.equal(model.generate(IDS, attention_mask=mask, max_new_tokens=12, **OPTIONS), truth)
    left = torch.cat((torch.zeros_like(IDS[:, :4]), IDS), 1)
    padded = model.generate(
        left, attention_mask=(torch.arange(24) >= 4).long().expand(2, 24), max_new_tokens=12, **OPTIONS
    )
    assert torch.equal(padded[:, 4:], truth)
    beams = model.generate(IDS, attention_mask=mask, max_new_tokens=6, num_beams=3, **OPTIONS)
    again = model.generate(IDS, attention_mask=mask, max_new_tokens=6, num_beams=3, use_cache=False, **OPTIONS)
    assert torch.equal(beams, again)


def test_assisted_decoding_goes_back_exactly(model):
    prompt = IDS[:1]
    truth = greedy(model, prompt, 24)
    mask = torch.ones_like(prompt)
    run = lambda **more: model.generate(prompt, attention_mask=mask, max_new_tokens=24, **OPTIONS, **more)
    assert torch.equal(run(prompt_lookup_num_tokens=3), truth)
    assert torch.equal(run(assistant_model=build("KM")), truth)  # wrong most of the time
    assert torch.equal(run(assistant_model=model), truth)  # right all the time


def test_a_cache_takes_tokens_back():
    model = build()
    with torch.no_grad():
        cache = StateCache()
        cache.activate_past_recording()
        for part in IDS.split([5, 1, 1, 6, 7], 1):
            model(IDS[:, : part.shape[1]] * 0 + part, **{CACHE: cache})
        assert cache.get_seq_length() == 20
        for removed in (3, 5, 2):  # within a call, across calls, and before anything is read again
            cache.crop(-removed)
        assert cache.get_seq_length() == 10
        rest = model(IDS[:, 10:], **{CACHE: cache}).logits
        torch.testing.assert_close(rest, model(IDS).logits[:, 10:])
        assert cache.get_seq_length() == 20
        cache.crop(20)  # as a length
        assert cache.get_seq_length() == 20
        cache.reorder_cache(torch.tensor([1, 0]))
        swapped = model(IDS[:, :3], **{CACHE: cache}).logits
        torch.testing.assert_close(swapped[0], model(torch.cat((IDS[1], IDS[0, :3]))[None]).logits[0, -3:])
        with pytest.raises(RuntimeError, match="call activate_past_recording"):
            unrecorded = StateCache()
            for part in IDS.split(10, 1):
                model(part, **{CACHE: unrecorded})
            unrecorded.crop(-15)


def test_bad_input_is_a_sentence(model, tmp_path):
    with pytest.raises(ValueError, match="this model reads tokens; pass input_ids"):
        model(inputs_embeds=torch.zeros(1, 2, 64))
    with pytest.raises(ValueError, match="the cache is a DynamicCache; this model keeps a StateCache"):
        model(IDS, **{CACHE: transformers.DynamicCache()})
    with pytest.raises(ValueError, match="cache_implementation is 'static'"):
        model.generate(IDS, attention_mask=torch.ones_like(IDS), cache_implementation="static", max_new_tokens=2)
    with pytest.raises(NotImplementedError, match="part of its checkpoint"):
        model.resize_token_embeddings(300)
    with pytest.raises(ValueError, match="model_type 'llama'; this model reads 'kimi_linear'"):
        PalimpsestConfig({"model_type": "llama"})


def rows(count=16):
    return [{"input_ids": list(b"abcabcabcabcabcabcabcabc")} for _ in range(count)]


def settings(kind, folder, **more):
    known = {f.name for f in dataclasses.fields(kind)}
    common = {
        "output_dir": str(folder), "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 5e-3,
        "report_to": [], "save_strategy": "no", "use_cpu": True, "bf16": False, "disable_tqdm": True,
    }  # fmt: skip
    off = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return kind(**common, **{off: False}, **more)


def test_trainer_with_packed_documents_and_pipeline(tmp_path, tokenizer):
    model = PalimpsestForCausalLM(PalimpsestConfig(KimiLinearConfig.tiny().to_dict()))
    trainer = transformers.Trainer(
        model=model,
        args=settings(transformers.TrainingArguments, tmp_path, logging_steps=3),
        train_dataset=rows(),
        data_collator=transformers.DataCollatorWithFlattening(),
        callbacks=[RouterBalance(0.01)],
    )
    trainer.train()
    first, second = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert second < first
    assert model.model.layers[1].block_sparse_moe.gate.e_score_correction_bias.abs().sum() > 0
    trainer.save_model(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write = transformers.pipeline("text-generation", model=str(tmp_path / "model"), device="cpu")
    text = write("abcab", max_new_tokens=6, do_sample=False)[0]["generated_text"]
    assert text.startswith("abcab")
    assert len(text) > 5


def test_gradient_checkpointing_gives_the_same_gradient(model):
    gradients = []
    for on in (False, True):
        network = build().train()
        (network.gradient_checkpointing_enable if on else network.gradient_checkpointing_disable)()
        assert network.is_gradient_checkpointing == on
        network(IDS, labels=IDS).loss.backward()
        gradients.append(network.model.layers[0].self_attn.q_proj.weight.grad)
    torch.testing.assert_close(*gradients)


PROJECTIONS = (
    "q_proj k_proj v_proj o_proj f_a_proj f_b_proj b_proj g_a_proj g_b_proj kv_a_proj_with_mqa kv_b_proj "
    "gate_proj up_proj down_proj"
).split()
TENSORS = ["experts.w1", "experts.w3", "experts.w2", "gate.weight"]


def test_lora_on_projections_gates_experts_and_router(tmp_path):
    peft = pytest.importorskip("peft")
    make = lambda: peft.LoraConfig(r=2, target_modules=PROJECTIONS, target_parameters=TENSORS, task_type="CAUSAL_LM")
    base = build()
    before = base(IDS).logits.detach()
    network = peft.get_peft_model(base, make())
    trained = [(n, p) for n, p in network.named_parameters() if p.requires_grad]
    names = " ".join(n for n, _ in trained)
    assert all(part in names for part in ("b_proj", "f_a_proj", "g_b_proj", "kv_b_proj", "experts", "gate"))
    optimiser = torch.optim.AdamW([p for _, p in trained], lr=1e-2)
    for _ in range(2):
        optimiser.zero_grad()
        network(input_ids=IDS, labels=IDS).loss.backward()
        assert all(p.grad is not None for _, p in trained)
        optimiser.step()
    network.eval()
    after = network(input_ids=IDS).logits.detach()
    assert (after - before).abs().max() > 1e-3
    network.save_pretrained(tmp_path / "one")

    again = peft.PeftModel.from_pretrained(build(), tmp_path / "one", adapter_name="one").eval()
    torch.testing.assert_close(again(input_ids=IDS).logits, after)
    with again.disable_adapter():
        torch.testing.assert_close(again(input_ids=IDS).logits, before)
    assert again.generate(input_ids=IDS, max_new_tokens=3, **OPTIONS).shape == (2, 23)
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, after)
    with pytest.raises(RuntimeError, match="size mismatch"):  # adapters of another shape
        peft.PeftModel.from_pretrained(build("KKKM", linear_num_heads=4), tmp_path / "one")


def test_several_adapters_on_one_base(tmp_path):
    peft = pytest.importorskip("peft")
    network = peft.get_peft_model(build(), peft.LoraConfig(r=2, target_modules=["q_proj", "b_proj"]), adapter_name="a")
    network.add_adapter("b", peft.LoraConfig(r=2, target_modules=["v_proj", "f_b_proj"]))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    logits = {}
    for name in ("a", "b", "a"):
        network.set_adapter(name)
        seen = network(input_ids=IDS).logits.detach()
        torch.testing.assert_close(logits.setdefault(name, seen), seen)
    assert (logits["a"] - logits["b"]).abs().max() > 1e-3


def test_lora_on_the_native_model_after_enable():
    peft = pytest.importorskip("peft")
    from native import tiny

    from palimpsest.integrations.transformers import disable, enable

    enable(["kimi_linear"])
    try:
        network = peft.get_peft_model(
            tiny("kimi_linear"), peft.LoraConfig(r=2, target_modules=["q_proj", "f_b_proj", "b_proj"])
        )
        network(input_ids=IDS % 60 + 3, labels=IDS % 60 + 3).loss.backward()
        trained = [p for p in network.parameters() if p.requires_grad]
        assert trained
        assert all(p.grad is not None for p in trained)
    finally:
        disable()


@pytest.mark.parametrize("packing", [False, True])
def test_trl_sft(tmp_path, tokenizer, packing):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    model = PalimpsestForCausalLM(PalimpsestConfig(KimiLinearConfig.tiny().to_dict()))
    data = Dataset.from_dict({"text": ["abcabcabc", "def f(x): return x", "hello there"] * 8})
    args = settings(trl.SFTConfig, tmp_path, packing=packing, padding_free=packing, max_length=64)
    trainer = trl.SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
    assert trainer.train().metrics["train_loss"] < 5.55  # log 257


def test_trl_grpo(tmp_path, tokenizer):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    model = PalimpsestForCausalLM(PalimpsestConfig(KimiLinearConfig.tiny().to_dict()))
    before = model.lm_head.weight.detach().clone()
    trainer = trl.GRPOTrainer(
        model=model,
        args=settings(trl.GRPOConfig, tmp_path, num_generations=4, max_completion_length=8),
        reward_funcs=lambda completions, **_: [float(len(set(text))) for text in completions],
        train_dataset=Dataset.from_dict({"prompt": ["abc", "de"] * 8}),
        processing_class=tokenizer,
    )
    trainer.train()
    assert not torch.equal(model.lm_head.weight, before)
