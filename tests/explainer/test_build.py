"""The page in the package is the one that its sources make, and it is light and alone."""

import gzip
import hashlib
import json
import re
from pathlib import Path

import pytest

from palimpsest.explainer.scene_file import to_safetensors
from palimpsest.explainer.scenes import worked
from palimpsest.explainer.server import STATIC

SOURCES = Path(__file__).parents[2] / "web"


def test_the_built_page_is_of_these_sources():
    if not SOURCES.is_dir():
        pytest.skip("the page's sources are not part of an installed package")
    digest = hashlib.sha256()
    names = [
        "index.html",
        "package-lock.json",
        "vite.config.ts",
        *(f"src/{p.name}" for p in (SOURCES / "src").iterdir()),
    ]
    for name in sorted(names):
        digest.update(f"{name}\n".encode() + (SOURCES / name).read_bytes())
    built = json.loads((STATIC / "build.json").read_text())["sources"]
    assert built == digest.hexdigest(), "run npm ci && npm run build in web/, and commit what it writes"


def test_the_whole_page_weighs_less_than_a_megabyte_and_a_half():
    packed = lambda path: path.read_bytes() if path.suffix == ".woff2" else gzip.compress(path.read_bytes())
    assert sum(len(packed(path)) for path in STATIC.rglob("*") if path.is_file()) < 1.5e6


def test_the_page_asks_no_one_else():
    for path in (*STATIC.glob("*.html"), *STATIC.glob("assets/*.css")):
        text = re.sub(r"http://www\.w3\.org/[\w/]+", "", path.read_text(encoding="utf-8"))
        assert "http://" not in text, path
        assert "https://" not in text, path
        assert not re.search(r"""(src|href)=["']//""", text), path


def test_the_first_picture_is_the_librarys():
    assert (STATIC / "first.safetensors").read_bytes() == to_safetensors(worked("walk"))


def test_every_licence_is_there():
    text = (STATIC / "LICENSES.txt").read_text(encoding="utf-8")
    for name in ("katex", "d3-scale", "d3-shape", "@fontsource-variable/inter", "@fontsource-variable/source-serif-4"):
        assert re.search(rf"^{re.escape(name)} [\d.]+ \(", text, re.MULTILINE), name
    assert "No licence text" not in text
