"""The named endpoints, for scripts and gradio_client; everything else on the page is private."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from studio.components.events import JOBS
from studio.context import Studio
from studio.jobs import explain
from studio.pages.shared import session_of
from studio.services import api, models
from studio.services.form import Form
from studio.services.work import run_work
from studio.state import LiveRun, Progress


def publish(studio: Studio) -> None:
    """Add the endpoints to the page that is being built."""

    def list_models() -> list[dict[str, Any]]:
        """The models that this studio can quantize."""
        return models.facts(studio.core)

    def list_runs() -> list[dict[str, str]]:
        """The stored runs, newest first."""
        return [row._asdict() for row in studio.runs.rows()]

    def plan(model: str, recipe: str, groups: int = 1) -> dict[str, Any]:
        """What converting a model with a recipe such as "tr-dq-w4a8" would give."""
        try:
            return models.plan(studio.core, model, recipe, groups)
        except Exception as error:
            raise gr.Error(explain(error), print_exception=False) from error

    def compare(
        request: gr.Request, model: str, recipes: str, prompt: str, steps: int = 20, guidance: float = 3.5, seed: int = 0,
        groups: int = 1,
    ) -> Iterator[dict[str, Any]]:  # fmt: skip
        """Compare recipes such as "rtn-w4a8,tr-dq-w4a8" with full precision on one prompt; tells how far it is, then the result.

        The last value has "state" "done", the numbers of each recipe and its picture as a data URL.
        """
        try:
            form = Form(model=model, steps=steps, guidance=guidance, seed=seed)
            spec = api.comparison(studio.core, model, recipes, prompt, form, groups)
            label = f"comparison of {spec.model}"
            job = studio.worker.submit(session_of(request), label, run_work(studio.core, spec))
        except Exception as error:
            raise gr.Error(explain(error), print_exception=False) from error
        live = LiveRun(Progress(label))
        for events in studio.worker.follow(job):
            live.take(events)
            heard = [said for event in events if (said := api.told(event)) is not None]
            if heard and not job.finished:
                yield heard[-1]
        run = studio.runs.open(live.run_id)
        if job.state != "done" or run is None:
            raise gr.Error(
                job.text or "The comparison left nothing behind; see the studio's log.", print_exception=False
            )
        yield api.result(run, job.state, job.text)

    for function in (list_models, list_runs, plan):
        gr.api(function, api_name=function.__name__)
    gr.api(compare, api_name="compare", **{name: JOBS[name] for name in ("concurrency_id", "concurrency_limit")})
