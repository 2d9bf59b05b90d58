"""The ablation of transforms on the test bed: it tells apart what helps there."""

from __future__ import annotations

import pytest

from benchmarks import ablation_transforms
from tests.outliers import OutlierModel
from trdq_core.calibration import calibrate


def test_the_ablation_sees_what_outliers_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    model = OutlierModel()
    statistics = calibrate(model, ["red apple"], steps=4, guidance=2.0, seed=0)
    kept = {name: ablation_transforms.ROTATIONS[name] for name in ("none", "serpentine > hadamard")}
    monkeypatch.setattr(ablation_transforms, "ROTATIONS", kept)
    errors = ablation_transforms.measure(model, statistics, bits=4, groups=2, blocks=[1])
    assert errors.keys() == {(s, r) for s in ablation_transforms.SMOOTHINGS for r in kept}
    assert errors["0.5", "none"] < 0.5 * errors["none", "none"]
    assert errors["none", "serpentine > hadamard"] < 0.8 * errors["none", "none"]
    for rotation in kept:
        least = min(errors[smoothing, rotation] for smoothing in ablation_transforms.SMOOTHINGS)
        assert errors["searched", rotation] <= 1.1 * least, "judged on other rows than it was searched on"
