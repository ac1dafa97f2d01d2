"""The public names, pinned: adding or removing one is a decision, seen in review. And each says what it takes."""

import ast
import dataclasses
import inspect
import re
import textwrap
from importlib import import_module
from pathlib import Path

import pytest

import palimpsest

PUBLIC = """
    DeltaOutput KimiDeltaAttention KimiLinearConfig KimiLinearForCausalLM ModelState MultiHeadLatentAttention
    StateHistory
    backends delta_rule dplr gated_delta gated_delta_product gated_linear_attention gates gdn2 kda kda_from_logits kda_step_
    linear_attention softmax_lookup trace
""".split()
MODULES = [
    "palimpsest.ops.gates",
    "palimpsest.ops.backends",
    "palimpsest.ops.trace",
]  # public as modules, without __all__
MODULES += sorted(
    ".".join(path.relative_to(Path(__file__).parents[1]).parent.parts)
    for path in Path(palimpsest.__file__).parent.rglob("__init__.py")
    if "\n__all__ = " in path.read_text()
)
TORCHS_OWN = {"extra_repr", "state_dict", "load_state_dict", "forward"}  # torch says what these are


def test_the_public_names_are_these():
    assert sorted(palimpsest.__all__) == sorted(PUBLIC)


def test_every_public_name_is_there_and_explains_itself():
    for name in PUBLIC:
        assert getattr(palimpsest, name).__doc__, f"{name} has no docstring"


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(AttributeError, match="kda_step_"):
        palimpsest.kda_step  # noqa: B018


def public(module):
    """Name -> function or class, of a module's __all__, or of what is defined in it."""
    own = [name for name, x in vars(module).items() if getattr(x, "__module__", None) == module.__name__]
    names = getattr(module, "__all__", [name for name in own if not name.startswith("_")])
    found = {name: getattr(module, name) for name in names}
    return {name: x for name, x in found.items() if inspect.isfunction(x) or inspect.isclass(x)}


def missing_of_function(function, name: str) -> list[str]:
    signature = inspect.signature(function)
    parameters = [x for x in signature.parameters.values() if x.name not in ("self", "cls")]
    missing = [f"{name}: {x.name} has no type" for x in parameters if x.annotation is x.empty]
    if signature.return_annotation is signature.empty and not name.endswith("__init__"):
        missing.append(f"{name}: what it returns has no type")
    if not function.__doc__ and name.split(".")[-1] not in (*TORCHS_OWN, "__init__"):
        missing.append(f"{name}: no docstring")
    return missing


def fields_of(x) -> list[str]:
    return (
        [field.name for field in dataclasses.fields(x)]
        if dataclasses.is_dataclass(x)
        else list(getattr(x, "_fields", ()))
    )


def described(x) -> set[str]:
    """Names that a class describes: "name: ..." or "one, another: ..." in its docstring, or a string below the field."""
    entries = re.findall(r"^ *((?:\w+, )*\w+)(?: \([^)]*\))?: ", (x.__doc__ or "") + "\n", re.MULTILINE)
    found = {name for entry in entries for name in entry.split(", ")}
    body = ast.parse(textwrap.dedent(inspect.getsource(x))).body[0].body
    for field, text in zip(body, body[1:]):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            found.add(field.target.id)
    return found


def is_protocol(x) -> bool:
    return getattr(x, "_is_protocol", False)


def missing_of_class(x, name: str) -> list[str]:
    missing = [] if x.__doc__ else [f"{name}: no docstring"]
    fields = fields_of(x)
    if fields:
        missing += [f"{name}: field {field} is not described" for field in fields if field not in described(x)]
    for key, member in vars(x).items():
        member = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        made = key == "__init__" and not fields and not is_protocol(x)  # a protocol's is typing's own
        if inspect.isfunction(member) and (not key.startswith("_") or made):
            missing += missing_of_function(member, f"{name}.{key}")
    return missing


def missing_of(module) -> dict[str, list[str]]:
    return {
        name: (missing_of_class if inspect.isclass(x) else missing_of_function)(x, name)
        for name, x in public(module).items()
    }


@pytest.mark.parametrize("module", MODULES)
def test_every_public_callable_is_typed_and_every_field_described(module):
    found = missing_of(import_module(module))
    assert found, f"{module} has no public callable"
    assert not [line for lines in found.values() for line in lines]


@pytest.mark.parametrize("name", sorted({*PUBLIC} - {"backends", "gates"}))
def test_the_operators_describe_every_argument(name):
    function = getattr(palimpsest, name)
    if not inspect.isfunction(function):
        pytest.skip("a class: its fields and methods are asked above")
    doc = inspect.getdoc(function)
    sections = re.split(r"^(Args|Returns|Raises):\n", doc, flags=re.MULTILINE)
    assert {"Args", "Returns", "Raises"} <= set(sections), f"{name} lacks a section"
    assert ">>> " in doc, f"{name} has no example"
    arguments = sections[sections.index("Args") + 1]
    for parameter in inspect.signature(function).parameters:
        assert re.search(rf"\b{parameter}\b", arguments), f"{name}: {parameter} is not described"


def test_what_is_missing_is_found():
    @dataclasses.dataclass
    class Some:
        """A value.

        Attributes:
            one, two: numbers.
        """

        one: int
        two: int
        three: int

        def method(self, x) -> int:
            return x

    assert missing_of_class(Some, "Some") == [
        "Some: field three is not described",
        "Some.method: x has no type",
        "Some.method: no docstring",
    ]
