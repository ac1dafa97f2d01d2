"""Python files of the user's own: recipes, experiments, layers. They are programs, and loading one runs it."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from palimpsest.checks import check


def load_file(place: str | Path, what: str, *, again: bool = True) -> ModuleType:
    """Runs a Python file, with all that it may do, and returns it as a module.

    Args:
        place: a file that ends in .py.
        what: the word for it in sentences, such as "recipe".
        again: run it anew even if it was loaded before. False gives the same module, so that its classes stay the same.

    Raises:
        ValueError: there is no such file, it is not Python, or running it fails.
    """
    place = str(place)
    check(Path(place).is_file(), f"{what} {place!r} is not a file; give a Python file")
    check(place.endswith(".py"), f"{what} {place!r} is not Python; give a file that ends in .py")
    name = f"palimpsest_{what}_{hashlib.sha256(str(Path(place).resolve()).encode(errors='replace')).hexdigest()[:12]}"
    if not again and name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses defined in the file look themselves up here
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ValueError(f"{what} {place!r} does not run: {type(error).__name__}: {error}") from error
    return module
