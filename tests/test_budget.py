"""Bits under a byte budget: exact, monotone, and a recipe that weighs what was promised."""

from __future__ import annotations

import itertools
import random

import pytest

from trdq_core import budget
from trdq_core.budget import Option, allocate, group_options, lower_bound, parse_bytes, search
from trdq_core.errors import RecipeError
from trdq_core.presets import make_recipe
from trdq_core.sensitivity.table import Cell, LayerSensitivity, Sensitivity
from trdq_core.specs import LayerRule

BITS = ("W8A8", "W4A8", "W4A4")


def made_up(blocks: int = 4, seed: int = 0) -> Sensitivity:
    """A table of q, k, v and an output for each block, with errors that fall by chance as bits grow."""
    draw, layers = random.Random(seed), []
    for block in range(blocks):
        for leaf, role in (("to_q", "self_q"), ("to_k", "self_k"), ("to_v", "self_v"), ("to_out.0", "self_out")):
            group = f"b.{block}.attn1.to_q" if leaf != "to_out.0" else f"b.{block}.attn1.to_out.0"
            size = 256 + 64 * block
            base = draw.uniform(0.001, 1)
            cells = {
                "W8A8": Cell(base / 300, base / 200, size * 128 + 12, size * 128 + 12),
                "W4A8": Cell(base / 10, base / 9, size * 64 + 12, size * 64 + 12),
                "W4A4": Cell(base, base, size * 64 + 12, size * 64 + 12),
            }
            layers.append(LayerSensitivity(f"b.{block}.attn1.{leaf}", role, group, 128, size, cells))
    recipes = {b: make_recipe("rtn", weight_bits=int(b[1]), activation_bits=int(b[3])) for b in BITS}
    return Sensitivity(BITS, tuple(layers), recipes, {"method": "rtn"})


TABLE = made_up()
LEAST = sum(layer.cells["W4A4"].bytes for layer in TABLE.layers)
MOST = sum(layer.cells["W8A8"].bytes for layer in TABLE.layers)


def best_by_trying(table: Sensitivity, limit: int) -> float:
    """The least error of all choices."""
    options = [group_options(members, table.bits) for members in table.groups().values()]
    sums = (
        sum(option.error for option in choice)
        for choice in itertools.product(*options)
        if sum(option.bytes for option in choice) <= limit
    )
    return min(sums)


def test_invariant_36_the_budget_is_kept_and_the_best_is_found() -> None:
    for seed, share in itertools.product(range(3), (0.0, 0.1, 0.37, 0.8, 1.0)):
        table = made_up(seed=seed)
        limit = LEAST + int(share * (MOST - LEAST))
        found = allocate(table, limit)
        assert found.bytes <= limit
        assert found.bytes == sum(choice.bytes for choice in found.choices)
        assert found.error == pytest.approx(best_by_trying(table, limit), rel=1e-12)
        assert found.gap == 0


def test_invariant_36_the_largest_budget_gives_the_most_bits() -> None:
    for limit in (MOST, 10 * MOST):
        assert {choice.bits for choice in allocate(TABLE, limit).choices} == {"W8A8"}


def test_invariant_36_noise_does_not_turn_more_bits_down() -> None:
    noisy = tuple(
        layer._replace(cells={**layer.cells, "W8A8": layer.cells["W8A8"]._replace(denoiser_error=9.0)})
        for layer in TABLE.layers
    )
    table = Sensitivity(BITS, noisy, TABLE.recipes, TABLE.about)
    assert {choice.bits for choice in allocate(table, MOST).choices} == {"W8A8"}


def test_invariant_36_the_error_never_grows_with_the_budget() -> None:
    errors = [allocate(TABLE, LEAST + (MOST - LEAST) * i // 40).error for i in range(41)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > errors[-1]


def test_a_budget_that_nothing_fits_is_one_sentence() -> None:
    with pytest.raises(RecipeError, match=f"--bytes: got {LEAST - 1:,}; the smallest choice .* takes {LEAST:,} bytes"):
        allocate(TABLE, LEAST - 1)
    assert allocate(TABLE, LEAST).bytes == LEAST


def test_siblings_get_one_rule_and_others_a_rule_of_their_own() -> None:
    recipe = allocate(TABLE, (LEAST + MOST) // 2).recipe
    assert recipe.rules[0].match == "b.0.attn1.to_*"
    assert recipe.rules[0].roles == ("self_q", "self_k", "self_v")
    assert recipe.rules[1].match == "b.0.attn1.to_out.0"
    assert len(recipe.rules) == 8
    assert len({rule.weight.bits for rule in recipe.rules}) == 2, "half the bytes: some layers get 8 bits, some 4"


def test_layers_without_a_common_pattern_get_a_rule_each() -> None:
    strange = tuple(
        layer._replace(role="self_q", group="b.0.attn1.to_q")
        if ".0." in layer.layer and "out" in layer.layer
        else layer
        for layer in TABLE.layers
    )
    moved = TABLE.layers[1]._replace(role="self_q", group="b.0.attn1.to_k")
    strange = (*(x for x in strange if x.layer != "b.0.attn1.to_k"), moved)
    table = Sensitivity(BITS, strange, TABLE.recipes, TABLE.about)
    rules = [rule.match for rule in allocate(table, MOST).recipe.rules]
    assert {"b.0.attn1.to_q", "b.0.attn1.to_v", "b.0.attn1.to_out.0", "b.0.attn1.to_k"} <= set(rules)


def test_a_thinned_search_states_its_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = (LEAST + MOST) // 2
    exact = allocate(TABLE, limit).error
    monkeypatch.setattr(budget, "FRONTIER", 4)
    found = allocate(TABLE, limit)
    assert found.bytes <= limit
    assert exact - 1e-12 <= found.error <= exact + found.gap + 1e-12


def test_the_lagrangian_bound_is_below_the_best() -> None:
    groups = [[Option("W4A4", 1, 1.0), Option("W8A8", 2, 0.25)], [Option("W4A4", 1, 2.0), Option("W8A8", 2, 0.0)]]
    assert search(groups, 3) == ([0, 1], 0.0)
    assert lower_bound(groups, 3) <= 1.0 + 1e-9
    assert lower_bound(groups, 4) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1200", 1200), ("3.2MB", 3_200_000), ("2 kib", 2048), ("0.5", 4 * 128 * (256 + 320 + 384 + 448) * 4 // 2)],
)
def test_sizes_as_people_write_them(text: str, expected: int) -> None:
    assert parse_bytes(text, TABLE) == expected


@pytest.mark.parametrize("text", ["", "much", "3 miles", "-1", "1.5", "0.0"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="--bytes: got"):
        parse_bytes(text, TABLE)


def test_a_table_without_a_rule_for_a_layer_is_refused() -> None:
    recipes = {bits: make_recipe("rtn").__class__(name="none", rules=(LayerRule(),)) for bits in BITS}
    with pytest.raises(RecipeError, match="of the sensitivity table does not quantize it"):
        allocate(Sensitivity(BITS, TABLE.layers, recipes, {}), MOST)


def test_a_budget_says_what_bits_the_attention_products_keep() -> None:
    recipes = {bits: make_recipe("tq-dit", weight_bits=int(bits[1]), activation_bits=int(bits[3])) for bits in BITS}
    recipe = allocate(Sensitivity(BITS, TABLE.layers, recipes, {"method": "tq-dit"}), LEAST).recipe
    assert recipe.attention.bits == 8
    assert recipe.description.endswith("bytes; attention products at 8 bits, softmax 8.")


def test_learnt_rounding_can_be_budgeted() -> None:
    recipes = {
        bits: make_recipe("q-diffusion", weight_bits=int(bits[1]), activation_bits=int(bits[3])) for bits in BITS
    }
    recipe = allocate(Sensitivity(BITS, TABLE.layers, recipes, {"method": "q-diffusion"}), MOST).recipe
    assert recipe.reconstruction is not None
    assert {rule.rounding for rule in recipe.rules} == {"adaround"}
