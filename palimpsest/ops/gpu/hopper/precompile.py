"""Compile the Hopper kernels and pack their machine code; needs nvcc 12.8 or later.

    python -m palimpsest.ops.gpu.hopper.precompile

Every specialisation is one file; `digest` ties the archive to the sources, and a test holds them together.
"""

import hashlib
import subprocess
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOM = Path(__file__).parent
ARCHIVE = ROOM / "sm_90a.zip"
COMMAND = ("nvcc", "-gencode=arch=compute_90a,code=sm_90a", "-cubin", "-O3", "-use_fast_math", "-Xptxas", "-v")


def variants() -> dict[str, tuple[str, list[str]]]:
    """Name -> (source, definitions) of everything that is compiled."""
    found = {}
    for dtype, flag in (("bf16", []), ("fp16", ["-DFP16"])):
        for K in (64, 128):
            flags = [*flag, f"-DKEY_DIM={K}"]
            found[f"inter_chunk_{dtype}_{K}"] = ("inter_chunk.cu", flags)
            for erase in (0, 1, 2):
                for file in ("intra_chunk", "forward", "gradient"):
                    found[f"{file}_{erase}_{dtype}_{K}"] = (f"{file}.cu", [*flags, f"-DERASE={erase}"])
    return found


def digest() -> str:
    """Of all sources, and of how each is compiled."""
    text = hashlib.sha256(repr((COMMAND, sorted(variants().items()))).encode())
    for path in sorted([*ROOM.glob("*.cu"), *ROOM.glob("*.cuh")]):
        text.update(path.read_bytes())
    return text.hexdigest()


def compile_one(source: str, definitions: list[str]) -> tuple[bytes, str]:
    """The machine code of one specialisation, and what the assembler says of its registers."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.cubin"
        command = [*COMMAND, *definitions, str(ROOM / source), "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc could not compile {source} with {' '.join(definitions)}:\n{done.stderr}")
        return out.read_bytes(), done.stderr


def main() -> None:
    names = variants()
    with ThreadPoolExecutor() as pool:
        codes = dict(zip(names, pool.map(lambda v: compile_one(*v)[0], names.values())))
    with zipfile.ZipFile(ARCHIVE, "w", zipfile.ZIP_LZMA) as archive:
        for name, code in {"digest": digest().encode(), **codes}.items():
            entry = zipfile.ZipInfo(name)  # no date: the same sources make the same file
            archive.writestr(entry, code, compress_type=zipfile.ZIP_LZMA)


if __name__ == "__main__":
    main()
