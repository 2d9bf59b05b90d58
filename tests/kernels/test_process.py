"""The library as a guest of the process: no leak, torch's own thread pool, and clean under the sanitizers."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import psutil
import pytest
import torch

from tests.kernels.cases import generator, make_stages, make_weight
from trdq_core.kernels import build, native
from trdq_core.kernels.types import Epilogue, Prologue

ROOT = Path(__file__).parents[2]
SANITIZERS = "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined"

# One call of every entry on every path, at sizes that no tile and no register divides; then a write past the end.
SMOKE = """
import ctypes, torch
from tests.kernels.cases import make_input, make_stages, make_weight
from trdq_core.errors import ShapeError
from trdq_core.kernels import cpu, native, structures
from trdq_core.kernels.types import Epilogue, Prologue
assert native.unavailable_reason() is None, native.unavailable_reason()
for path in native.PATHS[: native.PATHS.index(native.path()) + 1]:
    with native.limited_to(path):
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for tokens, width, out in ((1, 1, 1), (14, 96, 70), (37, 33, 129)):
                items = 2 if tokens % 2 == 0 else 1
                x, mods = make_input(tokens, width), torch.zeros(items, width)
                parts = {} if width % 96 else {"scale": True, "rotation": 48, "permute": True, "hadamard": 32, "second": 16}
                stages = make_stages(width, **parts)
                for bits, groups in ((8, 0), (4, 0), (4, 0 if width % 96 else 3)):
                    weight = make_weight(out, width, bits, groups=groups, zero_point=True)
                    for prologue in (None, Prologue("gelu"), Prologue("norm", mods, mods, 1e-6)):
                        cpu.transform(x, stages, prologue)
                        levels = cpu.quantize_activation(x, stages, 8, False, prologue=prologue)
                        cpu.linear(levels, weight, torch.ones(out))
                        added, gate = torch.ones(tokens, 2 * out), torch.ones(items, 2 * out)
                        for epilogue in (None, Epilogue(added), Epilogue(added, gate)):
                            y = cpu.linears_from_float(x, stages, [(weight, None)] * 2, 8, True, None, 1.0, prologue, epilogue)
                            assert torch.equal(*y.split(out, 1))
                if items == 2:
                    try:
                        cpu.transform(x, stages, Prologue("norm", mods, mods[:1], 1e-6))
                        raise SystemExit("a scale for fewer items than the shift was taken")
                    except ShapeError:
                        pass
                q, k = torch.randn(2, tokens, 3 * width), torch.randn(2, tokens + 5, 3 * width)
                hidden = torch.full((2, 1, tokens, tokens + 5), float("-inf"))
                hidden[:, :, 1:, 0] = 0
                for attention in (0, 8):
                    cpu.attend(q, k, k, 3, torch.zeros(2, 1, 1, tokens + 5), attention)
                    y = cpu.attend(q, k, k, 3, hidden, attention)
                    assert not y[:, 0].any() and torch.equal(y, cpu.attend(q, k, k, 3, hidden == 0, attention))
                    assert cpu.attend(q, k, k * float("nan"), 3, None, attention).isnan().all()
print("clean", flush=True)
x, y = torch.zeros(4, 1000), torch.zeros(3, 1000)
rows = structures.Rows(x=x.data_ptr(), tokens=4, width=1000, item_rows=1, clip=1.0)
native.load().functions.trdq_transform(ctypes.byref(rows), y.data_ptr(), 1)
"""


def calls(cpp: ModuleType, rounds: int) -> None:
    """Every entry of the library, `rounds` times, with everything fused; attention with both kinds of products."""
    x, weight = torch.randn(8, 64, generator=generator()), make_weight(64, 64, 8)
    stages, mods = make_stages(64, rotation=32, hadamard=32), torch.zeros(1, 64)
    q, visible = x[None], torch.ones(1, 1, 8, 8, dtype=torch.bool).tril(-1)
    for _ in range(rounds):
        cpp.transform(x, stages, Prologue("gelu"))
        levels = cpp.quantize_activation(x, stages, 8, True)
        cpp.linear(levels, weight)
        cpp.linear_from_float(
            x, stages, weight, None, 8, True, prologue=Prologue("norm", mods, mods, 1e-6), epilogue=Epilogue(x, mods)
        )
        cpp.attend(q, q, q, 2)
        cpp.attend(q, q, q, 2, visible, bits=8)


def test_ten_thousand_calls_leak_nothing(cpp: ModuleType) -> None:
    """Resident memory after 10,000 calls is that after the first few, but for noise: 256 bytes a call would be seen."""
    calls(cpp, 200)
    before = psutil.Process().memory_info().rss
    calls(cpp, 1700)
    assert psutil.Process().memory_info().rss - before < 2_000_000


def test_threads_are_those_of_torch(cpp: ModuleType) -> None:
    """Both libraries call one OpenMP runtime: a second one would bring a second pool, and both would want every core."""
    own = native.load().functions
    theirs = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    addresses = {ctypes.cast(library.omp_get_thread_num, ctypes.c_void_p).value for library in (own, theirs)}
    assert len(addresses) == 1
    torch.set_num_threads(2)
    calls(cpp, 3)
    count = psutil.Process().num_threads()
    calls(cpp, 20)
    assert psutil.Process().num_threads() == count


def sanitized(command: list[str], cache: Path) -> subprocess.CompletedProcess[str]:
    """Runs Python with the sanitizers' runtimes in front and a library that is built with them."""
    compiler = build.find_compiler()
    found = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    if not all(Path(name).is_absolute() and Path(name).exists() for name in found):
        pytest.skip(f"{compiler} has no sanitizer runtimes")
    environment = os.environ | {
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and torch keep memory until the end
        build.EXTRA_FLAGS: SANITIZERS,
        "TRDQ_CACHE_DIR": str(cache),
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=1800)


@pytest.mark.slow
def test_every_entry_is_clean_under_the_sanitizers(cpp: ModuleType, tmp_path: Path) -> None:
    """Address and undefined-behaviour sanitizer over each entry and path; the first fault would end the process. A wrong
    write at the end shows that they look.
    """
    answer = sanitized([sys.executable, "-c", SMOKE], tmp_path)
    assert answer.stdout.strip() == "clean", answer.stderr[-3000:]
    assert answer.returncode != 0
    assert "heap-buffer-overflow" in answer.stderr


@pytest.mark.skipif("TRDQ_SANITIZE" not in os.environ, reason="set TRDQ_SANITIZE=1, or make sanitize: takes minutes")
def test_all_kernel_tests_pass_under_the_sanitizers(cpp: ModuleType, tmp_path: Path) -> None:
    """The oracle tests again, in the library that is built with the sanitizers."""
    files = ["test_linear.py", "test_quantize.py", "test_fused.py", "test_attention.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", *(f"tests/kernels/{name}" for name in files)]
    answer = sanitized(command, tmp_path)
    assert answer.returncode == 0, answer.stdout[-3000:] + answer.stderr[-3000:]
