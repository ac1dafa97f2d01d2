"""What pyproject.toml cannot say: a README that survives an index page, results by folder, a wheel with compiled kernels.

python -m build                                     sdist and wheel: the kernel's source, compiled at first use
PALIMPSEST_PREBUILT=1 python -m build --wheel       a wheel for this platform, for machines without a compiler
PALIMPSEST_HOME=https://.../blob/main/              where the README's links and pictures lead; without it they are words
"""

import importlib.util
import os
import re
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
PREBUILT = os.environ.get("PALIMPSEST_PREBUILT", "0") not in ("", "0")
RELATIVE = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://|mailto:|#)([^)\s]+)\)")


def for_index(text: str, home: str) -> str:
    """A README whose relative links lead to `home`; without one, pictures are left out and links become their words."""

    def absolute(found: re.Match) -> str:
        picture, words, place = found.groups()
        if home:
            return f"{picture}[{words}]({home.rstrip('/')}/{place}{'?raw=true' if picture else ''})"
        return "" if picture else words

    return RELATIVE.sub(absolute, text)


def data_files() -> list[tuple[str, list[str]]]:
    """What lies under share/ after an install: recipes, and results: `palimpsest train demo`, `palimpsest lab list`."""
    name = lambda paths: sorted(str(path.relative_to(ROOT)) for path in paths)
    found = [("share/palimpsest/recipes", name((ROOT / "recipes").glob("*.py")))]
    for report in sorted((ROOT / "results" / "lab").glob("*/report.md")):
        files = [path for path in (report, report.with_name("results.csv")) if path.is_file()]
        found.append((f"share/palimpsest/results/lab/{report.parent.name}", name(files)))
    return found


def _jit():
    """The compiler's driver, which needs the standard library alone."""
    spec = importlib.util.spec_from_file_location("jit", ROOT / "palimpsest" / "ops" / "cpu" / "jit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Build(build_py):
    """Compiles the kernel into the package, where that was asked for."""

    def run(self):
        super().run()
        if PREBUILT:
            jit = _jit()
            made = jit.prebuild(jit.find_compiler(), Path(self.build_lib) / "palimpsest" / "ops" / "cpu" / "prebuilt")
            if not made:
                raise SystemExit("PALIMPSEST_PREBUILT is set and nothing could be compiled; install gcc or clang")


class Wheel(bdist_wheel):
    """With compiled code it is a wheel of one platform, for any Python 3."""

    def finalize_options(self):
        super().finalize_options()
        self.root_is_pure = not PREBUILT

    def get_tag(self):
        python, abi, platform = super().get_tag()
        return ("py3", "none", platform) if PREBUILT else (python, abi, platform)


if __name__ == "__main__":
    readme = for_index((ROOT / "README.md").read_text(encoding="utf-8"), os.environ.get("PALIMPSEST_HOME", ""))
    commands = {"build_py": Build, "bdist_wheel": Wheel}
    setup(
        long_description=readme, long_description_content_type="text/markdown", data_files=data_files(), cmdclass=commands
    )  # fmt: skip
