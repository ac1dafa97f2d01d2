"""Compile the Hopper kernels and pack their machine code; needs nvcc 12.8 or later.

    python -m palimpsest.ops.gpu.hopper.precompile            make sm_90a.zip, and say with which compiler
    python -m palimpsest.ops.gpu.hopper.precompile --check    compile anew and compare with sm_90a.zip, which stays as it is

Every specialisation is one file. `digest` ties the archive to the sources, `compiler` says what made it; the same
compiler makes the same bytes.
"""

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOM = Path(__file__).parent
ARCHIVE = ROOM / "sm_90a.zip"
COMMAND = ("nvcc", "-gencode=arch=compute_90a,code=sm_90a", "-cubin", "-O3", "-use_fast_math", "-Xptxas", "-v")


def variants() -> dict[str, tuple[str, list[str]]]:
    """Name -> (source, definitions) of everything that is compiled."""
    jobs = {}
    for dtype, flag in (("bf16", []), ("fp16", ["-DFP16"])):
        for K in (64, 128):
            flags = [*flag, f"-DKEY_DIM={K}"]
            jobs[f"inter_chunk_{dtype}_{K}"] = ("inter_chunk.cu", flags)
            for erase in (0, 1, 2):
                for file in ("intra_chunk", "forward", "gradient"):
                    jobs[f"{file}_{erase}_{dtype}_{K}"] = (f"{file}.cu", [*flags, f"-DERASE={erase}"])
    return jobs


def digest() -> str:
    """Of all sources, and of how each is compiled."""
    text = hashlib.sha256(repr((COMMAND, sorted(variants().items()))).encode())
    for path in sorted([*ROOM.glob("*.cu"), *ROOM.glob("*.cuh")]):
        text.update(path.read_bytes())
    return text.hexdigest()


def compiler() -> str | None:
    """The compiler on PATH, "nvcc 13.0.88"; None if there is none."""
    if shutil.which(COMMAND[0]) is None:
        return None
    version = re.search(
        r"release [^,]*, V(\S+)", subprocess.run([COMMAND[0], "--version"], capture_output=True, text=True).stdout
    )
    return f"nvcc {version[1]}" if version else None


def compile_one(source: str, definitions: list[str]) -> tuple[bytes, str]:
    """The machine code of one specialisation, and what the assembler says of its registers."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.cubin"
        command = [*COMMAND, *definitions, str(ROOM / source), "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc could not compile {source} with {' '.join(definitions)}:\n{done.stderr}")
        return out.read_bytes(), done.stderr


def compile_all(names: Iterable[str]) -> dict[str, bytes]:
    """The machine code of the named specialisations."""
    wanted = {name: variants()[name] for name in names}
    with ThreadPoolExecutor() as pool:
        return dict(zip(wanted, pool.map(lambda x: compile_one(*x)[0], wanted.values())))


def write() -> None:
    """Compile everything and write the archive."""
    entries = {"digest": digest().encode(), "compiler": str(compiler()).encode(), **compile_all(variants())}
    with zipfile.ZipFile(ARCHIVE, "w", zipfile.ZIP_LZMA) as archive:
        for name, content in entries.items():
            entry = zipfile.ZipInfo(name)  # no date: the same sources make the same file
            archive.writestr(entry, content, compress_type=zipfile.ZIP_LZMA)


def shipped(name: str) -> bytes:
    """An entry of the archive."""
    with zipfile.ZipFile(ARCHIVE) as archive:
        return archive.read(name)


def differences(names: Iterable[str]) -> list[str]:
    """Those of the named specialisations whose machine code is not, byte for byte, what the archive has."""
    return [name for name, code in compile_all(names).items() if code != shipped(name)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m palimpsest.ops.gpu.hopper.precompile", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the archive instead of writing it")
    check, here = parser.parse_args().check, compiler()
    if here is None:
        raise SystemExit("nvcc is not on PATH; it comes with CUDA 12.8 and later")
    if not check:
        write()
        sys.stdout.write(f"{ARCHIVE.name}: {len(variants())} files, compiled with {here}\n")
        return 0
    made_with = shipped("compiler").decode()
    if here != made_with:
        raise SystemExit(
            f"{ARCHIVE.name} was made with {made_with}, and this is {here}: their bytes cannot be compared"
        )
    different = differences(variants())
    sys.stdout.write(f"{len(variants())} files, {len(different)} differ from {ARCHIVE.name} {' '.join(different)}\n")
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
