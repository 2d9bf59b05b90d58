"""Every numbered invariant of quantization for diffusion transformers has a test, named so that one can find it.

1 to 10 transforms, 11 to 25 quantizers, 26 to 38 whole methods. `pytest -k invariant_24` runs what holds packing, for instance.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
INVARIANTS = {
    1: "rotations are orthogonal",
    2: "the base rotation spreads its first channel evenly",
    3: "permutations deal every channel once, evenly",
    4: "every transform leaves the layer's output unchanged",
    5: "rotations keep the length of a token",
    6: "a greedy rotation never raises the peak",
    7: "smoothing balances ranges as alpha says",
    8: "smoothing folds into the modulation",
    9: "dead channels and odd widths: finite, or refused",
    10: "saving and loading keeps every bit",
    11: "quantizing twice is quantizing once",
    12: "no more than 2^b levels",
    13: "the error stays within half a step, zero is exact",
    14: "grids are monotone",
    15: "grids scale with their input",
    16: "symmetric grids are symmetric",
    17: "more bits, no more error",
    18: "finer granularity, no more error",
    19: "a searched range is never worse than the whole one",
    20: "twin-log contains the uniform grid",
    21: "the softmax grid: regions exclude each other, no bias",
    22: "the GELU grid: two scales, the minimum exact",
    23: "a batch is quantized like its items",
    24: "packing loses nothing",
    25: "constant, zero and huge inputs stay finite",
    26: "never above round-to-nearest behind the check",
    27: "low rank: residual and output error do not grow",
    28: "GPTQ is not worse than rounding to nearest on its inputs",
    29: "AdaRound: floor or floor plus one, loss falls",
    30: "output weights: constant ones choose like plain error, gradients are not zero",
    31: "the temporal block is learnt apart",
    32: "time groups tile the axis, and each uses its own set",
    33: "methods reduce to each other as their pieces say",
    34: "the adaptive rotation decides at its threshold",
    35: "attention sharing: equal branches, masks, stores, order",
    36: "mixed precision keeps its budget",
    37: "reported bits are the bytes of the buffers",
    38: "the same seed gives the same artefact",
}


@pytest.mark.parametrize("number", INVARIANTS, ids=lambda number: f"{number:02}")
def test_the_invariant_has_a_test(number: int) -> None:
    """A test function whose name holds invariant_NN."""
    wanted = re.compile(rf"def test_\w*invariant_{number:02}_", re.MULTILINE)
    found = [path.name for path in TESTS.rglob("test_*.py") if wanted.search(path.read_text(encoding="utf-8"))]
    assert found, f"no test is named invariant_{number:02} ({INVARIANTS[number]})"
