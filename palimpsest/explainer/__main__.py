"""python -m palimpsest.explainer: the command by itself."""

import typer

from palimpsest.explainer.command import explain

if __name__ == "__main__":
    typer.run(explain)
