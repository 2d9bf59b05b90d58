"""Write the trained model as a stock pipeline folder: `python -m training.export assets/pocket-image`.

The averaged weights of the last state go in, as fp16 safetensors. Beside the folder lands `prompts.json`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from training import tokenizer as words
from training.captions import Sample, never_trained, plain, trained
from training.data import Pictures, cache_folder, load
from training.retrieval import evenly
from training.text_to_image import Models, assemble, build

PROMPTS_EACH = 64
COMPOSED_PROMPTS = 8


def prompt_sets(pictures: Pictures) -> dict[str, list[str]]:
    """Calibration and evaluation prompts, trained names and disjoint, and a few composed ones never trained on."""
    chosen = [plain(pictures.names[i]) for i in evenly(len(pictures.names), 2 * PROMPTS_EACH)]
    unseen = never_trained(pictures.names)
    composed: list[Sample] = []
    for kind, count in (("colour", 4), ("place", 2), ("pair", 2)):
        of_kind = [sample for sample in unseen if sample.kind == kind]
        composed += [of_kind[i] for i in evenly(len(of_kind), count + 2)[1:-1]]
    return {
        "calibration": chosen[0::2],
        "evaluation": chosen[1::2],
        "composed": [sample.caption for sample in composed],
    }


def declare_fp32(folder: Path) -> None:
    """Let every part load in fp32 unless the caller says otherwise.

    transformers follows the dtype in `config.json`, diffusers does not: a folder of fp16 files would otherwise load a
    half-precision text encoder beside a single-precision transformer, which cannot run together.
    """
    file = folder / "text_encoder" / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n", encoding="utf-8")


def forget_origins(folder: Path) -> None:
    """Take out of the configurations where on the training machine a part was loaded from."""
    for file in folder.rglob("config.json"):
        config = json.loads(file.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def move_into(source: Path, target: Path) -> None:
    """Replace the target's files by the source's one at a time, each in one go; other files there stay."""
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        file.chmod(0o644)  # safetensors writes files that only their owner may read
        file.replace(place)


def export(state_file: Path, autoencoder: Path, target: Path) -> dict:
    """Write the pipeline and return what the model card needs to know about its training."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # Written beside the target and moved in at the end: a full disk or a kill leaves the former model whole.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as unfinished:
        facts = write_pipeline(state_file, autoencoder, Path(unfinished))
        move_into(Path(unfinished), target)
    prompts = json.dumps(prompt_sets(load().of_groups(facts["groups"])), indent=1, ensure_ascii=False) + "\n"
    (target.parent / "prompts.json").write_text(prompts, encoding="utf-8")
    return facts


def write_pipeline(state_file: Path, autoencoder: Path, target: Path) -> dict:
    """Write the stock folder with `training.json`, whose content is returned."""
    state = torch.load(state_file, weights_only=True, map_location="cpu")
    shape = state["shape"]
    pictures = load().of_groups(shape["groups"])
    samples = trained(pictures.names)
    tokenizer = words.build([sample.caption for sample in samples])
    models = build(len(tokenizer), shape["width"], shape["layers"])
    for model, weights in zip(models, state["average"], strict=True):
        model.load_state_dict(weights)
    vae = AutoencoderKL.from_pretrained(autoencoder)
    halves = Models(models.text_encoder.half(), models.transformer.half())
    assemble(halves, tokenizer, vae.half()).save_pretrained(target, safe_serialization=True)
    declare_fp32(target)
    forget_origins(target)
    facts = shape | {
        "pictures": len(pictures.names),
        "captions": len(samples),
        "steps": state["step"],
        "images": state["images"],
        "epochs": round(state["images"] / len(pictures.names), 1),
        "minutes": round(state["seconds"] / 60, 1),
        "parameters": {
            "text_encoder": sum(p.numel() for p in models.text_encoder.parameters()),
            "transformer": sum(p.numel() for p in models.transformer.parameters()),
            "vae": sum(p.numel() for p in vae.parameters()),
        },
    }
    (target / "training.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, help="folder to write, for example assets/pocket-image")
    arguments = parser.parse_args()
    folder = cache_folder()
    facts = export(folder / "text_to_image.pt", folder / "autoencoder", arguments.target)
    size = sum(file.stat().st_size for file in arguments.target.rglob("*") if file.is_file())
    print(f"{arguments.target}: {size / 1e6:.1f} MB after {facts['steps']} steps, {facts['epochs']} epochs")


if __name__ == "__main__":
    main()
