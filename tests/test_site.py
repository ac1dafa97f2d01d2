"""The documentation site: builds strictly, leads only where something is, and asks nobody else for anything."""

import html.parser
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip("mkdocs", reason="the site is built with the docs extra")
ROOT = Path(__file__).parents[1]


class Page(html.parser.HTMLParser):
    """What a page loads, where it leads, and which places it has."""

    def __init__(self, text: str):
        super().__init__()
        self.loads, self.leads, self.places = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if found.get("id"):
            self.places.add(found["id"])
        if tag == "a" and found.get("href"):
            self.leads.append(found["href"])
        if tag == "link" and found.get("rel") not in ("canonical", "prev", "next") and found.get("href"):
            self.loads.append(found["href"])
        if tag in ("script", "img", "iframe", "source", "video", "audio", "embed") and found.get("src"):
            self.loads.append(found["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    run = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return {path: Page(path.read_text()) for path in folder.rglob("*.html")}


def test_every_lesson_and_page_is_there(site):
    built = {path.stem for path in site}
    assert {path.stem for path in (ROOT / "course").glob("[0-9][0-9]_*.py")} <= built
    assert {path.stem for path in (ROOT / "docs").rglob("*.md")} <= built


def test_links_lead_somewhere(site):
    lost = [(path.name, link) for path, page in site.items() for link in page.leads if not _leads(link, path, site)]
    assert not lost


def test_nothing_comes_from_elsewhere(site):
    outside = [(p.name, link) for p, page in site.items() for link in page.loads if urlsplit(link).netloc]
    assert not outside
    missing = [(p.name, link) for p, page in site.items() for link in page.loads if not _file(link, p).exists()]
    assert not [m for m in missing if not m[1].startswith(("data:", "/")) and m[0] != "404.html"]
    styles = {sheet for path in site for sheet in path.parent.rglob("*.css")}
    assert not [sheet for sheet in styles if "url(http" in sheet.read_text() or "@import" in sheet.read_text()]


def test_no_formula_is_left_as_text(site):
    assert not [path.name for path in site if "arithmatex" in path.read_text()]


def _leads(link: str, source: Path, site) -> bool:
    parts = urlsplit(link)
    if parts.scheme or parts.netloc or source.name == "404.html" or parts.path in (".", ".."):
        return True
    target = _file(link, source) if parts.path else source
    if target not in site:
        return target.is_file()
    return parts.fragment in ("", "__top", "__skip", "__codelineno") or unquote(parts.fragment) in site[target].places


def _file(link: str, source: Path) -> Path:
    return (source.parent / unquote(urlsplit(link).path)).resolve()
