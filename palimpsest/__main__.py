"""`palimpsest`, and `python -m palimpsest`."""

import sys


def main() -> None:
    """The command line."""
    try:
        from palimpsest.cli import run
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(f"the command line needs {error.name}: pip install palimpsest-kda[cli]")
    sys.exit(run())


if __name__ == "__main__":
    main()
