"""The second half of the Layers page: a plan changed layer by layer, fitted to a budget, saved as a recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr

from studio.components import edited, html
from studio.components.controls import Controls, offer
from studio.components.editing import SIDEBAR, PlanPart, source_choices
from studio.components.events import QUEUED, QUICK
from studio.context import Studio
from studio.jobs import TRDQError, explain
from studio.services import commands, scans
from studio.services.edits import Edit, EditedPlan, bits_from
from studio.services.form import Form, chosen_recipe, plain_comparison
from studio.services.methods import SAVED_PREFIX, saved_name
from studio.services.scans import ScanView

Updates = dict[Any, Any]
NO_PLAN = "plan: there is none yet; press Start."


def wire(studio: Studio, controls: Controls, page: PlanPart, stored: gr.Dropdown, tabs: gr.Tabs) -> None:
    """Connect the widgets; `stored` holds the chosen scan."""
    handlers, form = Handlers(studio, page, controls, tabs), controls.inputs()
    about = [page.edit, stored]
    page.start.click(handlers.start, [page.source, stored, *form], page.drawn(), **QUICK)
    page.fit.click(handlers.fit, [page.budget, stored, *form], page.drawn(), **QUICK)
    page.set_bits.click(
        handlers.set_bits, [*about, page.picked, page.weight_bits, page.activation_bits, *form], page.drawn(), **QUICK
    )
    page.skip.click(handlers.skip, [*about, page.picked, *form], page.drawn(), **QUICK)
    page.undo.click(handlers.undo, [*about, page.picked, *form], page.drawn(), **QUICK)
    page.table.select(handlers.pick, [page.edit, page.picked], page.picked, **QUICK)
    kept = [
        page.saved,
        page.file,
        page.use,
        page.source,
        page.command,
        controls.saved,
        controls.method,
        controls.baseline,
    ]
    page.save.click(handlers.save, [*about, page.name, *form], kept, **QUEUED)
    page.use.click(
        handlers.use, page.name, [controls.saved, controls.method, controls.baseline, page.saved, tabs], **QUEUED
    )


def follow_scan(studio: Studio, controls: Controls, page: PlanPart, stored: gr.Dropdown, event: Any) -> None:
    """After `event` draw the plan with the errors of the scan that is chosen now."""
    handlers = Handlers(studio, page, controls, None)
    event.then(
        handlers.show, [page.edit, stored, *controls.inputs()], [page.source, *page.drawn()], **QUICK,
    )  # fmt: skip


@dataclass(frozen=True)
class Handlers:
    """The handlers."""

    studio: Studio
    page: PlanPart
    controls: Controls
    tabs: gr.Tabs | None

    def show(self, edit: Edit | None, run_id: Any, *values: Any) -> Updates:
        """The plan as it stands, or that of the sidebar if there is none for its model."""
        form = Form.of(*values)
        choices = {self.page.source: gr.Dropdown(choices=source_choices(self.studio.recipes.all()))}
        if edit is None or edit.model != form.model:
            return choices | self.start(SIDEBAR, run_id, *values)
        return choices | self._changed(lambda: edit, run_id, form)

    def start(self, source: Any, run_id: Any, *values: Any) -> Updates:
        """The recipe of the sidebar or a saved one, nothing changed."""
        form = Form.of(*values)

        def made() -> Edit:
            name = saved_name(source)
            recipe = chosen_recipe(form) if name is None else self.studio.recipes.open(name)
            return self.studio.edits.start(str(form.model), recipe, form.steps)

        return self._changed(made, run_id, form, fresh=True)

    def fit(self, budget: Any, run_id: Any, *values: Any) -> Updates:
        """The plan with the least predicted error within the budget."""
        form = Form.of(*values)

        def made() -> Edit:
            view = self._scan(run_id)
            if view is None:
                raise TRDQError("budget: it is spent by what a scan measured, and there is none yet; press Scan first.")
            found = self.studio.scans.allocate(view, budget)
            return self.studio.edits.start(view.model, found.recipe, form.steps, scans.budget_command(view, budget))

        return self._changed(made, run_id, form, fresh=True)

    def set_bits(self, edit: Any, run_id: Any, picked: Any, weight: Any, activation: Any, *values: Any) -> Updates:
        """The picked layers at other bits."""
        return self._changed(
            lambda: self.studio.edits.change(_given(edit), picked, bits_from(weight, activation)),
            run_id,
            Form.of(*values),
        )

    def skip(self, edit: Any, run_id: Any, picked: Any, *values: Any) -> Updates:
        """The picked layers in full precision."""
        return self._changed(lambda: self.studio.edits.change(_given(edit), picked, None), run_id, Form.of(*values))

    def undo(self, edit: Any, run_id: Any, picked: Any, *values: Any) -> Updates:
        """The picked layers as the recipe has them; every layer if none is picked."""
        every = picked or ["*"]
        return self._changed(lambda: self.studio.edits.undo(_given(edit), every), run_id, Form.of(*values))

    def pick(self, event: gr.SelectData, edit: Any, picked: Any) -> Any:
        """Pick the layer of the clicked line, or leave it out if it was picked."""
        if not isinstance(edit, Edit) or not event.row_value:
            return gr.skip()
        name = edited.layer_called(self.studio.edits.view(edit), event.row_value[0])
        now = [str(word) for word in picked or ()]
        if name is None:
            return gr.skip()
        return [word for word in now if word != name] if name in now else [*now, name]

    def save(self, edit: Any, run_id: Any, name: Any, *values: Any) -> Updates:
        """Keep the plan under its name and offer it as a method."""
        page = self.page
        try:
            plan = self.studio.edits.view(_given(edit))
            before = self.studio.recipes.names()
            file = self.studio.recipes.save(name, plan.recipe)
            recipes = self.studio.recipes.all()
        except Exception as error:
            return {page.saved: html.notice(explain(error))}
        again = " in place of the earlier one" if file.stem in before else ""
        said = f"Saved as {file.stem}{again}: the sidebar offers it as a method and as a baseline, under saved recipes."
        line = self._commands(plan, self._scan(run_id), Form.of(*values), file.stem)
        return {
            page.saved: html.notice(said, "done"), page.file: gr.DownloadButton(value=str(file), interactive=True),
            page.use: gr.Button(interactive=True), page.source: gr.Dropdown(choices=source_choices(recipes)),
            page.command: line, **offer(self.controls, recipes),
        }  # fmt: skip

    def use(self, name: Any) -> Updates:
        """Choose the saved recipe as the method and go to the Compare page."""
        try:
            recipe = self.studio.recipes.open(str(name or "").strip())
        except Exception as error:
            return {self.page.saved: html.notice(explain(error))}
        chosen = offer(self.controls, self.studio.recipes.all(), method=SAVED_PREFIX + recipe.name)
        return chosen | {self.tabs: gr.Tabs(selected="compare")}

    def _changed(self, made: Callable[[], Edit], run_id: Any, form: Form, *, fresh: bool = False) -> Updates:
        """Draw the plan of an edit; a plan that cannot be made leaves the drawn one and says why."""
        page = self.page
        try:
            edit, scan = made(), self._scan(run_id)
            scan = scan if scan is not None and scan.model == edit.model else None
            plan = self.studio.edits.view(edit, scan.errors() if scan else None)
            offered = self.studio.edits.offered(edit)
            line = self._commands(plan, scan, form, None)
        except Exception as error:
            return {page.note: html.notice(explain(error))}
        chosen = {"value": []} if fresh else {}
        picked = gr.Dropdown(choices=offered, multiselect=True, **chosen)
        return {
            page.edit: edit, page.note: "", page.totals: edited.totals(plan, scan), page.table: edited.rows(plan),
            page.picked: picked, page.command: line,
        }  # fmt: skip

    def _scan(self, run_id: Any) -> ScanView | None:
        return self.studio.scans.open(run_id) if run_id else None

    def _commands(self, plan: EditedPlan, scan: ScanView | None, form: Form, saved: str | None) -> str:
        """Scan, budget and comparison as command lines, each as far as it stands."""
        lines = [scans.scan_command(scan)] if scan is not None else []
        lines += [plan.edit.origin] if plan.edit.origin else []
        if saved is None and plan.edit.changes:
            return "\n".join([*lines, "# save the recipe to compare with it"])
        files, name = self.studio.recipes.files(), saved or plan.recipe.name
        if plan.edit.origin and saved is None:
            files |= {name: Path("plan.json")}  # as the budget command above writes it
        try:
            lines.append(commands.compare(plain_comparison(form, replace(plan.recipe, name=name)), files))
        except TRDQError as error:  # the sidebar holds something that cannot be compared
            lines.append(f"# {explain(error)}")
        return "\n".join(lines)


def _given(edit: Any) -> Edit:
    if not isinstance(edit, Edit):
        raise TRDQError(NO_PLAN)
    return edit
