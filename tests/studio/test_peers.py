"""Other tools in the studio: who can be chosen, what a comparison with one shows, and one that failed."""

from __future__ import annotations

import dataclasses
from typing import Any

import gradio as gr
import pytest

from studio.components import controls as sidebar
from studio.components import html, methods, result
from studio.components.titles import title_of, under
from studio.context import Studio
from studio.services import peers
from studio.services.form import AppliedPlan, Form, compare_spec, form_of_spec
from studio.services.methods import baseline_choices, method_choices
from studio.services.work import run_work
from tests.studio.fake_core import FakeCore
from trdq_core.errors import RecipeError
from trdq_core.presets import PEERS, Peer
from trdq_core.presets import peers as core_peers
from trdq_core.specs import SharingSpec

HERE = {"torchao"}
FAILED = 'peer-sdnq-int8: sdnq is not installed; pip install "sdnq>=0.2.8,<0.3" brings what is missing.'


@pytest.fixture(autouse=True)
def only_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine where torchao is installed and nothing else."""
    monkeypatch.setattr(core_peers, "_installed", lambda package: package in HERE)


def test_every_tool_has_a_title() -> None:
    assert set(peers.TITLES) == set(PEERS)
    assert peers.title_of_peer("peer-openvino-int8-all") == "OpenVINO INT8, every linear"
    assert peers.title_of_peer("peer-unheard-of") == "unheard-of"


def test_installed_tools_are_a_group_of_the_baselines_and_the_rest_say_their_line() -> None:
    offered = dict((name, label) for label, name in baseline_choices())
    assert offered["peer-torchao-int8"] == "Other tool: torchao int8"
    assert "peer-torch-compile" in offered and "peer-sdnq-int8" not in offered
    assert not any(peers.is_peer(name) for _, name in method_choices())
    told = methods.absent_peers()
    assert "<b>SDNQ int8</b>: not installed: pip install &quot;sdnq&gt;=0.2.8,&lt;0.3&quot;" in told
    assert "torchao" not in told
    assert "bits" in sidebar._method_line("peer-torchao-int8", 4, 8, ())


def test_a_tool_is_compared_as_the_baseline(form: Form) -> None:
    spec = compare_spec(dataclasses.replace(form, baseline="peer-torchao-int8"))
    assert [recipe.name for recipe in spec.recipes] == ["fp", "peer-torchao-int8", "tr-dq-w4a8"]
    assert spec.recipes[1].peer == "torchao-int8"
    assert form_of_spec(spec)["baseline"] == "peer-torchao-int8"
    for name, sentence in (("peer-sdnq-int8", "not installed; pip install"), ("peer-x", "known peers are")):
        with pytest.raises(RecipeError, match=sentence):
            compare_spec(dataclasses.replace(form, baseline=name))


def test_a_tool_does_not_share(form: Form) -> None:
    plan = AppliedPlan("pocket-image", SharingSpec(blocks=((0,),)))
    spec = compare_spec(dataclasses.replace(form, baseline="peer-torchao-int8", share=True, applied=plan))
    assert [recipe.name for recipe in spec.recipes] == [
        "fp", "fp+sharing", "peer-torchao-int8", "tr-dq-w4a8", "tr-dq-w4a8+sharing",
    ]  # fmt: skip


def row(peer: Peer) -> dict[str, Any]:
    told = {"tool": peer.tool, "versions": "torchao 0.18.0", "description": peer.description}
    return {
        "kind": "peer",
        "peer": told,
        "kernels": {"int8 x int8, torch._int_mm": 8, "int8 weights, multiplied in float32": 1},
    }


def test_rows_of_tools_and_of_failures_are_shown(core: FakeCore, studio: Studio, form: Form) -> None:
    spec = compare_spec(dataclasses.replace(form, steps=4, baseline="peer-torchao-int8"))
    folder = run_work(core, spec)(lambda event: None, lambda: False)
    run = studio.runs.open(folder.name)
    assert run is not None
    rows = run.report["recipes"]
    rows["peer-torchao-int8"] |= row(PEERS["torchao-int8"])
    rows["tr-dq-w4a8"] = {"kind": "failed", "error": FAILED, "simulated": False}
    facts = rows["peer-torchao-int8"]
    assert title_of("peer-torchao-int8", facts) == "torchao int8"
    assert under("peer-torchao-int8", facts, run) == "another tool, torchao 0.18.0"
    with gr.Blocks():
        view = result.build()
    shown = result.stored(view, run)
    cards = [shown[column.cards] for column in view.columns]
    assert "torchao, int8 weights and activations per token at run time." in cards[1]
    assert '"tr-badge int8">int8 x int8' in cards[1] and '"tr-badge plain">int8 weights, multiplied' in cards[1]
    assert "Left out: peer-sdnq-int8: sdnq is not installed; pip install &quot;sdnq" in cards[2]
    assert not shown[view.columns[2].image].visible
    assert [name for _, name in shown[view.right].choices] == ["fp", "peer-torchao-int8"]
    assert shown[view.right].value == "peer-torchao-int8"
    table = html.metrics_table([(title_of(name, facts), facts) for name, facts in run.recipes.items()], None)
    assert "torchao int8 (torchao 0.18.0)" in table and "int8 x int8" in table
    assert table.count("<tr") == 4 and "Left out: peer-sdnq-int8" in table
