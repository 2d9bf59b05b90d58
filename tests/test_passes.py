"""Passes over the model: a recipe that needs one which is not at hand is refused by its name."""

from __future__ import annotations

import pytest
from torch import nn

from trdq_core.errors import CalibrationError
from trdq_core.passes import NO_PASSES, RangeRequest
from trdq_core.plan import LayerInfo
from trdq_core.presets import make_recipe
from trdq_core.specs import AttentionSpec, QuantSpec
from trdq_core.timegroups import TimeContext, TimeGroups

LAYER = LayerInfo("blocks.0.attn1.to_q", "self_q", "blocks.0.attn1.to_q", 64, 64)


def test_missing_passes_are_named() -> None:
    request = RangeRequest(None, QuantSpec(bits=8, granularity="tensor"), 1)
    with pytest.raises(CalibrationError, match=r"blocks.0: static activation ranges .*ModelPasses\(ranges="):
        NO_PASSES.observed_ranges({"blocks.0": request}, TimeGroups())
    with pytest.raises(CalibrationError, match=r"attn1.to_q: range \"output\" needs a pass with gradients"):
        NO_PASSES.measured_curvature([LAYER])
    with pytest.raises(CalibrationError, match=r"rtn-w8a8: learning the rounding needs passes"):
        NO_PASSES.reconstructed([], {}, make_recipe("rtn"))
    with pytest.raises(CalibrationError, match="quantized attention products need a calibration pass"):
        NO_PASSES.quantized_attention(nn.Identity(), AttentionSpec(), TimeGroups(), TimeContext(TimeGroups()))
