"""The list of methods, and the chosen one in a line."""

from __future__ import annotations

from html import escape

from studio.services import peers
from studio.services.methods import MethodFacts

CALIBRATION_LINES = {
    "none": "no pass of its own",
    "second pass": "a second calibration pass",
    "learns rounding (minutes)": "learns rounding, which takes minutes",
}
UNDER = (
    "Real: multiplied by integer kernels and timed. Simulated: rounded in floating point, because no kernel takes these grids; "
    "its pictures count, its time says nothing and is not shown. Every method uses the shared statistics of a "
    "calibration; the last column is what it asks for beyond them."
)


def line(facts: MethodFacts | None) -> str:
    """What the chosen method does, where it is from, how it computes and what it asks for; empty for none."""
    if facts is None:
        return ""
    asks = CALIBRATION_LINES[facts.calibration]
    return f'<p class="tr-small">{escape(facts.description)} ({_source(facts)}; {asks}.) {_badge(facts.simulated)}</p>'


def peer_line(name: str) -> str:
    """What another tool does; its bits are its own."""
    said = f"{peers.description_of(name)} Another tool, with its own bits: the weight and activation bits below are not its."
    return f'<p class="tr-small">{escape(said)}</p>'


def absent_peers() -> str:
    """The other tools that cannot be chosen, and the line that brings each; empty if all are at hand."""
    rows = "".join(f"<li><b>{escape(title)}</b>: {escape(_not_installed(why))}</li>" for title, why in peers.absent())
    if not rows:
        return ""
    return (
        f'<details class="tr-small"><summary>Other tools to install</summary><ul class="tr-small">{rows}</ul></details>'
    )


def _not_installed(why: str) -> str:
    return f"not installed: {why.partition('; ')[2]}"


def table(every: list[MethodFacts], bits: str) -> str:
    """All methods at the chosen bits."""
    rows = "".join(
        f'<tr><td><b>{escape(facts.title)}</b></td><td class="why">{escape(facts.description)}</td>'
        f"<td>{_source(facts)}</td><td>{_badge(facts.simulated)}</td><td>{escape(facts.calibration)}</td></tr>"
        for facts in every
    )
    names = ("method", "what it does", "source", f"arithmetic at {escape(bits)}", "calibration")
    head = "<tr>" + "".join(f"<th>{name}</th>" for name in names) + "</tr>"
    return (
        f'<div class="tr-table" tabindex="0"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>'
        f'<p class="tr-small tr-note">{UNDER}</p>'
    )


def _badge(simulated: bool) -> str:
    return (
        f'<span class="tr-badge {"simulated" if simulated else "int8"}">{"simulated" if simulated else "real"}</span>'
    )


def _source(facts: MethodFacts) -> str:
    if not facts.link:
        return escape(facts.source)
    return f'<a href="{escape(facts.link)}" target="_blank" rel="noopener noreferrer">{escape(facts.source)}</a>'
