"""A core that answers at once, with the shapes of `docs/interfaces.md`: the studio's test double."""

from __future__ import annotations

import fnmatch
import json
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from tests.studio import fake_clips
from tests.studio.fake_getting import FakeGetting, ModelInfo
from tests.studio.fake_inspection import LAYERS as LAYERS
from tests.studio.fake_inspection import FakeInspection
from tests.studio.fake_saving import write_model
from tests.studio.fake_sensitivity import FakeBudget, write_scan
from tests.studio.fake_sharing import FakeSharing, FakeTimeGroups, similarity_means, uniform_groups, write_similarity
from trdq_core.errors import Cancelled, ModelError, RecipeError
from trdq_core.specs import Recipe, RunSpec

SIDE = 64


class LayerPlan(NamedTuple):
    layer: str
    role: str
    in_features: int
    out_features: int
    action: str
    reason: str
    weight_bits: int | None
    activation_bits: int | None
    transforms: str
    sets: int
    kernel: str
    simulated: bool
    fp_bytes: int
    weight_bytes: int


class Plan(NamedTuple):
    layers: tuple[LayerPlan, ...]
    fp_bytes: int
    weight_bytes: int
    resident_bytes: int
    disk_bytes: int
    effective_bits: float
    notes: tuple[str, ...]


class RunInfo(NamedTuple):
    id: str
    command: str
    model: str
    created: str
    state: str
    folder: Path


class CalibrationInfo(NamedTuple):
    fingerprint: str
    model: str
    prompts: int
    steps: int
    guidance: float
    seed: int
    created: str
    seconds: float
    folder: Path


class FakeRuns(FakeGetting):
    """`trdq_core.runs` without a model. `pace` is the time of one sampler step."""

    def __init__(self, folder: Path, pace: float = 0.0) -> None:
        self.folder, self.pace = folder, pace
        super().__init__()
        self.codec = True  # whether mp4 files can be written
        self.calls: list[RunSpec] = []

    def data_folder(self) -> Path:
        return self.folder

    def models(self) -> list[ModelInfo]:
        return [
            ModelInfo("pocket-image", Path("pocket-image"), "pixart", "PixArt-Sigma of pocket size, 128 px.", True, ""),
            ModelInfo(
                "pocket-video", Path("pocket-video"), "video", "Latte of pocket size, 16 frames, 64 px.", True, ""
            ),
            ModelInfo("foreign", Path("foreign"), "unknown", "", False, "it holds no transformer"),
        ]

    def new_run_folder(self, command: str) -> Path:
        stamp = time.strftime("%Y%m%d-%H%M%S") + f"{time.time() % 1:.3f}"[1:].replace(".", "")
        folder = self.folder / "runs" / f"{stamp}-{command}-{secrets.token_hex(2)}"
        return folder

    def plan(self, model: str, recipe: Recipe, *, backend: str | None = None, steps: int = 20) -> Any:
        if model not in ("pocket-image", "pocket-video"):
            raise ModelError(f"model: got {model!r}; known are pocket-image.")
        sets = recipe.time.count if recipe.storage != "shared" else 1
        names = LAYERS if model == "pocket-image" else fake_clips.LAYERS
        layers = [_layer(name, rule_of(recipe, name), sets) for name in names]
        if recipe.quantized and not any(layer.action == "quantize" for layer in layers):
            raise RecipeError(f"{recipe.name}: no linear of this model matches a rule; check roles and match patterns.")
        layers.append(_kept("proj_out"))
        packed = sum(layer.weight_bytes for layer in layers)
        total = sum(layer.fp_bytes for layer in layers)
        resident = packed * (sets if recipe.storage == "resident" else 1)
        return Plan(
            layers=tuple(layers), fp_bytes=total, weight_bytes=packed, resident_bytes=resident, disk_bytes=packed * sets,
            effective_bits=32 * packed / total, notes=(),
        )  # fmt: skip

    def run(
        self, spec: RunSpec, folder: Path, *, on_event: Callable[[dict[str, Any]], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        self.calls.append(spec)
        run = _FakeRun(self, spec, folder, on_event or (lambda event: None), cancelled or (lambda: False))
        folder.mkdir(parents=True)
        (folder / "spec.json").write_text(spec.to_json())
        if self.break_with is not None:
            raise self.break_with
        return run.go()

    def list_runs(self) -> list[RunInfo]:
        found = sorted((self.folder / "runs").glob("*"), reverse=True)
        return [_run_info(path) for path in found if path.is_dir()]

    def list_calibrations(self, model: str | None = None) -> list[CalibrationInfo]:
        found = sorted((self.folder / "calibrations").glob("*"), reverse=True)
        infos = [_calibration_info(path) for path in found]
        return [info for info in infos if model in (None, info.model)]

    def find_calibration(self, spec: RunSpec) -> CalibrationInfo | None:
        return next(
            (i for i in self.list_calibrations(spec.model) if (i.steps, i.guidance) == (spec.steps, spec.guidance)),
            None,
        )


class _FakeRun:
    def __init__(self, runs: FakeRuns, spec: RunSpec, folder: Path, say: Any, cancelled: Any) -> None:
        self.runs, self.spec, self.folder, self._say, self.cancelled = runs, spec, folder, say, cancelled
        self.moving = spec.model == "pocket-video"
        self.report: dict[str, Any] = {"recipes": {}}

    def say(self, event: dict[str, Any]) -> None:
        with (self.folder / "events.jsonl").open("a") as log:
            log.write(json.dumps(event) + "\n")
        self._say(event)

    def go(self) -> dict[str, Any]:
        try:
            if self.spec.command == "attention":
                report = self._attention()
            elif self.spec.command == "sensitivity":
                report = self._scan()
            else:
                self._calibrate()
                report = {"command": self.spec.command, "recipes": {}}
            if self.spec.command in ("compare", "save"):
                report = self._report()
            if self.spec.command == "save":
                self.say({"kind": "stage", "stage": "save", "label": "saving", "recipe": self.spec.recipes[0].name})
                report["saved"] = write_model(self.folder)
        except Cancelled as error:
            if self.report["recipes"]:
                self._write(self.report, "report.json")
            self._write({"state": "cancelled"}, "state.json")
            self.say({"kind": "cancelled", "text": str(error)})
            raise
        self._write(report, "report.json")
        self._write({"state": "done"}, "state.json")
        self.say({"kind": "done", "text": "Finished."})
        return report

    def _calibrate(self) -> None:
        self.say({"kind": "stage", "stage": "load", "label": "reading the model", "recipe": None})
        if self.runs.find_calibration(self.spec) is not None:
            return
        self.say({"kind": "stage", "stage": "calibrate", "label": "sampling in full precision", "recipe": None})
        for step in range(self.spec.steps):
            self._pause("calibrate")
            self.say({"kind": "progress", "stage": "calibrate", "done": step + 1, "total": self.spec.steps,
                      "eta_seconds": (self.spec.steps - step) * self.runs.pace, "detail": LAYERS[step % len(LAYERS)],
                      "recipe": None})  # fmt: skip
        folder = self.runs.folder / "calibrations" / secrets.token_hex(8)
        folder.mkdir(parents=True)
        facts = {"model": self.spec.model, "prompts": 16, "steps": self.spec.steps, "guidance": self.spec.guidance,
                 "seed": self.spec.seed, "created": "2026-11-21T05:00:00", "seconds": 12.0}  # fmt: skip
        (folder / "facts.json").write_text(json.dumps(facts))

    def _attention(self) -> dict[str, Any]:
        spec = self.spec
        self.say({"kind": "stage", "stage": "attention", "label": "comparing both branches", "recipe": None})
        total = len(spec.prompts) * spec.steps
        for step in range(total):
            self._pause("attention")
            self.say({"kind": "progress", "stage": "attention", "done": step + 1, "total": total, "recipe": None,
                      "eta_seconds": (total - step) * self.runs.pace, "detail": spec.prompts[step // spec.steps]})  # fmt: skip
        made = write_similarity(self.folder, spec)
        means = similarity_means(made)
        if "temporal" in made:
            means["temporal"] = similarity_means(made["temporal"])
        return {"command": "attention", "recipes": {}, "similarity": means}

    def _scan(self) -> dict[str, Any]:
        layers = fake_clips.LAYERS if self.moving else LAYERS
        for index, (label, recipe) in enumerate(zip(self.spec.bits, self.spec.recipes, strict=True)):
            for done, layer in enumerate(layers):
                self._pause("measure")
                self.say({"kind": "progress", "stage": "measure", "done": done + 1, "total": len(layers), "detail": layer,
                          "recipe": recipe.name, "eta_seconds": (len(layers) - done) * self.runs.pace})  # fmt: skip
            write_scan(self.folder, self.spec, [(name, role_of(name)) for name in layers], self.spec.bits[: index + 1])
            self.say({"kind": "stage", "stage": "measure", "label": f"layers alone at {label}", "recipe": recipe.name})
        return {
            "command": "sensitivity",
            "recipes": {},
            "sensitivity": {"bits": list(self.spec.bits), "layers": list(layers)},
        }

    def _report(self) -> dict[str, Any]:
        recipes = self.report["recipes"]
        self.report |= {
            "format_version": 1, "command": self.spec.command, "model": self.spec.model, "created": "2026-11-21T05:01:00",
            "reference": {"label": "FP32", "dtype": "float32", "device": "cpu"}, "prompts": list(self.spec.prompts),
            "spec": self.spec.to_dict(), "clip": fake_clips.SHAPE if self.moving else None,
        }  # fmt: skip
        for recipe in self.spec.recipes:
            stage = "sample" if recipe.quantized else "reference"
            self.say({"kind": "stage", "stage": stage, "label": "sampling", "recipe": recipe.name})
            made = [self._sample(recipe.name, index) for index in range(len(self.spec.prompts))]
            recipes[recipe.name] = _metrics(recipe, [str(place["image"]) for place in made], self.spec)
            if self.moving:
                recipes[recipe.name] |= fake_clips.fields(recipe.name, made)
            self.say({"kind": "result", "recipe": recipe.name, "metrics": recipes[recipe.name]})
        recipes["fp-again"] = {"kind": "noise_floor", "identical": True, "psnr": None, "ssim": 1.0, "n": 1}
        return self.report

    def _sample(self, name: str, prompt: int) -> dict[str, str | None]:
        for step in range(1, self.spec.steps + 1):
            self._pause("sample")
            image, noise = f"previews/{name}_{prompt:03d}_{step:03d}.png", 1 - step / self.spec.steps
            if self.moving:
                fake_clips.write_strip(self.folder, image, fake_clips.frames(name, noise))
            else:
                self._picture(image, name, noise)
            self.say({"kind": "preview", "recipe": name, "prompt": prompt, "step": step, "steps": self.spec.steps,
                      "image": image})  # fmt: skip
        if self.moving:
            if not self.runs.codec:
                self.say({"kind": "warning", "text": "video: no ffmpeg was found to write libx264 with."})
            places = fake_clips.write(self.folder, name, prompt, self.runs.codec)
            self.say({"kind": "clip", "recipe": name, "prompt": prompt, **places})
            return places
        image = f"images/{name}_{prompt:03d}.png"
        self._picture(image, name, 0.0)
        self.say({"kind": "image", "recipe": name, "prompt": prompt, "image": image})
        return {"image": image}

    def _picture(self, relative: str, name: str, noise: float) -> None:
        path = self.folder / relative
        path.parent.mkdir(exist_ok=True)
        y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE - 0.5
        disc = (x**2 + y**2 < 0.12)[..., None]
        picture = np.where(disc, np.array([0.85, 0.15, 0.2]) - 0.3 * y[..., None], 1.0)
        amount = noise + (
            0.0 if name == "fp" else 0.02 if name == "fp+sharing" else 0.04 if name.startswith("tr-dq") else 0.12
        )
        random = np.random.default_rng(len(relative)).normal(size=picture.shape)
        partial = path.with_name(f"{path.stem}.tmp{path.suffix}")  # whole or not at all, as the core does it
        Image.fromarray((np.clip(picture + amount * random, 0, 1) * 255).astype(np.uint8)).save(partial)
        partial.replace(path)

    def _pause(self, stage: str) -> None:
        time.sleep(self.runs.pace)
        if self.cancelled():
            raise Cancelled(f"Cancelled during {stage}; what was finished before is kept.")

    def _write(self, data: dict[str, Any], name: str) -> None:
        (self.folder / name).write_text(json.dumps(data))


class FakeCore:
    """Both modules."""

    def __init__(self, folder: Path, pace: float = 0.0) -> None:
        self.runs, self.inspection = FakeRuns(folder, pace), FakeInspection()
        self.similarity = FakeSharing()
        self.budget = FakeBudget()
        self.timegroups = SimpleNamespace(TimeGroups=FakeTimeGroups, make_groups=uniform_groups)

    def backend_label(self) -> str:
        return "C++, AVX512-VNNI"

    def gpu_name(self) -> str:
        return ""


def role_of(name: str) -> str:
    if name.startswith("temporal_"):
        return "temporal_q" if name.endswith("to_q") else "temporal_mlp_in"
    return {"attn1.to_q": "self_q", "attn2.to_q": "cross_q"}.get(name.split(".", 2)[2], "mlp_in")


def rule_of(recipe: Recipe, name: str) -> Any:
    """The first rule that matches, as the core takes it."""
    rules = (r for r in recipe.rules if (not r.roles or role_of(name) in r.roles) and fnmatch.fnmatch(name, r.match))
    rule = next(rules, None)
    return rule if rule is not None and rule.weight is not None else None


def _layer(name: str, rule: Any, sets: int) -> Any:
    fp_bytes = 4 * 384 * 384
    if rule is None:
        return _kept(name)._replace(role=role_of(name), fp_bytes=fp_bytes, weight_bytes=fp_bytes)
    bits, activation = rule.weight.bits, rule.activation.bits if rule.activation else 16
    return LayerPlan(
        layer=name, role=role_of(name), in_features=384, out_features=384, action="quantize", reason="", weight_bits=bits,
        activation_bits=activation, transforms=" > ".join(t.kind for t in rule.transforms), sets=sets,
        kernel="int4 packed VNNI" if bits <= 4 else "int8 oneDNN", simulated=not rule.integer, fp_bytes=fp_bytes,
        weight_bytes=fp_bytes * bits // 32 + 1536,
    )  # fmt: skip


def _kept(name: str) -> Any:
    return LayerPlan(
        layer=name, role="final", in_features=384, out_features=16, action="keep",
        reason="embedders, modulation and the final projection stay in full precision", weight_bits=None,
        activation_bits=None, transforms="", sets=1, kernel="full precision", simulated=False, fp_bytes=24576,
        weight_bytes=24576,
    )  # fmt: skip


def _metrics(recipe: Recipe, images: list[str], spec: RunSpec) -> dict[str, Any]:
    size = 9 * 4 * 384 * 384
    step = {"median": 41.0, "p10": 40.2, "p90": 44.1, "n": 100}
    whole = {"median": 912.0, "p10": 900.0, "p90": 960.0, "n": 8}
    common = {"images": images, "peak_rss_bytes": 812_000_000, "fp_weight_bytes": size}
    shares = {"sharing": {**recipe.sharing.to_dict(), "shared_calls": 40, "plain_calls": 20}} if recipe.sharing else {}
    if not recipe.quantized and recipe.sharing:
        faster = {"median": 38.0, "p10": 37.2, "p90": 39.1, "n": 100}
        return {"kind": "shared", "psnr": 41.0, "ssim": 0.99, "identical": False, "n": len(images), "psnr_std": None,
                "ssim_std": None, "latent_sqnr_db": [45.0] * spec.steps, "mean_latent_sqnr_db": 45.0, "step_ms": faster,
                "end_to_end_ms": whole, "weight_bytes": size, "effective_bits": 32.0, "kernels": {"float32 linear": 9},
                "simulated": False, "rejected": [], **common, **shares}  # fmt: skip
    if not recipe.quantized:
        return {"kind": "reference", "label": "FP32", "step_ms": step, "end_to_end_ms": whole, "weight_bytes": size,
                "effective_bits": 32.0, "kernels": {}, "simulated": False, **common}  # fmt: skip
    rule = next(rule for rule in recipe.rules if rule.weight is not None)
    simulated = not rule.integer or recipe.attention is not None
    better = 6 if recipe.name.startswith("tr-dq") else 0
    kernel = "int4 packed VNNI" if rule.weight.bits <= 4 else "int8 oneDNN"
    return {
        "kind": "quantized", "psnr": 25.0 + better, "psnr_std": 2.0, "ssim": 0.91, "ssim_std": 0.02, "identical": False,
        "n": len(images), "latent_sqnr_db": [40.0 - 0.8 * i + better for i in range(spec.steps)],
        "mean_latent_sqnr_db": 30.0 + better, "step_ms": None if simulated else step,
        "end_to_end_ms": None if simulated else whole, "weight_bytes": size * rule.weight.bits // 32,
        "resident_bytes": size // 8, "disk_bytes": size // 2, "effective_bits": rule.weight.bits + 0.3,
        "kernels": {"simulated": 9} if simulated else {kernel: 9}, "simulated": simulated, "rejected": [], **common,
        **shares,
    }  # fmt: skip


def _run_info(path: Path) -> RunInfo:
    state = json.loads((path / "state.json").read_text())["state"] if (path / "state.json").exists() else "unfinished"
    return RunInfo(path.name, path.name.split("-")[-2], _model_of(path), "2026-11-21T05:00:00", state, path)


def _model_of(path: Path) -> str:
    spec = path / "spec.json"
    return str(json.loads(spec.read_text()).get("model", "pocket-image")) if spec.exists() else "pocket-image"


def _calibration_info(path: Path) -> CalibrationInfo:
    return CalibrationInfo(fingerprint=path.name, folder=path, **json.loads((path / "facts.json").read_text()))
