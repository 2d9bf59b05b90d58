"""Compiles the Triton kernels for chips that are not there: python -m tests.kernels.ahead first 80 90

The interpreter takes code that the compiler refuses; this finds it without a GPU. `first` compiles the first listed
configuration of each kernel, `all` every one that the chip can use, `one` the first again for a single token. One JSON
object a line. Run it in a process of its own: TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from trdq_core.kernels import triton_configs as configs
from trdq_core.kernels import triton_kernels as rows
from trdq_core.kernels import triton_products as products

INSTRUCTION = re.compile(r"(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)[\w.:]*?\.(?:s8|e4m3|tf32|kind::\w+)\b")
DIVISIBLE = {
    "width",
    "outputs",
    "x_stride",
    "y_stride",
    "modulation_stride",
    "gate_stride",
    "size",
}  # by 16, as in every real model

ROW_TYPES = {
    "x": "*bf16", "x_stride": "i32", "size": "i32", "modulation_stride": "i32", "tokens_each": "i32", "epsilon": "fp32",
    "tokens": "i32", "width": "i32",
}  # fmt: skip
LEVEL_TYPES = {"clip": "fp32", "values": "*i8", "scales": "*fp32", "zero_points": "*fp32", "row_sums": "*i32"}
PRODUCT_TYPES = {
    "x": "*i8", "x_scale": "*fp32", "x_zero": "*fp32", "x_sum": "*i32", "w": "*i8", "w_scale": "*fp32",
    "w_sum": "*fp32", "bias": "*fp32", "y": "*bf16", "tokens": "i32", "outputs": "i32", "width": "i32",
}  # fmt: skip
INTO_TYPES = {"y_stride": "i32", "gate_stride": "i32", "tokens_each": "i32"}
RESIDUAL_TYPES = {"added": "*bf16", "gate": "*bf16"}
INT4_TYPES = {"w": "*u8", "group_scale": "*i8", "w_zero": "*fp32", "groups": "i32", "group_size": "i32"}
FP8_TYPES = {name: PRODUCT_TYPES[name] for name in ("x_scale", "w_scale", "bias", "y", "tokens", "outputs", "width")}


class Case(NamedTuple):
    """One kernel with the types of its arguments, its constants and launch options."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]


def product_cases(capability: int, every: bool) -> Iterator[Case]:
    """The matrix products: int8 and int4 with group scales, alone and with gate and residual; fp8 where the chip has it."""
    chip = divmod(capability, 10)
    for name in ("int8", "int4", *(("fp8",) if capability >= 89 else ())):
        found = configs.product_configs(name, 4096, chip)
        for config in found if every else found[:1]:
            tile = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "GROUP_M": config.group_m}
            constants = tile | {"BLOCK_K": config.block_k, "EVEN": True, "HAS_BIAS": True, "HAS_W_ZERO": name == "int4"}
            types = PRODUCT_TYPES | INTO_TYPES | (INT4_TYPES if name == "int4" else {})
            if name == "int4":
                constants |= {"GROUPS": True, "WIDE": True}
            if name == "fp8":
                types = FP8_TYPES | {"x": "*fp8e4nv", "w": "*fp8e4nv"}
            options = {"num_warps": config.warps, "num_stages": config.stages}
            kernel = getattr(products, f"{name}_kernel")
            yield Case(f"{name} {tuple(config)}", kernel, types, constants, options)
            if name != "fp8":
                constants = constants | {"HAS_ADDED": True, "HAS_GATE": True}
                yield Case(f"{name} residual {tuple(config)}", kernel, types | RESIDUAL_TYPES, constants, options)


def row_cases(capability: int, every: bool) -> Iterator[Case]:
    """Quantization after each prologue and mixing, and the transform alone."""
    scale, gather, matrix = {"inverse_scale": "*fp32"}, {"permutation": "*i32"}, {"matrix": "*fp32"}
    modulation = {"shift": "*bf16", "factor": "*bf16"}
    grid = {"static_scale": "*fp32", "static_zero": "*fp32"}
    dense = configs.largest_dense(divmod(capability, 10))
    kinds = (
        ("scale gather H128", scale | gather, rows.HADAMARD, 128, rows.PLAIN),
        ("layer norm H256", scale | modulation, rows.HADAMARD, 256, rows.LAYER_NORM),
        ("gelu H64", {}, rows.HADAMARD, 64, rows.GELU),
        (f"gather R{dense}", gather | matrix, rows.DENSE, dense, rows.PLAIN),
        ("plain static", grid, rows.NOTHING, 1024, rows.PLAIN),
    )
    for name, extra, mix, block, prologue in kinds:
        found = configs.row_configs(mix is rows.DENSE, 4096)
        for config in found if every else found[:1]:
            constants = {
                "PROLOGUE": prologue.value, "MIX": mix.value, "BLOCK": block, "ROWS": config.rows, "BITS": 8,
                "HAS_SCALE": "inverse_scale" in extra, "HAS_PERMUTATION": "permutation" in extra,
                "STATIC": "static_scale" in extra, "SYMMETRIC": "permutation" in extra,
            }  # fmt: skip
            options = {"num_warps": config.warps, "num_stages": 1, "enable_fp_fusion": False}
            types = ROW_TYPES | LEVEL_TYPES | extra
            yield Case(f"quantize {name} {tuple(config)}", rows.quantize_kernel, types, constants, options)
    constants = constants | {"MIX": rows.DENSE.value, "BLOCK": 64, "ROWS": 16}
    types = ROW_TYPES | matrix | {"y": "*fp32"}
    yield Case("transform R64", rows.transform_kernel, types, constants, options | {"num_warps": 8})


def one_case(capability: int) -> Iterator[Case]:
    """One token, one group, one sample a modulation: Triton makes a constant of every size that is 1."""
    for case in (*product_cases(capability, False), *row_cases(capability, False)):
        ones = {"tokens", "groups", "tokens_each"} & set(case.types)
        types = {name: kind for name, kind in case.types.items() if name not in ones}
        yield case._replace(name=f"{case.name} of one", types=types, constants=case.constants | dict.fromkeys(ones, 1))


def compile_case(case: Case, capability: int) -> dict[str, Any]:
    """What came out: whether there is machine code, the matrix instructions in it, and the shared memory it wants."""
    names = case.kernel.arg_names
    signature = {name: case.types.get(name, "constexpr") for name in names}
    constants = {name: case.constants.get(name) for name in names if name not in case.types}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if name in DIVISIBLE & set(case.types) or case.types.get(name, " ")[0] == "*"
    }
    source = ASTSource(case.kernel, signature, constexprs=constants, attrs=aligned)
    done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=case.options)
    return {
        "capability": capability,
        "case": case.name,
        "cubin": len(done.asm.get("cubin", b"")),
        "instructions": sorted(set(INSTRUCTION.findall(done.asm["ptx"]))),
        "shared": done.metadata.shared,
        "limit": configs.SHARED_BYTES.get(capability, configs.SMALLEST_SHARED_BYTES),
    }


def main(which: str, capabilities: list[int]) -> None:
    """Compile and print."""
    for capability in capabilities:
        every = which == "all"
        if which == "one":
            cases = one_case(capability)
        else:
            cases = (*product_cases(capability, every), *row_cases(capability, every))
        for case in cases:
            print(json.dumps(compile_case(case, capability)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], [int(word) for word in sys.argv[2:]])
