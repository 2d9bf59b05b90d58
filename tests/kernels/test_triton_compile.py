"""Triton's kernels as torch operators, compiled for chips that are not here, tuned, and left alone on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.kernels.cases import make_input, make_stages, make_weight
from tests.kernels.triton_device import DEVICE, moved
from trdq_core.errors import BackendUnavailable
from trdq_core.kernels import capabilities, dispatch, triton_configs, triton_gpu, triton_selftest
from trdq_core.kernels.packing import to_rows
from trdq_core.kernels.types import NO_STAGES

CHECKS = ("test_schema", "test_faketensor")


@pytest.mark.parametrize("bits", [8, 4])
def test_operators_pass_torchs_own_checks(triton: ModuleType, bits: int) -> None:
    """Schema and shape functions: what torch.compile and CUDA graphs need to be right about."""
    x, stages = make_input(5, 64).to(DEVICE), moved(make_stages(64, scale=True, permute=True, hadamard=32))
    weight = moved(to_rows(make_weight(40, 64, bits, groups=0 if bits == 8 else 2, zero_point=True)))
    torch.library.opcheck(torch.ops.trdq.triton_transform, (x, *stages), test_utils=CHECKS)
    plain = (8, True, None, None, 0.9, "plain", None, None, 0.0)
    torch.library.opcheck(torch.ops.trdq.triton_quantize, (x, *stages, *plain), test_utils=CHECKS)
    modulated = (8, False, None, None, 1.0, "layer_norm", x[:1].clone(), x[1:2].clone(), 1e-6)
    torch.library.opcheck(torch.ops.trdq.triton_quantize, (x, *stages, *modulated), test_utils=CHECKS)
    levels = triton.quantize_activation(x, stages, 8, True)
    arguments = (*levels, *weight, torch.ones(40, device=DEVICE), torch.bfloat16)
    torch.library.opcheck(torch.ops.trdq.triton_linear, arguments, test_utils=CHECKS)


def test_fp8_operator_passes_torchs_own_checks(triton: ModuleType) -> None:
    """The same of the fp8 product; torch's schema test cannot multiply e4m3 on a CPU and is left out."""
    x, scale = (part.to(DEVICE) for part in triton.quantize_fp8(make_input(16, 32)))
    arguments = (x, scale, x.clone(), scale.clone(), None, torch.float32)
    torch.library.opcheck(torch.ops.trdq.triton_fp8_linear, arguments, test_utils=CHECKS[1:])


def test_traces_without_a_break(triton: ModuleType) -> None:
    """torch.compile sees one graph with the operators in it (aot_eager: no code generation)."""
    weight, stages = moved(to_rows(make_weight(40, 64, 8))), moved(make_stages(64, scale=True, hadamard=32))

    def layer(x: Tensor) -> Tensor:
        return dispatch.linear_from_float(torch.sin(x), stages, weight, None, 8, True, backend="triton")

    x = make_input(5, 64).to(DEVICE)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))


def test_shapes_on_cuda_are_known_without_a_gpu() -> None:
    """No shape depends on data: the operators run on fake CUDA tensors, on machines without triton too."""
    with FakeTensorMode():
        x = torch.empty(5, 64, device="cuda", dtype=torch.bfloat16)
        plain = (8, True, None, None, 1.0, "plain", None, None, 0.0)
        levels = torch.ops.trdq.triton_quantize(x, *NO_STAGES, *plain)
        data, scale = torch.empty(40, 64, device="cuda", dtype=torch.int8), torch.empty(40, device="cuda")
        weight = (data, scale, None, scale, None, 8, 0, 64, 40)
        y = torch.ops.trdq.triton_linear(*levels, *weight, None, torch.bfloat16)
    assert [(part.dtype, tuple(part.shape)) for part in levels] == [
        (torch.int8, (5, 64)),
        (torch.float32, (5,)),
        (torch.float32, (5,)),
        (torch.int32, (5,)),
    ]
    assert (y.dtype, tuple(y.shape), y.device.type) == (torch.bfloat16, (5, 40), "cuda")


@pytest.mark.gpu
def test_runs_inside_a_cuda_graph(triton: ModuleType) -> None:
    """A layer recorded once and replayed on other numbers gives what it gives outside, without a look at the data."""
    weight, stages = (
        moved(to_rows(make_weight(256, 256, 4, groups=2))),
        moved(make_stages(256, scale=True, hadamard=128)),
    )
    x = make_input(96, 256).to(DEVICE)

    def layer() -> Tensor:
        return dispatch.linear_from_float(x, stages, weight, None, 8, False, backend="triton")

    layer()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = layer()
    x.copy_(make_input(96, 256, 1))
    graph.replay()
    torch.testing.assert_close(recorded, layer())


@pytest.mark.gpu
def test_the_self_test_agrees_on_this_gpu(triton: ModuleType) -> None:
    """What is asked before anybody relies on the kernels."""
    assert triton_selftest.failure(DEVICE) is None


def compiled_ahead(which: str, *chips: int) -> list[dict]:
    """What tests/kernels/ahead.py printed, in a process without the interpreter."""
    root = Path(__file__).resolve().parents[2]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.ahead", which, *map(str, chips)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_compiled(found: list[dict]) -> None:
    """Machine code, the chip's own matrix instructions for each product, and no more shared memory than there is."""
    wanted = {80: "mma.sync.aligned.m16n8k32", 86: "mma.sync.aligned.m16n8k32", 90: "wgmma.mma_async"}
    for row in found:
        assert row["cubin"] > 0, row
        assert row["shared"] <= row["limit"], row
        if row["case"].startswith(("int8", "int4")):
            assert any(name.startswith(wanted[row["capability"]]) and "s8" in name for name in row["instructions"]), row
        if row["case"].startswith("fp8") and row["capability"] == 90:
            assert any("wgmma" in name and "e4m3" in name for name in row["instructions"]), row


@pytest.mark.slow
def test_first_configurations_compile_for_ampere_and_hopper() -> None:
    """Real compilation down to machine code, without a GPU: it refuses what the interpreter lets through."""
    pytest.importorskip("triton")
    found = compiled_ahead("first", 80, 90)
    check_compiled(found)
    assert {row["case"].split()[0] for row in found} == {"int8", "int4", "fp8", "quantize", "transform"}
    assert {row["capability"] for row in found} == {80, 90}


@pytest.mark.slow
@pytest.mark.skipif("TRDQ_COMPILE_ALL" not in os.environ, reason="takes minutes; set TRDQ_COMPILE_ALL to run it")
def test_every_listed_configuration_compiles() -> None:
    """All that tuning may try, on the chips with large and with small shared memory."""
    check_compiled(compiled_ahead("all", 80, 86, 90))
    check_compiled(compiled_ahead("one", 80, 90))


def test_the_way_of_the_cpu_does_not_import_triton() -> None:
    """Dispatch, layers and a product on the CPU work where importing triton fails, and load no module that needs it."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from trdq_core.kernels import dispatch\n"
        "import trdq_core.nn.linear\n"
        "w = dispatch.pack_weight(torch.ones(4, 64, dtype=torch.int8), torch.ones(4))\n"
        "dispatch.linear_from_float(torch.ones(2, 64), dispatch.NO_STAGES, w, None, 8, True, backend='torch')\n"
        "dispatch.describe()\n"
        "ours = [m for m in sys.modules if m.startswith('trdq_core') and 'triton' in m]\n"
        "assert not set(ours) & {'trdq_core.kernels.triton_kernels', 'trdq_core.kernels.triton_launch'}, ours\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


def test_what_is_missing_is_said_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package, without a GPU, with one that is too old, and for tensors that lie elsewhere."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(triton_gpu.importlib.util, "find_spec", lambda name: None)
    assert "not installed" in triton_gpu.unavailable_reason(cuda)
    with pytest.raises(BackendUnavailable, match='backend "triton" cannot run: The package triton'):
        dispatch.select_backend(cuda, "triton")
    monkeypatch.setattr(triton_gpu.importlib.util, "find_spec", lambda name: object())
    assert "NVIDIA GPUs only" in triton_gpu.unavailable_reason(cpu)
    monkeypatch.setattr(triton_gpu, "capability_of", lambda device: None)
    assert "no NVIDIA GPU" in triton_gpu.unavailable_reason(cuda)
    monkeypatch.setattr(triton_gpu, "capability_of", lambda device: (7, 5))
    assert triton_gpu.unavailable_reason(cuda) == "Triton needs compute capability 8.0, and this GPU has 7.5."
    monkeypatch.setattr(triton_gpu, "capability_of", lambda device: (8, 0))
    assert triton_gpu.unavailable_reason(cuda) is None
    with pytest.raises(BackendUnavailable, match="takes CUDA tensors"):
        triton_gpu.quantize_activation(torch.ones(2, 64), NO_STAGES, 8, True)


def test_a_gpu_gets_triton_only_after_the_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that disagrees or does not start leaves torch, with its sentence in what `describe` says."""
    cuda = torch.device("cuda")
    monkeypatch.setattr(triton_gpu, "unavailable_reason", lambda device: None)
    monkeypatch.setattr(triton_selftest, "_reasons", {cuda: None})
    assert dispatch.select_backend(cuda) == "triton"
    monkeypatch.setattr(triton_selftest, "_reasons", {cuda: "It disagrees."})
    assert dispatch.select_backend(cuda) == "torch"
    assert dispatch.describe(cuda)["fallback_reason"] == "It disagrees."
    with pytest.raises(BackendUnavailable, match="It disagrees"):
        dispatch.select_backend(cuda, "triton")


def test_a_failing_start_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever Triton raises at its first launch, the reason is one line."""

    def broken(*_: object) -> None:
        raise OSError("gcc: not found\nand a page of output")

    monkeypatch.setattr(triton_gpu, "quantize_activation", broken)
    reason = triton_selftest.failure(torch.device("cpu"))
    assert reason == "The Triton kernels do not start on this machine (OSError: gcc: not found)."


def test_the_self_test_passes_in_the_interpreter(triton: ModuleType) -> None:
    """Its cases and tolerances suit the kernels."""
    assert triton_selftest.failure(DEVICE) is None


def test_the_fastest_configuration_that_runs_is_taken(triton: ModuleType) -> None:
    """One that asks for too much is passed over; if all do, the error comes out."""
    from triton.runtime.errors import OutOfResources

    from trdq_core.kernels.triton_tuning import fastest, run_fastest

    seconds = {"a": 3.0, "b": 1.0, "c": 2.0}
    launched: list[str] = []

    def launch(config: str) -> None:
        launched.append(config)
        if config == "b":
            raise OutOfResources(200_000, 100_000, "shared memory")

    def timed(call: object) -> float:
        call()
        return seconds[launched[-1]]

    assert fastest(["a", "b", "c"], launch, timed) == "c"
    with pytest.raises(OutOfResources):
        fastest(["b"], launch, timed)
    run_fastest("key", ["c", "a"], launch, torch.device("cpu"))
    assert launched[-1] == "c"  # nothing is timed off the GPU


def test_configurations_fit_the_chip_and_the_shape() -> None:
    """Never empty, never beyond the shared memory, few wasted rows; one alone where nothing can be timed."""
    for product in triton_configs.PRODUCT_CONFIGS:
        for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)):
            limit = triton_configs.SHARED_BYTES.get(capability[0] * 10 + capability[1], 101_376)
            for tokens in (1, 100, 8192):
                found = triton_configs.product_configs(product, tokens, capability)
                assert found
                assert all(triton_configs.shared_bytes(product, config) <= limit for config in found)
            few = triton_configs.product_configs(product, 1, capability)
            assert {config.block_m for config in few} == {min(c.block_m for c in found)}
        assert len(triton_configs.product_configs(product, 8192, None)) == 1
    assert triton_configs.largest_dense((9, 0)) == 128
    assert triton_configs.largest_dense((8, 6)) == 64
    assert [triton_configs.token_bucket(tokens) for tokens in (1, 2, 3, 512, 513)] == [1, 2, 4, 512, 1024]
    assert capabilities.support((9, 0)).fp8 == "triton"
