"""The command line as a user meets it: words, exit codes, streams, interrupts."""

import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from palimpsest import __version__, cli, display
from palimpsest.commands import train as train_command
from palimpsest.models.kimi_linear import KimiLinearForCausalLM
from palimpsest.train import latest

ROOT = Path(__file__).parents[1]

RECIPE = """
from palimpsest.models.kimi_linear import KimiLinearConfig
from palimpsest.train import Data, Evaluate, Output, Recipe, TextFiles

def recipe():
    return Recipe(
        model=KimiLinearConfig.tiny("KM", hidden_size=16, intermediate_size=32, linear_head_dim=8, moe_intermediate_size=8),
        data=Data(source=TextFiles(paths=({texts!r},)), sequence_length=32, batch_size=4),
        steps=3,
        evaluate=Evaluate(every=100, piece_bytes=64, max_bytes=256, final_max_bytes=256),
        output=Output(checkpoint_every=1, log_every=1),
    )
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with texts, a recipe for them, and a run of it."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "texts").mkdir()
    for i in range(6):
        (folder / "texts" / f"{i}.py").write_text(f"def f{i}(x):\n    return x\n" * 12)
    (folder / "small.py").write_text(RECIPE.format(texts=str(folder / "texts")))
    assert cli.run(["train", str(folder / "small.py"), "--out", str(folder / "run"), "--quiet"]) == 0
    return folder


def run(capsys, *arguments):
    code = cli.run([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def refusal(capsys, *arguments):
    """The one sentence of a call that must fail with exit code 1."""
    code, out, err = run(capsys, *arguments)
    assert code == 1, (out, err)
    assert "Traceback" not in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    return err


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"palimpsest {__version__}\n", "")


@pytest.mark.parametrize("command", [[], ["train"], ["generate"], ["info"]])
def test_help_says_what_a_newcomer_needs(capsys, command):
    code, out, _ = run(capsys, *command, "--help")
    text = re.sub(r"\W+", " ", out)
    assert code == 0
    assert "Usage" in text
    for words in {
        "train": ["resume", "Ctrl C", "FIELD VALUE"],
        "generate": ["prompt", "temperature"],
        "info": ["48b"],
    }.get("".join(command), ["train", "generate", "info"]):
        assert words in text


def test_wrong_usage_exits_2(capsys):
    assert run(capsys, "frobnicate")[0] == 2
    assert run(capsys, "train")[0] == 2
    assert run(capsys, "generate", "x", "--top-k", "many")[0] == 2


def test_help_does_not_wait_for_torch():
    code = "import sys; from palimpsest import cli; cli.run(['--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.stdout.strip().endswith("False"), done.stderr


def test_a_run_leaves_what_the_help_promises(place):
    names = {p.name for p in (place / "run").iterdir()}
    assert {"metrics.jsonl", "loss.png", "loss.svg", "result.json", "checkpoints", "run.json"} <= names


def test_the_result_stands_beside_the_compressors(capsys, place):
    code, out, err = run(capsys, "train", place / "small.py", "--out", place / "run", "--resume")
    assert code == 0
    for word in ("this model", "entropy of single bytes", "gzip", "xz", "3 steps", "loss.png"):
        assert word in out
    assert "this run had finished at step 3: nothing was left to do" in err


def test_json_is_a_line_an_event(capsys, place, tmp_path):
    code, out, err = run(capsys, "train", place / "small.py", "--out", tmp_path / "r", "--json", "--set", "steps=2")
    events = [json.loads(line) for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert [e["event"] for e in events][:2] == ["start", "train"]
    assert events[-1]["event"] == "end"
    assert events[-1]["step"] == 2


def test_quiet_says_the_result_alone(capsys, place, tmp_path):
    code, out, err = run(capsys, "train", place / "small.py", "--out", tmp_path / "r", "-q", "-s", "steps=1")
    assert (code, err) == (0, "")
    assert "this model" in out


def test_progress_names_rate_loss_bits_and_time_left(monkeypatch):
    seconds = itertools.count()
    monkeypatch.setattr(train_command.time, "monotonic", lambda: 30.0 * next(seconds))
    standing = train_command.Standing()
    for i in range(3):
        event = {
            "event": "step",
            "step": i,
            "tokens": 100 * i,
            "share": i / 10,
            "loss": 2.0,
            "bits_per_byte": 2.9,
            "skipped": 1,
        }
        share, words = standing.status(event)
        standing.status({"event": "evaluate", "heldout_bits_per_byte": 3.1})
    assert share == 0.2
    assert words == "step 2  3 tok/s  loss 2.00  bits/byte 2.90  held out 3.10  1 skipped  ETA 4:00"


def test_a_live_bar_shows_the_same(place, tmp_path, monkeypatch):
    from rich.console import Console

    with open(tmp_path / "screen", "w+", encoding="utf-8") as screen:
        monkeypatch.setattr(display, "notes", Console(file=screen, force_terminal=True, width=160))
        assert cli.run(["train", str(place / "small.py"), "--out", str(tmp_path / "r"), "-s", "steps=2"]) == 0
        screen.seek(0)
        shown = screen.read()
    assert "tok/s" in shown
    assert "100%" in shown


def test_overwrite_removes_runs_and_nothing_else(capsys, place, tmp_path):
    again = ("train", place / "small.py", "--out", tmp_path / "r", "-q", "-s", "steps=1")
    assert run(capsys, *again)[0] == 0
    sentence = refusal(capsys, *again)
    for words in ("holds a run already", "--resume", "--overwrite", "--out"):
        assert words in sentence
    assert run(capsys, *again, "--overwrite")[0] == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    sentence = refusal(capsys, "train", place / "small.py", "--out", tmp_path / "mine", "--overwrite")
    assert "holds files but no run" in sentence
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "precious"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", "nothing.py"], "recipe 'nothing.py' is not a file"),
        (["train", "{small}", "--set", "optim.lrr=1"], "did you mean 'optim.lr'?"),
        (["train", "{small}", "--set", "optim.lr"], "is not FIELD=VALUE"),
        (["train", "{small}", "--resume", "--overwrite"], "choose one"),
        (
            ["train", "{small}", "--out", "{run}", "--resume", "--set", "seed=3"],
            "another recipe: seed was 0 and is now 3",
        ),
        (["train", "{small}:large"], "has no function 'large'; it has recipe"),
        (["train", "{small}:"], "names no function after its colon"),
        (["train", "{small}", "-s", "data.source.paths=/nowhere", "--out", "{run}2"], "'/nowhere' does not exist"),
        (["train", "{small}", "--out", "{small}"], "is a file; a run needs a folder"),
        (["generate", "/nowhere", "-p", "x"], "'/nowhere' is no folder"),
        (["generate", "{run}"], "no prompt was given"),
        (["generate", "{run}", "-p", ""], "prompt 0 is empty"),
        (["generate", "{run}", "-p", "x", "-n", "0"], "max_new_tokens"),
        (["generate", "{run}", "-p", "x", "-t", "-1"], "temperature"),
        (["generate", "{run}", "-p", "x", "--tokenizer", "nope.json"], "does not exist"),
        (["generate", "{run}", "-p", "x", "--device", "tpu9"], "--device 'tpu9' is unknown"),
        (["generate", "{run}", "-p", "x", "--device", "xpu"], "--device 'xpu' is unknown"),
        (["generate", "{run}", "-p", "x", "--device", "meta"], "--device 'meta' is unknown"),
        (["generate", "{run}", "-p", "x", "-p", "y", "--save", "{run}/s"], "2 prompts were given with --save"),
        (["generate", "{run}", "-p", "x", "--save", "{run}/no/s"], "is in no folder that exists"),
        (["generate", "{run}", "--prompt-file", "/nowhere.txt"], "/nowhere.txt"),
        (["generate", "{run}", "--load", "/nowhere.state"], "/nowhere.state"),
        (["generate", "{texts}", "-p", "x"], "config.json"),
        (["info", "nothing"], "'nothing' is no model; give one of official_48b, tiny, small, medium"),
    ],
)
def test_mistakes_get_one_sentence(capsys, place, arguments, sentence):
    names = {"small": place / "small.py", "run": place / "run", "texts": place / "texts"}
    assert sentence in refusal(capsys, *(a.format(**names) for a in arguments))


def test_generate_streams_text_to_standard_output_alone(capsys, place):
    code, out, err = run(capsys, "generate", place / "run", "-p", "def f", "-p", "retur", "-n", "5")
    assert code == 0
    assert out.startswith("def f")
    assert "retur" in out
    assert "10 tokens" in err
    code, out, err = run(capsys, "generate", place / "run", "-p", "def f", "-n", "5", "--quiet")
    assert err == ""
    assert "def f" not in out


def test_generate_is_the_librarys_own(capsys, place):
    from palimpsest.generate import Sampling, generate
    from palimpsest.text import ByteTokenizer

    options = ["-t", "0.9", "--top-k", "40", "--top-p", "0.95", "--seed", "7"]
    code, out, _ = run(capsys, "generate", place / "run", "-p", "def f", "-n", "12", "--json", *options)
    model = KimiLinearForCausalLM.from_pretrained(latest(place / "run"))
    ours = generate(
        model, "def f", max_new_tokens=12, tokenizer=ByteTokenizer(), sampling=Sampling(0.9, 40, 0.95), seed=7
    )
    told = json.loads(out)
    assert code == 0
    assert (told["tokens"], told["text"], told["reason"]) == (ours.tokens[0], ours.texts[0], ours.reasons[0])


def test_how_to_choose_travels_with_the_checkpoint(capsys, place, tmp_path):
    """Not greedy by default: the likeliest text of a small model is one blank after another."""
    tokens = lambda folder, *more: json.loads(
        run(capsys, "generate", folder, "-p", "def f", "-n", "24", "--json", *more)[1]
    )["tokens"]
    checkpoint = latest(place / "run")
    assert tokens(place / "run") == tokens(checkpoint, "-t", "0.8", "--top-p", "0.95")
    greedy = tokens(place / "run", "-t", "0")
    assert tokens(place / "run") != greedy
    shutil.copytree(checkpoint, tmp_path / "own")
    (tmp_path / "own" / "generation_config.json").write_text('{"do_sample": false}')
    assert tokens(tmp_path / "own") == greedy


def test_recipes_go_by_name(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # away from the checkout
    listed = [json.loads(line) for line in run(capsys, "recipes", "--json")[1].splitlines()]
    assert "demo" in [recipe["recipe"] for recipe in listed]
    assert all(recipe["about"] and recipe["names"] for recipe in listed)
    assert "wikitext103:local" in run(capsys, "recipes")[1]
    by_name = run(capsys, "train", "wikitext103:local", "--show")
    assert by_name[0] == 0
    file = next(recipe["file"] for recipe in listed if recipe["recipe"] == "wikitext103")
    assert by_name[1] == run(capsys, "train", f"{file}:local", "--show")[1]
    assert "recipe 'dmeo' is unknown; give a .py file, or one of demo" in refusal(capsys, "train", "dmeo")


def test_eval_is_what_the_model_pays(capsys, place, tmp_path):
    """In chunks with a carried state, the same as in one piece; the first byte at a guess."""
    (tmp_path / "a.txt").write_bytes("def f(x): return 'h\u00e9'".encode() * 3)
    (tmp_path / "b.txt").write_bytes(b"x")
    options = ["--device", "cpu", "--json"]
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    code, out, _ = run(capsys, "eval", place / "run", *files, "--chunk", "16", *options)
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    ids = torch.tensor([list(files[0].read_bytes())])
    loss = KimiLinearForCausalLM.from_pretrained(latest(place / "run"))(ids, labels=ids).loss.item()
    nats = loss * (ids.shape[1] - 1) + math.log(257)
    assert rows[0]["bits_per_byte"] == pytest.approx(nats / math.log(2) / ids.shape[1], rel=1e-5)
    assert rows[0]["perplexity"] == pytest.approx(math.exp(nats / ids.shape[1]), rel=1e-5)
    assert rows[1]["bits_per_byte"] == pytest.approx(math.log2(257))
    assert rows[2]["bytes"] == ids.shape[1] + 1
    (tmp_path / "c.txt").touch()
    assert "is empty" in refusal(capsys, "eval", place / "run", tmp_path / "c.txt", *options)


@pytest.fixture
def plugin(tmp_path):
    """The how-to's layer from outside, unknown to this process, and how to name it to a command."""
    from palimpsest.models.kimi_linear.mixers import MIXERS, unregister_mixer

    page = (ROOT / "docs" / "how-to" / "add-a-mixer.md").read_text()
    (tmp_path / "fading.py").write_text(re.search(r"write_text\('''\n(.*?)'''\)", page, re.DOTALL)[1])
    yield ("--plugin", tmp_path / "fading.py")
    if "fading" in MIXERS:
        unregister_mixer("fading")


def test_a_checkpoint_with_a_layer_from_outside_takes_its_plugin(capsys, place, plugin, tmp_path):
    from palimpsest.models.kimi_linear.mixers import unregister_mixer

    (tmp_path / "mine.py").write_text((place / "small.py").read_text().replace('"KM"', '"KF"'))
    (tmp_path / "a.txt").write_text("def f(x): return x")
    commands = [
        ("train", tmp_path / "mine.py", "--out", tmp_path / "run", "--quiet"),
        ("generate", tmp_path / "run", "-p", "def", "-n", "2", "--device", "cpu"),
        ("eval", tmp_path / "run", tmp_path / "a.txt", "--device", "cpu"),
        ("info", tmp_path / "run"),
    ]
    assert "--plugin" in run(capsys, "chat", "--help")[1]
    for command in commands:
        told = refusal(capsys, *command)  # nothing that lies in a checkpoint is run by itself
        assert "register_mixer" in told
        code, _, err = run(capsys, *command, *plugin)
        assert code == 0, err
        unregister_mixer("fading")
    page = ("explain", "--model", latest(tmp_path / "run"), "--export", tmp_path / "site", "--sentence", "ab")
    assert "register_mixer" in run(capsys, *page)[2]
    assert "needs at least 8" in run(capsys, *page, *plugin)[2]  # the model is known, and its sentence looked at
    (tmp_path / "bad.py").write_text("1 / 0")
    told = refusal(capsys, *commands[-1], "--plugin", tmp_path / "bad.py")
    assert "bad.py' does not run: ZeroDivisionError" in told
    assert "is not a file" in refusal(capsys, *commands[-1], "--plugin", tmp_path / "none.py")


def test_convert_and_validate(capsys, place, tmp_path):
    code, out, _ = run(capsys, "convert", place / "run", tmp_path / "native", "--to", "native", "--quiet")
    assert code == 0
    assert "from official to native" in out
    assert run(capsys, "validate", tmp_path / "native")[:2] == (0, "a whole native checkpoint\n")
    code, out, _ = run(capsys, "validate", tmp_path / "native", "--layout", "official", "--json")
    assert code == 1
    assert {finding["kind"] for finding in json.loads(out)["findings"]} == {"missing", "extra"}
    assert "holds a model already" in refusal(capsys, "convert", place / "run", tmp_path / "native", "--to", "fla")


def test_saved_and_loaded_is_one_text(capsys, place, tmp_path):
    whole = json.loads(run(capsys, "generate", place / "run", "-p", "def f", "-n", "10", "--json")[1])["tokens"]
    first = run(capsys, "generate", place / "run", "-p", "def f", "-n", "4", "--json", "--save", tmp_path / "s")[1]
    second = run(capsys, "generate", place / "run", "--load", tmp_path / "s", "-n", "6", "--json")[1]
    assert json.loads(first)["tokens"] + json.loads(second)["tokens"] == whole


def test_prompt_from_a_file(capsys, place, tmp_path):
    (tmp_path / "p.txt").write_text("def f")
    direct = run(capsys, "generate", place / "run", "-p", "def f", "-n", "4", "--json")[1]
    assert run(capsys, "generate", place / "run", "--prompt-file", tmp_path / "p.txt", "-n", "4", "--json")[1] == direct
    (tmp_path / "p.bin").write_bytes(b"\xff\xfe\x00")
    assert "is not UTF-8 text" in refusal(capsys, "generate", place / "run", "--prompt-file", tmp_path / "p.bin")


def test_info_counts_the_48b_model(capsys):
    code, out, _ = run(capsys, "info", "48b", "--json")
    card = json.loads(out)["model"]
    assert code == 0
    assert card["pattern"] == "KKKM" * 6 + "KKM"
    assert card["parameters"]["total"] == 49_122_681_728
    assert card["parameters"]["active"] == pytest.approx(3.5e9, rel=0.01)
    row = {r["tokens"]: r for r in card["memory"]}[1048576]
    assert row["latent"] == 27 * 1048576 * 2 * 576
    assert row["state"] == 7 * 1048576 * 2 * 576 + 20 * (4 * 32 * 128 * 128 + 2 * 3 * 3 * 4096)


def test_info_reads_presets_runs_recipes_and_the_machine(capsys, place):
    for name in ("tiny", place / "run", place / "small.py"):
        code, out, _ = run(capsys, "info", name)
        assert code == 0
        assert "parameters" in out
    code, out, _ = run(capsys, "info")
    assert code == 0
    assert "reference" in out
    assert "ok" in out
    said = re.sub(r"\W+", " ", out)
    if not torch.cuda.is_available():
        assert said.count("device") == 1  # a refusal is said once, not once a call


def test_info_takes_the_names_that_the_docs_give(capsys):
    cards = [json.loads(run(capsys, "info", name, "--json")[1])["model"] for name in ("official_48b", "48b")]
    assert cards[0] == cards[1]


@pytest.mark.parametrize(
    "arguments",
    ["--version", "info tiny", "lab list", "generate {run} -p x -n 2", "generate {run} -n 2 --prompt-file -"],
)
def test_streams_that_are_closed_are_no_trace(place, tmp_path, arguments):
    """stdin, stdout and stderr closed by whoever started it; and a full disk behind stdout, which must be said."""
    words = " ".join([sys.executable, "-m palimpsest", arguments.format(run=place / "run")])
    closed = subprocess.run(f"{words} <&- >&- 2>{tmp_path}/err", shell=True, cwd=ROOT, timeout=120, check=False)
    said = (tmp_path / "err").read_text()
    assert "Traceback" not in said
    assert closed.returncode == ("prompt-file" in arguments), said
    if Path("/dev/full").exists() and closed.returncode == 0:
        full = subprocess.run(f"{words} >/dev/full 2>{tmp_path}/err", shell=True, cwd=ROOT, timeout=120, check=False)
        said = (tmp_path / "err").read_text()
        assert "Traceback" not in said
        assert "No space left" in said
        assert full.returncode == 1


def test_help_shows_flags_without_a_type_and_usage_without_braces(capsys):
    for command in (["train"], ["generate"], ["info"], ["explain"], ["lab", "run"], ["lab", "compare"], ["lab"]):
        said = run(capsys, *command, "--help")[1]
        assert "bool" not in said
        assert "{" not in said
    assert "train [OPTIONS] RECIPE" in re.sub(r"\s+", " ", run(capsys, "train", "--help")[1])


def test_info_parameters_are_the_models(place, capsys):
    card = json.loads(run(capsys, "info", place / "run", "--json")[1])["model"]
    model = KimiLinearForCausalLM.from_pretrained(latest(place / "run"))
    assert card["parameters"]["total"] == sum(t.numel() for t in model.state_dict().values())


def test_killed_resumed_and_interrupted(place, tmp_path):
    """A real process: SIGKILL leaves a whole checkpoint, SIGTERM saves and exits with 130, and the run goes on."""
    command = [sys.executable, "-m", "palimpsest", "train", str(place / "small.py"), "--out", str(tmp_path / "r")]
    command += ["--set", "steps=100000", "--json", "--resume"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def until(process, event):
        return next(e for e in map(json.loads, process.stdout) if e["event"] == event)

    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment) as process:
        saved = until(process, "checkpoint")["step"]
        until(process, "train")
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    whole = latest(tmp_path / "r")
    assert int(whole.name.removeprefix("step-")) >= saved
    KimiLinearForCausalLM.from_pretrained(whole)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    ) as p:
        start = until(p, "start")
        assert start["resumed"]
        assert start["step"] == int(whole.name.removeprefix("step-"))
        until(p, "train")
        p.send_signal(signal.SIGTERM)
        assert until(p, "interrupt")["signal"] == "SIGTERM"
        out, err = p.communicate(timeout=120)
    assert p.returncode == 130, err
    assert "saved; go on with --resume" in err
    assert "Traceback" not in err


def test_without_typer_the_command_says_what_to_install():
    code = "import sys; sys.modules['typer'] = None; sys.argv = ['palimpsest']; from palimpsest.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 1
    assert "pip install palimpsest-kda[cli]" in done.stderr
    assert "Traceback" not in done.stderr


def test_doctor_says_what_works_and_what_to_install(capsys, monkeypatch):
    code, out, err = run(capsys, "doctor", "--json")
    told = json.loads(out)
    found = {finding["what"]: finding for finding in told["findings"]}
    assert (code, err) == (0, "")
    assert {"torch", "C kernel", "GPU", "train", "gguf"} <= {name.partition(" 0")[0] for name in found}
    assert found["chunked on cpu"]["state"] == "ok"
    from palimpsest.commands import doctor

    monkeypatch.setitem(doctor.EXTRAS, "gguf", ("no_such_module", "files"))
    monkeypatch.setattr(doctor, "ENOUGH", 1e-30)
    code, out, _ = run(capsys, "doctor")
    assert code == 1  # kernels that are wrong
    text = re.sub(r"[\s│]+", " ", out)
    assert "no no_such_module: files cannot be used pip install 'palimpsest-kda[gguf]'" in text
    assert "do not trust its results" in text


def test_a_machine_without_a_compiler_is_told_what_to_install(capsys, monkeypatch):
    from palimpsest.commands import doctor
    from palimpsest.ops import backends

    monkeypatch.setattr(backends, "explain", lambda problem: "cpu needs a C compiler and found none\nchunked ok")
    monkeypatch.setattr(backends, "facts", dict)
    (finding,) = doctor._cpu_kernel({})
    assert finding.state == "note"
    assert finding.said == "needs a C compiler and found none"
    assert "install gcc or clang" in finding.remedy


def test_bench_times_what_runs_here(capsys):
    code, out, err = run(capsys, "bench", "--only", "step", "--tokens", 64, "--rounds", 2, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert {row["by"] for row in rows} >= {"chunked", "reference"}
    assert all(row["ms"] > 0 and row["rounds"] == 2 for row in rows)
    assert "no row contains 'nothing'" in refusal(capsys, "bench", "--only", "nothing", "--tokens", 64, "-q")


def test_lab_list_has_the_results_with_their_verdicts(capsys, monkeypatch, tmp_path):
    told = json.loads(run(capsys, "lab", "list", "--json")[1])
    found = {Path(result["folder"]).name: result for result in told["results"]}
    assert set(found) >= {path.parent.name for path in (ROOT / "results" / "lab").glob("*/report.md")}
    assert found["spectra-small"]["verdict"] == "shown"
    assert all(result["because"] for result in found.values())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "lab" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "lab" / "mine" / "report.md").write_text("# x\n\n**Verdict: undecided.** Too few seeds.\n")
    told = json.loads(run(capsys, "lab", "list", "--json")[1])
    assert {"folder": "runs/lab/mine", "verdict": "undecided", "because": "Too few seeds."} in told["results"]


def test_a_run_is_taken_where_a_checkpoint_is(place, capsys, tmp_path):
    from palimpsest.convert import validate

    newest = latest(place / "run")
    model = KimiLinearForCausalLM.from_pretrained(place / "run")
    assert model.folder == newest
    assert model.tokenizer().name == "bytes"
    assert validate(place / "run") == []
    assert run(capsys, "convert", place / "run", tmp_path / "native", "--to", "native", "-q")[0] == 0
    assert run(capsys, "info", place / "run")[0] == 0
    text = model.generate("def", max_new_tokens=5, seed=3)
    assert (
        text.texts == model.generate(list(b"def"), max_new_tokens=5, seed=3).texts != [""]
    )  # as its files say: sampled
    assert len({model.generate("def", max_new_tokens=5, seed=i).texts[0] for i in range(4)}) > 1
    code, out, _ = run(capsys, "generate", place / "run", "-p", "def", "-n", 5, "--seed", 3, "--json")
    assert json.loads(out)["text"] == text.texts[0]
    with pytest.raises(ValueError, match="loaded from no folder"):
        KimiLinearForCausalLM(model.config).tokenizer()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        KimiLinearForCausalLM.from_pretrained(tmp_path / "begun")


@pytest.mark.parametrize("name", ["48b", "official_48b"])
def test_a_configuration_has_no_weights(capsys, name):
    assert "names a configuration, which has no weights; fetch the checkpoint" in refusal(
        capsys, "generate", name, "-p", "x"
    )
    assert run(capsys, "info", name)[0] == 0


def test_the_demo_has_a_miniature(capsys, tmp_path, monkeypatch):
    code, out, _ = run(capsys, "train", "demo:debug", "--show")
    shown = json.loads(out)
    assert code == 0
    assert (shown["steps"], shown["minutes"]) == (20, None)
