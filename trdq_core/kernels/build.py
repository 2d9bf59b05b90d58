"""Compiles the C++ kernels on first use into a per-user cache, and finds them there later.

The library's name carries a hash of the sources, the flags and the CPU's feature list, and one of the compiler's version,
so a new version, compiler or machine builds anew and never loads a stale file. A note beside it holds its checksum: what
was damaged or copied there is built again. torch's version is no part of the name, since the library calls nothing of
torch. Where no compiler works, what another one has built from the same sources is taken. Two processes that build at once
wait for each other at a file lock. Everything that can go wrong ends in `BuildFailed`, whose text is one plain sentence.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from trdq_core.cache import cache_root

SOURCES = Path(__file__).parent / "csrc"
MAIN_SOURCE = "api.cpp"
# No -march: the library chooses its path by the CPU it finds itself on. -w: gcc 12 warns of its own AVX512 headers.
FLAGS = ("-O3", "-std=c++17", "-fopenmp", "-shared", "-fPIC", "-fvisibility=hidden", "-w")
EXTRA_FLAGS = "TRDQ_KERNEL_FLAGS"  # an environment variable; a build with sanitizers is made by it
TIMEOUT_SECONDS = 180.0
CPU_FEATURES = ("avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8")


class BuildFailed(RuntimeError):
    """The library cannot be had; the text says why and what to do, in one sentence."""


class Library(NamedTuple):
    """A compiled library on disk and how it came to be."""

    path: Path
    compiler: str
    build_seconds: float  # of the build that made the file, in this process or an earlier one


def find_or_build(*, again: bool = False) -> Library:
    """The library for these sources and this CPU, compiled if it is not in the cache or, on request, once more. Or BuildFailed.

    Without a compiler that works, the cache may still have it from another one.
    """
    if not sys.platform.startswith("linux"):
        raise BuildFailed(f"The C++ kernels are built on Linux only, and this is {sys.platform}.")
    try:
        compiler = find_compiler()
        version = _compiler_version(compiler)
        path = cache_folder() / f"{_stem()}-{_digest(version)}.so"
        if again or not _intact(path):
            _build_locked(compiler, version, path, again)
    except BuildFailed:
        found = None if again else _built_before()
        if found is None:
            raise
        return found
    return _describe(path)


def _built_before() -> Library | None:
    """The newest whole library of these sources in the cache, whatever compiler made it."""
    try:
        found = sorted(cache_folder().glob(f"{_stem()}-*.so"), key=lambda path: path.stat().st_mtime)
    except OSError:
        return None
    return next((_describe(path) for path in reversed(found) if _intact(path)), None)


def find_compiler() -> str:
    """Path of the C++ compiler: $CXX, else g++ or c++. Not clang++ by itself: it would bring a second OpenMP runtime."""
    names = [name for name in (os.environ.get("CXX"), "g++", "c++") if name]
    for name in names:
        found = shutil.which(name)
        if found:
            return found
    raise BuildFailed(f"No C++ compiler was found (looked for {', '.join(names)}); install g++ or set CXX.")


def cache_folder() -> Path:
    """$TRDQ_CACHE_DIR/kernels, else $XDG_CACHE_HOME/trdq/kernels, or the same in ~/.cache, or in a private temporary folder."""
    own = os.environ.get("TRDQ_CACHE_DIR")
    if own:
        return Path(own) / "kernels"
    return cache_root() / "trdq" / "kernels"


def cpu_flags() -> tuple[str, ...]:
    """Feature names of the first CPU as Linux lists them, sorted; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ()
    line = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
    return tuple(sorted(line.partition(":")[2].split()))


def cpu_features() -> tuple[str, ...]:
    """Those of `CPU_FEATURES` that this CPU has: what a report should show."""
    present = set(cpu_flags())
    return tuple(name for name in CPU_FEATURES if name in present)


def _stem() -> str:
    """The name of the library but for the compiler's part."""
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        if source.suffix in (".cpp", ".h"):
            digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    for part in (" ".join(_flags()), platform.machine(), " ".join(cpu_flags())):
        digest.update(part.encode() + b"\0")
    return f"trdq-kernels-{digest.hexdigest()[:20]}"


def _digest(compiler_version: str) -> str:
    return hashlib.sha256(compiler_version.encode()).hexdigest()[:8]


def _flags() -> tuple[str, ...]:
    return (*FLAGS, *os.environ.get(EXTRA_FLAGS, "").split())


def _compiler_version(compiler: str) -> str:
    try:
        answer = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=20.0, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildFailed(f"The compiler {compiler} does not run ({_last_line(str(error))}).") from error
    return answer.stdout.partition("\n")[0].strip()


def _build_locked(compiler: str, version: str, path: Path, again: bool) -> None:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _file_lock(path.with_suffix(".lock")):
            if again or not _intact(path):
                _compile(compiler, version, path)
    except OSError as error:
        raise BuildFailed(
            f"The kernel cache {path.parent} cannot be written ({error.strerror or error}); "
            "set TRDQ_CACHE_DIR to a folder that can."
        ) from error


@contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    import fcntl

    with path.open("w") as file:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise BuildFailed(
                        f"Another process has held {path} for {TIMEOUT_SECONDS:.0f} s; end it or remove the file."
                    ) from None
                time.sleep(0.05)
        yield


def _compile(compiler: str, version: str, path: Path) -> None:
    # Compiled under another name in the same folder and renamed at the end: a reader never sees half a file.
    handle, temporary = tempfile.mkstemp(prefix=path.stem, suffix=".tmp", dir=path.parent)
    os.close(handle)
    started = time.monotonic()
    try:
        _run_compiler([compiler, *_flags(), str(SOURCES / MAIN_SOURCE), "-o", temporary])
        seconds = time.monotonic() - started
        notes = {"compiler": version, "build_seconds": round(seconds, 2), "sha256": _checksum(Path(temporary))}
        path.with_suffix(".json").write_text(json.dumps(notes))
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _run_compiler(command: list[str]) -> None:
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    except OSError as error:
        raise BuildFailed(f"The compiler {command[0]} could not be started ({error.strerror or error}).") from error
    except subprocess.TimeoutExpired as error:
        raise BuildFailed(f"Compiling the C++ kernels took over {TIMEOUT_SECONDS:.0f} s and was stopped.") from error
    if answer.returncode != 0:
        errors = [line for line in answer.stderr.splitlines() if "error" in line]
        reason = errors[0] if errors else _last_line(answer.stderr) or f"exit status {answer.returncode}"
        raise BuildFailed(f"Compiling the C++ kernels failed with: {reason.strip().rstrip('.')}.")


def _intact(path: Path) -> bool:
    """Whether the library is there as its build left it."""
    try:
        return path.is_file() and _notes(path).get("sha256") == _checksum(path)
    except OSError:
        return False


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _notes(path: Path) -> dict[str, Any]:
    """What the build wrote beside the library; empty where that cannot be read."""
    try:
        notes = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return notes if isinstance(notes, dict) else {}


def _describe(path: Path) -> Library:
    notes = _notes(path)
    try:
        seconds = float(notes["build_seconds"])
    except (ValueError, KeyError, TypeError):
        seconds = math.nan
    return Library(path, str(notes.get("compiler", "unknown")), seconds)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
