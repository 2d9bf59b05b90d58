"""Train the f8 autoencoder of the pocket models: `python -m training.autoencoder --minutes 20`.

Stock `AutoencoderKL`, 16 latent channels, trained on 64-pixel crops with L1 + MSE and noise on the latents. Resumable: the
state is written every minute and found again. At the end each latent channel is normalised to zero mean and unit
variance by folding the statistics into `quant_conv` and `post_quant_conv`, so `scaling_factor` is 1.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from training.data import cache_folder, load

CROP = 64
HELD_OUT = 40  # every 40th picture is never trained on
LEARNING_RATE = 2e-3


def build() -> AutoencoderKL:
    """A 1.7 M parameter autoencoder, 128x128 pixels to 16x16 latents of 16 channels."""
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(16, 32, 64, 96),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=128,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def random_crops(rgba: torch.Tensor, count: int) -> torch.Tensor:
    """(count, 3, 64, 64) in [-1, 1]: pictures on white or on a random colour, cropped and mirrored at random."""
    chosen = rgba[torch.randint(0, len(rgba), (count,))]
    top, left = torch.randint(0, rgba.shape[2] - CROP + 1, (2,)).tolist()
    chosen = chosen[:, :, top : top + CROP, left : left + CROP].float() / 255
    alpha = chosen[:, 3:]
    colour = torch.where(torch.rand(count, 1, 1, 1) < 0.5, torch.ones(()), torch.rand(count, 3, 1, 1))
    crops = (chosen[:, :3] * alpha + colour * (1 - alpha)) * 2 - 1
    return crops.flip(-1) if torch.rand(()) < 0.5 else crops


def on_white(rgba: torch.Tensor) -> torch.Tensor:
    """(count, 4, height, width) uint8 to (count, 3, height, width) in [-1, 1] on white."""
    values = rgba.float() / 255
    return (values[:, :3] * values[:, 3:] + 1 - values[:, 3:]) * 2 - 1


@torch.no_grad()
def psnr_of(model: AutoencoderKL, pictures: torch.Tensor) -> float:
    """Mean PSNR in dB over pictures in [-1, 1]."""
    restored = torch.cat([model(chunk.to(model.device)).sample.cpu() for chunk in pictures.split(16)]).clamp(-1, 1)
    return (-10 * torch.log10(((restored - pictures) / 2).square().mean((1, 2, 3)))).mean().item()


@torch.no_grad()
def fold_statistics(model: AutoencoderKL, pictures: torch.Tensor) -> None:
    """Make latents of zero mean and unit variance per channel; decoding is unchanged in exact arithmetic."""
    latents = torch.cat([model.encode(chunk.to(model.device)).latent_dist.mean for chunk in pictures.split(16)])
    mean, std = latents.double().mean((0, 2, 3)), latents.double().std((0, 2, 3))
    encode, decode = model.quant_conv, model.post_quant_conv
    half = len(mean)  # the second half of quant_conv's outputs is the log-variance, left alone
    encode.weight[:half] = (encode.weight[:half].double() / std[:, None, None, None]).float()
    encode.bias[:half] = ((encode.bias[:half].double() - mean) / std).float()
    decode.bias += torch.einsum("oi,i->o", decode.weight[:, :, 0, 0].double(), mean).float()
    decode.weight.copy_((decode.weight.double() * std[None, :, None, None]).float())


def train(minutes: float, batch: int, folder: Path, device: str = "cpu") -> AutoencoderKL:
    """Train until `minutes` of work are done in all, earlier runs counted in."""
    pictures = load(folder)
    rgba = torch.from_numpy(pictures.rgba).permute(0, 3, 1, 2).contiguous()
    held_out = on_white(rgba[::HELD_OUT])
    kept = rgba[[i for i in range(len(rgba)) if i % HELD_OUT]]
    torch.manual_seed(0)
    model = build().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, foreach=True)
    state_file, done, step = folder / "autoencoder.pt", 0.0, 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done, step = state["seconds"], state["step"]
        torch.manual_seed(step)
    started, next_save = time.time() - done, done + 60
    while (elapsed := time.time() - started) < minutes * 60:
        progress = elapsed / (minutes * 60)
        rate = LEARNING_RATE * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * progress)) + 1e-5
        for group in optimizer.param_groups:
            group["lr"] = rate
        crops = random_crops(kept, batch).to(device)
        with torch.autocast(model.device.type, torch.bfloat16):
            latents = model.encode(crops).latent_dist.mean
            noise = torch.randn_like(latents) * (0.1 * latents.detach().float().std()).to(latents.dtype)
            restored = model.decode(latents + noise).sample
        error = restored.float() - crops
        loss = error.abs().mean() + error.square().mean() + 1e-4 * latents.float().square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if elapsed > next_save:
            next_save += 60
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "seconds": elapsed, "step": step}
            torch.save(state, state_file.with_suffix(".tmp"))
            state_file.with_suffix(".tmp").replace(state_file)
            print(
                f"step {step} {elapsed:.0f} s loss {loss.item():.4f} held-out PSNR {psnr_of(model, held_out):.2f} dB",
                flush=True,
            )
    model.eval()
    print(f"before folding: held-out PSNR {psnr_of(model, held_out):.2f} dB after {step} steps", flush=True)
    fold_statistics(model, on_white(rgba))
    print(f"after folding: held-out PSNR {psnr_of(model, held_out):.2f} dB", flush=True)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20, help="training time in all (default: 20)")
    parser.add_argument("--batch", type=int, default=32, help="crops a step (default: 32)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    arguments = parser.parse_args()
    folder = cache_folder()
    model = train(arguments.minutes, arguments.batch, folder, arguments.device)
    model.save_pretrained(folder / "autoencoder")


if __name__ == "__main__":
    main()
