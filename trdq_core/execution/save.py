"""The save command: convert, sample with and without it where there are prompts, save, load again and compare."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from trdq_core import profiling, saving
from trdq_core.convert import Conversion
from trdq_core.execution.rows import REFERENCE, changed_row, facts_of, fp_bytes, measured_conversion, quality
from trdq_core.execution.samples import Samples, sample_all
from trdq_core.peers.convert import PeerConversion
from trdq_core.sampling import sample
from trdq_core.session import Session, statistics_for


def save(session: Session, report: dict[str, Any]) -> None:
    """One recipe as a folder that diffusers loads; rows of the reference and of the recipe where prompts are given."""
    spec, rows = session.spec, report["recipes"]
    recipe = saving.check(session)
    statistics = statistics_for(session, report) if recipe.quantized else None
    conversion, measured = measured_conversion(session, recipe, statistics)
    samples, picture = Samples(), None
    if spec.prompts and not getattr(session.model, "decodes", True):
        samples = _latents_only(session, conversion)
        rows[recipe.name] = {**measured, **facts_of(session, conversion), "peak_rss_bytes": samples.peak_rss_bytes}
    elif spec.prompts:
        session.conditionings = session.model.encode(spec.prompts)
        reference = sample_all(session, REFERENCE, session.model.denoiser, keep=True)
        session.references, session.pictures = reference.runs, reference.pictures
        label, weights = report["reference"]["label"], fp_bytes(session, [recipe])
        rows[REFERENCE] = {"kind": "reference", "label": label, **weights, **reference.row()}
        samples = sample_all(session, recipe.name, conversion.denoiser)
        with Image.open(session.folder.path / samples.outputs[0].image) as image:  # of a clip its filmstrip
            picture = np.asarray(image)
        rows[recipe.name] = {**measured, **changed_row(session, conversion, samples), **quality(session, samples)}
    else:
        rows[recipe.name] = {**measured, **facts_of(session, conversion)}
    session.folder.write_report(report)
    report["saved"] = saving.save(session, conversion, report, samples.runs, picture)


def _latents_only(session: Session, conversion: Conversion | PeerConversion) -> Samples:
    """The first prompt sampled with a model that makes no pictures: enough to see that the saved one comes back as it was."""
    spec, model = session.spec, session.model
    session.conditionings = model.encode(spec.prompts[:1])
    profiling.reset_peak_memory()
    with model.using(conversion.denoiser):
        run = sample(model, session.conditionings[0], spec.seed, steps=spec.steps, guidance=spec.guidance)
    return Samples(runs=[run], peak_rss_bytes=profiling.peak_rss_bytes())
