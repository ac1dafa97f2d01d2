"""Our model as a `PreTrainedModel`, for whatever is written against transformers: Trainer, generate, PEFT, TRL, lm-eval.

    import palimpsest.integrations.transformers.causal_lm      # registers it with AutoConfig and AutoModelForCausalLM
    model = PalimpsestForCausalLM.from_official("folder")

It is a thin coat: the modules, their names and their numbers are `KimiLinearForCausalLM`'s.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    TrainerCallback,
)
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from palimpsest.integrations.transformers.documents import documents
from palimpsest.integrations.transformers.state_cache import StateCache
from palimpsest.layers.memory_layer import MemoryLayer
from palimpsest.layers.moe import Experts, MoE, Router, update_router_bias
from palimpsest.layers.norms import RMSNorm
from palimpsest.layers.short_conv import ShortConvolution
from palimpsest.models.kimi_linear import KimiLinearConfig, KimiLinearForCausalLM
from palimpsest.models.kimi_linear.model import KimiLinearModel

CACHE = (
    "cache" if "cache" in {f.name for f in dataclasses.fields(CausalLMOutputWithPast)} else "past_key_values"
)  # from 5.24
SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "initializer_range",
)


class PalimpsestConfig(PreTrainedConfig):
    """The config of our model among those of transformers.

    Args:
        official: the model's own config, `KimiLinearConfig.to_dict()`; a tiny one if None.

    >>> PalimpsestConfig(KimiLinearConfig.tiny().to_dict()).hidden_size
    64
    """

    model_type = "palimpsest_kimi_linear"

    def __init__(self, official: dict[str, Any] | None = None, **kwargs: Any):
        ours = KimiLinearConfig.tiny() if official is None else KimiLinearConfig.from_dict(official)
        self.official = ours.to_dict()
        for name in SHARED:
            kwargs.pop(name, None)
            setattr(self, name, getattr(ours, name))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"):
            setattr(self, name, kwargs.pop(name, getattr(ours, name)))
        self.use_cache = kwargs.pop("use_cache", True)
        self.max_position_embeddings = kwargs.pop("max_position_embeddings", ours.model_max_length)
        super().__init__(**kwargs)

    @property
    def ours(self) -> KimiLinearConfig:
        """As the library's own config."""
        return KimiLinearConfig.from_dict(self.official)


class Backbone(KimiLinearModel):
    """The layers of our model, called as transformers calls them: trainers that compute the loss themselves do."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: StateCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: StateCache | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states [B, T, D] after the final norm. See PalimpsestForCausalLM.forward."""
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("this model reads tokens; pass input_ids, not inputs_embeds")
        cache = past_key_values if cache is None else cache
        if cache is not None and not isinstance(cache, StateCache):
            raise ValueError(
                f"the cache is a {type(cache).__name__}; this model keeps a StateCache, which generate() makes"
            )
        (B, T), read = input_ids.shape, super().forward
        borders, mask = _rows(input_ids, attention_mask, position_ids, cu_seq_lens_q)
        if cache is not None and cache.tokens and cu_seq_lens_q is None:
            borders = None  # positions go on from the cache; they say nothing about documents
        if borders is not None:
            if cache is not None and cache.tokens:
                raise ValueError(
                    "packed documents came with a cache, which continues one document; pass use_cache=False"
                )
            hidden, _state = read(input_ids.reshape(1, -1), cu_seqlens=borders)
            return BaseModelOutputWithPast(last_hidden_state=hidden.view(B, T, -1))
        if cache is None and not use_cache:
            return BaseModelOutputWithPast(last_hidden_state=read(input_ids, mask=mask)[0])
        cache = StateCache() if cache is None else cache
        before, pending = cache.take()
        ids = input_ids if pending is None else torch.cat((pending, input_ids), 1)
        if pending is not None and mask is not None:
            mask = torch.cat((torch.ones_like(pending, dtype=torch.bool), mask), 1)
        hidden, after = read(ids, state=before, mask=mask)
        cache.read(before, ids, mask, after)
        named: dict[str, Any] = {CACHE: cache}
        return BaseModelOutputWithPast(last_hidden_state=hidden[:, -T:], **named)


class PalimpsestForCausalLM(PreTrainedModel, GenerationMixin):
    """Kimi Linear for the tools of transformers.

    Padding may stand on any side and leaves no trace; documents packed in a row (position_ids that start again, or
    cu_seq_lens_q) are kept apart; assisted and prompt-lookup decoding go back exactly; rates stay in float32 in a bf16 model.

    >>> model = PalimpsestForCausalLM(PalimpsestConfig()).eval()
    >>> model(torch.tensor([[72, 101]])).logits.shape
    torch.Size([1, 2, 257])
    """

    config_class = PalimpsestConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    # transformers copies these lists for each model, and types them as an instance's own
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["A_log", "dt_bias", "e_score_correction_bias"]  # noqa: RUF012
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _is_stateful = False  # its cache can go back

    def __init__(self, config: PalimpsestConfig):
        super().__init__(config)
        self.model = Backbone(config.ours)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_official(
        cls, folder: str | os.PathLike, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> PalimpsestForCausalLM:
        """A model from a folder in the official layout: a released checkpoint, or one of this library's runs.

        How tokens are chosen comes with it, from generation_config.json.

        Raises:
            ValueError: as `KimiLinearForCausalLM.from_pretrained`.
        """
        from transformers import GenerationConfig

        own = KimiLinearForCausalLM.from_pretrained(folder, dtype=dtype, device=device)
        with torch.device("meta"):
            model = cls(PalimpsestConfig(own.config.to_dict()))
        _share(own.model, model.model)
        model.lm_head = own.lm_head
        assert own.folder is not None
        folder = own.folder  # of a run, its newest checkpoint
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        return model.eval()

    def save_official(self, folder: str | os.PathLike) -> None:
        """Write the model in the official layout, which `palimpsest generate`, vLLM and the native model read."""
        self.own().save_pretrained(folder)

    def own(self) -> KimiLinearForCausalLM:
        """The same weights as the library's own model; nothing is copied."""
        with torch.device("meta"):
            own = KimiLinearForCausalLM(cast(PalimpsestConfig, self.config).ours)
        _share(self.model, own.model)
        own.lm_head = cast(nn.Linear, self.lm_head)
        return own.train(self.training)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value  # pyright: ignore[reportAttributeAccessIssue]

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings  # pyright: ignore[reportAttributeAccessIssue]

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            "the vocabulary of a Kimi Linear model is part of its checkpoint; make a model of another size"
        )

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **_: Any) -> None:
        """Keep no activations inside layers; compute them again for the gradient."""
        self.model.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        self.model.gradient_checkpointing = False

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.model.gradient_checkpointing

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            init.normal_(module.weight, std=std)
        elif isinstance(module, Experts):
            for weight in (module.w1, module.w3, module.w2):
                init.normal_(weight, std=std)
        elif isinstance(module, Router):
            init.normal_(module.weight, std=std)
            init.zeros_(cast(Tensor, module.e_score_correction_bias))
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, ShortConvolution):
            bound = module.weight.shape[-1] ** -0.5
            init.uniform_(module.weight, -bound, bound)
        elif isinstance(module, MoE):
            init.zeros_(module.last_load)
            init.zeros_(module.total_load)
        elif isinstance(module, MemoryLayer) and not getattr(
            getattr(module, "A_log", None), "_is_hf_initialized", False
        ):
            module.reset_decay()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: StateCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: StateCache | None = None,
        cu_seq_lens_q: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits, and the loss of labels. Arguments as transformers' causal models.

        Raises:
            ValueError: inputs_embeds without input_ids, a cache of another kind, or packed documents with a cache.
        """
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        output = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, cache, cu_seq_lens_q
        )
        hidden = output.last_hidden_state
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, keep])
        loss = None
        if labels is not None:
            assert input_ids is not None  # or the layers below would have refused
            targets = _without_first(labels, *_rows(input_ids, attention_mask, position_ids, cu_seq_lens_q))
            loss = self.loss_function(logits=logits, labels=targets, vocab_size=self.config.vocab_size, **kwargs)
        result = CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: output.get(CACHE)})
        return result if return_dict is not False else result.to_tuple()

    def _prepare_cache_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any
    ) -> None:
        """generate() asks for its cache here."""
        if model_kwargs.get(CACHE) is None and generation_config.use_cache is not False:
            if generation_config.cache_implementation not in (None, "dynamic"):
                raise ValueError(
                    f"cache_implementation is {generation_config.cache_implementation!r}; the state of this model is of one "
                    "size and kind, so leave it out"
                )
            model_kwargs[CACHE] = StateCache()
        if generation_config.is_assistant and model_kwargs.get(CACHE) is not None:
            model_kwargs[CACHE].activate_past_recording()


def _share(source: KimiLinearModel, target: KimiLinearModel) -> None:
    target.embed_tokens, target.layers, target.norm = source.embed_tokens, source.layers, source.norm
    target.gradient_checkpointing = source.gradient_checkpointing


def _rows(
    input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cu_seq_lens_q: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The borders of packed documents, or the mask of padded rows; both None where every row is one document."""
    B, T = input_ids.shape
    mask = None if attention_mask is None else attention_mask[:, -T:].bool()
    if mask is not None and not bool(mask.all()):
        return None, mask
    return (documents((B, T), position_ids, cu_seq_lens_q) if T > 1 else None), None


def _without_first(labels: Tensor, borders: Tensor | None, mask: Tensor | None) -> Tensor:
    """-100 for the first token of every document: the token before it is another document's, or padding."""
    if borders is None and mask is None:
        return labels
    labels = labels.clone()
    if borders is not None:
        starts = borders[:-1][borders.diff() > 0]
        labels.view(-1)[starts] = -100
    if mask is not None:
        labels[~mask | (mask & (mask.cumsum(1) == 1))] = -100
    return labels


class RouterBalance(TrainerCallback):
    """Balances the experts as the library's own training does: pass `callbacks=[RouterBalance()]` to a Trainer.

    Args:
        rate: how far a router's bias moves after each step of the optimiser.
    """

    def __init__(self, rate: float = 1e-3):
        self.rate = rate

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        update_router_bias(model, self.rate)


AutoConfig.register(PalimpsestConfig.model_type, PalimpsestConfig, exist_ok=True)
AutoModelForCausalLM.register(PalimpsestConfig, PalimpsestForCausalLM, exist_ok=True)
