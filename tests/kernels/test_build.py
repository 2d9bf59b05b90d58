"""Building the library, choosing a backend, and falling back with one sentence."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

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
    """A damaged file in the cache is reported, not loaded."""
    needs_compiler()
    monkeypatch.setattr(build, "_run_compiler", lambda command: Path(command[-1]).write_bytes(b"no library"))
    assert_falls_back("do not load", "remove the file")


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
    name = f"trdq-kernels-{build._fingerprint(build._compiler_version(build.find_compiler()))}"
    (folder / f"{name}.lock").touch()
    (folder / f"{name}abc.tmp").write_bytes(b"half a library")
    assert build.find_or_build().path == folder / f"{name}.so"


def test_flags_from_the_environment_build_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build with sanitizers never stands in for the plain one."""
    before = build._fingerprint("compiler 1")
    monkeypatch.setenv(build.EXTRA_FLAGS, "-fsanitize=address")
    assert build._fingerprint("compiler 1") != before
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
    before = build._fingerprint("compiler 1")
    assert build._fingerprint("compiler 2") != before
    monkeypatch.setattr(build, name, (lambda: ("other",)) if name == "cpu_flags" else ("-O1",))
    assert build._fingerprint("compiler 1") != before


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
