"""Train the pocket text-to-video model: `python -m training.text_to_video --minutes 40`.

A stock `LatteTransformer3DModel` starts from pocket-image's transformer (its spatial blocks, embeddings and output) and
is trained by flow matching on cached latents; pocket-image's text encoder stays as it is. Resumable: the state is written
every few minutes and when the process is told to end, and found again; `--minutes` counts all runs, in processor time, so
a paused run loses nothing.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import signal
import time
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL, LatteTransformer3DModel, PixArtTransformer2DModel
from torch import nn
from transformers import AutoTokenizer, T5EncoderModel

from training.captions import plain
from training.data import cache_folder
from training.video_data import FRAMES, Clips, cached_latents, load
from training.video_forward import Captions, predict

POCKET_IMAGE = Path("assets/pocket-image")
LENGTH = 12  # tokens; clips with longer names are left out
LEARNING_RATE = 1e-3  # of the temporal blocks
SPATIAL_RATE = 0.5  # of that, for everything that comes from pocket-image
WARM_UP = 200  # steps
CONSTANT_UNTIL = 0.4  # share of the time after which the rate falls
DROPPED = 0.1  # share of captions replaced by the empty one, for guidance
FEWER = 4  # frames of a clip in a step that looks at more clips and fewer frames
# Share of steps with FEWER frames, until that share of the time: names first, motion throughout, whole clips at the end.
FEWER_SHARES = ((0.45, 0.7), (0.7, 0.35), (1.0, 0.0))
SAVE_EVERY = 180  # seconds
# Noise levels are drawn from sigmoid(normal), higher than for pictures: frames of a clip tell of each other.
NOISE_MEAN, NOISE_STD = 0.6, 1.2


class Batch(NamedTuple):
    """Latents (clips, channels, frames, height, width), their captions, and the frames' numbers (frames,)."""

    latents: torch.Tensor
    captions: Captions
    frames: torch.Tensor


def build(picture: PixArtTransformer2DModel, sample_size: int = 8, frames: int = FRAMES) -> LatteTransformer3DModel:
    """A Latte with the picture model's weights in its spatial blocks, whose temporal blocks do nothing yet."""
    config = picture.config
    transformer = LatteTransformer3DModel(
        num_attention_heads=config.num_attention_heads,
        attention_head_dim=config.attention_head_dim,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_layers=config.num_layers,
        cross_attention_dim=config.cross_attention_dim,
        attention_bias=config.attention_bias,
        sample_size=sample_size,
        patch_size=config.patch_size,
        activation_fn=config.activation_fn,
        num_embeds_ada_norm=config.num_embeds_ada_norm,
        norm_type=config.norm_type,
        norm_elementwise_affine=config.norm_elementwise_affine,
        norm_eps=config.norm_eps,
        caption_channels=config.caption_channels,
        video_length=frames,
    )
    taken = transformer.load_state_dict(picture.state_dict(), strict=False)
    strange = [key for key in taken.missing_keys if not key.startswith("temporal_transformer_blocks.")]
    if strange or taken.unexpected_keys:
        raise SystemExit(f"the picture model does not fit: {strange + taken.unexpected_keys}")
    for block in transformer.temporal_transformer_blocks:
        for layer in (block.attn1.to_out[0], block.ff.net[2]):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    return transformer


def fitting(folder: Path, names: list[str]) -> list[str]:
    """The names of at most LENGTH tokens. Words that pocket-image never saw are spelled, a token a letter."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    return [name for name in names if len(tokenizer(plain(name)).input_ids) <= LENGTH]


@torch.no_grad()
def encode_captions(folder: Path, texts: list[str]) -> Captions:
    """The captions as the text encoder in a pipeline folder sees them."""
    encoder = T5EncoderModel.from_pretrained(folder / "text_encoder").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    tokens = tokenizer(texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
    return Captions(encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0], tokens.attention_mask.bool())


class Sampler:
    """Draws clips, windows and frames; a tenth of the captions is the empty one."""

    def __init__(self, latents: torch.Tensor, captions: Captions, empty: Captions):
        self.latents, self.captions, self.empty = latents, captions, empty

    def draw(self, clips: int, count: int) -> Batch:
        """`clips` windows of which `count` frames are looked at, the same frame numbers in all of them."""
        frames = torch.randperm(self.latents.shape[2])[:count].sort().values
        chosen = torch.randint(len(self.latents), (clips,))
        window = torch.randint(self.latents.shape[1], (clips,))
        latents = self.latents[chosen[:, None], window[:, None], frames[None]].float().transpose(1, 2)
        dropped = torch.rand(clips, 1, 1) < DROPPED
        embeddings = torch.where(dropped, self.empty.embeddings, self.captions.embeddings[chosen])
        # The mask stays the caption's: Latte's pipeline cuts the empty prompt to as many tokens as the prompt has.
        return Batch(latents, Captions(embeddings, self.captions.kept[chosen]), frames)


def flow_loss(transformer: LatteTransformer3DModel, batch: Batch) -> torch.Tensor:
    """Mean squared error of the predicted velocity, noise minus clip, at one random noise level for each clip."""
    level = torch.sigmoid(NOISE_MEAN + NOISE_STD * torch.randn(len(batch.latents)))
    noise = torch.randn_like(batch.latents)
    share = level[:, None, None, None, None]
    noisy = (1 - share) * batch.latents + share * noise
    velocity = predict(transformer, noisy, level * 1000, batch.captions, batch.frames)
    return (velocity.float() - (noise - batch.latents)).square().mean()


def learning_rate(progress: float, step: int) -> float:
    """Warm-up, constant, then a cosine that reaches zero with the end of the time."""
    fall = max(0.0, (progress - CONSTANT_UNTIL) / (1 - CONSTANT_UNTIL))
    return LEARNING_RATE * min(1, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * min(1, fall))) + 1e-6


def frames_of_step(progress: float) -> int:
    """How many frames of its clips the next step looks at."""
    share = next(share for until, share in FEWER_SHARES if progress <= until or until == 1.0)
    return FEWER if float(torch.rand(())) < share else FRAMES


class Run(NamedTuple):
    """What a run is told on the command line."""

    minutes: float
    batch: int
    fp32: bool


class State:
    """Network, its running average and the optimizer: everything a killed run needs to go on."""

    def __init__(self, names: list[str], picture: PixArtTransformer2DModel, file: Path):
        self.file, self.names = file, names
        torch.manual_seed(0)
        self.model = build(picture).train()
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self._parameter_groups(), LEARNING_RATE, betas=(0.9, 0.98), fused=True)
        self.seconds, self.step, self.clips, self.frames = 0.0, 0, 0, 0
        if file.exists():
            self._restore(torch.load(file, weights_only=True))

    def _parameter_groups(self) -> list[dict]:
        groups = []
        for temporal in (True, False):
            named = [(n, p) for n, p in self.model.named_parameters() if n.startswith("temporal_") == temporal]
            scale = 1.0 if temporal else SPATIAL_RATE
            groups.append({"params": [p for _, p in named if p.ndim > 1], "weight_decay": 0.01, "scale": scale})
            groups.append({"params": [p for _, p in named if p.ndim <= 1], "weight_decay": 0.0, "scale": scale})
        return groups

    def _restore(self, stored: dict) -> None:
        if stored["names"] != self.names:
            raise SystemExit(f"{self.file} is of {len(stored['names'])} other clips; move it away to start afresh")
        self.model.load_state_dict(stored["model"])
        self.average.load_state_dict(stored["average"])
        self.optimizer.load_state_dict(stored["optimizer"])
        self.seconds, self.step = stored["seconds"], stored["step"]
        self.clips, self.frames = stored["clips"], stored["frames"]
        torch.manual_seed(self.step)

    def save(self) -> None:
        """Replace the state file in one go, so that a kill never leaves half a file."""
        stored = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "names": self.names,
            "seconds": self.seconds,
            "step": self.step,
            "clips": self.clips,
            "frames": self.frames,
        }
        torch.save(stored, self.file.with_suffix(".tmp"))
        self.file.with_suffix(".tmp").replace(self.file)

    def learn(self, loss: torch.Tensor, rate: float) -> None:
        """One optimizer step and one step of the running average."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        # The average follows quickly at first, so that early checkpoints are worth looking at.
        keep = min(0.999, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - keep)
        self.step += 1


def sampler_of(folder: Path, clips: Clips) -> Sampler:
    """Latents of the fine-tuned autoencoder, captions of pocket-image's text encoder."""
    vae = AutoencoderKL.from_pretrained(folder / "video_autoencoder").eval()
    latents = cached_latents(folder, vae, clips)
    captions = encode_captions(POCKET_IMAGE, [plain(name) for name in clips.names])
    return Sampler(latents, captions, encode_captions(POCKET_IMAGE, [""]))


def train(run: Run, folder: Path) -> State:
    """Train until `run.minutes` of work are done in all, earlier runs counted in."""
    clips = load(folder)
    clips = clips.of_names(fitting(POCKET_IMAGE, clips.names))
    sampler = sampler_of(folder, clips)
    picture = PixArtTransformer2DModel.from_pretrained(POCKET_IMAGE / "transformer")
    state = State(clips.names, picture, folder / "text_to_video.pt")
    size = sum(p.numel() for p in state.model.parameters()) / 1e6
    print(f"{len(clips.names)} clips, {size:.1f} M parameters, from {state.seconds:.0f} s", flush=True)
    begun = time.process_time() - state.seconds
    losses: dict[int, list[float]] = {FEWER: [], FRAMES: []}
    next_save, next_report = state.seconds + SAVE_EVERY, state.seconds + 60
    told_to_end: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: told_to_end.append(number))
    while not told_to_end and (elapsed := time.process_time() - begun) < run.minutes * 60:
        progress = elapsed / (run.minutes * 60)
        count = frames_of_step(progress)
        batch = sampler.draw(run.batch * FRAMES // count, count)
        with torch.autocast("cpu", torch.bfloat16, enabled=not run.fp32):
            loss = flow_loss(state.model, batch)
        state.learn(loss, learning_rate(progress, state.step))
        state.seconds, state.clips = elapsed, state.clips + len(batch.latents)
        state.frames += len(batch.latents) * count
        losses[count].append(loss.item())
        if elapsed > next_report:
            next_report = elapsed + 60
            means = ", ".join(f"{n} frames {sum(x) / len(x):.4f}" for n, x in losses.items() if x)
            epochs = state.frames / (FRAMES * len(clips.names))
            print(f"step {state.step} {elapsed:.0f} s loss of {means}; {state.frames / elapsed:.0f} frames/s,",
                  f"{epochs:.1f} epochs", flush=True)  # fmt: skip
            losses = {FEWER: [], FRAMES: []}
        if elapsed > next_save:
            next_save = elapsed + SAVE_EVERY
            state.save()
    state.save()
    print(
        f"{'stopped' if told_to_end else 'finished'} after {state.step} steps, {state.clips} clips, {state.frames} frames",
        flush=True,
    )
    return state


def parsed() -> Run:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=40, help="training time in all (default: 40)")
    parser.add_argument("--batch", type=int, default=8, help="whole clips a step (default: 8)")
    parser.add_argument("--fp32", action="store_true", help="no bf16 autocast")
    return Run(**vars(parser.parse_args()))


def main() -> None:
    run, folder = parsed(), cache_folder()
    (folder / "text_to_video.json").write_text(json.dumps(run._asdict(), indent=2) + "\n", encoding="utf-8")
    train(run, folder)


if __name__ == "__main__":
    main()
