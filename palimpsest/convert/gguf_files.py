"""GGUF by the `gguf` package: metadata as llama.cpp's kimi-linear reads it, tensors as they are streamed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from palimpsest.convert.pipe import pipe
from palimpsest.convert.sources import Entry, Source
from palimpsest.files import replacing
from palimpsest.models.kimi_linear.config import KimiLinearConfig
from palimpsest.models.kimi_linear.mixers import is_full_attention
from palimpsest.text.tiktoken_files import TIKTOKEN, as_tokenizer_json

if TYPE_CHECKING:
    from palimpsest.convert.conversion import Moved, Planned

ARCHITECTURE = "kimi-linear"
SIGMOID = 2  # llama.cpp's number of the router's function
FULL = ("conv1d", "ffn_gate_inp", "ssm_a", "ssm_dt", "exp_probs_b", "norm")  # kept in float32, as llama.cpp wants them


def write(
    opened: Source, plan: list[Planned], file: Path, progress: Callable[[float, str], None]
) -> tuple[tuple[Moved, ...], tuple[str, ...]]:
    """Write a .gguf file whole or not at all; returns what was written and remarks."""
    from palimpsest.convert.conversion import NAMES, Moved, send

    gguf = _gguf()
    kinds = {torch.float32: gguf.GGMLQuantizationType.F32, torch.float16: gguf.GGMLQuantizationType.F16}
    kinds[torch.bfloat16] = gguf.GGMLQuantizationType.BF16
    moved, remarks = [], []
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as partial:
        writer = gguf.GGUFWriter(partial, ARCHITECTURE)
        try:
            _write_metadata(writer, gguf, opened.config)
            remarks += _write_vocabulary(writer, gguf, opened)
            dtypes = []
            for planned in plan:
                full = len(planned.made.shape) == 1 or any(part in planned.made.name for part in FULL)
                dtype = torch.float32 if full or planned.dtype not in kinds else planned.dtype
                dtypes.append(dtype)
                size = dtype.itemsize * int(torch.Size(planned.made.shape).numel())
                writer.add_tensor_info(
                    planned.made.name, planned.made.shape, _numpy(dtype), size, raw_dtype=kinds[dtype]
                )
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            out = writer.fout[0]
            writer.write_padding(out, out.tell())
            hashes = [hashlib.sha256() for _ in plan]
            with pipe(out) as into:
                for number, (planned, dtype, digest) in enumerate(zip(plan, dtypes, hashes)):
                    send(opened, planned, dtype, into, digest)
                    size = dtype.itemsize * int(torch.Size(planned.made.shape).numel())
                    into.put(bytes(-size % writer.data_alignment))
                    progress((number + 1) / len(plan), planned.made.name)
            for planned, dtype, digest in zip(plan, dtypes, hashes):
                made = planned.made
                digits = digest.hexdigest()
                moved.append(Moved(made.name, planned.source, made.shape, NAMES[dtype], digits, file.name))
        finally:
            writer.close()
    return tuple(moved), tuple(remarks)


def read_header(file: Path) -> tuple[KimiLinearConfig, dict[str, Entry]]:
    """The config and the tensors of a .gguf file.

    Raises:
        ValueError: it is none, of another architecture, or quantised.
    """
    gguf = _gguf()
    try:
        reader = gguf.GGUFReader(file)
    except Exception as error:  # the library has its own for each way in which a file can be none
        raise ValueError(f"{str(file)!r} is no whole GGUF file: {error}") from error
    values = {name: field.contents() for name, field in reader.fields.items()}
    if values.get("general.architecture") != ARCHITECTURE:
        raise ValueError(
            f"{str(file)!r} is of architecture {values.get('general.architecture')!r}; expected {ARCHITECTURE!r}"
        )
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    entries = {}
    for tensor in reader.tensors:
        if tensor.tensor_type.name not in kinds:
            raise ValueError(
                f"tensor {tensor.name!r} of {str(file)!r} is quantised ({tensor.tensor_type.name}); convert from a file in "
                "F32, F16 or BF16"
            )
        shape = tuple(int(n) for n in reversed(tensor.shape.tolist()))
        entries[tensor.name] = Entry(file, int(tensor.data_offset), shape, kinds[tensor.tensor_type.name])
    return _config(values, entries), entries


def _write_metadata(writer: Any, gguf: Any, config: KimiLinearConfig) -> None:
    heads = [1 if is_full_attention(name) else 0 for name in config.layer_types]  # 0 marks a memory layer
    writer.add_name("Kimi Linear")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.model_max_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    writer.add_ssm_conv_kernel(config.short_conv_kernel_size)
    writer.add_kda_head_dim(config.linear_head_dim)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_token)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_shared_count(config.num_shared_experts)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(config.moe_renormalize)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType(SIGMOID))
    writer.add_leading_dense_block_count(config.first_k_dense_replace)


def _write_vocabulary(writer: Any, gguf: Any, opened: Source) -> list[str]:
    config, path = opened.config, opened.path / "tokenizer.json"
    ends = config.eos_token_id
    for mark, add in (
        (config.bos_token_id, writer.add_bos_token_id),
        (ends[0] if isinstance(ends, tuple) else ends, writer.add_eos_token_id),
        (config.pad_token_id, writer.add_pad_token_id),
    ):  # fmt: skip
        if mark is not None:
            add(mark)
    said = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    kimi = not said and (opened.path / TIKTOKEN).is_file()
    if kimi:
        said = as_tokenizer_json(opened.path)
    if said.get("model", {}).get("type") != "BPE":
        writer.add_tokenizer_model("none")
        return [
            "no tokenizer.json with byte-pair merges was there, so the file has no vocabulary: llama.cpp takes token ids alone"
        ]
    added = {token["id"]: token["content"] for token in said.get("added_tokens", [])}
    ids = {number: text for text, number in said["model"]["vocab"].items()} | added
    kinds = gguf.TokenType
    tokens = [ids.get(i, f"[PAD{i}]") for i in range(config.vocab_size)]
    types = [
        kinds.CONTROL if i in added else kinds.NORMAL if i in ids else kinds.UNUSED for i in range(config.vocab_size)
    ]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in said["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("kimi-k2" if kimi else "gpt-2")  # llama.cpp's name of the released pattern
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(
        merges or ["\u0100 \u0100"]
    )  # the list may not be empty; this pair is no token, so it never joins
    return (
        []
        if kimi or not merges
        else ["the pre-tokenizer is written as gpt-2; compare a text's tokens before trusting it"]
    )


def _config(values: dict[str, Any], entries: dict[str, Entry]) -> KimiLinearConfig:
    def get(name: str, default: Any = None) -> Any:
        value = values.get(f"{ARCHITECTURE}.{name}", default)
        if value is None:
            raise ValueError(f"the GGUF file has no {ARCHITECTURE}.{name}; convert the model again")
        return value

    kinds = tuple("mla" if count else "kda" for count in get("attention.head_count_kv"))
    rope = int(get("rope.dimension_count"))
    mark = lambda name: values.get(f"tokenizer.ggml.{name}_token_id")
    return KimiLinearConfig(
        vocab_size=int(entries["token_embd.weight"].shape[0]),
        hidden_size=int(get("embedding_length")),
        intermediate_size=int(get("feed_forward_length")),
        layer_types=kinds,
        linear_num_heads=next(e.shape[0] for n, e in entries.items() if n.endswith("ssm_beta.weight")),
        linear_head_dim=int(get("kda.head_dim")),
        short_conv_kernel_size=int(get("ssm.conv_kernel")),
        num_attention_heads=int(get("attention.head_count")),
        kv_lora_rank=int(get("attention.kv_lora_rank")),
        qk_nope_head_dim=int(get("attention.key_length_mla")) - rope,
        qk_rope_head_dim=rope,
        v_head_dim=int(get("attention.value_length_mla")),
        rope_theta=float(get("rope.freq_base", 10000.0)),
        num_experts=int(get("expert_count")),
        num_experts_per_token=int(get("expert_used_count")),
        num_shared_experts=int(get("expert_shared_count")),
        moe_intermediate_size=int(get("expert_feed_forward_length")),
        first_k_dense_replace=int(get("leading_dense_block_count", 0)),
        moe_renormalize=bool(get("expert_weights_norm", True)),
        routed_scaling_factor=round(float(get("expert_weights_scale", 1.0)), 6),
        rms_norm_eps=float(f"{get('attention.layer_norm_rms_epsilon'):.6g}"),
        model_max_length=int(get("context_length")),
        bos_token_id=mark("bos"),
        eos_token_id=mark("eos"),
        pad_token_id=mark("padding"),
    )


def _numpy(dtype: torch.dtype) -> Any:
    import numpy as np

    return {torch.float32: np.dtype(np.float32), torch.float16: np.dtype(np.float16)}.get(dtype, np.dtype(np.float16))


def _gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise ImportError("GGUF files need the gguf package: pip install palimpsest-kda[gguf]") from None
    return gguf
