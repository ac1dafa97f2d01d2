"""enable() and disable(): what is set on the classes of transformers, said in sentences, and undone to the last name.

Everything is looked up and checked before the first name is set, so a version that does not fit is left as it was.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from palimpsest.integrations.transformers.delta_forward import make_forward
from palimpsest.integrations.transformers.documents import documents, positions
from palimpsest.integrations.transformers.families import FAMILIES, Family
from palimpsest.ops import backends

OLDEST, NEWEST = (5, 17), (5, 24)  # of transformers: the versions that the tests have seen
RATES = ("A_log", "dt_bias")
CACHE_NAMES = ("cache", "past_key_values", "cache_params")


@dataclass(frozen=True)
class Enabled:
    """What enable() did.

    Attributes:
        version: of transformers.
        models: the native models that now run on our kernels.
        absent: those that this version of transformers does not have.
        sentences: everything that changed, one sentence each.
    """

    version: str
    models: tuple[str, ...]
    absent: tuple[str, ...]
    sentences: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(self.sentences)


class Patch(NamedTuple):
    """A name on a class or in a table, and what it becomes."""

    owner: Any
    name: str
    value: Any
    says: str = ""  # an empty one belongs to the patch before it
    model: str = "every model"


_UNDO: list[Callable[[], None]] = []
_ENABLED: Enabled | None = None


def enabled() -> Enabled | None:
    """What is enabled now; None if nothing is."""
    return _ENABLED


def enable(models: Iterable[str] | None = None, *, backend: str = "auto") -> Enabled:
    """Give the native delta-rule models of transformers our kernels, on CPU and GPU, and close the holes around them.

    Call it before a model is loaded: decay rates that were rounded to bf16 stay rounded. Models that exist already run on
    the kernels too, and warn when their rates are rounded. Calling it again replaces the first call.

    Args:
        models: names of `model_type`s; every one that this transformers has if None.
        backend: as for `palimpsest.kda`; a named one never falls back.

    Returns:
        What changed; print it.

    Raises:
        ImportError: transformers is not installed.
        ValueError: it is older than 5.17, its layers are not laid out as ours expect, a model is unknown or the backend
            is. Nothing is changed then.

    >>> print(enable(["kimi_linear"]))  # doctest: +ELLIPSIS
    transformers 5...: kimi_linear on palimpsest's kernels.
    ...
    >>> disable()
    """
    global _ENABLED
    version = _transformers_version()
    wanted = tuple(FAMILIES) if models is None else tuple(models)
    if unknown := [name for name in wanted if name not in FAMILIES]:
        raise ValueError(
            f"{', '.join(unknown)}: no such native model; those with a delta-rule memory are {', '.join(FAMILIES)}"
        )
    if backend != "auto" and backend not in backends.names():
        raise ValueError(f"backend {backend!r} is unknown; this machine has {', '.join(backends.names())}")
    disable()

    enabled, absent, patches = [], [], []
    for name in wanted:
        try:
            module = importlib.import_module(FAMILIES[name].module)
        except ModuleNotFoundError:
            absent.append(name)
            continue
        patches += _patches(FAMILIES[name], module, backend)
        enabled.append(name)
    if not enabled:
        raise ValueError(f"transformers {version} has none of {', '.join(wanted)}; install a newer one")
    if "kimi_linear" in enabled:
        patches += _kimi_linear_patches()
    patches += _cache_patches()

    done: dict[str, list[str]] = {}  # what was done -> the models it was done to
    for patch in patches:
        _apply(patch)
        if patch.says:
            done.setdefault(patch.says, []).append(patch.model)
    sentences = [f"transformers {version}: {', '.join(enabled)} on palimpsest's kernels."]
    sentences += [f"{', '.join(names)}: {says}." for says, names in done.items()]
    if absent:
        sentences.append(f"Not in transformers {version}: {', '.join(absent)}.")
    _ENABLED = Enabled(version, tuple(enabled), tuple(absent), tuple(sentences))
    return _ENABLED


def disable() -> None:
    """Give transformers back everything that enable() replaced. Nothing happens if nothing is enabled."""
    global _ENABLED
    while _UNDO:
        _UNDO.pop()()
    _ENABLED = None


def _apply(patch: Patch) -> None:
    owner, name = patch.owner, patch.name
    if isinstance(owner, dict):
        before = owner[name]
        _UNDO.append(lambda: owner.__setitem__(name, before))
        owner[name] = patch.value
        return
    if name in vars(owner):
        before = vars(owner)[name]
        _UNDO.append(lambda: setattr(owner, name, before))
    else:
        _UNDO.append(lambda: delattr(owner, name))
    setattr(owner, name, patch.value)


def _transformers_version() -> str:
    try:
        import transformers
    except ImportError:
        raise ImportError("transformers is not installed; pip install 'transformers>=5.17'") from None
    release = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if release < OLDEST:
        raise ValueError(
            f"transformers {transformers.__version__} has no native kimi_linear that this knows; "
            f"install 5.17 or newer: pip install 'transformers>=5.17'"
        )
    if release > NEWEST:
        warnings.warn(
            f"transformers {transformers.__version__} is newer than the newest that was tried here, "
            f"{NEWEST[0]}.{NEWEST[1]}; its layers look as expected, or this would refuse; compare a first loss with disable()",
            stacklevel=3,
        )
    return transformers.__version__


def _patches(family: Family, module, backend: str) -> list[Patch]:
    missing = [name for name in (family.layer, family.model, family.pretrained) if not hasattr(module, name)]
    if missing:
        raise _unfit(family, f"has no {', '.join(missing)}")
    layer, model, pretrained = (getattr(module, name) for name in (family.layer, family.model, family.pretrained))
    accepted = set(inspect.signature(layer.forward).parameters)
    if not {"hidden_states", "attention_mask"} <= accepted or not accepted & set(CACHE_NAMES):
        raise _unfit(family, f"calls {family.layer} with {', '.join(sorted(accepted - {'self'}))}")

    name, kept = family.model_type, pretrained._keep_in_fp32_modules_strict or ()
    hooked = _with_conv_hooks(make_forward(family, backend))
    apart = (
        "packed documents (position_ids that start again, or cu_seq_lens_q) are kept apart"
        if family.apart
        else "packed documents are refused, since the indexed attention beside the memory would mix them"
    )
    rates = f"decay rates ({', '.join(RATES)}) are loaded in float32 whatever the dtype of the model"
    latent = [Patch(module, "ALL_ATTENTION_FUNCTIONS", _EvenHeads(module.ALL_ATTENTION_FUNCTIONS), EVEN, name)]
    return [
        *(latent if hasattr(module, "ALL_ATTENTION_FUNCTIONS") and family.latent else []),
        Patch(layer, "forward", hooked, "padding on any side leaves no trace in the memory", name),
        Patch(model, "forward", _hears_documents(family, model.forward), apart, name),
        Patch(pretrained, "_keep_in_fp32_modules_strict", [*kept, *(r for r in RATES if r not in kept)], rates, name),
    ]


EVEN = "latent attention on a CPU runs in the flash kernel, which wants values as wide as keys"


class _EvenHeads:
    """The table of attention functions, but that sdpa on a CPU sees values widened with zeros to the width of the keys."""

    def __init__(self, table: Any):
        self._table = table

    def __getattr__(self, name: str) -> Any:
        return getattr(self._table, name)

    def __getitem__(self, name: str) -> Any:
        return self._table[name]

    def get_interface(self, name: str, default: Any) -> Any:
        run = self._table.get_interface(name, default)
        if name != "sdpa":
            return run

        def even(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            V, wider = value.shape[-1], query.shape[-1] - value.shape[-1]
            if wider <= 0 or value.device.type != "cpu":
                return run(module, query, key, value, *args, **kwargs)
            output, weights = run(module, query, key, F.pad(value, (0, wider)), *args, **kwargs)
            return output[..., :V], weights

        return even


def _unfit(family: Family, reason: str) -> ValueError:
    import transformers

    return ValueError(
        f"transformers {transformers.__version__} {reason}, which this version of palimpsest does not know in "
        f"{family.model_type}; nothing was changed. Install transformers 5.17 to {NEWEST[0]}.{NEWEST[1]}, or a newer palimpsest"
    )


def _with_conv_hooks(forward):
    """The convolution's weight is read without calling it, so accelerate's hooks (offloading) are fired by hand."""
    from transformers.integrations.accelerate import force_accelerate_hooks

    return force_accelerate_hooks("conv1d")(forward)


def _hears_documents(family: Family, original):
    signature = inspect.signature(original)
    cache_name = next(name for name in CACHE_NAMES if name in signature.parameters)

    @functools.wraps(original)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(signature.bind_partial(self, *args, **kwargs).arguments)
        given.pop("self")
        given.update(given.pop("kwargs", {}))
        for alias in CACHE_NAMES:  # a caller of the older name
            if alias != cache_name and alias in given:
                given[cache_name] = given.pop(alias)
        _mark_documents(family, given, cache_name)
        result = original(self, **given)
        _count(result, given, cache_name)
        return result

    return forward


def _mark_documents(family: Family, given: dict[str, Any], cache_name: str) -> None:
    """Turn what a collator says about documents into cu_seq_lens_q and position_ids, for memory and attention alike."""
    ids = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
    mask, position_ids, said = (given.get(name) for name in ("attention_mask", "position_ids", "cu_seq_lens_q"))
    if ids is None or ids.shape[1] == 1 or torch.compiler.is_compiling():
        return
    if mask is not None and (isinstance(mask, dict) or mask.ndim != 2 or not bool((mask == 1).all())):
        if said is not None:
            raise ValueError(
                "cu_seq_lens_q came with an attention_mask that hides tokens; a packed row has no padding: give one"
            )
        return
    text = position_ids
    if text is not None and text.ndim == 3:  # with places of pictures beside it
        text = text[0] if len(text) in (1, 4) else None
    borders = documents(tuple(ids.shape[:2]), text, said)
    if borders is None:
        return
    if not family.apart:
        raise ValueError(
            f"packed documents came to {family.model_type}, whose indexed attention would mix them; give one document a row"
        )
    if given.get(cache_name) is not None or given.get("use_cache"):
        raise ValueError("packed documents came with a cache, which continues one document; pass use_cache=False")
    given.update(use_cache=False, cu_seq_lens_q=borders, attention_mask=None)  # a mask of ones says nothing more
    if text is None:
        given["position_ids"] = positions(borders)


def _count(result: Any, given: dict[str, Any], cache_name: str) -> None:
    """Tell a cache how many tokens it has seen: one of memory layers alone has nobody else to ask."""
    cache = getattr(result, cache_name, None)
    ids = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
    if cache is not None and ids is not None:
        cache._palimpsest_tokens = getattr(cache, "_palimpsest_tokens", 0) + ids.shape[1]


def _cache_patches() -> list[Patch]:
    from transformers.cache_utils import Cache, CacheLayerMixin

    original_length, original_sizes, original_reset = Cache.get_seq_length, Cache.get_mask_sizes, Cache.reset
    alone = lambda cache: cache.layers and not any(isinstance(layer, CacheLayerMixin) for layer in cache.layers)

    @functools.wraps(original_length)
    def get_seq_length(self, layer_idx: int = 0, *args: Any, **kwargs: Any) -> int:
        return (
            getattr(self, "_palimpsest_tokens", 0) if alone(self) else original_length(self, layer_idx, *args, **kwargs)
        )

    @functools.wraps(original_sizes)
    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        if alone(self):  # of a mask that nobody will read
            return getattr(self, "_palimpsest_tokens", 0) + query_length, 0
        return original_sizes(self, query_length, layer_idx)

    @functools.wraps(original_reset)
    def reset(self) -> None:
        self._palimpsest_tokens = 0
        original_reset(self)

    says = "a cache of memory layers alone knows its length, so models without attention run and generate"
    names = (get_seq_length, get_mask_sizes, reset)
    return [Patch(Cache, f.__name__, f, says if f is get_seq_length else "") for f in names]


def _kimi_linear_patches() -> list[Patch]:
    from transformers import conversion_mapping
    from transformers.models.kimi_linear.configuration_kimi_linear import KimiLinearConfig

    patches = []
    mapping = conversion_mapping.get_checkpoint_conversion_mapping("kimi_linear") or []
    wide = [i for i, rule in enumerate(mapping) if any("block_sparse_moe" in p for p in _sources(rule))]
    if len(wide) == 1:
        renaming = type(mapping[wide[0]])
        narrow = [
            renaming(source_patterns=rf"\.block_sparse_moe\.{part}", target_patterns=rf"\.mlp\.{part}")
            for part in (r"gate\.", r"experts\.", r"shared_experts\.")
        ]
        fixed = [*mapping[: wide[0]], *narrow, *mapping[wide[0] + 1 :]]
        table = conversion_mapping._checkpoint_conversion_mapping_cache
        assert table is not None  # built by the call above
        says = "save_pretrained writes the dense layer under its official name"
        patches.append(Patch(table, "kimi_linear", fixed, says, "kimi_linear"))

    original = KimiLinearConfig.__post_init__

    @functools.wraps(original)
    def __post_init__(self, **kwargs: Any) -> None:  # noqa: N807
        unsaid = self.layer_types is None and "full_attn_layers" not in (kwargs.get("linear_attn_config") or {})
        original(self, **kwargs)
        if unsaid:
            last = self.num_hidden_layers - 1
            self.layer_types = [
                "full_attention" if i % 4 == 3 or i == last else "linear_attention"
                for i in range(self.num_hidden_layers)
            ]

    says = "a configuration without layer types gets the released pattern, attention in layers 4, 8, ... and the last"
    patches.append(Patch(KimiLinearConfig, "__post_init__", __post_init__, says, "kimi_linear"))
    return patches


def _sources(rule) -> list[str]:
    patterns = rule.source_patterns
    return [patterns] if isinstance(patterns, str) else list(patterns)
