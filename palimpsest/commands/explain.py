"""`palimpsest explain`: the page in a browser, or as a static site."""

import sys
import threading
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from palimpsest.commands.options import Plugin


def explain(
    model: Annotated[
        Path | None,
        typer.Option(help="A run's or checkpoint's folder to watch, in place of the small model that is shipped."),
    ] = None,
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1; 0 takes a free one.")] = 0,
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
    export: Annotated[
        Path | None, typer.Option(help="Write the page as a static site into this folder, and serve nothing.")
    ] = None,
    sentence: Annotated[
        list[str] | None, typer.Option(help="With --export: a sentence that the site offers; may be given again.")
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(help="Draw decay, erase and write into this folder, as PNG and SVG, and serve nothing."),
    ] = None,
    plugin: Plugin = None,
) -> None:
    """See the memory fade, erase and write: one page, served to this machine alone."""
    from palimpsest.commands.options import checkpoint_of

    try:
        if model is not None and (model / "run.json").is_file():  # else nothing needs torch before the page is up
            model = checkpoint_of(str(model))
        if picture is not None:
            from palimpsest.explainer.picture import draw

            for file in draw(picture):
                typer.echo(file)
        elif export is not None:
            _export(export, model, tuple(sentence or ()))
        else:
            _serve(model, port, browser)
    except (ValueError, ImportError) as error:
        typer.echo(f"palimpsest explain: {error}", err=True)
        raise typer.Exit(1) from None


def _serve(model: Path | None, port: int, browser: bool) -> None:
    try:
        import starlette  # noqa: F401  # asked for here, so that its absence is a sentence and not a traceback
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ImportError("the explainer needs starlette and uvicorn: pip install palimpsest-kda[explain]") from error
    from palimpsest.explainer.server import Library, listen, serve

    _check_model(model)

    def ready(url: str) -> None:
        typer.echo(f"The explainer is at {url}  (Ctrl-C ends it)")
        if browser:
            threading.Thread(target=_open, args=(url,), daemon=True).start()

    serve(listen(port), Library(model), ready)


def _open(url: str) -> None:
    try:
        opened = webbrowser.open(url)
    except webbrowser.Error:
        opened = False
    if not opened:
        typer.echo("No browser could be opened; open that address in one yourself.")


def _export(folder: Path, model: Path | None, sentences: tuple[str, ...]) -> None:
    from palimpsest.explainer.export import check_target, export
    from palimpsest.explainer.server import EXAMPLES, Library

    check_target(folder)
    _check_model(model)
    counted = lambda done, total: typer.echo(f"\r{done} of {total} traces", err=True, nl=done == total)
    files = export(folder, Library(model), sentences or EXAMPLES, counted if sys.stderr.isatty() else lambda *_: None)
    size = sum(file.stat().st_size for file in files)
    typer.echo(
        f"{len(files)} files, {size / 1e6:.1f} MB, in {folder}. To look at it: python -m http.server -d {folder}"
    )


def _check_model(model: Path | None) -> None:
    """Before torch is loaded and a page is up, what can be known already."""
    if model is None:
        return
    if not model.is_dir():
        raise ValueError(f"there is no folder {str(model)!r}; give a checkpoint's folder, with config.json in it")
    if not (model / "config.json").is_file():
        raise ValueError(f"the folder {str(model)!r} has no config.json; give a checkpoint's folder")
