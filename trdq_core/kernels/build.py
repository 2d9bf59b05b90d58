"""Compiles the C++ kernels on first use into a per-user cache, and finds them there later.

The library's name carries a hash of the sources, the compiler's version, the flags and the CPU's feature list, so a
new version, compiler or machine builds anew and never loads a stale file. Two processes that build at once wait for
each other at a file lock. Everything that can go wrong ends in `BuildFailed`, whose text is one plain sentence.
"""

from __future__ import annotations

import hashlib
import json
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
from typing import NamedTuple

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


def find_or_build() -> Library:
    """The library for these sources, this compiler and this CPU, compiled if it is not in the cache. Or BuildFailed."""
    if not sys.platform.startswith("linux"):
        raise BuildFailed(f"The C++ kernels are built on Linux only, and this is {sys.platform}.")
    compiler = find_compiler()
    version = _compiler_version(compiler)
    path = cache_folder() / f"trdq-kernels-{_fingerprint(version)}.so"
    if not path.exists():
        _build_locked(compiler, version, path)
    return _describe(path, version)


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


def _fingerprint(compiler_version: str) -> str:
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        if source.suffix in (".cpp", ".h"):
            digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    for part in (compiler_version, " ".join(_flags()), platform.machine(), " ".join(cpu_flags())):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:20]


def _flags() -> tuple[str, ...]:
    return (*FLAGS, *os.environ.get(EXTRA_FLAGS, "").split())


def _compiler_version(compiler: str) -> str:
    try:
        answer = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=20.0, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildFailed(f"The compiler {compiler} does not run ({_last_line(str(error))}).") from error
    return answer.stdout.partition("\n")[0].strip()


def _build_locked(compiler: str, version: str, path: Path) -> None:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _file_lock(path.with_suffix(".lock")):
            if not path.exists():
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
        path.with_suffix(".json").write_text(json.dumps({"compiler": version, "build_seconds": round(seconds, 2)}))
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _run_compiler(command: list[str]) -> None:
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise BuildFailed(f"Compiling the C++ kernels took over {TIMEOUT_SECONDS:.0f} s and was stopped.") from error
    if answer.returncode != 0:
        errors = [line for line in answer.stderr.splitlines() if "error" in line]
        reason = errors[0] if errors else _last_line(answer.stderr) or f"exit status {answer.returncode}"
        raise BuildFailed(f"Compiling the C++ kernels failed with: {reason.strip().rstrip('.')}.")


def _describe(path: Path, version: str) -> Library:
    try:
        notes = json.loads(path.with_suffix(".json").read_text())
        seconds = float(notes["build_seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        seconds = float("nan")
    return Library(path, version, seconds)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
