"""The rooms and the doors between them. A new door is a change to this table, in review."""

import ast
import sys
from pathlib import Path

import pytest

import palimpsest

ROOT = Path(__file__).parents[1] / "palimpsest"
MAY_IMPORT = {  # room -> rooms it may import, besides itself
    "ops": set(),  # knows torch and nothing above it
    "testing": {"ops"},
    "compat": {"ops"},
    "text": set(),
    "convert": {"models", "text"},
    "integrations": {"ops", "layers", "models", "generate", "text"},  # each tool in a room of its own
    "layers": {"ops"},
    "models": {
        "ops",
        "layers",
        "generate",
        "text",
    },  # the last two within methods alone: model.generate, model.tokenizer
    "generate": {"models", "layers", "ops", "text"},
    "parallel": {"ops", "layers", "models"},
    "train": {"models", "layers", "text", "parallel"},  # and generate and train never import each other
    "lab": {"ops", "layers", "models", "train", "text", "machine"},
    "explainer": {"ops", "layers", "models", "text"},
    "display": set(),
    "commands": {
        "ops",
        "layers",
        "models",
        "generate",
        "train",
        "lab",
        "explainer",
        "text",
        "display",
        "machine",
        "convert",
        "parallel",
    },
    "cli": {"commands", "display"},
    "__main__": {"cli"},
    "__init__": {"ops", "layers", "models"},
    "checks": set(),
    "files": set(),
    "python_files": set(),
    "machine": set(),
}
LEAVES = {"checks", "files", "python_files"}  # know the standard library alone; every room but the ops may use them
BARE = {"ops/reference.py": {"torch"}, "ops/chunked.py": {"torch", "typing"}}  # files that import nothing else at all
LIGHT = {
    "ops",
    "layers",
    "testing",
}  # rooms that import torch and the standard library, and triton only in its own room


def imports(path: Path) -> set[str]:
    """Everything that a file imports by its full name: `from a.b import c` reaches a.b and, if that is a module, a.b.c.

    A public name of the package is looked up where it lives: `from palimpsest import kda` reaches palimpsest.ops.variants.
    """
    return imported(path.read_text(), path)


def imported(source: str, path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ["palimpsest", *path.relative_to(ROOT).parts[: -node.level]] if node.level else []
            module = ".".join([*package, *filter(None, [node.module])])
            found.add(module)
            if module == "palimpsest":
                found |= {f"palimpsest.{palimpsest._HOME.get(alias.name, alias.name)}" for alias in node.names}
            elif module.startswith("palimpsest."):
                found |= {f"{module}.{alias.name}" for alias in node.names}
    return found - {"palimpsest", "palimpsest.__version__"}


@pytest.mark.parametrize(
    ("line", "reached"),
    [
        ("from palimpsest import train", "palimpsest.train"),
        ("from palimpsest import KimiLinearForCausalLM", "palimpsest.models.kimi_linear.model"),
        ("from palimpsest.ops import gpu", "palimpsest.ops.gpu"),
        ("from .. import lab", "palimpsest.lab"),
        ("from ..train.loop import train", "palimpsest.train.loop"),
        ("def f():\n    import palimpsest.explainer.server", "palimpsest.explainer.server"),
    ],
)
def test_a_door_is_seen_however_it_is_opened(line, reached):
    assert reached in imported(line, ROOT / "ops" / "variants.py")


def test_models_reach_generation_within_methods_alone():
    """Else neither room could be loaded without the other."""
    for path in (ROOT / "models").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert "palimpsest.generate" not in ast.unparse(node), path
                assert "palimpsest.text" not in ast.unparse(node), path


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


FILES = sorted(path for path in ROOT.rglob("*.py") if "static" not in path.parts)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_through_its_doors(path):
    room = room_of(path)
    assert room in MAY_IMPORT, f"{room} is a new room: add it to MAY_IMPORT"
    reached = {name.split(".")[1] for name in imports(path) if name.startswith("palimpsest.")}
    allowed = MAY_IMPORT[room] | {room} | (LEAVES if room not in ("ops", "files", "checks") else set())
    assert reached <= allowed, f"{path}: {reached - allowed}"


ONE_NAME = {  # modules that share a name, and the one thing that they all mean by it
    "delta_memory": "the core of the family on one tier of GPU kernels",
    "arguments": "what the arguments of an operator may be, and the check that holds a call to it",
    "register": "a room of kernels as torch operators and backends",
    "short_conv": "the short causal convolution: its function, its layer, its kernel",
    "linear": "linear attention: its kernels, its functions under another library's names",
    "cross_entropy": "the loss of logits: its function, its kernel",
    "plan": "how a model is spread over processes: the fields, the command that weighs them",
    "options": "what may be chosen: of a layer, of a command",
    "plots": "the plots that a room draws of its results",
    "state_tracking": "composing permutations: the task, the experiment about it",
}


def test_two_modules_of_one_name_mean_one_thing():
    names = [path.stem for path in FILES if path.stem not in ("__init__", "__main__")]
    shared = {name for name in names if names.count(name) > 1}
    assert shared == set(ONE_NAME), "rename one of the modules, or say in ONE_NAME what they all mean"


def test_the_leaves_know_the_standard_library_alone():
    for name in LEAVES:
        reached = {imported.split(".")[0] for imported in imports(ROOT / f"{name}.py")}
        assert reached <= sys.stdlib_module_names | {"palimpsest"}, f"{name}: {reached}"


def test_the_law_stands_alone():
    for file, allowed in BARE.items():
        reached = {name.split(".")[0] for name in imports(ROOT / file)}
        assert reached <= allowed, f"{file}: {reached}"


def test_kernels_are_reached_through_backends_alone():
    kernel_rooms = ("palimpsest.ops.cpu", "palimpsest.ops.gpu")
    for path in FILES:
        if path.parent == ROOT / "ops" or "ops" not in path.parts:
            reached = {name for name in imports(path) if name.startswith(kernel_rooms)}
            assert not reached or path == ROOT / "ops" / "__init__.py", f"{path}: {reached}"


def test_the_light_rooms_stand_on_torch_alone():
    for path in FILES:
        if room_of(path) in LIGHT:
            reached = {name.split(".")[0] for name in imports(path)} - sys.stdlib_module_names - {"palimpsest", "torch"}
            allowed = {"triton"} if "gpu" in path.parts else set()
            assert reached <= allowed, f"{path}: {reached}"


MAY_PRINT = {"commands", "__main__"}
MAY_ASK_THE_SYSTEM = {
    "commands",
    "train",
    "explainer",
    "parallel",
}  # who launched me; and ops/cpu: where are the compiler and the cache


def test_nobody_reads_the_environment_or_prints():
    for path in FILES:
        room = room_of(path)
        for node in ast.walk(ast.parse(path.read_text())):
            text = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            asks = text in ("os.environ", "os.getenv")
            assert not asks or room in MAY_ASK_THE_SYSTEM or "cpu" in path.parts, f"{path}: reads {text}"
            prints = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
            assert not prints or room in MAY_PRINT, f"{path}:{node.lineno} prints"
