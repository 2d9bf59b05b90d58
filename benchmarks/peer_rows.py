"""Recipes beside other tools in one run: the run's report as rows of benchmarks/results.csv.

A row's note has four parts with semicolons between: how it was sampled, "peers", the time of the run, which all of its rows
share, and the arithmetic of the products, or "failed" and the sentence that says why. Times have the 10th and 90th percentile
in `low` and `high`, quality one standard deviation over prompts. Speedups are medians of what the rounds say, with the same
percentiles.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trdq_core.presets.peers import EVERY_LINEAR, PREFIX
from trdq_core.presets.peers import PEERS as TOOLS
from trdq_core.profiling import ratios

PEERS, FAILED, RUN = "peers", "failed", "run "
REFERENCE, NOISE_FLOOR, COMPILED = "fp", "noise_floor", "peer-torch-compile"
SPREADS = {"psnr": "psnr_std", "ssim": "ssim_std"}
NUMBERS = (
    "psnr", "ssim", "final_latent_sqnr_db", "step_ms", "rotation_quantize_share", "product_peak_share", "weight_bytes",
    "file_bytes", "calibration_seconds", "fit_seconds",
)  # fmt: skip

Row = dict[str, str]
Facts = Mapping[str, Any]


def rows_from_peers(report: Mapping[str, Any], head: Mapping[str, Any]) -> list[Row]:
    """The numbers of a compare or profile run as rows of the results file; a tool that failed is a row with its reason."""
    spec, recipes = report["spec"], report["recipes"]
    how = f"{spec['steps']} steps, guidance {spec['guidance']}, seed {spec['seed']}"
    common = [how, PEERS, f"{RUN}{report['created']}"]
    best = best_rivals(recipes)
    rows = []
    for recipe, facts in recipes.items():
        if facts["kind"] == NOISE_FLOOR:
            continue
        if facts["kind"] == FAILED:
            note = "; ".join([*common, f"{FAILED}: {facts['error'].replace(';', ',')}"])
            cells: list[dict[str, object]] = [cell(FAILED, "")]
        else:
            note = "; ".join([*common, _arithmetic(facts)])
            cells = [*_numbers(facts), *_speedups(facts, recipes, best)]
        rows += [
            {key: str(value) for key, value in {**head, "recipe": recipe, **one, "note": note}.items()} for one in cells
        ]
    return rows


def cell(metric: str, value: object, *, low: object = "", high: object = "", n: object = "") -> dict[str, object]:
    """The cells of one number."""
    return {"metric": metric, "value": value, "low": low, "high": high, "n": n}


def is_rival(name: str) -> bool:
    """Whether a row is of a tool that quantizes; the reference compiled, or in another format, is none."""
    tool = TOOLS.get(name.removeprefix(PREFIX).removesuffix(EVERY_LINEAR))
    return name.startswith(PREFIX) and (tool is None or tool.weight_bits is not None)


def best_rivals(recipes: Mapping[str, Facts]) -> dict[str, str]:
    """The fastest rival of a run, and the fastest without OpenVINO's own graphs, by the metric of the speedup over it.

    Of those that quantize, whichever layers they take. What did not run is none.
    """
    timed = {
        name: facts["step_ms"]["median"] for name, facts in recipes.items() if facts.get("step_ms") and is_rival(name)
    }
    others = {name: ms for name, ms in timed.items() if not name.startswith(f"{PREFIX}openvino")}
    found = {"speedup_rival": timed, "speedup_other_rival": others}
    return {metric: min(times, key=lambda name: times[name]) for metric, times in found.items() if times}


def speedup(facts: Facts, other: Facts) -> dict[str, object] | None:
    """How many times as fast a row is as another of its run: the median of the rounds' ratios with its spread.

    Of reports without rounds it is the ratio of the medians. None where one of the two has no time.
    """
    step, baseline = facts.get("step_ms"), other.get("step_ms")
    if not step or not baseline:
        return None
    own, rounds = facts.get("round_ms"), other.get("round_ms")
    if own and rounds and len(own) == len(rounds):
        found = ratios(own, rounds)
        return {"value": found["median"], "low": found["p10"], "high": found["p90"], "n": found["n"]}
    return {"value": round(baseline["median"] / step["median"], 4), "low": "", "high": "", "n": step["n"]}


def file_share(facts: Facts) -> float | None:
    """What a whole denoiser takes in a file against the unquantized one at two bytes a weight."""
    size, whole = facts.get("file_bytes"), facts.get("bf16_file_bytes")
    return round(size / whole, 5) if size and whole else None


def _speedups(facts: Facts, recipes: Mapping[str, Facts], best: Mapping[str, str]) -> Iterable[dict[str, object]]:
    against = {"speedup": REFERENCE, "speedup_compiled": COMPILED, **best}
    for metric, name in against.items():
        found = speedup(facts, recipes.get(name) or {})
        if found is not None:
            yield {"metric": metric, **found}


def _arithmetic(facts: Facts) -> str:
    """ "int8 VNNI x 80, simulated": the products and how many of each, and what torch.compile did not get through."""
    words = [f"{kernel} x {count}".replace(";", ",") for kernel, count in (facts.get("kernels") or {}).items()]
    compiled = facts.get("compiled") or {}
    for key, what in (("given_up", "frames that torch.compile gave up"), ("graph_breaks", "graph breaks")):
        if compiled.get(key):
            words.append(f"{what}: {compiled[key]}")
    return ", ".join([*words, *(["simulated"] if facts.get("simulated") else [])])


def _numbers(facts: Facts) -> Sequence[dict[str, object]]:
    found: list[dict[str, object]] = []
    for name in NUMBERS:
        value = facts.get(name)
        if isinstance(value, Mapping):
            found.append(cell(name, value["median"], low=value["p10"], high=value["p90"], n=value["n"]))
        elif value is not None:
            error = facts.get(SPREADS.get(name, ""))
            low, high = ("", "") if error is None else (round(value - error, 6), round(value + error, 6))
            found.append(cell(name, round(value, 6), low=low, high=high, n=facts.get("n", "")))
    if (share := file_share(facts)) is not None:
        found.append(cell("file_share", share))
    if facts.get("quantized_layers"):
        found.append(cell("transformed_layers", facts["transformed_layers"], n=facts["quantized_layers"]))
    return found
