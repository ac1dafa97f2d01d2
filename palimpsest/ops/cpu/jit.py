"""From delta_memory.c to a loaded library: compiled on first use, kept in the user's cache, checked before it is opened.

A cached library is one file, `delta_memory-<key>-<digest>.so`. Its key is made of source, flags, processor and
compiler, so a change of any of them is another file. Its digest is that of its own bytes, so a file that is cut short
or altered is seen before it is opened, thrown away and built again. It is compiled in a folder of its own and then
renamed: processes that compile at once, or die while they do, leave either a whole library or none.

Where the cache cannot be written, each process compiles for itself in a temporary folder. Where there is no compiler, a
library that came with the package is taken: `prebuild` makes them, for a wheel that is built with PALIMPSEST_PREBUILT=1.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
import warnings
from pathlib import Path

SOURCE = Path(__file__).with_name("delta_memory.c")
OPTIMISE = ("-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic", "-fno-math-errno", "-fno-trapping-math")
SHARED = ("-std=gnu11", "-shared", "-fPIC")
# Tried in this order. Apple's compiler has no OpenMP, and some have no name for the processor they run on.
FLAGS = (("-march=native", "-fopenmp"), ("-march=native",), ("-mcpu=native",), ())
READY = SOURCE.with_name("prebuilt")
WIDE = {"avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"}  # what Linux calls the parts of x86-64-v3 that matter here
PATIENCE = 120  # seconds for one compilation, which takes two on an idle machine


class CannotCompileError(RuntimeError):
    """Why there is no library, and what to install."""


@functools.cache
def library() -> ctypes.CDLL:
    """The kernels, compiled if need be.

    Raises:
        CannotCompileError: no compiler was found, or none of its ways to compile worked.
    """
    try:
        return load(find_compiler(), cache_folder())
    except CannotCompileError:
        for path in prebuilt():
            with contextlib.suppress(
                OSError
            ):  # without the threads' library that it was linked with: the next has none
                return _open(path)
        raise


def prebuild(compiler: Path, folder: Path) -> list[Path]:
    """Libraries for machines without a compiler, into `folder`: the best first, for this kind of processor."""
    levels = (("v3", ("-march=x86-64-v3",)),) if platform.machine() in ("x86_64", "AMD64") else ()
    built = []
    folder.mkdir(parents=True, exist_ok=True)
    for level, march in (*levels, ("any", ())):
        for threads, flags in (("threads", ("-fopenmp",)), ("single", ())):
            with contextlib.suppress(CannotCompileError), tempfile.TemporaryDirectory(prefix="palimpsest-") as place:
                made = compile_source(compiler, Path(place), flags=((*march, *flags),))
                name = f"delta_memory-{platform.machine()}-{level}-{threads}-{_of_source()}.so"
                built.append(Path(shutil.copy(made, folder / name)))
    return built


def prebuilt() -> list[Path]:
    """Libraries that came with the package, of this very source and for this processor; the best first."""
    found = []
    for level in ("v3", "any") if set(_flags()) >= WIDE else ("any",):
        names = (
            f"delta_memory-{platform.machine()}-{level}-{threads}-{_of_source()}.so"
            for threads in ("threads", "single")
        )
        found += [READY / name for name in names if (READY / name).is_file()]
    return found


def facts() -> dict[str, str]:
    """What there is to say of these kernels on this machine: compiler, cache, and libraries that came with the package."""
    said = {}
    try:
        said["compiler"] = str(find_compiler())
    except CannotCompileError:
        said["compiler"] = "none"
    cache = cache_folder()
    kept = [] if cache is None else sorted(cache.glob("delta_memory-*.so"))
    size = sum(path.stat().st_size for path in kept)
    said["cache"] = (
        "none: this user has no home" if cache is None else f"{cache}, {len(kept)} kernels, {size / 1e6:.1f} MB"
    )
    if ready := prebuilt():
        said["came with the package"] = ", ".join(path.name for path in ready)
    return said


def refusal() -> str | None:
    """Why this machine cannot run the kernels, or None. The first "why" of a process also warns."""
    return _refusal()


# What torch.compiler.assume_constant_result does, without loading the whole of torch's compiler for it (3 seconds).
setattr(refusal, "_dynamo_marked_constant", True)  # noqa: B010


@functools.cache
def _refusal() -> str | None:
    try:
        library()
    except CannotCompileError as why:
        warnings.warn(f"KDA runs in its slower PyTorch form on this CPU: the C kernel {why}", stacklevel=2)
        return str(why)
    return None


def find_compiler() -> Path:
    """The system's C compiler: $CC, else cc, gcc or clang."""
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and (path := shutil.which(name)):
            return Path(path).resolve()
    raise CannotCompileError(
        "needs a C compiler and found none; install gcc or clang (Debian, Ubuntu: `apt install gcc`; macOS: "
        "`xcode-select --install`) and start again"
    )


def cache_folder() -> Path | None:
    """Where compiled kernels of this user are kept; None for a user without a home."""
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache) / "palimpsest"
    try:
        return Path.home() / ".cache" / "palimpsest"
    except RuntimeError:
        return None


def load(compiler: Path, cache: Path | None, *, source: Path = SOURCE) -> ctypes.CDLL:
    """Open the cached library for this source, compiler and processor, or compile and keep it."""
    if cache is not None:
        with contextlib.suppress(OSError):  # not ours to write, full, or mounted so that nothing in it may run
            return _load_from(cache, compiler, source)
    try:
        with tempfile.TemporaryDirectory(prefix="palimpsest-", ignore_cleanup_errors=True) as folder:
            return _open(compile_source(compiler, Path(folder), source=source))
    except OSError as error:
        raise CannotCompileError(f"could not be built or opened ({error}); install or repair gcc or clang") from None


def _load_from(cache: Path, compiler: Path, source: Path) -> ctypes.CDLL:
    key = _key(compiler, source)
    for path in sorted(cache.glob(f"delta_memory-{key}-*.so")):
        if path.stem.rpartition("-")[2] == _digest(path):
            return _open(path)
        _discard(path)
    cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    _sweep(cache)
    with tempfile.TemporaryDirectory(prefix="build-", dir=cache, ignore_cleanup_errors=True) as folder:
        built = compile_source(compiler, Path(folder), source=source)
        opened = _open(built)  # before it is kept: what cannot be opened is not worth keeping
        os.replace(built, cache / f"delta_memory-{key}-{_digest(built)}.so")
    return opened


def compile_source(
    compiler: Path, folder: Path, *, source: Path = SOURCE, flags: tuple[tuple[str, ...], ...] = FLAGS
) -> Path:
    """Compile into `folder` with the first of `flags` that works. Raises CannotCompileError with the last complaint."""
    complaint = ""
    for machine in flags:
        built = folder / "delta_memory.so"
        command = [str(compiler), *OPTIMISE, *SHARED, *machine, str(source), "-o", str(built), "-lm"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            raise CannotCompileError(f"did not compile: {compiler} took more than {PATIENCE} s") from None
        except OSError as error:
            raise CannotCompileError(f"did not compile: {compiler} does not run ({error})") from None
        if done.returncode == 0 and built.is_file():
            return built
        errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
        complaint = (errors or done.stderr.splitlines() or [f"exit status {done.returncode}"])[0]
    if shutil.disk_usage(folder).free < 1 << 20:
        raise OSError("no space left to compile in")
    raise CannotCompileError(f"did not compile: {compiler} said `{complaint}`; install or repair gcc or clang")


def _open(path: Path) -> ctypes.CDLL:
    opened = ctypes.CDLL(str(path))
    for name in ("delta_memory_forward", "delta_memory_backward", "delta_memory_step"):
        if not hasattr(opened, name):
            raise OSError(f"{path} has no {name}")
    return opened


def _key(compiler: Path, source: Path) -> str:
    made_by = compiler.stat()
    facts = (source.read_bytes(), OPTIMISE, SHARED, FLAGS, compiler, made_by.st_size, made_by.st_mtime_ns, _processor())
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _of_source() -> str:
    return hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]


def _flags() -> list[str]:
    """What the processor can do, as Linux says it."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return []


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    names = ("model name", "flags", "Features", "CPU part")
    return repr((platform.machine(), platform.processor(), [line for line in lines if line.startswith(names)]))


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:32]
    except OSError:
        return ""


def _discard(path: Path) -> None:
    with contextlib.suppress(OSError):  # not ours to remove: then it is only skipped
        path.unlink()


def _sweep(cache: Path) -> None:
    """Remove what compilations that were killed an hour ago or more left behind."""
    for folder in cache.glob("build-*"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > 3600:
                shutil.rmtree(folder, ignore_errors=True)
