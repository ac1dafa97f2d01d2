"""`palimpsest recipes`, and where a recipe's name leads."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import typer

from palimpsest.commands.options import Json


def shipped(name: str) -> list[Path]:
    """Where a folder that comes with the package is: beside it in a checkout, under the environment's share/ once installed."""
    root, shared = Path(__file__).parents[2], Path("share", "palimpsest", name)
    places = (root / name, root / shared, Path(sys.prefix) / shared)
    return [place for place in places if place.is_dir()]


def known() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    found: dict[str, Path] = {}
    for folder in shipped("recipes"):
        for file in sorted(folder.glob("*.py")):
            found.setdefault(file.stem, file)
    return found


def place_of(recipe: str) -> str:
    """A recipe as `load_recipe` takes it: a file as it is, a name such as `demo` or `wikitext103:local` turned into its file."""
    name, colon, function = recipe.partition(":")
    if name.endswith(".py") or "/" in name or Path(name).exists():
        return recipe
    if name not in known():
        raise ValueError(f"recipe {name!r} is unknown; give a .py file, or one of {', '.join(known()) or 'none here'}")
    return f"{known()[name]}{colon}{function}"


def recipes(as_json: Json = False) -> int:
    """Recipes that come with the package; `palimpsest train NAME` runs one, `NAME:FUNCTION` another function of it.

    Example: `palimpsest recipes`
    """
    for name, file in known().items():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        about = (ast.get_docstring(tree) or "").partition("\n")[0]
        functions = [
            node.name
            for node in tree.body
            if isinstance(node, ast.FunctionDef) and ast.unparse(node.returns or node) == "Recipe"
        ]
        names = [name if function == "recipe" else f"{name}:{function}" for function in functions]
        if as_json:
            typer.echo(json.dumps({"recipe": name, "names": names, "about": about, "file": str(file)}))
        else:
            typer.echo(f"{', '.join(names):34} {about}")
    return 0
