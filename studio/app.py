"""The studio's page: header, sidebar, and the pages as tabs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from studio import endpoints, theme
from studio.components import controls as sidebar
from studio.components import html, result, trial
from studio.components.events import QUEUED, QUICK
from studio.context import Studio
from studio.pages import activations, compare, getting, guidance, layers, profile, runs, saving
from studio.services import getting as fetching
from studio.services import machine, models, sharing
from studio.services.core import Core, InstalledCore

TITLE = "TR-DQ Studio"
CACHE_CHECK, CACHE_AGE = 600, 3600  # seconds: how often served files are swept, and how old they may get
HEADER_EVERY = 3  # seconds
# Keeps the value readable after a restart. It hides nothing: the page holds it, and the value is only a run's id.
SAVED_KEY, SAVED_SECRET = "trdq-studio", "trdq-studio-last-run"
TRIAL_KEY, TRIAL_SECRET = "trdq-studio-trial", "trdq-studio-last-trial"
PLAN_KEY, PLAN_SECRET = "trdq-studio-plan", "trdq-studio-applied-plan"


def build(core: Core | Studio | None = None) -> gr.Blocks:
    """The page over a studio or a core; the installed core by default. Nothing heavy is loaded here."""
    studio = core if isinstance(core, Studio) else Studio.over(core or InstalledCore())
    with gr.Blocks(
        title=TITLE, analytics_enabled=False, fill_width=True, delete_cache=(CACHE_CHECK, CACHE_AGE)
    ) as demo:
        endpoints.publish(studio)
        saved = gr.BrowserState(None, storage_key=SAVED_KEY, secret=SAVED_SECRET)
        saved_trial = gr.BrowserState(None, storage_key=TRIAL_KEY, secret=TRIAL_SECRET)
        header = gr.HTML(header_now(studio), elem_id="header")
        offered = fetching.choices(studio.core) if studio.settings.downloads else None
        controls = sidebar.build(models.choices(studio.core), offered, allow_hub=studio.settings.allow_hub)
        strip, problem = compare.build_strip()
        # Their children are made with the page: an answer that meets widgets in the making is shown in part only.
        with gr.Tabs(selected="compare", elem_id="pages") as tabs:
            with gr.Tab("Compare", id="compare"):
                compare_page = compare.build(strip, problem, saved)
            with gr.Tab("Activations", id="activations", render_children=True) as activations_tab:
                activations_page = activations.build()
            with gr.Tab("Guidance", id="guidance", render_children=True) as guidance_tab:
                guidance_page = guidance.build(strip, problem, saved_trial)
            with gr.Tab("Layers", id="layers", render_children=True) as layers_tab:
                layers_page = layers.build(strip, problem)
            with gr.Tab("Profile", id="profile", render_children=True) as profile_tab:
                profile_page = profile.build()
            with gr.Tab("Runs", id="runs", render_children=True) as runs_tab:
                runs_page = runs.build()
        compare.wire(studio, controls, compare_page, header, lambda: header_now(studio))
        activations.wire(studio, controls, activations_page, activations_tab)
        guidance.wire(studio, controls, guidance_page, guidance_tab, header, lambda: header_now(studio))
        layers.wire(studio, controls, layers_page, tabs, layers_tab, header, lambda: header_now(studio))
        profile.wire(studio, profile_page, profile_tab)
        runs.wire(studio, controls, runs_page, compare_page.result, tabs, runs_tab)
        getting.wire(studio, controls, strip, problem)
        shown = compare_page.result
        saving.wire(studio, shown.save, shown.run_id, strip, problem, header, lambda: header_now(studio))
        _wire_page(studio, demo, header, controls, compare_page)
        _restore_trial(studio, demo, guidance_page)
        _keep_plan(demo, controls)
    demo.queue(max_size=64, default_concurrency_limit=8)
    return demo


def launch_options() -> dict[str, Any]:
    """The options of `launch` that belong to the page and not to where it is served."""
    return {
        "theme": theme.theme(),
        "css_paths": [str(theme.CSS_FILE)],
        "js": theme.ON_LOAD,
        "footer_links": ["settings"],
        "run_history": False,
        "ssr_mode": False,
        "max_file_size": "1mb",
        "blocked_paths": [str(Path(__file__).resolve().parents[1])],
    }


def header_now(studio: Studio) -> str:
    """The header strip as of now."""
    return html.header(
        machine.facts(studio.core.gpu_name()),
        studio.core.backend_label(),
        studio.worker.length(),
        studio.worker.running_label(),
    )


def _wire_page(
    studio: Studio, demo: gr.Blocks, header: gr.HTML, controls: sidebar.Controls, page: compare.ComparePage
) -> None:
    def choose(name: str, prompt: str) -> dict[Any, Any]:
        line = {controls.model_line: models.line(studio.core, name)}
        return line | sidebar.of_model(controls, name, models.kind(studio.core, name), prompt)

    of_model = [controls.model_line, controls.prompt, controls.examples, controls.extra_prompts]
    controls.model.change(choose, [controls.model, controls.prompt], of_model, **QUICK)
    gr.Timer(HEADER_EVERY).tick(lambda: header_now(studio), outputs=header, **QUICK)

    def restore(run_id: str | None) -> dict[Any, Any]:
        run = studio.runs.open(run_id) if isinstance(run_id, str) else None
        return result.stored(page.result, run) if run and run.recipes else {page.result.run_id: None}

    demo.load(restore, page.saved, page.result.widgets(), **QUEUED)
    demo.load(lambda name: models.line(studio.core, name), controls.model, controls.model_line, **QUICK)
    demo.load(
        lambda: sidebar.offer(controls, studio.recipes.all()), None,
        [controls.saved, controls.method, controls.baseline], **QUEUED,
    )  # fmt: skip
    compare.plan_at_load(studio, demo, controls, page)


def _restore_trial(studio: Studio, demo: gr.Blocks, page: guidance.GuidancePage) -> None:
    def restore(run_id: str | None) -> dict[Any, Any]:
        return trial.stored(page.use.trial, studio.runs.open(run_id) if isinstance(run_id, str) else None)

    demo.load(restore, page.use.saved, page.use.trial.widgets(), **QUICK)


def _keep_plan(demo: gr.Blocks, controls: sidebar.Controls) -> None:
    """An applied plan outlives a reload: the browser keeps it, and what comes back is checked as any other input."""
    saved = gr.BrowserState(None, storage_key=PLAN_KEY, secret=PLAN_SECRET)
    controls.applied.change(sharing.kept, controls.applied, saved, **QUICK)
    demo.load(restored_plan, saved, [controls.applied, controls.share], **QUEUED)


def restored_plan(text: Any) -> tuple[Any, Any]:
    """The applied plan that the browser kept, not yet ticked; nothing changes without one."""
    applied = sharing.restored(text)
    return (applied, sidebar.share_box(applied)) if applied is not None else (gr.skip(), gr.skip())
