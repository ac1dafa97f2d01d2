"""The page as a static site: the built files, and traces computed now. It can lie on any web server, or on none's network."""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from palimpsest.explainer.code import code
from palimpsest.explainer.server import EXAMPLES, STATIC, Library

LIVE, EXPORTED = '<meta name="palimpsest" content="live"', '<meta name="palimpsest" content="export"'
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
        folder: new, empty, or an earlier export, which is replaced as a whole once the new one is complete.
        library: scenes and model.
        sentences: those that the page offers.
        report: called with the number of traces done and of all.

    Returns:
        The files written.

    Raises:
        ValueError: the folder holds something else, or cannot be written.
    """
    from palimpsest.explainer.scene_file import to_safetensors

    folder = Path(folder)
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
        page.write_text(text.replace(LIVE, EXPORTED), encoding="utf-8")
        data = site / "data"
        data.mkdir()
        heads = [(layer, head) for layer in model.watchable() for head in range(model.model.config.linear_num_heads)]
        total = len(sentences) * len(heads)
        for i, sentence in enumerate(sentences):
            (data / f"order-{i}.safetensors").write_bytes(to_safetensors(scenes.order(model, sentence)))
            (data / f"heads-{i}.safetensors").write_bytes(to_safetensors(scenes.heads(model, sentence)))
            for j, (layer, head) in enumerate(heads):
                scene = scenes.sentence(model, sentence, layer, head)
                if j == 0:
                    (data / f"next-{i}.json").write_text(json.dumps(scene["next"]), encoding="utf-8")
                kept = {name: value for name, value in scene.items() if name not in BEATS}
                (data / f"sentence-{i}-{layer}-{head}.safetensors").write_bytes(to_safetensors(kept))
                report(i * len(heads) + j + 1, total)
        for name in scenes.WORKED:
            kept = {k: x for k, x in scenes.worked(name).items() if k not in BEATS}
            (data / f"worked-{name}.safetensors").write_bytes(to_safetensors(kept))
        (data / "hybrid.safetensors").write_bytes(to_safetensors(scenes.hybrid()))
        about = library.about() | {"examples": list(sentences)}
        (data / "about.json").write_text(json.dumps(about), encoding="utf-8")
        (data / "code.json").write_text(json.dumps(code()), encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        site.rename(folder)
    except OSError as error:
        raise ValueError(f"{str(folder)!r} cannot be written ({error.strerror}); give another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return sorted(path for path in folder.rglob("*") if path.is_file())


def check_target(folder: Path) -> None:
    """Refuses a folder that holds something else, or that has no parent to lie in."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is a file; give a folder")
    if not folder.resolve().parent.is_dir():
        raise ValueError(f"{str(folder.parent)!r} does not exist; make it first, or give another folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "data" / "about.json").is_file():
        raise ValueError(f"{str(folder)!r} holds files that are no earlier export; give a new or empty folder")
