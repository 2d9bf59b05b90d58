"""Building the library, choosing a backend, and falling back with one sentence."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.kernels.cases import make_input, make_weight
from trdq_core.errors import BackendUnavailable
from trdq_core.kernels import build, cpu, dispatch, native, reference
from trdq_core.kernels.types import NO_STAGES

CPU = torch.device("cpu")
BUILD = "from trdq_core.kernels import build; print(build.find_or_build())"


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder and a process that has loaded nothing yet."""
    monkeypatch.setenv("TRDQ_CACHE_DIR", str(tmp_path))
    native.forget()
    yield tmp_path
    monkeypatch.undo()
    native.forget()


def assert_falls_back(*fragments: str) -> None:
    """One sentence with the fragments, the torch backend chosen, right results, and an error for the explicit wish."""
    reason = cpu.unavailable_reason()
    assert reason is not None
    assert reason.endswith(".")
    assert "\n" not in reason
    for fragment in fragments:
        assert fragment in reason
    assert dispatch.select_backend(CPU) == "torch"
    assert dispatch.describe()["fallback_reason"] == reason
    x, weight = make_input(3, 40), make_weight(9, 40, 8)
    expected = reference.linear(reference.quantize_activation(x, NO_STAGES, 8, True), weight)
    actual = dispatch.linear_from_float(x, NO_STAGES, weight, None, 8, True)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(BackendUnavailable, match="cannot run"):
        dispatch.select_backend(CPU, "cpp")


def needs_compiler() -> None:
    """Skips where nothing can be built."""
    if not sys.platform.startswith("linux") or shutil.which("g++") is None:
        pytest.skip("needs Linux and g++")


def test_no_compiler(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty PATH: the sentence names what was looked for."""
    monkeypatch.setenv("PATH", str(fresh))
    monkeypatch.delenv("CXX", raising=False)
    assert_falls_back("No C++ compiler was found", "g++", "install g++ or set CXX")


def test_broken_compiler(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that starts and fails: its first error line is quoted."""
    script = fresh / "compiler"
    script.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo fake 1.0 && exit 0\necho "x.cpp: error: no" >&2\nexit 1\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    assert_falls_back("failed with: x.cpp: error: no")
    assert not list((fresh / "kernels").glob("*.so"))
    assert not list((fresh / "kernels").glob("*.tmp"))


def test_compiler_that_hangs(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build over its time limit is stopped."""
    script = fresh / "compiler"
    script.write_text('#!/bin/sh\n[ "$1" = --version ] && echo fake 1.0 && exit 0\nexec sleep 60\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setattr(build, "TIMEOUT_SECONDS", 0.3)
    assert_falls_back("was stopped")


def test_unwritable_cache(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache path that is no folder (this works for root too): the sentence names the folder and the variable."""
    blocker = fresh / "file"
    blocker.write_text("")
    monkeypatch.setenv("TRDQ_CACHE_DIR", str(blocker))
    needs_compiler()
    assert_falls_back("cannot be written", str(blocker), "TRDQ_CACHE_DIR")


def test_file_that_is_no_library(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the compiler makes does not load: tried once more, then reported."""
    needs_compiler()
    commands: list[list[str]] = []

    def run(command: list[str]) -> None:
        commands.append(command)
        Path(command[-1]).write_bytes(b"no library")

    monkeypatch.setattr(build, "_run_compiler", run)
    assert_falls_back("do not load")
    assert len(commands) == 2


@pytest.fixture
def quick(cpp: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A library in a fresh cache that nothing has loaded; what the machine's own compiler makes is a copy, to save time."""
    ready, compiler, run = native.load().library.path.read_bytes(), build.find_compiler(), build._run_compiler

    def copy(command: list[str]) -> None:
        if command[0] != compiler:
            run(command)
        else:
            Path(command[-1]).write_bytes(ready)

    monkeypatch.setattr(build, "_run_compiler", copy)
    monkeypatch.setenv("TRDQ_CACHE_DIR", str(tmp_path))
    native.forget()
    yield build.find_or_build().path
    monkeypatch.undo()
    native.forget()


@pytest.mark.parametrize("damage", ["cut", "other", "no note", "foreign note"])
def test_damaged_and_stale_files_are_built_again(quick: Path, damage: str) -> None:
    """Half a file, another library under the right name, one that nothing is known of: the next process cures it."""
    whole = quick.read_bytes()
    note = quick.with_suffix(".json")
    if damage == "cut":
        quick.write_bytes(whole[: len(whole) // 2])
    elif damage == "other":
        quick.write_bytes(b"another library")
    elif damage == "no note":
        note.unlink()
    else:
        note.write_text("[1]")
    assert native.load().library.path == quick
    assert build._intact(quick)
    assert quick.read_bytes() == whole


def test_library_that_does_not_load_here_is_built_again(quick: Path) -> None:
    """Whole by its checksum, and still no library for this machine."""
    note = json.loads(quick.with_suffix(".json").read_text())
    quick.write_bytes(b"built for another system")
    quick.with_suffix(".json").write_text(json.dumps(note | {"sha256": build._checksum(quick)}))
    assert build._intact(quick)
    assert native.load().library.path == quick


@pytest.mark.parametrize("compiler", ["none", "broken", "newer and broken"])
def test_cached_library_without_a_compiler(
    quick: Path, tmp_path: Path, compiler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Built once, it runs where there is no compiler any more; a damaged one does not, and the compiler is what lacks."""
    version = build.find_or_build().compiler
    script = tmp_path / "compiler"
    newer = '[ "$1" = --version ] && echo gcc 99 && exit 0\n' if compiler == "newer and broken" else ""
    script.write_text(f"#!/bin/sh\n{newer}exit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    if compiler == "none":
        monkeypatch.delenv("CXX")
        monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    native.forget()
    assert native.load().library.path == quick
    assert native.load().library.compiler == version
    quick.write_bytes(quick.read_bytes()[:1000])
    native.forget()
    assert_falls_back({"none": "No C++ compiler", "broken": "does not run"}.get(compiler, "failed with"))


def test_compiler_that_vanishes(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It told its version and was gone: the sentence is about the compiler, not about the cache."""
    script = fresh / "compiler"
    script.write_text('#!/bin/sh\necho fake 1.0\nrm -- "$0"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    assert_falls_back("compiler", "could not be started", str(script))
    assert not list((fresh / "kernels").glob("*.tmp"))


# Loads a library and transforms two rows with it, in a process that has no torch at all.
WITHOUT_TORCH = """
import ctypes, runpy, sys
sys.modules["torch"] = None
structures = runpy.run_path(sys.argv[2])
library = ctypes.CDLL(sys.argv[1])
x, factor, y = (ctypes.c_float * 64)(*range(64)), (ctypes.c_float * 32)(*[2.0] * 32), (ctypes.c_float * 64)()
address = lambda array: ctypes.cast(array, ctypes.c_void_p)
rows = structures["Rows"](x=address(x), tokens=2, width=32, item_rows=1, inverse_scale=address(factor), clip=1.0)
assert library.trdq_transform(ctypes.byref(rows), y, 2) == 0
assert list(y) == [2.0 * i for i in range(64)]
print(library.trdq_abi_version())
"""


def test_torch_is_no_part_of_the_library(cpp: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but C crosses the border, so one file serves every version of torch, and its name says nothing of torch."""
    path = native.load().library.path
    structures = Path(build.__file__).with_name("structures.py")
    command = [sys.executable, "-I", "-c", WITHOUT_TORCH, str(path), str(structures)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert answer.stdout.strip() == str(native.ABI_VERSION), answer.stderr
    before = build._stem()
    monkeypatch.setattr(torch, "__version__", "99.0")
    assert build._stem() == before
    assert path.name.startswith(before)


def test_library_of_another_version(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stale file under the right name, as a cache copied from elsewhere may hold: reported, not called."""
    needs_compiler()
    monkeypatch.setattr(native, "ABI_VERSION", native.ABI_VERSION + 1)
    assert_falls_back("another version", "remove the file")


def test_a_lock_nobody_holds_and_half_a_build_do_not_matter(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed build leaves behind: its lock file and its temporary file."""
    needs_compiler()
    monkeypatch.setattr(build, "FLAGS", ("-O0", *build.FLAGS[1:]))
    folder = fresh / "kernels"
    folder.mkdir(parents=True)
    name = f"{build._stem()}-{build._digest(build._compiler_version(build.find_compiler()))}"
    (folder / f"{name}.lock").touch()
    (folder / f"{name}abc.tmp").write_bytes(b"half a library")
    assert build.find_or_build().path == folder / f"{name}.so"


def test_flags_from_the_environment_build_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build with sanitizers never stands in for the plain one."""
    before = build._stem()
    monkeypatch.setenv(build.EXTRA_FLAGS, "-fsanitize=address")
    assert build._stem() != before
    assert build._flags()[-1] == "-fsanitize=address"


def test_failed_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that computes something else is not used."""
    needs_compiler()
    true_linear = reference.linear
    monkeypatch.setattr(reference, "linear", lambda *arguments: true_linear(*arguments) + 1.0)
    native.forget()
    try:
        reason = cpu.unavailable_reason()
        assert reason is not None
        assert "disagrees with the reference" in reason
        assert dispatch.select_backend(CPU) == "torch"
    finally:
        monkeypatch.undo()
        native.forget()


def test_two_processes_build_at_once_and_a_third_finds_it(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One waits for the other's build, both name the one file, and who comes later builds nothing."""
    needs_compiler()
    command = [sys.executable, "-c", BUILD]
    environment = os.environ | {"TRDQ_CACHE_DIR": str(fresh), "PYTHONPATH": str(Path(__file__).parents[2])}
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [process.communicate(timeout=300)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    monkeypatch.setattr(build, "_run_compiler", lambda command: pytest.fail(f"built again: {command}"))
    library = native.load().library
    assert answers == [str(library)] * 2
    assert list((fresh / "kernels").glob("*.so")) == [library.path]
    assert library.build_seconds > 0


@pytest.mark.parametrize("name", ["cpu_flags", "FLAGS"])
def test_another_cpu_or_other_flags_build_anew(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file's name depends on them, as it does on the compiler's version."""
    before = build._stem()
    assert build._digest("compiler 1") != build._digest("compiler 2")
    monkeypatch.setattr(build, name, (lambda: ("other",)) if name == "cpu_flags" else ("-O1",))
    assert build._stem() != before


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"TRDQ_CACHE_DIR": "/own", "XDG_CACHE_HOME": "/xdg"}, Path("/own/kernels")),
        ({"XDG_CACHE_HOME": "/xdg"}, Path("/xdg/trdq/kernels")),
        ({"HOME": "/someone"}, Path("/someone/.cache/trdq/kernels")),
    ],
)
def test_cache_folder(variables: dict[str, str], expected: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The project's own variable wins, then the desktop standard, then the home folder."""
    for name in ("TRDQ_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert build.cache_folder() == expected


def test_unknown_backend_and_wrong_device() -> None:
    """Wishes that cannot be met say what can."""
    with pytest.raises(BackendUnavailable, match="reference, torch, cpp"):
        dispatch.select_backend(CPU, "cuda")
    with pytest.raises(BackendUnavailable, match="CPU only"):
        dispatch.select_backend(torch.device("cuda"), "cpp")
    if not torch.cuda.is_available():
        assert dispatch.select_backend(torch.device("cuda")) == "torch"


def test_lesser_machines() -> None:
    """AVX2 is enough for the automatic choice; below that it is torch, and the report says why."""
    needs_compiler()
    if native.path() != "portable":
        with native.limited_to("avx2"):
            assert dispatch.select_backend(CPU) == "cpp"
            assert dispatch.kernel_name(8, 8, "cpp") == "int8 AVX2"
    with native.limited_to("portable"):
        assert dispatch.select_backend(CPU) == "torch"
        assert dispatch.select_backend(CPU, "cpp") == "cpp"
        assert "AVX512-VNNI" in dispatch.describe()["fallback_reason"]
        assert dispatch.kernel_name(8, 8, "cpp") == "int8 portable C++"


def test_kernel_names() -> None:
    """What a report calls each kernel."""
    assert dispatch.kernel_name(8, 8, "reference") == "reference float64"
    assert dispatch.kernel_name(4, 4, "reference").endswith("4-bit levels")
    if native.path() == "avx512-vnni":
        assert dispatch.kernel_name(8, 8, "cpp") == "int8 VNNI"
        assert dispatch.kernel_name(4, 8, "cpp") == "int4 packed VNNI"


def test_describe_is_plain_data() -> None:
    """The report's entry holds JSON values only."""
    described = dispatch.describe()
    assert json.loads(json.dumps(described, allow_nan=False)) == described
    assert described["backend"] in dispatch.BACKENDS
    assert described["threads"] == torch.get_num_threads()
    assert (described["fallback_reason"] is None) == (described["backend"] == "cpp")
