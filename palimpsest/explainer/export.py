"""The page as a static site: the built files, and traces computed now. It can lie on any web server, and opens from a folder.

Everything that is not a picture of the page itself travels in one script, data.js: a page opened by a double click may
run scripts that lie beside it, and fetch nothing.

FOLDER/export.json says which files an export wrote, with their digests: a later export replaces those and no others.
"""

import base64
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from palimpsest import __version__
from palimpsest.explainer.code import code
from palimpsest.explainer.server import EXAMPLES, STATIC, Library

LIVE, EXPORTED = '<meta name="palimpsest" content="live"', '<meta name="palimpsest" content="export"'
SCRIPT = "<script defer src="
MANIFEST = "export.json"
BEATS = (
    "decayed",
    "erased",
    "written",
    "held",
    "next",
)  # the page computes these itself; `next` travels once a sentence


def export(
    folder: Path,
    library: Library,
    sentences: tuple[str, ...] = EXAMPLES,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path]:
    """Writes the site.

    The memory's inputs of every layer and head are taken from the model here. The page then runs the law over them in
    the browser, in float64, and shows how far it is from the outputs and the last memory that this library computed.

    Args:
        folder: new, empty, or an earlier export as it was written, whose files are replaced once the new ones are complete.
        library: scenes and model.
        sentences: those that the page offers.
        report: called with the number of traces done and of all.

    Returns:
        The files written.

    Raises:
        ValueError: the folder holds anything that no export wrote, or cannot be written.
    """
    from palimpsest.explainer.scene_file import to_safetensors

    folder = Path(folder).resolve()
    check_target(folder)
    scenes, model = library.get()
    try:
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise ValueError(f"{str(folder.parent)!r} cannot be written ({error.strerror}); give another folder") from error
    try:
        partial.chmod(0o755)
        site = partial / "site"
        shutil.copytree(STATIC, site)
        page = site / "index.html"
        text = page.read_text(encoding="utf-8")
        assert LIVE in text, "the built page has lost its mark"
        assert SCRIPT in text, "the built page has lost its script"
        data = f'<script defer src="./data.js"></script>\n    {SCRIPT}'
        page.write_text(text.replace(LIVE, EXPORTED).replace(SCRIPT, data, 1), encoding="utf-8")
        files = {"first.safetensors": (site / "first.safetensors").read_bytes()}
        heads = [(layer, head) for layer in model.watchable() for head in range(model.model.config.linear_num_heads)]
        total = len(sentences) * len(heads)
        for i, sentence in enumerate(sentences):
            files[f"data/order-{i}.safetensors"] = to_safetensors(scenes.order(model, sentence))
            files[f"data/answers-{i}.safetensors"] = to_safetensors(scenes.answers(model, sentence))
            files[f"data/heads-{i}.safetensors"] = to_safetensors(scenes.heads(model, sentence))
            for j, (layer, head) in enumerate(heads):
                scene = scenes.sentence(model, sentence, layer, head)
                if j == 0:
                    files[f"data/next-{i}.json"] = json.dumps(scene["next"]).encode()
                kept = {name: value for name, value in scene.items() if name not in BEATS}
                files[f"data/sentence-{i}-{layer}-{head}.safetensors"] = to_safetensors(kept)
                within = scenes.inside(model, sentence, layer, head, 0)
                kept = {
                    name: within[name].float() for name in ("half_life", "eigenvalues")
                }  # the page computes the rest
                files[f"data/inside-{i}-{layer}-{head}.safetensors"] = to_safetensors(kept)
                report(i * len(heads) + j + 1, total)
        for name in scenes.WORKED:
            kept = {k: x for k, x in scenes.worked(name).items() if k not in BEATS}
            files[f"data/worked-{name}.safetensors"] = to_safetensors(kept)
        files["data/hybrid.safetensors"] = to_safetensors(scenes.hybrid())
        about = library.about() | {"examples": list(sentences)}
        files["data/about.json"] = json.dumps(about).encode()
        files["data/code.json"] = json.dumps(code()).encode()
        packed = json.dumps({name: base64.b64encode(content).decode() for name, content in files.items()})
        (site / "data.js").write_text(f"globalThis.PALIMPSEST = {packed};\n", encoding="utf-8")
        _replace(folder, site)
    except OSError as error:
        raise ValueError(f"{str(folder)!r} cannot be written ({error.strerror}); give another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return sorted(path for path in folder.rglob("*") if path.is_file())


def check_target(folder: Path) -> None:
    """Refuses a folder that holds anything that no export wrote, or that has no parent to lie in."""
    folder = folder.resolve()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is a file; give a folder")
    if not folder.parent.is_dir():
        raise ValueError(f"{str(folder.parent)!r} does not exist; make it first, or give another folder")
    written = read_manifest(folder)
    for file in _files(folder):
        path = folder / file
        ours = file in written and path.is_file() and not path.is_symlink() and _digest(path) in written[file]
        if not ours and file not in (MANIFEST, f".{MANIFEST}"):
            raise ValueError(
                f"{str(folder)!r} holds {file!r}, which no export wrote as it is now; give a new or empty folder"
            )


def read_manifest(folder: Path) -> dict[str, list[str]]:
    """file -> the digests that exports into this folder may have given it; {} where there was none."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return {str(name): list(digests) for name, digests in files.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(
            f"{str(folder / MANIFEST)!r} does not say what an export wrote; give a new or empty folder"
        ) from None


def _replace(folder: Path, site: Path) -> None:
    """Puts the site's files in the folder, which stays, in place of those of the earlier export.

    The manifest names old and new files while they change places, so that an interrupted export can be made again.
    """
    check_target(folder)  # again: drawing the site has taken a while
    before, now = read_manifest(folder), {file: [_digest(site / file)] for file in _files(site)}
    folder.mkdir(exist_ok=True)
    _write_manifest(folder, {file: [*before.get(file, ()), *now.get(file, ())] for file in before | now})
    for file in now:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).replace(folder / file)
    for file in set(_files(folder)) & before.keys() - now.keys():
        (folder / file).unlink()
    _write_manifest(folder, now)


def _write_manifest(folder: Path, files: dict[str, list[str]]) -> None:
    whole = folder / f".{MANIFEST}"
    whole.write_text(json.dumps({"palimpsest": __version__, "files": files}, indent=1), encoding="utf-8")
    whole.replace(folder / MANIFEST)


def _files(folder: Path) -> list[str]:
    """All but folders, by their paths within it; what a link leads to is not entered."""
    return sorted(
        str((Path(place) / name).relative_to(folder))
        for place, folders, files in os.walk(folder)
        for name in [*files, *(name for name in folders if (Path(place) / name).is_symlink())]
    )


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
