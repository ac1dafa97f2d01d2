"""Kimi Linear in plain PyTorch.

Letters  B sequences, T tokens, N packed documents, D hidden channels.
Source   arXiv:2510.26692; parameter names and numerics are those of moonshotai/Kimi-Linear-48B-A3B.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from palimpsest.layers.mlp import GatedMLP
from palimpsest.layers.moe import Experts, MoE
from palimpsest.layers.norms import RMSNorm
from palimpsest.layers.padding import check_rows, check_split, pack, unpack
from palimpsest.models.kimi_linear.captured_prompt import CapturedPrompt
from palimpsest.models.kimi_linear.checkpoint import check_files, fill_, read_config, save
from palimpsest.models.kimi_linear.checkpoint_place import checkpoint_of
from palimpsest.models.kimi_linear.compiled_step import CompiledStep
from palimpsest.models.kimi_linear.config import KimiLinearConfig
from palimpsest.models.kimi_linear.mixers import make_mixer
from palimpsest.models.kimi_linear.model_state import ModelState
from palimpsest.ops.cross_entropy import IGNORED, cross_entropy_sum
from palimpsest.ops.packing import check_cu_seqlens
from palimpsest.ops.split import SequenceSplit

if TYPE_CHECKING:
    from palimpsest.generate import DecodeState, Generation, Sampling
    from palimpsest.generate.prompts import Prompts
    from palimpsest.text import Tokenizer


class CausalOutput(NamedTuple):
    """What the causal model returns.

    Attributes:
        logits: [B, T, vocabulary], or one row a sequence with last_only; None where only the loss was formed.
        state: after the last token.
        loss: mean cross entropy in nats a predicted token; None without labels.
    """

    logits: Tensor | None  # [B, T, vocabulary], or one row a sequence with last_only; None with labels
    state: ModelState | None  # after the last token; None with labels and no state to go on from
    loss: Tensor | None  # mean cross entropy in nats a predicted token; None without labels


class DecoderLayer(nn.Module):
    """Mix tokens, then channels, each around a residual."""

    def __init__(self, config: KimiLinearConfig, index: int):
        super().__init__()
        self.self_attn = make_mixer(config, index)
        if config.is_sparse(index):
            self.block_sparse_moe = MoE(
                config.hidden_size,
                config.moe_intermediate_size,
                config.num_experts,
                config.num_experts_per_token,
                num_shared_experts=config.num_shared_experts,
                num_groups=config.num_expert_group,
                groups_per_token=config.topk_group,
                renormalize=config.moe_renormalize,
                scaling=config.routed_scaling_factor,
                weigh_by=config.router,
            )
        else:
            self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        state=None,
        cu_seqlens: Tensor | None = None,
        keep_state: bool = True,
        split: SequenceSplit | None = None,
    ):
        """y [B, T, D] and the mixer's state after it; None in its place if it is not to be kept, as in training."""
        normed, more = self.input_layernorm(x), {} if split is None else {"split": split}
        if not keep_state and hasattr(self.self_attn, "without_state"):
            y = self.self_attn.without_state(normed, cu_seqlens=cu_seqlens, **more)  # type: ignore[operator]  # a method
        else:
            y, state = self.self_attn(normed, state, cu_seqlens=cu_seqlens, **more)
        x = x + y
        return x + self._channel_mixer(self.post_attention_layernorm(x)), state if keep_state else None

    def step_(self, x: Tensor, parts: Tensor, state, mask: Tensor | None = None):
        """One token a sequence: the residual stream x [B, D] and what the layer before adds to it, parts [B, J, D], in;
        the stream, what this layer adds to it, and the state out."""
        x, y = self.input_layernorm.after(x, parts)
        y, state = self.self_attn.step_(y, state, mask)
        x, y = self.post_attention_layernorm.after(x, y[:, None])
        return x, self._channel_mixer.step(y), state

    @property
    def _channel_mixer(self) -> GatedMLP | MoE:
        return self.mlp if hasattr(self, "mlp") else self.block_sparse_moe


class KimiLinearModel(nn.Module):
    """Embedding, layers, final norm: tokens in, hidden states out.

    `gradient_checkpointing = True` keeps no activations inside layers and computes them again for the gradient.
    """

    def __init__(self, config: KimiLinearConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self._kinds_of_states: list[type] | None = None
        self._compiled_step, self._captured_prompt = CompiledStep(), CapturedPrompt()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        input_ids: Tensor,
        *,
        state: ModelState | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, ModelState]:
        """Hidden states [B, T, D] after the final norm, void at padding, and the state. Args as the causal model's."""
        self._check_ids(input_ids, 2, state, mask, cu_seqlens)
        if mask is not None and not mask.all():
            packed, cu_seqlens = pack(input_ids, mask)
            x, state = self._run(packed, state, cu_seqlens)
            return unpack(x, mask), state
        return self._run(input_ids, state, cu_seqlens)

    def without_state(
        self, input_ids: Tensor, *, cu_seqlens: Tensor | None = None, split: SequenceSplit | None = None
    ) -> Tensor:
        """Hidden states [B, T, D] where nobody continues, as in training: on a GPU the host is never waited for."""
        if split is None or split.length:  # a rank may have none of the tokens
            self._check_ids(input_ids, 2, None, None, cu_seqlens)
        if split is not None:
            check_split(split, None, cu_seqlens)
            check_mixers(self.layers)
            split.check_tokens("input_ids", input_ids)
        x = self.embed_tokens(input_ids)
        for layer in cast("list[DecoderLayer]", self.layers):
            x, _ = self._layer(layer, x, None, cu_seqlens, False, split)
        return self.norm(x)

    def _run(self, input_ids: Tensor, state: ModelState | None, cu_seqlens: Tensor | None) -> tuple[Tensor, ModelState]:
        if state is not None and cu_seqlens is None:
            whole = self._captured_prompt.run(self, input_ids, state.layers)
            if whole is not None:
                return whole[0], ModelState(whole[1], state.position + input_ids.shape[1])
        x = self.embed_tokens(input_ids)
        states = [None] * len(self.layers) if state is None else state.layers
        after = []
        for layer, layer_state in zip(cast("list[DecoderLayer]", self.layers), states):
            x, new = self._layer(layer, x, layer_state, cu_seqlens, True)
            after.append(new)
        B, T = input_ids.shape
        seen = torch.full((B,), T, device=x.device) if cu_seqlens is None else cu_seqlens.diff().long()
        position = seen if state is None else state.position + seen
        return self.norm(x), ModelState(tuple(after), position)

    def _layer(
        self,
        layer: DecoderLayer,
        x: Tensor,
        state,
        cu_seqlens: Tensor | None,
        keep_state: bool,
        split: SequenceSplit | None = None,
    ):
        given = (x, state, cu_seqlens, keep_state) if split is None else (x, state, cu_seqlens, keep_state, split)
        if self.gradient_checkpointing and torch.is_grad_enabled():
            x, state = checkpoint(layer, *given, use_reentrant=False, preserve_rng_state=False)
        else:
            x, state = layer(*given)
        if self.training and hasattr(layer, "block_sparse_moe"):
            layer.block_sparse_moe.record_load()  # here, and not in the layer: checkpointing runs that twice
        return x, state

    def step_(self, input_ids: Tensor, state: ModelState, mask: Tensor | None = None) -> tuple[Tensor, ModelState]:
        """One token a sequence, [B] -> hidden states [B, D]. See KimiLinearForCausalLM.step_."""
        self._check_ids(input_ids, 1, state, mask, None)
        x, layers = self.step_layers_(input_ids, state.layers, mask)
        position = state.position + (1 if mask is None else mask.long())
        return x, ModelState(layers, position)

    def step_layers_(self, input_ids: Tensor, layers: Sequence, mask: Tensor | None = None) -> tuple[Tensor, tuple]:
        """`step_` on the states of the layers alone, unchecked: what a CUDA graph can hold."""
        if mask is None and (whole := self._compiled_step.run(self, input_ids, layers)) is not None:
            return whole
        x = self.embed_tokens(input_ids)
        parts, after = x.new_zeros(len(x), 0, x.shape[1]), []
        for layer, layer_state in zip(cast("list[DecoderLayer]", self.layers), layers):
            x, parts, new = layer.step_(x, parts, layer_state, mask)
            after.append(new)
        return self.norm.after(x, parts)[1], tuple(after)

    def _check_ids(self, ids: Tensor, ndim: int, state: ModelState | None, mask, cu_seqlens) -> None:
        shape = "[B, T]" if ndim == 2 else "[B]"
        if ids.ndim != ndim or ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"input_ids is {ids.dtype} of shape {tuple(ids.shape)}; expected whole numbers {shape}")
        if not ids.numel():
            raise ValueError(f"input_ids has shape {tuple(ids.shape)}, no token at all; give at least one")
        check_tokens("input_ids", ids, self.config.vocab_size)
        check_rows(ids, mask, cu_seqlens)
        if cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens, ids.shape[0], ids.shape[1])
        rows = len(ids) if cu_seqlens is None else len(cu_seqlens) - 1
        if state is None:
            return
        if len(state.position) != rows:
            raise ValueError(
                f"state has {len(state.position)} sequences and input_ids {rows}; give one state a sequence"
            )
        if self._kinds_of_states is None:
            self._kinds_of_states = [type(layer) for layer in ModelState.empty(self.config, device="meta").layers]
        if [type(layer) for layer in state.layers] != self._kinds_of_states:
            raise ValueError(
                f"state is of another model: its layers are {', '.join(type(layer).__name__ for layer in state.layers)} "
                f"and the model's {', '.join(self.config.layer_types)}"
            )
        needs_grad = ndim == 1 and torch.is_grad_enabled()
        if needs_grad and any(x.requires_grad for x in (*self.parameters(), *state.tensors().values())):
            raise RuntimeError(  # before the first layer rewrites anything
                "step_ edits the state in place and has no gradient; call the model, or enter torch.no_grad()"
            )


class KimiLinearForCausalLM(nn.Module):
    """The language model.

    >>> model = KimiLinearForCausalLM(KimiLinearConfig.tiny())
    >>> logits, state, _ = model(torch.tensor([[72, 101, 108]]))
    >>> logits.shape
    torch.Size([1, 3, 257])
    >>> model(torch.tensor([[108, 111]]), state=state).state.position
    tensor([5])
    """

    def __init__(self, config: KimiLinearConfig):
        super().__init__()
        self.config = config
        self.model = KimiLinearModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.folder: Path | None = (
            None  # that it was loaded from, and that knows its tokenizer and how tokens are chosen
        )
        self.apply(self._initialise)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding) and not module.weight.is_meta:
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, Experts) and not module.w1.is_meta:
            module.reset_parameters(self.config.initializer_range)

    def compile_layers(self) -> None:
        """Have torch.compile fuse each layer of a training step: on a GPU 1.5 to 2 times as fast, after a first step of
        half a minute. Layers of one make share one compilation."""
        for layer in self.model.layers:
            layer.compile()

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its output projection; decay rates and router biases stay float32."""
        return self.lm_head.weight.dtype

    def forward(
        self,
        input_ids: Tensor,
        *,
        state: ModelState | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        labels: Tensor | None = None,
        last_only: bool = False,
        split: SequenceSplit | None = None,
    ) -> CausalOutput:
        """Logits for the token after each token.

        Args:
            input_ids: [B, T].
            state: what came before, from an earlier call; it is not changed.
            mask: [B, T], True for a token, False for padding, on any side. Logits at padding mean nothing.
            cu_seqlens: [N + 1], borders of N documents packed end to end in a batch of 1; the state then has N rows.
            labels: [B, T], the same tokens again (the shift happens here), -100 where nothing is to be learned. The output
                is then the loss; logits are never formed as a whole, and a state is kept only beside one given.
            last_only: logits of the last token of each sequence or document only, [B, 1, vocabulary] or
                [1, N, vocabulary].
            split: input_ids and labels are this rank's part of sequences that lie on several ranks, as `split.shard` gives;
                without state, mask, cu_seqlens and last_only. The loss is then this rank's share: the mean over the ranks,
                and that of the gradients, is what one rank would have found.

        Raises:
            ValueError: a shape, dtype or token that does not fit.
        """
        if labels is not None and (labels.shape != input_ids.shape or last_only):
            reason = "last_only leaves nothing to learn from" if last_only else f"shape {tuple(labels.shape)}"
            raise ValueError(
                f"labels: {reason}; give labels like input_ids {tuple(input_ids.shape)}, without last_only"
            )
        if labels is not None:
            check_tokens("labels", torch.where(labels == -100, 0, labels), self.config.vocab_size)
        after = None
        if split is not None:
            if state is not None or mask is not None or last_only:
                raise ValueError(
                    "split came with state, mask or last_only; a split sequence runs whole and from its start"
                )
            x = self.model.without_state(input_ids, cu_seqlens=cu_seqlens, split=split)
            if labels is not None:
                return CausalOutput(None, None, split_loss(x, self.lm_head.weight, labels, split))
        elif labels is None or state is not None or mask is not None:
            x, after = self.model(input_ids, state=state, mask=mask, cu_seqlens=cu_seqlens)
        else:
            x = self.model.without_state(input_ids, cu_seqlens=cu_seqlens)
        if labels is not None:
            return CausalOutput(None, after, next_token_loss(x, self.lm_head.weight, labels, mask, cu_seqlens))
        if last_only:
            x = _last(x, mask, cu_seqlens)
        return CausalOutput(self.lm_head(x), after, None)

    def step_(self, input_ids: Tensor, state: ModelState, mask: Tensor | None = None) -> tuple[Tensor, ModelState]:
        """One token a sequence, the cheap way: the state given is used up, its memories are rewritten in place.

        Args:
            input_ids: [B].
            state: must not be used afterwards; use the one returned, or copy it first.
            mask: [B], False leaves a sequence as it is; its logits mean nothing.

        Returns:
            logits [B, vocabulary] and the state after the token.

        >>> model = KimiLinearForCausalLM(KimiLinearConfig.tiny())
        >>> with torch.no_grad():
        ...     logits, state = model.step_(torch.tensor([72]), ModelState.empty(model.config))
        >>> logits.shape
        torch.Size([1, 257])
        """
        x, state = self.model.step_(input_ids, state, mask)
        return self.lm_head(x), state

    @classmethod
    def from_pretrained(
        cls,
        folder: str | PathLike,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        verify: bool = True,
    ) -> KimiLinearForCausalLM:
        """A model from a folder in the official layout; it is in evaluation mode.

        Args:
            folder: holds config.json and the weights; or a run's, whose newest checkpoint is taken.
            dtype: of the weights; as stored if None. Decay rates and biases and router biases stay float32.
            device: where to.
            verify: check each file against its own digest, where it has one.

        Raises:
            ValueError: something is missing, damaged, of another model, or does not fit the config.
        """
        folder = checkpoint_of(folder)
        config = read_config(folder)
        check_files(config, folder)
        try:
            with torch.device("meta"):
                model = cls(config)
        except (RuntimeError, OverflowError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"the config in {str(folder)!r} makes no model ({reason}); its sizes are too large"
            ) from error
        fill_(model, folder, dtype=dtype, device=device, verify=verify)
        model.folder = folder
        return model.eval()

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that came with the checkpoint.

        Raises:
            ValueError: the model was loaded from no folder, or its folder does not say.
        """
        from palimpsest.text import tokenizer_of

        if self.folder is None:
            raise ValueError(
                "this model was loaded from no folder; use palimpsest.text.load_tokenizer('bytes') or a file"
            )
        return tokenizer_of(self.folder)

    def generate(
        self,
        prompts: Prompts | DecodeState,
        *,
        max_new_tokens: int,
        tokenizer: Tokenizer | None = None,
        sampling: Sampling | None = None,
        **options: Any,
    ) -> Generation:
        """Continue each prompt, as `palimpsest.generate.generate` does.

        Args:
            prompts: a text or several, ids or several lists of them, or ids [B, T]; or a `DecodeState`.
            max_new_tokens: at most this many per sequence.
            tokenizer: by default the checkpoint's, where it was loaded from a folder that has one.
            sampling: by default as the checkpoint's generation_config.json says; greedy without one.
            options: as that function's: stop, seed, state, draft, history and the others.

        Raises:
            ValueError: an argument that does not fit, named in one sentence.

        >>> model = KimiLinearForCausalLM(KimiLinearConfig.tiny()).eval()
        >>> len(model.generate([72, 101], max_new_tokens=5, end_tokens=()).tokens[0])
        5
        """
        from palimpsest.generate import Sampling, generate
        from palimpsest.models.kimi_linear.generation_config import GREEDY, sampling_defaults

        if tokenizer is None and self.folder is not None:
            with suppress(ValueError, ImportError):  # ids need none
                tokenizer = self.tokenizer()
        if sampling is None:
            said: dict[str, Any] = dict(GREEDY) if self.folder is None else sampling_defaults(self.folder)
            sampling = Sampling(**said)
        return generate(self, prompts, max_new_tokens=max_new_tokens, tokenizer=tokenizer, sampling=sampling, **options)

    def save_pretrained(self, folder: str | PathLike, *, max_shard_bytes: int = 5 * 10**9) -> None:
        """Write the model to a folder in the official layout. See checkpoint.save."""
        save(self, folder, max_shard_bytes=max_shard_bytes)


def check_tokens(name: str, ids: Tensor, vocab_size: int) -> None:
    """Raise ValueError if a token is none of the vocabulary. Looks only on the CPU: on a GPU it would stop the stream."""
    if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
        low, high = ids.min().item(), ids.max().item()
        if low < 0 or high >= vocab_size:
            bad = low if low < 0 else high
            raise ValueError(f"{name} has token {bad}; the model's vocabulary is 0..{vocab_size - 1}")


def next_token_loss(
    hidden: Tensor, head: Tensor, labels: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Mean cross entropy, in nats, of each token given those before it; no document predicts the next one.

    Args:
        hidden: [B, T, D], after the final norm. head: [vocabulary, D]. The logits between them are formed in pieces.
        labels, mask, cu_seqlens: as the causal model's.

    Returns:
        A scalar, 0 if there is nothing to predict.
    """
    target = labels.clone()
    target[:, 0] = IGNORED
    if cu_seqlens is not None:
        first = torch.zeros(
            target.shape[1] + 1, dtype=torch.bool, device=target.device
        )  # one more: an empty last document
        first.index_fill_(0, cu_seqlens[:-1].long().to(target.device), True)
        target = target.masked_fill(first[:-1], IGNORED)
    if mask is not None:
        target = target.masked_fill(~mask | (mask.cumsum(1) == 1), IGNORED)
        hidden, target = hidden[mask][None], target[mask][None]
    target = F.pad(target[:, 1:], (0, 1), value=IGNORED).flatten()  # each position's own: the token after it
    total = cross_entropy_sum(hidden.flatten(0, 1), head, target)
    return total / (target != IGNORED).sum().clamp(min=1)


def split_loss(hidden: Tensor, head: Tensor, labels: Tensor, split: SequenceSplit) -> Tensor:
    """This rank's share of `next_token_loss` of a sequence that lies on several ranks: their mean is that of the whole.

    Args:
        hidden, labels: of this rank's tokens. head: as next_token_loss.
        split: who holds what.
    """
    target = split.next_tokens(labels, IGNORED)
    total = cross_entropy_sum(hidden.flatten(0, 1), head, target.flatten())
    count = split.sum_over_ranks((target != IGNORED).sum())
    return total * split.size / count.clamp(min=1)


def check_mixers(layers: nn.ModuleList) -> None:
    """Raise ValueError if a layer cannot run on a part of a sequence."""
    for index, layer in enumerate(layers):
        mixer: Any = layer.self_attn
        run = mixer.without_state if hasattr(mixer, "without_state") else mixer.forward
        inner = getattr(mixer, "remember", run)
        if any("split" not in inspect.signature(f).parameters for f in (run, inner)):  # pyright: ignore[reportArgumentType]
            raise ValueError(
                f"layer {index} is a {type(mixer).__name__}, which cannot run on a part of a sequence: its forward (or "
                "without_state, and a memory layer's remember) must take split=None, as that of the package's own layers does"
            )


def _last(x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    if cu_seqlens is not None:
        if (cu_seqlens.diff() == 0).any():
            raise ValueError("last_only asks for the last token of every document; cu_seqlens has an empty one")
        return x[:, cu_seqlens[1:].long() - 1]
    if mask is None:
        return x[:, -1:]
    if not mask.any(1).all():
        raise ValueError("last_only asks for the last token of every sequence; mask has a row without a token")
    at = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
    return x[torch.arange(len(x), device=x.device), at][:, None]
