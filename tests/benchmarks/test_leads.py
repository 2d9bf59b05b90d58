"""Paired differences of ablations, and the lead of our recipes over published ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.evaluation_tables import make_evaluation_tables
from benchmarks.leads import GAIN, base_of, gain_rows, method_of, paired_gain
from benchmarks.tables import rows_from_report
from tests.benchmarks.test_evaluation_tables import REPORT, facts


def write(file: Path, scores: dict[tuple[int, int], float]) -> Path:
    lines = [f"{prompt},{seed},{score}" for (prompt, seed), score in scores.items()]
    file.write_text("\n".join(["prompt,seed,final_latent_sqnr_db", *lines]))
    return file


def test_differences_are_paired_by_prompt_and_seed(tmp_path: Path) -> None:
    base = write(tmp_path / "base.csv", {(0, 0): 10, (0, 1): 30, (1, 0): 20, (2, 0): 99})
    own = write(tmp_path / "own.csv", {(0, 0): 11, (0, 1): 32, (1, 0): 24})
    gain = paired_gain(own, base)
    assert gain is not None
    mean, error, n = gain
    assert mean == pytest.approx((1.5 + 4) / 2), "the mean over prompts of the mean over seeds"
    assert error == pytest.approx(1.25)
    assert n == 3
    assert paired_gain(own, write(tmp_path / "other.csv", {(7, 7): 1})) is None


def test_an_ablation_is_set_against_its_base(tmp_path: Path) -> None:
    names = ("plus-base-w4a4", "no-gptq-w4a4", "branch-w4a4", "branch-no-refit-w4a4", "greedy-w4a4")
    recipes = {name: facts("W4A4", 11.0) for name in names}
    for shift, name in enumerate(names[:4]):
        write(tmp_path / f"{name}.csv", {(prompt, 0): 10 * prompt + shift for prompt in range(3)})
    found = gain_rows(rows_from_report({**REPORT, "recipes": recipes}, tag="ablation"), tmp_path)
    assert {row["recipe"]: (row["metric"], row["value"]) for row in found} == {
        "no-gptq-w4a4": (GAIN, "1"),
        "branch-no-refit-w4a4": (GAIN, "1"),
    }, "bases have none, and neither has what has no samples"
    text = make_evaluation_tables([*rows_from_report({**REPORT, "recipes": recipes}, tag="ablation"), *found])
    assert "| +1.00 ± 0.00 |" in text


@pytest.mark.parametrize(
    ("recipe", "base"),
    [
        ("no-gptq-w4a8", "plus-base-w4a8"),
        ("branch-uniform-groups-4-w4a4", "branch-w4a4"),
        ("greedy-w4a4", "plus-base-w4a4"),
    ],
)
def test_the_base_of_a_variant(recipe: str, base: str) -> None:
    assert base_of(recipe) == base


def test_methods_are_known_by_the_longest_name() -> None:
    assert method_of("tr-dq-plus-low-rank-w4a8") == "tr-dq-plus-low-rank"
    assert method_of("tr-dq-plus-1-group-w4a8") == "tr-dq-plus"
    assert method_of("tr-dq-release-pixart-w4a8") == "tr-dq-release-pixart"
    assert method_of("mine") == ""


def test_the_lead_is_over_published_recipes_of_as_many_bits_or_fewer() -> None:
    def of(sqnr: float, bits: float, packed: float) -> dict[str, Any]:
        return facts("W4A8", sqnr, effective_bits=bits, packed_bits=packed)

    recipes = {
        "tr-dq-plus-w4a8": of(25.0, 4.4, 15.0), "tr-dq-plus-1-group-w4a8": of(24.0, 4.4, 4.1), "quarot-w4a8": of(23.5, 4.3, 4.2),
        "q-dit-w4a8": of(22.0, 4.5, 4.4), "svdquant-w4a8": of(23.0, 7.3, 7.2),
    }  # fmt: skip
    text = make_evaluation_tables(rows_from_report({**REPORT, "recipes": recipes}))
    ahead = [line for line in text.splitlines() if line.startswith("| W4A8 |")]
    assert ahead == [
        "| W4A8 | tr-dq-plus-w4a8 | 4.40 | 15.00 | 25.00 | +1.50 dB: quarot, 4.20 bits | +1.50 dB: quarot, 4.20 bits |",
        "| W4A8 | tr-dq-plus-1-group-w4a8 | 4.40 | 4.10 | 24.00 | none | +0.50 dB: quarot, 4.20 bits |",
    ]
