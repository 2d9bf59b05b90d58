"""Short clips and names the pocket video model is trained on, fetched from npm packages and never committed.

`python -m training.video_data` packs them, keeps what is truly animated and may be used, cuts two windows of 16 frames
out of every loop, and writes `clips.npz` into the cache folder. Latents of an autoencoder are cached beside it.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from training.data import NAMES, _emoji, _letters, _usable, cache_folder, fetch, on_colour

CLIPS = [f"@lobehub/fluent-emoji-anim-{part}@1.0.0" for part in (1, 2, 3, 4)]  # WebP, RGBA, 256x256, 23.8 fps, MIT
FPS = 23.8  # frames a second of the packages' loops
SIZE = 64  # pixels
FRAMES = 16
STRIDE = 3  # every third frame: a window spans 1.9 s. Every 4.5th, the whole loop, would alias fast gestures
WINDOWS = 2  # of each loop: one from its beginning, one from its middle
# The first three are what pocket-image was trained on, so its text encoder knows their words.
GROUPS = ["Animals & Nature", "Food & Drink", "Activities", "Travel & Places"]
CLOCKS = ("o\u2019clock", "-thirty")  # 24 clips of one clock, told apart by the angle of a few pixels: left out


class Clips(NamedTuple):
    """Windows (clips, WINDOWS, FRAMES, 64, 64, 3) uint8 on white, with a name and a group for each clip."""

    frames: np.ndarray
    names: list[str]
    groups: list[str]

    def of_names(self, names: list[str]) -> Clips:
        """The clips whose name is listed, in their own order."""
        wanted = set(names)
        keep = [i for i, name in enumerate(self.names) if name in wanted]
        return Clips(self.frames[keep], [self.names[i] for i in keep], [self.groups[i] for i in keep])


def window_indices(count: int) -> np.ndarray:
    """Frame numbers (WINDOWS, FRAMES) out of a loop of `count` frames; a window that passes the end goes on at its start."""
    starts = np.arange(WINDOWS) * count // WINDOWS
    return (starts[:, None] + STRIDE * np.arange(FRAMES)[None]) % count


def windows_of(animation: Image.Image) -> np.ndarray:
    """The windows (WINDOWS, FRAMES, 64, 64, 3) uint8 of an animated RGBA picture, on white."""
    wanted = window_indices(animation.n_frames)
    decoded: dict[int, np.ndarray] = {}
    for number in sorted(set(wanted.ravel().tolist())):
        animation.seek(number)
        # Premultiplied resize: otherwise the colour of fully transparent pixels bleeds into the edges.
        small = animation.convert("RGBA").convert("RGBa").resize((SIZE, SIZE), Image.LANCZOS).convert("RGBA")
        decoded[number] = on_colour(np.asarray(small))
    return np.stack([[decoded[number] for number in window] for window in wanted.tolist()])


def build(folder: Path) -> Path:
    """Write `clips.npz`: every usable animated clip of `GROUPS` once, sorted by name."""
    with tarfile.open(fetch(NAMES, folder)) as tar:
        table = json.load(tar.extractfile("package/data-by-emoji.json"))
    by_letters = {_letters(emoji): entry for emoji, entry in table.items()}
    rows: list[tuple[str, str, np.ndarray]] = []
    for package in CLIPS:
        with tarfile.open(fetch(package, folder)) as tar:
            for member in tar:
                entry = by_letters.get(_letters(_emoji(Path(member.name).stem)))
                if not member.name.endswith(".webp") or entry is None or not _usable(entry["name"], entry["group"]):
                    continue
                if entry["group"] not in GROUPS or entry["name"].endswith(CLOCKS):
                    continue
                animation = Image.open(io.BytesIO(tar.extractfile(member).read()))
                # Most files are stills that merely have the animated ones' form; some loops are too short for a window.
                if getattr(animation, "n_frames", 1) > FRAMES:
                    rows.append((entry["name"], entry["group"], windows_of(animation)))
    rows.sort(key=lambda row: row[0])
    target = folder / "clips.npz"
    np.savez(target, frames=np.stack([r[2] for r in rows]), names=[r[0] for r in rows], groups=[r[1] for r in rows])
    return target


def load(folder: Path | None = None) -> Clips:
    """The prepared clips; builds them first when they are not there yet."""
    folder = folder or cache_folder()
    target = folder / "clips.npz"
    if not target.exists():
        build(folder)
    with np.load(target) as stored:
        return Clips(stored["frames"], stored["names"].tolist(), stored["groups"].tolist())


@torch.no_grad()
def encode_frames(vae: AutoencoderKL, frames: np.ndarray, batch: int = 64) -> torch.Tensor:
    """Latents (count, channels, height / 8, width / 8) in fp16 of frames (count, height, width, 3) uint8."""
    latents = []
    for start in range(0, len(frames), batch):
        pixels = torch.from_numpy(frames[start : start + batch]).permute(0, 3, 1, 2).float() / 127.5 - 1
        latents.append(vae.encode(pixels).latent_dist.mean.half())
    return torch.cat(latents)


@torch.no_grad()
def decode_frames(vae: AutoencoderKL, latents: torch.Tensor, batch: int = 64) -> np.ndarray:
    """Frames (count, height, width, 3) uint8 of latents (count, channels, height / 8, width / 8)."""
    frames = []
    for start in range(0, len(latents), batch):
        pixels = vae.decode(latents[start : start + batch].float(), return_dict=False)[0].clamp(-1, 1)
        frames.append(((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
    return np.concatenate(frames)


def cached_latents(folder: Path, vae: AutoencoderKL, clips: Clips) -> torch.Tensor:
    """Latents (clips, WINDOWS, FRAMES, 16, 8, 8) in fp16, read from `clip_latents.pt` if made by this autoencoder."""
    target = folder / "clip_latents.pt"
    fingerprint = float(sum(p.detach().double().abs().sum() for p in vae.parameters()))
    if target.exists():
        stored = torch.load(target, weights_only=True)
        if stored["names"] == clips.names and stored["autoencoder"] == fingerprint:
            return stored["latents"]
    flat = clips.frames.reshape(-1, SIZE, SIZE, 3)
    latents = encode_frames(vae, flat)
    latents = latents.reshape(*clips.frames.shape[:3], *latents.shape[1:])
    torch.save({"latents": latents, "names": clips.names, "autoencoder": fingerprint}, target)
    return latents


def reconstruction_psnr(vae: AutoencoderKL, frames: np.ndarray) -> float:
    """Mean PSNR in dB of frames (count, height, width, 3) uint8 after encoding and decoding."""
    again = decode_frames(vae, encode_frames(vae, frames))
    error = np.square((again.astype(np.float32) - frames) / 255).mean((1, 2, 3))
    return float(np.mean(-10 * np.log10(np.maximum(error, 1e-10))))


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    clips = load()
    counts = {group: clips.groups.count(group) for group in sorted(set(clips.groups))}
    print(f"{len(clips.names)} clips in {cache_folder()}", counts)


if __name__ == "__main__":
    main()
