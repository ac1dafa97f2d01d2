"""lm-evaluation-harness scores our model: choices, text read to its end, and text written, each as our own model has it."""

import builtins
import json
import math

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs the harness extra")
transformers = pytest.importorskip("transformers", minversion="5.17")

from palimpsest.generate import generate  # noqa: E402
from palimpsest.integrations.transformers.causal_lm import PalimpsestForCausalLM  # noqa: E402
from palimpsest.models.kimi_linear import KimiLinearConfig, KimiLinearForCausalLM  # noqa: E402
from palimpsest.text import ByteTokenizer, tokenizer_files  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = ["abs", "all", "any", "callable", "chr", "divmod", "hash", "len", "ord", "pow", "repr", "sorted"]


def questions():
    """What Python's own functions do, out of their own words; four names to choose from."""
    for i, name in enumerate(NAMES):
        choices = [NAMES[(i + step) % len(NAMES)] for step in (0, 3, 5, 8)]
        choices = choices[i % 4 :] + choices[: i % 4]
        yield {
            "text": getattr(builtins, name).__doc__.partition("\n")[0],
            "choices": choices,
            "target": choices.index(name),
        }


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    folder = tmp_path_factory.mktemp("harness")
    torch.manual_seed(0)
    own = KimiLinearForCausalLM(KimiLinearConfig.tiny("KKM")).eval()
    own.save_pretrained(folder / "model")
    for name, content in tokenizer_files(ByteTokenizer()).items():
        (folder / "model" / name).write_bytes(content)
    rows = list(questions())
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": str(folder / "rows.jsonl"), "cache_dir": str(folder / "cache")},
        "test_split": "train", "num_fewshot": 0,
    }  # fmt: skip
    tasks = [
        {
            **data, "task": "builtin_names", "output_type": "multiple_choice", "doc_to_text": "{{text}}\nThis is the function",
            "doc_to_choice": "{{choices}}", "doc_to_target": "target", "metric_list": [{"metric": "acc"}],
        },
        {
            **data, "task": "builtin_words", "output_type": "loglikelihood_rolling", "doc_to_text": "",
            "doc_to_target": "{{text}}", "metric_list": [{"metric": "bits_per_byte"}],
        },
        {
            **data, "task": "builtin_goes_on", "output_type": "generate_until", "doc_to_text": "{{text}}", "doc_to_target": "x",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
    ]  # fmt: skip
    harness = HFLM(
        pretrained=PalimpsestForCausalLM.from_official(folder / "model"),
        tokenizer=transformers.AutoTokenizer.from_pretrained(folder / "model"), device="cpu", batch_size=3, max_length=512,
    )  # fmt: skip
    result = simple_evaluate(model=harness, tasks=tasks, bootstrap_iters=0, log_samples=True, verbosity="ERROR")
    return own, rows, result


def cost(own, before, after):
    """Nats of the bytes after, given those before."""
    ids = torch.tensor([[256, *before, *after]])
    with torch.no_grad():
        logs = own(ids[:, :-1]).logits[0].double().log_softmax(-1)
    chosen = logs[torch.arange(ids.shape[1] - 1), ids[0, 1:]]
    return -chosen[len(before) :].sum().item()


def test_choices_are_weighed_as_our_model_weighs_them(scored):
    own, rows, result = scored
    right = 0
    for row, sample in zip(rows, sorted(result["samples"]["builtin_names"], key=lambda s: s["doc_id"])):
        text = f"{row['text']}\nThis is the function".encode()
        costs = []
        for choice, response in zip(row["choices"], sample["filtered_resps"]):
            with torch.no_grad():
                whole = torch.tensor([[*text, *b" ", *choice.encode()]])
                logs = own(whole[:, :-1]).logits[0].double().log_softmax(-1)
            nats = -logs[torch.arange(len(logs)), whole[0, 1:]][len(text) - 1 :].sum().item()
            assert float(response[0]) == pytest.approx(-nats, abs=2e-3)
            costs.append(nats)
        right += min(range(4), key=costs.__getitem__) == row["target"]
    assert result["results"]["builtin_names"]["acc,none"] == pytest.approx(right / len(rows))


def test_text_costs_what_it_costs_our_model(scored):
    own, rows, result = scored
    nats = sum(cost(own, b"", row["text"].encode()) for row in rows)
    count = sum(len(row["text"].encode()) for row in rows)
    assert result["results"]["builtin_words"]["bits_per_byte,none"] == pytest.approx(
        nats / count / math.log(2), rel=1e-4
    )


def test_what_is_written_is_what_our_model_writes(scored):
    own, rows, result = scored
    for row, sample in zip(rows, sorted(result["samples"]["builtin_goes_on"], key=lambda s: s["doc_id"])):
        ours = generate(own, row["text"], max_new_tokens=6, tokenizer=ByteTokenizer())
        assert sample["resps"][0][0] == ours.texts[0].partition("\n")[0]
