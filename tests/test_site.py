"""The documentation site: builds strictly, leads only where something is, and asks nobody else for anything; its code fits
its column, and what the copy button copies can be run.
"""

import functools
import html.parser
import http.server
import subprocess
import sys
import threading
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


@pytest.fixture
def address(site):
    """The site on a port of this machine; the copy button needs one."""
    folder = next(path.parent for path in site if path.name == "404.html")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


COPIED = """[...document.querySelectorAll('.highlight code')].map((code) => {
    code.setAttribute('data-md-copying', '')
    const text = code.innerText
    code.removeAttribute('data-md-copying')
    return text
})"""  # as the theme's copy button does
CUT = """[...document.querySelectorAll('article pre')].filter((x) => x.scrollWidth > x.clientWidth + 1).length
    + Number(document.documentElement.scrollWidth > document.documentElement.clientWidth)"""


def test_code_fits_its_column_and_is_copied_without_prompts(site, address, chromium):
    root = next(path.parent for path in site if path.name == "404.html")
    context = chromium.new_context(viewport={"width": 1440, "height": 900}, permissions=["clipboard-read"])
    page, complaints = context.new_page(), []
    page.on("console", lambda m: complaints.append(m.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    for path in sorted(site):
        if path.name == "404.html" or {"explainer", "gallery", "benchmarks"} & set(path.relative_to(root).parts):
            continue
        for width in (1440, 390):
            page.set_viewport_size({"width": width, "height": 900})
            if width == 1440:
                page.goto(address + path.relative_to(root).as_posix(), wait_until="domcontentloaded")
            assert page.evaluate(CUT) == 0, (path.name, width)
        copied = [line for text in page.evaluate(COPIED) for line in text.splitlines()]
        assert not [line for line in copied if line.startswith((">>>", "...", "$ "))], path.name
    page.set_viewport_size({"width": 1440, "height": 900})
    page.goto(address + "index.html")
    page.locator(".md-clipboard, .md-code__button[data-md-type=copy]").first.click()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.startswith("import torch\nfrom palimpsest import kda\n")
    assert "[ 5." not in copied  # the answer
    assert not complaints
    context.close()


def test_every_page_leads_on(site):
    """Previous and next, and in an order that leaves nobody out."""
    pages = [p for p, page in site.items() if "md-footer__link" in p.read_text()]
    assert len(pages) >= 40


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
