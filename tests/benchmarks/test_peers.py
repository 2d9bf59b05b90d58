"""What the comparison with other tools measures."""

from __future__ import annotations

from benchmarks import peers


def test_ours_is_measured_with_every_rotation_too() -> None:
    names = peers.recipe_names()
    spec = peers.specification("random-dit", names, rounds=3, steps=2)
    found = {recipe.name: recipe for recipe in spec.recipes}
    assert list(found) == names
    rotated = found[f"tr-dq-w8a8{peers.ROTATED}"]
    assert not rotated.do_no_harm
    assert rotated.rules == found["tr-dq-w8a8"].rules
    assert found["tr-dq-w8a8"].do_no_harm


def test_a_peer_on_every_linear_is_beside_itself_on_ours() -> None:
    names = peers.recipe_names()
    for tool in peers.WHOLE:
        assert f"{peers.PREFIX}{tool}" in names
        assert f"{peers.PREFIX}{tool}{peers.EVERY_LINEAR}" in names
