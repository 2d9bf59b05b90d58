"""What the command line lists: models, runs, and the numbers of one layer's input. Text only; no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trdq_core.terminal import set_left, size, table


def models_text(models: Iterable[Any]) -> str:
    """The table of models: which are at hand, and why one is not."""
    rows = [
        (m.name, m.kind, "yes" if m.available else f"no: {m.reason}", _place(m), m.description) for m in models
    ]  # fmt: skip
    return set_left(("model", "kind", "at hand", "where", "what it is"), rows, columns=range(5))


def _place(model: Any) -> str:
    """The folder of a model; of one of the hub that is not here its id and the commit that would be fetched."""
    if model.path is not None or not model.repo:
        return str(model.path)
    return f"{model.repo} at {str(model.revision)[:8]}"


def runs_text(runs: Iterable[Any]) -> str:
    """The table of stored runs."""
    rows = [(run.created.replace("T", " "), run.command, run.model, run.state, str(run.folder)) for run in runs]
    return (
        set_left(("created", "command", "model", "state", "folder"), rows, columns=range(5)) if rows else "No runs yet."
    )


def activations_text(found: Mapping[str, Any]) -> str:
    """One input before and after its transform: its numbers, and what else can be looked at."""
    before, after = found["before_facts"], found["after_facts"]
    names = {"absmax": "absmax", "peak": "absmax over RMS", "kurtosis": "kurtosis", "clipped_share": "clipped share"}
    names["sqnr_db"] = "SQNR dB"
    rows = [(said, f"{before[key]:.4g}", f"{after[key]:.4g}") for key, said in names.items()]
    groups = ", ".join(f"{index}: {label}" for index, label in enumerate(found["groups"]))
    return "\n".join(
        [
            f"{found['layer']}, {found['recipe']}, group {found['group']}, {found['rows']} rows of {found['calibration']}",
            table(("", "before", "after"), rows), found["note"], f"groups of timesteps: {groups}",
            f"layers: {', '.join(found['layers'])}",
        ]
    )  # fmt: skip


def cleaned_text(found: Sequence[Any], *, dry_run: bool) -> str:
    """What was removed from the data folder, or would be."""
    if not found:
        return "Nothing is that old."
    rows = [(one.path.parent.name, one.path.name, f"{one.days:.0f}", size(one.nbytes)) for one in found]
    total, word = size(sum(one.nbytes for one in found)), "would be removed" if dry_run else "removed"
    return table(("kind", "name", "days", "bytes"), rows, left=2) + f"\n\n{total} {word}."


def peers_text(peers: Iterable[tuple[str, str | None, str]]) -> str:
    """The table of other tools: name, what is missing of each, what it is."""
    rows = [(name, "yes" if missing is None else f"no: {missing}", words) for name, missing, words in peers]
    return set_left(("peer", "at hand", "what it is"), rows, columns=range(3))
