"""What the profile command adds to a run's report: the split of a step, the roofline, the parts of a run, memory, traces."""

from __future__ import annotations

import gzip
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from trdq_core import branches
from trdq_core.errors import ModelError, StorageError
from trdq_core.sampling import Trajectory
from trdq_core.session import Session
from trdq_core.step_profile.roofline import Peaks, measured_peaks, roofline
from trdq_core.step_profile.split import split_step, trace_step


def profile_steps(
    session: Session, report: dict[str, Any], denoisers: Mapping[str, nn.Module], call: Mapping[str, Any]
) -> None:
    """Add "split" with its shares, "roofline" and Chrome traces to the rows of some denoisers.

    "trace_file" lies in the run folder, compressed; "trace" is the file that the specification names, if it names one.
    `call` holds the arguments of one denoiser call. Simulated rows get none of it, since their time is that of no kernel, nor
    do other tools, whose work is not cut into operators that torch's profiler could see.
    """
    rows = report["recipes"]
    own = {name for name, row in rows.items() if not row["simulated"] and row["kind"] != "peer"}
    shown = {name: denoiser for name, denoiser in denoisers.items() if name in own}
    session.stage("measure", "Taking one step of each column apart")
    progress = session.progress("measure", len(shown))
    peaks = measured_peaks()
    report["peaks"] = peaks._asdict()
    for name, denoiser in shown.items():
        step = _step(denoiser, call)
        with branches.joint() if session.spec.guidance > 1 else branches.single():
            report["recipes"][name] |= _measured(step, peaks)
            stored = f"traces/{name}.json.gz"
            trace_step(step, session.folder.path / stored)
        report["recipes"][name]["trace_file"] = stored
        if session.spec.trace is not None:
            file = trace_file(session.spec.trace, name, several=len(shown) > 1)
            copy_trace(session.folder.path / stored, file)
            report["recipes"][name]["trace"] = str(file)
        progress.advance(name)


def _step(denoiser: nn.Module, call: Mapping[str, Any]) -> Callable[[], Any]:
    return lambda: denoiser(**call)


def _measured(step: Callable[[], Any], peaks: Peaks) -> dict[str, Any]:
    split = split_step(step)
    return {"split": split, **shares_of(split, peaks), "roofline": roofline(step, peaks)}


def shares_of(split: Mapping[str, Any], peaks: Peaks) -> dict[str, float | None]:
    """What rotation and quantization together are of the plain step; and of the measured 8-bit peak, what the products of
    the linears reach while they run in the step. None where there are no such products, or the peak is not known.
    """
    products, peak = split["products"], peaks.integer_operations_per_s
    speed = 1000 * products["integer_operations"] / products["ms"] if products["ms"] else 0.0
    return {
        "rotation_quantize_share": round(split["parts_ms"]["rotation_quantization"] / split["plain_ms"], 5),
        "product_peak_share": round(speed / peak, 4) if speed and peak else None,
    }


def trace_file(given: str, recipe: str, *, several: bool) -> Path:
    """The file for one recipe's trace: the given one, or with the recipe's name in it where there are several."""
    file = Path(given)
    return file.with_name(f"{file.stem}-{recipe}{file.suffix or '.json'}") if several else file


def copy_trace(stored: Path, file: Path) -> None:
    """Put a compressed trace where somebody wants it, plain unless the file ends in .gz; StorageError if that fails."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".gz":
            shutil.copyfile(stored, file)
            return
        with gzip.open(stored) as packed, file.open("wb") as plain:
            shutil.copyfileobj(packed, plain)
    except OSError as error:
        raise StorageError(f"{file}: the trace could not be written ({error}); choose another file.") from error


def decode_ms(session: Session, run: Trajectory) -> float | None:
    """Milliseconds of decoding a run's last latents; None for a model that has no decoder."""
    started = time.perf_counter()
    try:
        session.model.decode(run.latents[-1])
    except ModelError:
        return None
    return round(1000 * (time.perf_counter() - started), 3)


def memory_of(row: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, int]:
    """The four memory numbers of a row: weights resident, peak of the process while it sampled, disk, full precision."""
    return {
        "weights_bytes": row["resident_bytes"],
        "peak_rss_bytes": row["peak_rss_bytes"],
        "disk_bytes": row.get("disk_bytes", 0),
        "full_precision_bytes": reference["resident_bytes"],
    }
