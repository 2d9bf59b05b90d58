"""The sidebar: everything a run depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from studio.components import getting
from studio.components import methods as lines
from studio.components.events import QUICK
from studio.services import form as forms
from studio.services import methods, peers, prompts, sharing
from studio.services.form import AppliedPlan, Form


@dataclass(frozen=True)
class Controls:
    """The sidebar's widgets; the first ones are named as the fields of `Form`."""

    model: gr.Dropdown
    method: gr.Dropdown
    baseline: gr.Dropdown
    weight_bits: gr.Radio
    activation_bits: gr.Radio
    group_kind: gr.Radio
    groups: gr.Slider
    edges: gr.Textbox
    storage: gr.Radio
    steps: gr.Slider
    guidance: gr.Slider
    seed: gr.Number
    prompt: gr.Textbox
    extra_prompts: gr.Slider
    share: gr.Checkbox
    applied: gr.State
    saved: gr.State
    model_line: gr.HTML
    examples: gr.Dataset
    method_line: gr.HTML
    baseline_line: gr.HTML
    group_line: gr.HTML
    prices: gr.HTML
    random_seed: gr.Button
    calibrate: gr.Button
    compare: gr.Button
    cancel: gr.Button
    getting: getting.GetModel | None = None  # not there where models are not fetched

    def inputs(self) -> list[Any]:
        """The widgets whose values make a `Form`, in its order."""
        return [getattr(self, name) for name in Form.names()]

    def planned(self) -> list[Any]:
        """The widgets that the plan depends on."""
        left_out = ("prompt", "extra_prompts", "baseline", "edges", "share", "applied", "saved")
        return [getattr(self, name) for name in Form.names() if name not in left_out]


def build(
    models: list[tuple[str, str]], offered: list[tuple[str, str]] | None = None, *, allow_hub: bool = False
) -> Controls:
    """The sidebar with its widgets; `models` are (label, name), `offered` those that can be fetched, None where none are."""
    with gr.Sidebar(width=340, elem_id="controls"):
        made = _subject(models)
        if offered is not None:
            made["getting"] = getting.build(offered, allow_hub)
        made |= _quantization() | _sampling() | _buttons()
    controls = Controls(**made)
    controls.random_seed.click(forms.random_seed, outputs=controls.seed, **QUICK)
    controls.group_kind.change(
        _group_widgets,
        [controls.group_kind, controls.groups],
        [controls.groups, controls.edges, controls.group_line],
        **QUICK,
    )
    for chosen, line in ((controls.method, controls.method_line), (controls.baseline, controls.baseline_line)):
        depends = [chosen, controls.weight_bits, controls.activation_bits, controls.saved]
        gr.on([widget.change for widget in depends], _method_line, depends, line, **QUICK)
    return controls


def _subject(models: list[tuple[str, str]]) -> dict[str, Any]:
    names = [name for _, name in models]
    first = forms.DEFAULT_MODEL if forms.DEFAULT_MODEL in names else (names[0] if names else None)
    offered = prompts.examples(str(first))
    model = gr.Dropdown(models, value=first, label="Model", elem_id="model", interactive=True)
    line = gr.HTML(elem_id="model-line")
    prompt = gr.Textbox(offered[0], label="Prompt", lines=2, max_lines=4, elem_id="prompt", interactive=True)
    examples = gr.Examples(
        [[text] for text in offered], prompt, label="Examples", cache_examples=False, api_visibility="private",
        elem_id="prompt-examples",
    )  # fmt: skip
    return {"prompt": prompt, "model": model, "model_line": line, "examples": examples.dataset}


def _quantization() -> dict[str, Any]:
    gr.HTML('<h3 class="tr-section">Quantization</h3>')
    method = gr.Dropdown(
        methods.method_choices(), value="tr-dq", label="Method", elem_id="method", interactive=True, min_width=100
    )
    method_line = gr.HTML(_method_line("tr-dq", 4, 8, ()), elem_id="method-line")
    baseline = gr.Dropdown(
        methods.baseline_choices(), value="rtn", label="Baseline", elem_id="baseline", interactive=True, min_width=100
    )
    baseline_line = gr.HTML(_method_line("rtn", 4, 8, ()), elem_id="baseline-line")
    gr.HTML(lines.absent_peers(), elem_id="absent-peers")
    with gr.Row(elem_classes="tr-pair"):
        weight_bits = gr.Radio(
            forms.BITS_CHOICES,
            value=4,
            label="Weight bits",
            elem_id="weight-bits",
            interactive=True,
            min_width=100,
            elem_classes="tr-segments",
        )
        activation_bits = gr.Radio(
            forms.ACTIVATION_BITS_CHOICES, value=8, label="Activation bits", elem_id="activation-bits", interactive=True,
            min_width=100, elem_classes="tr-segments",
        )  # fmt: skip
    group_kind = gr.Radio(
        forms.GROUP_KIND_CHOICES,
        value="uniform",
        label="Timestep groups",
        elem_id="group-kind",
        interactive=True,
        elem_classes="tr-segments",
    )
    group_line = gr.HTML(_line(forms.group_span("uniform", 4)))
    groups = gr.Slider(1, 50, 4, step=1, label="Number of groups", elem_id="groups", interactive=True)
    edges = gr.Textbox(
        "250, 500, 750", label="Edges (timesteps)", elem_id="edges", interactive=True, visible=False, max_lines=1
    )
    storage = gr.Radio(
        forms.STORAGE_CHOICES, value="switched", label="Storage", elem_id="storage", interactive=True,
        elem_classes="tr-segments",
    )  # fmt: skip
    return {
        "method": method, "baseline": baseline, "method_line": method_line, "baseline_line": baseline_line,
        "weight_bits": weight_bits, "activation_bits": activation_bits,
        "group_kind": group_kind, "group_line": group_line, "groups": groups, "edges": edges, "storage": storage,
        "prices": gr.HTML(elem_id="prices"), "share": share_box(None), "applied": gr.State(None),
        "saved": gr.State(()),
    }  # fmt: skip


def _sampling() -> dict[str, Any]:
    gr.HTML('<h3 class="tr-section">Sampling</h3>')
    steps = gr.Slider(2, 100, 20, step=1, label="Steps", elem_id="steps", interactive=True)
    guidance = gr.Slider(1, 15, 3.5, step=0.1, label="Guidance (1 is off)", elem_id="guidance", interactive=True)
    with gr.Row(elem_classes="tr-pair"):
        seed = gr.Number(0, label="Seed", precision=0, elem_id="seed", interactive=True, min_width=100)
        random_seed = gr.Button("Random seed", size="sm", min_width=100, elem_id="random-seed")
    extra = gr.Slider(
        0, forms.MOST_EXTRA_PROMPTS, 0, step=1, label="Also measure on this many evaluation prompts",
        elem_id="extra-prompts", interactive=True,
    )  # fmt: skip
    return {"steps": steps, "guidance": guidance, "seed": seed, "random_seed": random_seed, "extra_prompts": extra}


def _buttons() -> dict[str, Any]:
    with gr.Row(elem_id="actions"):
        calibrate = gr.Button("Calibrate", elem_id="calibrate", min_width=80)
        compare = gr.Button("Compare", variant="primary", elem_id="compare", min_width=80)
        cancel = gr.Button("Cancel", elem_id="cancel", min_width=80)
    return {"calibrate": calibrate, "compare": compare, "cancel": cancel}


def of_model(controls: Controls, model: str, kind: str, prompt: Any) -> dict[Any, Any]:
    """The updates that a newly chosen model asks for: its own prompts, and none where random weights draw nothing."""
    drawn = kind != "speed"
    return {
        controls.prompt: gr.update(value=prompts.kept(model, str(prompt or "")), visible=drawn),
        controls.examples: gr.update(samples=[[text] for text in prompts.examples(model)], visible=drawn),
        controls.extra_prompts: gr.update(visible=drawn),
    }


def share_box(applied: AppliedPlan | None, ticked: bool = False) -> gr.Checkbox:
    """The tick box for attention sharing; it can be ticked once a plan was applied."""
    label = "With attention sharing (no plan yet: the Guidance page makes one)"
    if applied is not None:
        label = f"With attention sharing (plan: {sharing.plan_words(applied.plan)})"
    return gr.Checkbox(
        ticked and applied is not None, label=label, interactive=applied is not None, elem_id="share", container=False
    )


def offer(controls: Controls, recipes: tuple[Any, ...], **values: Any) -> dict[Any, Any]:
    """The updates that offer saved recipes as methods; `values` may choose a method or a baseline."""
    return {
        controls.saved: recipes,
        controls.method: _choose(methods.method_choices(recipes), values.get("method")),
        controls.baseline: _choose(methods.baseline_choices(recipes), values.get("baseline")),
    }


def _method_line(method: Any, weight_bits: Any, activation_bits: Any, saved: tuple[Any, ...]) -> str:
    if peers.is_peer(method):
        return lines.peer_line(str(method))
    return lines.line(methods.chosen_facts(method, weight_bits, activation_bits, saved))


def _choose(choices: list[tuple[str, str]], value: Any) -> gr.Dropdown:
    return gr.Dropdown(choices=choices) if value is None else gr.Dropdown(choices=choices, value=value)


def _line(text: str) -> str:
    return f'<p class="tr-small">{text}</p>'


def _group_widgets(kind: str, groups: float) -> tuple[Any, Any, str]:
    """Which of the group widgets apply to a kind of groups."""
    return (
        gr.update(visible=kind in ("uniform", "dp")),
        gr.update(visible=kind == "edges"),
        _line(forms.group_span(kind, groups)),
    )
