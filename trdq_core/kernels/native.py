"""The compiled library inside this process: loaded once, tested once against the reference, or absent with a reason."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_int, c_int64, c_void_p
from typing import Literal, NamedTuple, get_args

from trdq_core.errors import BackendUnavailable
from trdq_core.kernels import build, selftest

ABI_VERSION = 5  # 5: wall times of the phases; a residual has the columns of all weights
Path = Literal["portable", "avx2", "avx512-vnni"]
PATHS: tuple[Path, ...] = get_args(Path)  # in the order of the library's own numbers

_SIGNATURES = {
    "trdq_transform": [c_void_p, c_void_p, c_int],
    "trdq_quantize": [c_void_p, *[c_void_p] * 4, c_int],
    "trdq_linear": [*[c_void_p] * 4, c_int64, c_void_p, c_int],
    "trdq_linears_from_float": [c_void_p, c_void_p, c_int64, c_void_p, c_int],
    "trdq_attend": [c_void_p, c_int],
    "trdq_measure": [c_int],
    "trdq_phases": [c_void_p],
    "trdq_peak": [c_int, c_int64, c_int, c_void_p],
    "trdq_abi_version": [],
    "trdq_path": [],
    "trdq_limit_path": [c_int],
}

_lock = threading.RLock()
_outcome: tuple[Native | None, str | None] | None = None


class Native(NamedTuple):
    """The loaded library and where it came from."""

    functions: ctypes.CDLL
    library: build.Library


def load() -> Native:
    """The library, built and loaded on the first call; BackendUnavailable with one sentence where that fails."""
    native, reason = _load_once()
    if native is None:
        raise BackendUnavailable(reason)
    return native


def loaded() -> Native | None:
    """The library, built and loaded on the first call, or None where that fails."""
    return _load_once()[0]


def unavailable_reason() -> str | None:
    """One plain sentence on why the C++ kernels do not run here, or None where they do."""
    return _load_once()[1]


def forget() -> None:
    """Drops the loaded library, so that the next call builds or loads again; for tests of the build."""
    global _outcome
    with _lock:
        _outcome = None


@contextmanager
def limited_to(path: Path) -> Iterator[None]:
    """Runs the body with no faster path than this one; for tests, while no other thread computes."""
    functions = load().functions
    functions.trdq_limit_path(PATHS.index(path))
    try:
        yield
    finally:
        functions.trdq_limit_path(len(PATHS) - 1)


def path() -> Path | None:
    """What the loaded library runs on this CPU, or None where there is no library."""
    native = _load_once()[0]
    return None if native is None else PATHS[native.functions.trdq_path()]


def _load_once() -> tuple[Native | None, str | None]:
    return _outcome or _load_locked()  # without the lock once the answer is there: this runs in every call


def _load_locked() -> tuple[Native | None, str | None]:
    global _outcome
    with _lock:  # one thread builds, the others wait for its answer
        if _outcome is None:
            _outcome = _build_open_test()
        return _outcome


def _build_open_test() -> tuple[Native | None, str | None]:
    try:
        library, functions = _find_and_open()
    except build.BuildFailed as error:
        return None, str(error)
    failure = selftest.failure(functions)
    return (Native(functions, library), None) if failure is None else (None, failure)


def _find_and_open() -> tuple[build.Library, ctypes.CDLL]:
    library = build.find_or_build()
    try:
        functions = ctypes.CDLL(str(library.path))
    except OSError:  # built where other libraries are, for one: built here it may load
        try:
            library = build.find_or_build(again=True)
        except build.BuildFailed as error:
            raise build.BuildFailed(
                f"The compiled kernels {library.path} do not load, and building them again failed: {error}"
            ) from error
        functions = _loaded_file(library)
    return library, _with_signatures(library, functions)


def _loaded_file(library: build.Library) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(library.path))
    except OSError as error:
        raise build.BuildFailed(f"The compiled kernels {library.path} do not load: {error}.") from error


def _with_signatures(library: build.Library, functions: ctypes.CDLL) -> ctypes.CDLL:
    try:
        for name, arguments in _SIGNATURES.items():
            function = getattr(functions, name)
            function.argtypes, function.restype = arguments, c_int
    except AttributeError as error:
        raise build.BuildFailed(
            f"The compiled kernels {library.path} are of another version ({error}); remove the file."
        ) from error
    if functions.trdq_abi_version() != ABI_VERSION:
        raise build.BuildFailed(f"The compiled kernels {library.path} are of another version; remove the file.")
    return functions
