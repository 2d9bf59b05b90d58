"""Fine-tune pocket-image's autoencoder on 64-pixel frames: `python -m training.video_autoencoder --minutes 12`.

At 64 pixels everything in a picture is half as large as what that autoencoder learnt to draw, and faces are lost. Same
design, same losses, started from its weights; every 12th clip is held out. The statistics are folded in again.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from training import data
from training.autoencoder import fold_statistics
from training.data import cache_folder
from training.video_data import SIZE, Clips, load, reconstruction_psnr

HELD_OUT = 12  # every 12th clip is never trained on
LEARNING_RATE = 1e-3
STILLS = 0.25  # share of a batch that is still pictures of all groups, so that it does not only know these clips


def still_pictures(folder: Path, leave_out: list[str]) -> np.ndarray:
    """All still pictures but those of the names left out, halved: (count, 64, 64, 3) uint8 on white."""
    pictures = data.load(folder)
    kept = [i for i, name in enumerate(pictures.names) if name not in leave_out]
    full = data.on_colour(pictures.rgba[kept]).astype(np.float32)
    side = full.shape[1] // SIZE
    blocks = full.reshape(len(full), SIZE, side, SIZE, side, 3).mean((2, 4))
    return blocks.round().astype(np.uint8)


def as_pixels(frames: np.ndarray) -> torch.Tensor:
    """(count, 64, 64, 3) uint8 to (count, 3, 64, 64) in [-1, 1], half of the time mirrored."""
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixels.flip(-1) if torch.rand(()) < 0.5 else pixels


def train(start: Path, minutes: float, batch: int, folder: Path, clips: Clips) -> AutoencoderKL:
    """Train for `minutes` from the weights in `start`; prints PSNR on frames of held-out clips before and after."""
    outside = clips.frames[::HELD_OUT, :, ::4].reshape(-1, SIZE, SIZE, 3)
    kept = clips.frames[[i for i in range(len(clips.names)) if i % HELD_OUT]].reshape(-1, SIZE, SIZE, 3)
    stills = still_pictures(folder, clips.names[::HELD_OUT])
    model = AutoencoderKL.from_pretrained(start).train()
    print(f"held-out PSNR {reconstruction_psnr(model, outside):.2f} dB before", flush=True)
    random, step = np.random.default_rng(0), 0
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, foreach=True)
    begun = time.time()
    while (progress := (time.time() - begun) / (minutes * 60)) < 1:
        rate = LEARNING_RATE * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * progress)) + 1e-5
        for group in optimizer.param_groups:
            group["lr"] = rate
        still = round(batch * STILLS)
        chosen = [
            kept[random.integers(len(kept), size=batch - still)],
            stills[random.integers(len(stills), size=still)],
        ]
        frames = as_pixels(np.concatenate(chosen))
        with torch.autocast("cpu", torch.bfloat16):
            latents = model.encode(frames).latent_dist.mean
            noise = torch.randn_like(latents) * (0.1 * latents.detach().float().std()).to(latents.dtype)
            restored = model.decode(latents + noise).sample
        error = restored.float() - frames
        loss = error.abs().mean() + error.square().mean() + 1e-4 * latents.float().square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 200 == 0:
            held = reconstruction_psnr(model, outside)
            print(
                f"step {step} {time.time() - begun:.0f} s loss {loss.item():.4f} held-out PSNR {held:.2f} dB",
                flush=True,
            )
    model.eval()
    fold_statistics(model, torch.cat([as_pixels(kept[::4])]))
    print(f"held-out PSNR {reconstruction_psnr(model, outside):.2f} dB after {step} steps", flush=True)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=12, help="training time (default: 12)")
    parser.add_argument("--batch", type=int, default=32, help="frames a step (default: 32)")
    parser.add_argument(
        "--start", type=Path, default=Path("assets/pocket-image/vae"), help="weights to start from (pocket-image's)"
    )
    arguments = parser.parse_args()
    folder = cache_folder()
    model = train(arguments.start, arguments.minutes, arguments.batch, folder, load(folder))
    model.save_pretrained(folder / "video_autoencoder")


if __name__ == "__main__":
    main()
