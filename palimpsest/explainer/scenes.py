"""What the page shows, computed: each function returns one scene, plain values and tensors.

The memory is traced in float64 by the law itself; a model's gates come from the model in its own type. A scene says
everything with which the page can be checked: inputs, every beat, and what other forms of the same law gave.

T tokens, K key channels, V value channels, C tokens of a chunk.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from palimpsest.checks import shown as shown_in_words
from palimpsest.layers.kimi_delta_attention import RecurrenceInputs
from palimpsest.layers.latent_attention import MultiHeadLatentAttention
from palimpsest.models.kimi_linear.config import KimiLinearConfig
from palimpsest.models.kimi_linear.model import CausalOutput, KimiLinearForCausalLM
from palimpsest.models.kimi_linear.model_state import ModelState
from palimpsest.models.kimi_linear.watched_layers import delta_rule_layers
from palimpsest.ops import chunked, reference, variants
from palimpsest.ops.trace import trace_memory
from palimpsest.text import ByteTokenizer, Tokenizer, tokenizer_of

SHIPPED = Path(__file__).parent / "model"
MAX_TOKENS = 256
SAMPLE = "The door is red. Now the door is blue."  # on which a head's telling is judged
MAX_BYTES = 32 << 20  # of a traced scene
CHUNK_SIZES = (4, 8, 16)
STORIES = json.loads((Path(__file__).parent / "stories.json").read_text(encoding="utf-8"))  # of figures 2 and 3

Scene = dict[str, Any]


# The whiteboard ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Worked:
    """An example small enough to check by hand. One row a token; the memory before the first is `start`.

    Attributes:
        title, about: what the page calls it and says of it.
        tokens: their words.
        start: the memory before the first, [K, V].
        k, v, alpha, beta: of each token.
        q: what each token asks; with its own key, if None.
        rows, columns: names of the memory's rows and columns, where they mean something.
        asked: the row whose key is asked after every token, beside what the tokens ask themselves; "" for none.
    """

    title: str
    about: str
    tokens: tuple[str, ...]
    start: list[list[float]]
    k: list[list[float]]
    v: list[list[float]]
    alpha: list[list[float]]
    beta: list[float]
    q: list[list[float]] | None = None
    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    asked: str = ""


def _told(text: str, rows: tuple[str, ...], columns: tuple[str, ...], keep: float) -> dict[str, Any]:
    """A story word by word, as a board with named rows and columns takes it.

    A colour is written under the thing named last, with strength 1; a thing followed by a question mark is asked for; every
    other word writes nothing. All rows keep the same share of themselves at each word.
    """
    words, thing = tuple(text.split()), ""
    unit = lambda names, name: [float(x == name) for x in names]
    k, v, beta, q = [], [], [], []
    for word in words:
        bare = word.strip(".?").lower()
        thing = bare if bare in rows else thing
        k.append(unit(rows, thing))
        v.append(unit(columns, bare))
        beta.append(float(bare in columns))
        q.append(unit(rows, thing if word.endswith("?") else ""))
    start = [[0.0] * len(columns)] * len(rows)
    return {"tokens": words, "start": start, "k": k, "v": v, "beta": beta, "q": q, "alpha": [[keep] * len(rows)] * len(words)} | {
        "rows": rows, "columns": columns
    }  # fmt: skip


WORKED = {
    "walk": Worked(
        title="Fade, erase, write",
        about="One token meets a memory of two rows. Row 1 fades not at all, row 2 by half; the key points at row 2.",
        tokens=("the token",),
        start=[[10.0, 10.0], [2.0, 2.0]],
        k=[[0.0, 1.0]],
        v=[[5.0, 5.0]],
        alpha=[[1.0, 0.5]],
        beta=[1.0],
    ),
    "row": Worked(
        title="One key, one row",
        about="An empty memory of three rows. The key is [0, 1, 0], so the value lands in row 2 and nowhere else.",
        tokens=("the token",),
        start=[[0.0] * 3] * 3,
        k=[[0.0, 1.0, 0.0]],
        v=[[5.0, 5.0, 5.0]],
        alpha=[[1.0] * 3],
        beta=[1.0],
    ),
    "twice": Worked(
        title="The same key twice",
        about="Two facts, then a new value under the first key: the old value is wiped before the new one is written.",
        tokens=("door = 4", "lamp = 2", "door = −3"),
        start=[[0.0] * 3] * 3,
        k=[[1.0, 0.0, 0.0], [0.0, 0.6, 0.8], [1.0, 0.0, 0.0]],
        v=[[4.0, 4.0, 0.0], [2.0, 0.0, 2.0], [-3.0, 0.0, -3.0]],
        alpha=[[1.0, 1.0, 1.0], [0.9, 1.0, 1.0], [0.9, 1.0, 1.0]],
        beta=[1.0, 1.0, 1.0],
    ),
    "door": Worked(
        title="A story, word by word",
        about="The rows are things, the columns colours. A colour is written under the thing named last; other words only "
        "let the board fade, by two in a hundred. Under each word: what the board would answer, were it asked for the door.",
        **_told(
            "The door is red. The lamp is green. Now the door is blue. What colour is the door?",
            rows=("door", "lamp"),
            columns=("red", "green", "blue"),
            keep=0.98,
        ),
        asked="door",
    ),
}


def worked(name: str) -> Scene:
    """A worked example, traced. q is not scaled."""
    example = _one_of("example", name, WORKED)
    k, v, alpha, beta, start = (_row(x) for x in (example.k, example.v, example.alpha, example.beta, example.start))
    q = k if example.q is None else _row(example.q)
    tokens = [{"text": token} for token in example.tokens]
    scene = {"title": example.title, "about": example.about} | _traced(tokens, q, k, v, alpha.log(), beta, start)
    if example.rows:
        scene |= {"rows": example.rows, "columns": example.columns}
    if example.asked:
        scene["asked"] = example.rows.index(example.asked)
    return scene


def sentence(model: Watched, text: str, layer: int, head: int) -> Scene:
    """One head of one layer of the model, traced over the tokens of text."""
    tokens, ids = model.tokens(text)
    inputs = model.head(ids, layer, head)
    K, V = inputs.k.shape[-1], inputs.v.shape[-1]
    size = len(ids) * (K * V * 3 + 4 * (K + V)) * 4
    if size > MAX_BYTES:
        most = MAX_BYTES * len(ids) // size
        raise ValueError(
            f"The sentence has {len(ids)} tokens; with memories of {K} x {V} up to {most} fit. Shorten it."
        )
    q = inputs.q * K**-0.5
    scene = _traced(tokens, q, inputs.k, inputs.v, inputs.log_decay, inputs.beta, inputs.k.new_zeros(K, V))
    return scene | {"layer": layer, "head": head, "next": model.guesses(ids)}


def heads(model: Watched, text: str) -> Scene:
    """What every head that can be watched holds after the last token: memories [layers, heads, K, V]."""
    _, ids = model.tokens(text)
    memories = []
    for q, k, v, log_decay, beta in model.all_inputs(ids):
        memories.append(variants.kda(q, k, v, log_decay, beta, backend="chunked").state[0])
    return {"layers": model.watchable(), "memories": torch.stack(memories).float()}


def inside(model: Watched, text: str, layer: int, head: int, asker: int) -> Scene:
    """What a head's answers are made of, how much of every token is left, and how long its channels keep.

    The memory is linear in what is written. So with a value of its own for each token, a row of the identity, the board
    says how much of each token's value it holds:

        o_t = sum_s reads[t, s] v_s,        left[t, s] = |what S_t holds of v_s|

    Args:
        model, text, layer, head: as for `sentence`.
        asker: the token, from 0, whose query is asked after every token.

    Returns:
        tokens: what the page writes on each.
        reads: [T, T], of token s in what token t reads.
        asked: [T, T], of token s in what `asker` would read after token t.
        left: [T, T], of token s after token t; beta_s, where it has just been written.
        half_life: [K], tokens after which half of a channel is left, by its mean decay over the text; capped at 1e9.
        eigenvalues: [T, K], of (I - beta k k^T) Diag(alpha), ascending: real, since it is similar to a symmetric matrix.
    """
    tokens, ids = model.tokens(text)
    T = len(ids)
    if not 0 <= asker < T:
        raise ValueError(f"Token {asker + 1} was asked for and there are {T}.")
    q, k, _, log_decay, beta = model.head(ids, layer, head)
    K = k.shape[-1]
    erase, own, q = beta[:, None] * k, torch.diag(beta), q * K**-0.5
    at = lambda x, t: x[None, t : t + 1, None]
    state, reads, asked, left = k.new_zeros(1, 1, K, T), [], [], []
    for t in range(T):
        rows = (at(q, t), at(k, t), at(erase, t), at(own, t), at(log_decay, t))
        read, state = reference.delta_memory(*rows, state)
        reads.append(read[0, 0, 0])
        asked.append(q[asker] @ state[0, 0])
        left.append(state[0, 0].norm(dim=0))
    root = (0.5 * log_decay).exp()
    alike = torch.diag_embed(root * root) - beta[:, None, None] * (root * k)[:, :, None] * (root * k)[:, None, :]
    half_life = (math.log(2) / -log_decay.mean(0).clamp(max=-1e-12)).clamp(max=1e9)
    return {
        "tokens": tokens,
        **{"reads": torch.stack(reads), "asked": torch.stack(asked), "left": torch.stack(left)},
        **{"half_life": half_life, "eigenvalues": torch.linalg.eigvalsh(alike)},
    }


def _traced(
    tokens: list[dict], q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, start: Tensor
) -> Scene:
    """Trace rows [T, *]; beta is [T]. Memories go out in float32, which is finer than the page can show."""
    one = lambda x: x[None, :, None]
    erase, write = beta[:, None] * k, beta[:, None] * v
    beats = trace_memory(one(q), one(k), one(erase), one(write), one(log_decay), start[None, None])
    decayed, erased, written, read, held = (beat[0, :, 0] for beat in beats)
    before = torch.cat((start[None], written[:-1]))
    return {
        "tokens": tokens,
        **{"start": start, "q": q, "k": k, "v": v, "alpha": log_decay.exp(), "beta": beta},
        **{"decayed": decayed.float(), "erased": erased.float(), "written": written.float()},
        **{"read": read, "held": held},
        "norms": torch.stack([_norm(x) for x in (before, decayed, erased, written)], -1),
        "final": written[-1],
    }


# Change one thing ----------------------------------------------------------------------------------------------------


def touch(
    alpha: tuple[float, float], beta: float, angle: float, value: tuple[float, float], times: int, eraser: bool
) -> Scene:
    """Write one fact, `times` times, over a memory of two rows that holds an old one.

    Args:
        alpha: what each of the two channels keeps at each token, 0 to 1.
        beta: strength, 0 to 2.
        angle: of the new key, degrees; the old key is at 90.
        value: two numbers, each -2 to 2.
        times: tokens, 1 to 24.
        eraser: False writes without erasing.
    """
    for name, number in (("alpha 1", alpha[0]), ("alpha 2", alpha[1])):
        _within(name, number, 0, 1)
    for name, number, low, high in (("beta", beta, 0, 2), ("angle", angle, -360, 360), ("times", times, 1, 24)):
        _within(name, number, low, high)
    for number in value:
        _within("value", number, -2, 2)
    turn = math.radians(angle)
    k = _row([[math.cos(turn), math.sin(turn)]] * times)
    v, log_decay, betas = _row([value] * times), _row([alpha] * times).log(), _row([beta] * times)
    old_key, old_value = (_row(STORIES["old"][name]) for name in ("key", "value"))
    start = torch.outer(old_key, old_value)
    one = lambda x: x[None, :, None]
    erase = betas[:, None] * k if eraser else torch.zeros_like(k)
    beats = trace_memory(one(k), one(k), one(erase), one(betas[:, None] * v), one(log_decay), start[None, None])
    decayed, erased, written, _, _ = (beat[0, :, 0] for beat in beats)
    history = torch.cat((start[None], written))
    return {
        **{"start": start, "decayed": decayed, "erased": erased, "written": written, "key": k[0], "value": v[0]},
        **{"old_key": old_key, "old_value": old_value},
        "old_answers": history.mT @ old_key,  # [times + 1, 2]
        "new_answers": history.mT @ k[0],
    }


# The family side by side ---------------------------------------------------------------------------------------------


def family(story: str, beta: float, keep: tuple[float, float], positions: bool = False) -> Scene:
    """The same tokens through every member: its memory after each, and its answer if asked then.

    Args:
        story: one of the stories in stories.json.
        beta: 0 to 2, of the members that erase.
        keep: what the door's channel and the other three keep at each token, 0 to 1. One decay a head is their
            geometric mean over the four channels.
        positions: gives softmax what it lacks here, a sense of what came last: scores fall with distance.
    """
    told = _one_of("story", story, STORIES["stories"])
    facts, keys, possible = told["facts"], STORIES["keys"], STORIES["answers"]
    _within("beta", beta, 0, 2)
    for number in keep:
        _within("keep", number, 0.01, 1)
    T = len(facts)
    k = _row([keys[fact["key"]] for fact in facts])[None, :, None]
    v = _row([[float(fact["value"] == answer) for answer in possible] for fact in facts])[None, :, None]
    q = _row([keys[told["asked"]]] * T)[None, :, None]
    log_decay = _row([keep[0], keep[1], keep[1], keep[1]]).log().expand(1, T, 1, 4)
    by_head, betas = log_decay.mean(-1), torch.full((1, T, 1), beta, dtype=torch.float64)
    identity = lambda x: x
    plain = {"scale": 1.0, "backend": "reference"}
    gated = lambda run, *gates: lambda t, S: run(q[:, t], k[:, t], v[:, t], *(g[:, t] for g in gates), state=S, **plain)
    linear = lambda t, S: variants.linear_attention(
        q[:, t], k[:, t], v[:, t], feature_map=identity, normalise=False, state=S, **plain
    )
    runs = {
        "linear_attention": linear,
        "delta_rule": gated(variants.delta_rule, betas),
        "gated_linear_attention": gated(variants.gated_linear_attention, log_decay),
        "gated_delta": gated(variants.gated_delta, by_head, betas),
        "kda": gated(variants.kda, log_decay, betas),
    }
    members: Scene = {"softmax_lookup": _scroll(q, k, v, positions)}
    for name, run in runs.items():
        state, memories, answers = None, [], []
        for t in range(T):
            answer, state = run(slice(t, t + 1), state)
            memories.append(state[0, 0])
            answers.append(answer[0, 0, 0])
        members[name] = {"memory": torch.stack(memories), "answer": torch.stack(answers)}
    return {
        **{"title": told["title"], "asked": told["asked"], "answers": possible, "facts": facts},
        "head_decay": by_head[0, 0, 0].exp().item(),
        **{"keys": k[0, :, 0], "members": members},
    }


def _scroll(q: Tensor, k: Tensor, v: Tensor, positions: bool) -> Scene:
    answer, _ = variants.softmax_lookup(q, k, v, scale=STORIES["sharpness"], backend="reference")
    scores = STORIES["sharpness"] * q[0, :, 0] @ k[0, :, 0].T
    if positions:
        place = torch.arange(len(scores))
        scores = scores - STORIES["recency"] * (place[:, None] - place)
        unseen = torch.ones_like(scores).triu(1).bool()
        weights = scores.masked_fill(unseen, -torch.inf).softmax(-1)
        return {"answer": weights @ v[0, :, 0], "weights": weights}
    unseen = torch.ones_like(scores).triu(1).bool()
    return {"answer": answer[0, :, 0], "weights": scores.masked_fill(unseen, -torch.inf).softmax(-1)}


# The model's own answer ----------------------------------------------------------------------------------------------

MAX_ANSWER = 40  # tokens


def answers(model: Watched, text: str) -> Scene:
    """What the model says next, token by token; and, if the text ends in a question, what it would have said to it earlier.

    Args:
        text: such as "The door is red. Now the door is blue. What colour is the door?".

    Returns:
        question: the last sentence, if it asks; else "".
        said: the continuation of the whole text, tokens with their chances.
        earlier: for each sentence before the question, the answer after it: the state there, forked, reads the question.
    """
    _, ids = model.tokens(text)
    sentences = re.findall(r"[^.?!]+[.?!]*", text.strip())
    question = sentences[-1].strip() if len(sentences) > 1 and sentences[-1].endswith("?") else ""
    earlier, state = [], None
    for i, sentence in enumerate(sentences[:-1] if question else []):
        state = model.read(sentence if i else sentence.lstrip(), state)
        said = model.continued(model.read(f" {question}", state))
        earlier.append(
            {
                "sentence": sentence.strip(),
                "answer": "".join(token["text"] for token in said).replace("␣", " ").strip(),
                "chance": min(token["chance"] for token in said),
            }
        )
    return {"question": question, "said": model.continued(model.read(text, None)), "earlier": earlier}


# Chunks --------------------------------------------------------------------------------------------------------------


def chunk(tokens: list[dict], inputs: RecurrenceInputs, start: int, size: int) -> Scene:
    """Tokens start .. start + size in matrix products, beside the same tokens one by one.

    Args:
        tokens, inputs: of one head, rows [T, *].
        start: the first token of the chunk.
        size: one of CHUNK_SIZES.
    """
    if size not in CHUNK_SIZES:
        raise ValueError(f"The chunk has {size} tokens; choose {', '.join(map(str, CHUNK_SIZES))}.")
    if not 0 <= start <= len(tokens) - size:
        raise ValueError(f"Tokens {start + 1} to {start + size} were asked for and there are {len(tokens)}.")
    beta = inputs.beta[:, None]
    rows = (inputs.q * inputs.q.shape[-1] ** -0.5, inputs.k, beta * inputs.k, beta * inputs.v, inputs.log_decay)
    part = lambda first, last: tuple(x[None, first:last, None] for x in rows)
    q, k, erase, write, log_decay = part(0, start)
    empty = inputs.k.new_zeros(1, 1, inputs.k.shape[-1], inputs.v.shape[-1])
    _, S = reference.delta_memory(q, k, erase, write, log_decay, empty)
    q, k, erase, write, log_decay = part(start, start + size)
    by_token, S_by_token = reference.delta_memory(q, k, erase, write, log_decay, S)
    by_chunk, S_by_chunk = chunked.delta_memory(q, k, erase, write, log_decay, S)
    A, M, W, U, P, q, k, decay = (x[0, 0, 0] for x in chunked.products(q, k, erase, write, log_decay))
    S, S_by_token, S_by_chunk = S[0, 0], S_by_token[0, 0], S_by_chunk[0, 0]
    fresh = U - W @ S
    inter, intra = q @ S, P @ fresh
    after = decay[:, None] * S + k.T @ fresh
    by_token = by_token[0, :, 0]
    return {
        "tokens": tokens[start : start + size],
        **{"start": start, "size": size, "memory": S, "A": A, "M": M, "W": W, "U": U, "P": P, "fresh": fresh},
        **{"inter": inter, "intra": intra, "output": inter + intra, "by_token": by_token, "after": after},
        "identity_error": _largest(M @ (torch.eye(size, dtype=A.dtype) + A) - torch.eye(size, dtype=A.dtype)),
        "output_difference": _largest(inter + intra - by_token),
        "memory_difference": _largest(after - S_by_token),
        "library_difference": max(_largest(by_chunk[0, :, 0] - by_token), _largest(S_by_chunk - S_by_token)),
    }


def chunk_of_sentence(model: Watched, text: str, layer: int, head: int, start: int, size: int) -> Scene:
    tokens, ids = model.tokens(text)
    return chunk(tokens, model.head(ids, layer, head), start, size)


# The hybrid ----------------------------------------------------------------------------------------------------------


def hybrid() -> Scene:
    """What the released 48B model and its two pure cousins hold for one sequence, in bytes, by the library's account."""
    config = KimiLinearConfig.official_48b()
    layers = config.num_hidden_layers
    accounts = {
        name: ModelState.empty(config.replace(layer_types=types), device="meta", dtype=torch.bfloat16).account()
        for name, types in {
            "hybrid": config.layer_types,
            "latent": ("mla",) * layers,
            "memory": ("kda",) * layers,
        }.items()
    }
    return {
        "layer_types": list(config.layer_types),
        "heads": config.linear_num_heads,
        "head_dim": config.linear_head_dim,
        "latent_width": config.kv_lora_rank + config.qk_rope_head_dim,
        "longest": config.model_max_length,
        "layers": [{"kind": a.kind, "fixed": a.total, "per_token": a.bytes_per_token} for a in accounts["hybrid"]],
        "models": {
            name: {"fixed": sum(a.total for a in rows), "per_token": sum(a.bytes_per_token for a in rows)}
            for name, rows in accounts.items()
        },
    }


def order(model: Watched, text: str) -> Scene:
    """What each kind of layer notices when two earlier tokens change places.

    The layers are taken alone, on the tokens' embeddings, and read at the last token: how far their output moves,
    relative to its size. A latent layer without positions sees a set, so it cannot move beyond rounding.
    """
    tokens, ids = model.tokens(text)
    latent = next((i for i, m in enumerate(model.mixers()) if isinstance(m, MultiHeadLatentAttention)), None)
    if len(ids) < 8:
        raise ValueError(f"The sentence has {len(ids)} tokens; to exchange two of them it needs at least 8.")
    second = len(ids) - 6  # beyond the short convolution of the last token
    first = next((i for i in range(len(ids) // 2 - 1, -1, -1) if ids[i] != ids[second]), 0)
    swapped = list(ids)
    swapped[first], swapped[second] = swapped[second], swapped[first]
    moved = lambda layer: model.last_output_moves(layer, ids, tuple(swapped))
    return {
        "tokens": tokens,
        "exchanged": [first, second],
        "memory": moved(model.watchable()[0]),
        "latent": None if latent is None else moved(latent),
    }


SCENES = {  # by the names that the page asks for
    **{"worked": worked, "sentence": sentence, "heads": heads, "touch": touch, "family": family},
    **{"chunk": chunk_of_sentence, "hybrid": hybrid, "order": order, "answers": answers, "inside": inside},
}


# A model to watch ----------------------------------------------------------------------------------------------------


class Watched:
    """A model whose memories can be watched.

    Args:
        folder: a checkpoint in the official layout; its tokenizer.json if it has one, or bytes.

    Raises:
        ValueError: not a checkpoint of this model, or a model without a layer of the delta rule.
    """

    def __init__(self, folder: str | Path = SHIPPED):
        folder = Path(folder)
        self.name = "" if folder == SHIPPED else folder.resolve().name
        self.model = KimiLinearForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        said = any((folder / name).is_file() for name in ("palimpsest.json", "tokenizer.json"))
        self.tokenizer: Tokenizer = tokenizer_of(folder) if said else ByteTokenizer()
        if self.tokenizer.vocab_size > self.model.config.vocab_size:
            raise ValueError(
                f"The model in {str(folder)!r} knows {self.model.config.vocab_size} tokens and its tokenizer, "
                f"{self.tokenizer.name}, has {self.tokenizer.vocab_size}; put the model's own tokenizer.json beside it."
            )
        if not self.watchable():
            raise ValueError(
                f"The model in {str(folder)!r} has no layer of the delta rule, so nothing here can be watched."
            )
        self._run = lru_cache(maxsize=16)(self._run_once)

    def mixers(self) -> list[torch.nn.Module]:
        return [layer.self_attn for layer in self.model.model.layers]  # type: ignore[union-attr]

    def watchable(self) -> list[int]:
        """Layers, from 0, that erase and write with a beta."""
        return list(delta_rule_layers(self.model))

    def describe(self) -> Scene:
        config = self.model.config
        return {
            "name": self.name,
            "layer_types": list(config.layer_types),
            "watchable": self.watchable(),
            "heads": config.linear_num_heads,
            "head_dim": config.linear_head_dim,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "tokenizer": self.tokenizer.name if self.tokenizer.name == "bytes" else "tokenizer.json",
            "max_tokens": MAX_TOKENS,
            "telling": self.telling(),
        }

    def telling(self) -> list[int]:
        """The layer and head whose tokens erase each other most evenly, so that every part of figure 4 can be seen."""
        _, ids = self.tokens(SAMPLE)
        best, evenest = -1.0, [self.watchable()[0], 0]
        for layer in self.watchable():
            for head in range(self.model.config.linear_num_heads):
                inputs = self.head(ids, layer, head)
                _, k, v, log_decay, beta = (x[None, :8, None] for x in inputs)
                erase = beta[..., None] * k
                A = chunked.products(k, k, erase, beta[..., None] * v, log_decay).A[0, 0, 0]
                even = A.abs()[torch.ones_like(A).tril(-1).bool()].clamp(max=0.5).quantile(0.6).item()
                if even > best:
                    best, evenest = even, [layer, head]
        return evenest

    def tokens(self, text: str) -> tuple[list[dict], tuple[int, ...]]:
        """What the page writes on each token, and the ids."""
        if not text:
            raise ValueError("The sentence is empty; type at least one character.")
        ids = tuple(self.tokenizer.encode(text))
        if len(ids) > MAX_TOKENS:
            raise ValueError(f"The sentence has {len(ids)} tokens; up to {MAX_TOKENS} fit. Shorten it.")
        if isinstance(self.tokenizer, ByteTokenizer):
            return byte_labels(text), ids
        return [{"text": shown(self.tokenizer.decode([i])) or "·"} for i in ids], ids

    def head(self, ids: tuple[int, ...], layer: int, head: int) -> RecurrenceInputs:
        """What one head tells its memory, as rows [T, *], in float64."""
        if layer not in self.watchable():
            raise ValueError(f"Layer {layer} cannot be watched; the layers that can are {self.watchable()}.")
        inputs, _ = self._run(ids)
        if not 0 <= head < inputs[layer].k.shape[2]:
            raise ValueError(f"Head {head} does not exist; the heads are 0 to {inputs[layer].k.shape[2] - 1}.")
        return RecurrenceInputs(*(x[0, :, head].double() for x in inputs[layer]))

    def all_inputs(self, ids: tuple[int, ...]) -> list[RecurrenceInputs]:
        """What all layers that can be watched tell their memories, [1, T, H, *], first layer first."""
        seen, _ = self._run(ids)
        return [seen[layer] for layer in self.watchable()]

    def guesses(self, ids: tuple[int, ...], count: int = 3) -> list[list[dict]]:
        """The model's likeliest next tokens after each token."""
        _, chances = self._run(ids)
        best = chances.topk(count)
        return [
            [{"text": self._label(i), "chance": p} for p, i in zip(values, indices)]
            for values, indices in zip(best.values.tolist(), best.indices.tolist())
        ]

    def read(self, text: str, output: CausalOutput | None) -> CausalOutput:
        """The model's output after it has read on; what it read before stays as it was."""
        ids = torch.tensor([self.tokenizer.encode(text)])
        with torch.no_grad():
            return self.model(ids, state=None if output is None else output.state)

    def continued(self, output: CausalOutput, most: int = MAX_ANSWER) -> list[dict]:
        """The likeliest tokens from here on, up to the end of a sentence."""
        said: list[dict] = []
        while len(said) < most:
            assert output.logits is not None
            chance, token = output.logits[0, -1].softmax(-1).max(-1)
            said.append({"text": self._label(int(token)), "chance": chance.item()})
            if said[-1]["text"].endswith((".", "?", "!", "end", "\\n")):
                break
            with torch.no_grad():
                output = self.model(token[None, None], state=output.state)
        return said

    def last_output_moves(self, layer: int, ids: tuple[int, ...], other: tuple[int, ...]) -> float:
        block = self.model.model.layers[layer]
        with torch.no_grad():
            y, z = (
                block.self_attn(block.input_layernorm(self.model.model.embed_tokens(torch.tensor([x]))))[0][0, -1]  # type: ignore[operator]
                for x in (ids, other)
            )
        return ((y - z).norm() / y.norm()).item()

    def _label(self, token: int) -> str:
        if isinstance(self.tokenizer, ByteTokenizer):
            return "end" if token > 255 else shown(chr(token)) if token < 128 else f"{token:02X}"
        return shown(self.tokenizer.decode([token])) or "·"

    def _run_once(self, ids: tuple[int, ...]) -> tuple[dict[int, RecurrenceInputs], Tensor]:
        """Layer by layer, so that what enters each can be seen; several readers may do so at once."""
        seen: dict[int, RecurrenceInputs] = {}
        whole, watchable = self.model.model, self.watchable()
        with torch.no_grad():
            x = whole.embed_tokens(torch.tensor([ids]))
            for i, block in enumerate(whole.layers):
                if i in watchable:
                    seen[i] = block.self_attn.recurrence_inputs(block.input_layernorm(x))  # type: ignore[operator]
                x, _ = block(x, None)
            logits = self.model.lm_head(whole.norm(x))
        return seen, logits[0].softmax(-1)


def shown(text: str) -> str:
    """Text with every character visible: control characters by their escapes or numbers, a space as an open box.

    >>> shown("a b\\n\\a")
    'a␣b\\\\nU+0007'
    """
    return "".join(_shown(c) for c in text)


ESCAPES = {" ": "␣", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def _shown(character: str) -> str:
    if character in ESCAPES:
        return ESCAPES[character]
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"):
        return f"U+{ord(character):04X}"
    return character


def byte_labels(text: str) -> list[dict]:
    """A label a byte; the bytes of one longer character share it and say which of how many they are.

    >>> byte_labels("é")
    [{'text': 'é', 'part': 1, 'parts': 2}, {'text': 'é', 'part': 2, 'parts': 2}]
    """
    labels = []
    for character in text:
        parts = len(character.encode("utf-8", errors="surrogatepass"))
        label = {"text": shown(character)}
        labels += [label] if parts == 1 else [label | {"part": i + 1, "parts": parts} for i in range(parts)]
    return labels


def _row(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _norm(matrices: Tensor) -> Tensor:
    return matrices.flatten(1).norm(dim=-1)


def _largest(x: Tensor) -> float:
    return x.abs().max().item()


def _one_of(name: str, value: str, choices: dict) -> Any:
    if value not in choices:
        raise ValueError(f"The {name} is {shown_in_words(value)}; choose one of {', '.join(choices)}.")
    return choices[value]


def _within(name: str, number: float, low: float, high: float) -> None:
    if not low <= number <= high:
        raise ValueError(f"{name} is {number}; expected {low} to {high}.")
