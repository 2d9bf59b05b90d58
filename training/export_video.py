"""Write the trained video model as a stock pipeline folder: `python -m training.export_video assets/pocket-video`.

The averaged weights of the last state go in, as fp16 safetensors, with pocket-image's text encoder and tokenizer and the
autoencoder tuned for 64 pixels. Calibration and evaluation prompts land in the folder as `prompts.json`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, LattePipeline, PixArtTransformer2DModel
from transformers import AutoTokenizer, T5EncoderModel

from training.captions import plain
from training.data import cache_folder
from training.export import declare_fp32, forget_origins, move_into
from training.retrieval import evenly
from training.text_to_video import LEARNING_RATE, POCKET_IMAGE, SPATIAL_RATE, build
from training.video_data import FPS, FRAMES, STRIDE, WINDOWS, load

PROMPTS_EACH = 32


def assemble(
    transformer: torch.nn.Module, text_encoder: T5EncoderModel, tokenizer: AutoTokenizer, vae: AutoencoderKL
) -> LattePipeline:
    """The stock pipeline around the networks, with pocket-image's schedule."""
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=1.5,
        num_train_timesteps=1000,
        # Otherwise Latte's pipeline takes half of the output channels for a variance and drops them. Flow prediction
        # never looks at this setting.
        variance_type="learned",
    )
    pipeline = LattePipeline(
        tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def prompt_sets(names: list[str]) -> dict[str, list[str]]:
    """Calibration and evaluation prompts: trained names, disjoint, evenly spread."""
    chosen = [plain(names[i]) for i in evenly(len(names), 2 * PROMPTS_EACH)]
    return {"calibration": chosen[0::2], "evaluation": chosen[1::2]}


def facts_of(state: dict, pipeline: LattePipeline) -> dict:
    """What the model card needs to know about the training."""
    clips = load().of_names(state["names"])
    epochs = state["frames"] / (FRAMES * len(clips.names))
    return {
        "groups": {group: clips.groups.count(group) for group in sorted(set(clips.groups))},
        "clips": len(clips.names),
        "frames_per_clip": FRAMES,
        "fps": round(FPS / STRIDE, 3),
        "windows_per_clip": WINDOWS,
        "learning_rate": {"temporal": LEARNING_RATE, "spatial": LEARNING_RATE * SPATIAL_RATE},
        "steps": state["step"],
        "samples": state["clips"],
        "frames": state["frames"],
        "epochs": round(epochs, 1),
        "minutes": round(state["seconds"] / 60, 1),
        "parameters": {
            name: sum(p.numel() for p in getattr(pipeline, name).parameters())
            for name in ("text_encoder", "transformer", "vae")
        },
        "names": state["names"],
    }


def export(state_file: Path, autoencoder: Path, target: Path) -> dict:
    """Write the pipeline with `training.json` and `prompts.json`; returns the former's content."""
    state = torch.load(state_file, weights_only=True, map_location="cpu")
    transformer = build(PixArtTransformer2DModel.from_pretrained(POCKET_IMAGE / "transformer"))
    transformer.load_state_dict(state["average"])
    tokenizer = AutoTokenizer.from_pretrained(POCKET_IMAGE / "tokenizer")
    encoder = T5EncoderModel.from_pretrained(POCKET_IMAGE / "text_encoder").half()
    vae = AutoencoderKL.from_pretrained(autoencoder).half()
    pipeline = assemble(transformer.half(), encoder, tokenizer, vae)
    facts = facts_of(state, pipeline)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Written beside the target and moved in at the end: a full disk or a kill leaves the former model whole.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as unfinished:
        folder = Path(unfinished)
        pipeline.save_pretrained(folder, safe_serialization=True)
        # As it is: saved again, its configuration would also say that it was loaded from a folder.
        shutil.copytree(POCKET_IMAGE / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
        declare_fp32(folder)
        forget_origins(folder)
        for name, content in (("training.json", facts), ("prompts.json", prompt_sets(state["names"]))):
            (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        move_into(folder, target)
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, help="folder to write, for example assets/pocket-video")
    arguments = parser.parse_args()
    folder = cache_folder()
    facts = export(folder / "text_to_video.pt", folder / "video_autoencoder", arguments.target)
    size = sum(file.stat().st_size for file in arguments.target.rglob("*") if file.is_file())
    print(f"{arguments.target}: {size / 1e6:.1f} MB after {facts['steps']} steps, {facts['epochs']} epochs")


if __name__ == "__main__":
    main()
