"""Time of a denoiser step with no, half and all blocks sharing attention, interleaved, and what operation counts predict.

python -m benchmarks.sharing --rounds 15
python -m benchmarks.sharing --quality --prompts 32     # pictures instead of times, see benchmarks/sharing_quality.py
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import time
from collections.abc import Callable

import torch
from diffusers import DiTTransformer2DModel
from torch import nn

from benchmarks import sharing_quality
from benchmarks.tables import add_rows
from trdq_core import branches
from trdq_core.adapters.roles import find_linears
from trdq_core.convert import convert
from trdq_core.kernels import dispatch
from trdq_core.plan import LayerInfo
from trdq_core.presets import QUANTIZED_ROLES, make_recipe, with_sharing
from trdq_core.profiling import machine
from trdq_core.sharing import attention_flops
from trdq_core.specs import SharingSpec
from trdq_core.statistics import LayerStatistics, Statistics

LAYERS, HEADS, WIDTH = 12, 6, 64
CHANNELS = HEADS * WIDTH


def build(side: int) -> DiTTransformer2DModel:
    """12 layers, 6 heads of 64, random weights, `side` x `side` tokens."""
    torch.manual_seed(0)
    return (
        DiTTransformer2DModel(
            num_attention_heads=HEADS, attention_head_dim=WIDTH, in_channels=4, out_channels=4, num_layers=LAYERS,
            sample_size=2 * side, patch_size=2, num_embeds_ada_norm=1000, norm_elementwise_affine=False,
        )
        .eval()
        .requires_grad_(False)
    )  # fmt: skip


def made_up_statistics(layers: tuple[LayerInfo, ...]) -> Statistics:
    """Random rows for every input: enough to convert, since speed does not depend on what was fitted."""
    inputs = {layer.leader: layer.in_features for layer in layers if layer.role in QUANTIZED_ROLES}
    rows = {name: torch.randn(1, 64, width).half() for name, width in inputs.items()}
    stored = {name: LayerStatistics(x.abs().amax(1, keepdim=True), x) for name, x in rows.items()}
    return Statistics((500.0,), stored, {"fingerprint": "random"})


def variants(denoiser: nn.Module, method: str) -> dict[str, nn.Module]:
    """The denoiser at W8A8 sharing in no block, in every second one, and in all."""
    layers = find_linears(denoiser)
    found = {}
    for name, blocks in (("none", ()), ("half", range(0, LAYERS, 2)), ("all", range(LAYERS))):
        recipe = with_sharing(make_recipe(method), SharingSpec(blocks=(tuple(blocks),)))
        settings = {"backend": dispatch.select_backend(torch.device("cpu")), "storage_folder": None}
        found[name] = convert(denoiser, layers, recipe, made_up_statistics(layers), **settings).denoiser
    return found


def measure(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, interleaved: every round runs each once, the order turning from round to round."""
    names, seconds = list(calls), {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            started = time.perf_counter()
            calls[name]()
            if turn:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    return seconds


def predicted_saving(tokens: int, shared: int) -> float:
    """Share of the block FLOPs of both branches that is gone with `shared` blocks: attention, and an MLP four wide."""
    attention, saved = attention_flops(tokens, CHANNELS)
    mlp = 2 * 2 * 2 * 4 * tokens * CHANNELS * CHANNELS
    return shared * saved / (LAYERS * (attention + mlp))


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--side", type=int, default=32, help="tokens along one side; 32 makes 1024 tokens")
    parser.add_argument("--method", default="rtn")
    parser.add_argument("--add", action="store_true", help="take the figures into benchmarks/results.csv")
    parser.add_argument("--quality", action="store_true", help="measure what sharing costs in pictures, and no times")
    parser.add_argument("--prompts", type=int, default=32, help="evaluation prompts of --quality")
    parser.add_argument("--search-prompts", type=int, default=8, help="prompts that --quality measures and plans on")
    options = parser.parse_args()
    if options.quality:
        settings = sharing_quality.Settings(options.prompts, options.search_prompts)
        rows = sharing_quality.run("pocket-image", settings)
        if options.add:
            add_rows(rows)
        return
    tokens = options.side**2
    inputs = {
        "hidden_states": torch.randn(2, 4, 2 * options.side, 2 * options.side),
        "timestep": torch.full((2,), 500),
        "class_labels": torch.tensor([1000, 7]),
    }
    denoisers = variants(build(options.side), options.method)
    # Not inference mode: there, unshared queries, keys and values cannot know that they read one tensor and quantize thrice.
    with torch.no_grad(), branches.joint():
        seconds = measure({n: (lambda d=d: d(**inputs)) for n, d in denoisers.items()}, options.rounds)
    found = machine()
    print(f"{found['cpu']}, {found['threads']} threads, torch {torch.__version__}")
    print(f"{options.method} W8A8, {LAYERS} layers of {HEADS}x{WIDTH}, {tokens} tokens, {options.rounds} rounds")
    print(f"{'shared':8}{'median ms':>11}{'p10':>9}{'p90':>9}{'speedup':>9}{'saved':>8}{'FLOPs say':>11}{'of it':>7}")
    rows = []
    for name, shared in (("none", 0), ("half", LAYERS // 2), ("all", LAYERS)):
        own = sorted(1000 * s for s in seconds[name])
        last = len(own) - 1
        ratio = statistics.median(a / b for a, b in zip(seconds["none"], seconds[name], strict=True))
        saved, expected = 1 - 1 / ratio, predicted_saving(tokens, shared)
        print(
            f"{name:8}{statistics.median(own):>11.1f}{own[round(0.1 * last)]:>9.1f}{own[round(0.9 * last)]:>9.1f}"
            f"{ratio:>9.3f}{saved:>8.3f}{expected:>11.3f}{saved / expected if expected else 0:>7.2f}"
        )
        rows += result_rows(f"{options.method}-w8a8, {name} shared", tokens, own, ratio, expected)
    if options.add:
        add_rows(rows)


def result_rows(
    recipe: str, tokens: int, ordered: list[float], ratio: float, expected: float
) -> list[dict[str, object]]:
    """Rows of results.csv for one variant: step time from its sorted ms, and speed against no sharing in the same rounds."""
    found, last = machine(), len(ordered) - 1
    note = f"{LAYERS} layers of {HEADS}x{WIDTH}, {tokens} tokens, guidance batch 2; operations predict {expected:.3f} saved"
    common = {
        "date": datetime.date.today().isoformat(),
        "device": found["gpu"] or found["cpu"],
        "threads": found["threads"],
        "model": f"dit-{tokens}-tokens",
        "recipe": recipe,
        "n": len(ordered),
        "note": note,
    }
    step = {"value": round(statistics.median(ordered), 3), "low": round(ordered[round(0.1 * last)], 3)}
    high = round(ordered[round(0.9 * last)], 3)
    return [
        {**common, "metric": "step_ms", **step, "high": high},
        {**common, "metric": "speedup", "value": round(ratio, 4), "low": "", "high": ""},
    ]


if __name__ == "__main__":
    main()
