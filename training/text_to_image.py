"""Train the pocket text-to-image model: `python -m training.text_to_image --minutes 90`.

A stock `T5EncoderModel` and a stock `PixArtTransformer2DModel` are trained together by flow matching on cached latents
of the autoencoder. Resumable: the state is written every few minutes and found again; `--minutes` counts all runs.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from torch import nn
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from training import tokenizer as words
from training.captions import Sample, picture_of, trained
from training.data import Pictures, cache_folder, load
from training.retrieval import evenly, generate, rank_of_true, sheet

GROUPS = ["Animals & Nature", "Food & Drink", "Activities"]
LATENT_CHANNELS = 16
LATENT_SIDE = 16
TEXT_WIDTH = 256
LENGTH = 12  # tokens in training; every trained caption fits, and the model does not see how much is padding
LEARNING_RATE = 1e-3
WARM_UP = 200  # steps
CONSTANT_UNTIL = 0.4  # share of the time after which the rate falls
DROPPED = 0.1  # share of captions replaced by the empty one, for guidance
COMPOSED = 0.15  # share of samples that are composed pictures
SAVE_EVERY = 180  # seconds
SCORE_EVERY = 1500  # seconds
# Noise levels are drawn from sigmoid(normal): high noise is where a picture is chosen, so it gets more than half.
NOISE_MEAN, NOISE_STD = 0.4, 1.1


class Models(NamedTuple):
    """The two trained networks."""

    text_encoder: T5EncoderModel
    transformer: PixArtTransformer2DModel

    def parameters(self) -> list[nn.Parameter]:
        return [*self.text_encoder.parameters(), *self.transformer.parameters()]


class Batch(NamedTuple):
    """Latents (count, 16, 16, 16), token ids and mask (count, length)."""

    latents: torch.Tensor
    ids: torch.Tensor
    mask: torch.Tensor


def build(vocabulary: int, width: int = 256, layers: int = 8) -> Models:
    """Untrained networks; `width` is a multiple of 128, heads are 64 wide."""
    config = T5Config(
        vocab_size=vocabulary, d_model=TEXT_WIDTH, d_kv=64, d_ff=512, num_layers=2, num_heads=4,
        dropout_rate=0.0, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    transformer = PixArtTransformer2DModel(
        num_attention_heads=width // 64,
        attention_head_dim=64,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=layers,
        cross_attention_dim=width,
        sample_size=LATENT_SIDE,
        patch_size=2,
        caption_channels=TEXT_WIDTH,
        use_additional_conditions=False,
        interpolation_scale=1,
    )
    return Models(T5EncoderModel(config), transformer)


def start_from_zero(transformer: PixArtTransformer2DModel) -> None:
    """Let the output and every cross-attention begin as nothing, which trains much faster in the first minutes."""
    for layer in [transformer.proj_out, *(block.attn2.to_out[0] for block in transformer.transformer_blocks)]:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def assemble(models: Models, tokenizer: PreTrainedTokenizerFast, vae: AutoencoderKL) -> PixArtSigmaPipeline:
    """The stock pipeline around the networks."""
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.5, num_train_timesteps=1000
    )
    pipeline = PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=models.text_encoder,
        vae=vae,
        transformer=models.transformer,
        scheduler=scheduler,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def encode_all(vae: AutoencoderKL, samples: list[Sample], rgba: np.ndarray, device: str) -> torch.Tensor:
    """Latents (count, 16, 16, 16) in fp16 of every sample's picture."""
    latents = []
    for start in range(0, len(samples), 32):
        chunk = np.stack([picture_of(sample, rgba) for sample in samples[start : start + 32]])
        pixels = torch.from_numpy(chunk).permute(0, 3, 1, 2).to(device).float() / 127.5 - 1
        latents.append(vae.encode(pixels).latent_dist.mean.half().cpu())
    return torch.cat(latents)


def cached_latents(
    folder: Path, vae: AutoencoderKL, samples: list[Sample], rgba: np.ndarray, device: str
) -> torch.Tensor:
    """The samples' latents, read from `latents.pt` if it was made by this autoencoder from these captions."""
    target = folder / "latents.pt"
    fingerprint = float(sum(p.detach().double().abs().sum() for p in vae.parameters()))
    captions = [sample.caption for sample in samples]
    if target.exists():
        stored = torch.load(target, weights_only=True)
        if stored["captions"] == captions and stored["autoencoder"] == fingerprint:
            return stored["latents"]
    latents = encode_all(vae, samples, rgba, device)
    torch.save({"latents": latents, "captions": captions, "autoencoder": fingerprint}, target)
    return latents


def tokenize(tokenizer: PreTrainedTokenizerFast, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask (count, LENGTH), padded the way the pipeline pads."""
    tokens = tokenizer(captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
    return tokens.input_ids, tokens.attention_mask


def flow_loss(models: Models, batch: Batch) -> torch.Tensor:
    """Mean squared error of the predicted velocity, noise minus picture, at random noise levels."""
    count = len(batch.latents)
    level = torch.sigmoid(NOISE_MEAN + NOISE_STD * torch.randn(count, device=batch.latents.device))
    noise = torch.randn_like(batch.latents)
    share = level[:, None, None, None]
    noisy = (1 - share) * batch.latents + share * noise
    embeddings = models.text_encoder(batch.ids, attention_mask=batch.mask)[0]
    velocity = models.transformer(
        noisy,
        encoder_hidden_states=embeddings,
        encoder_attention_mask=batch.mask,
        timestep=level * 1000,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        return_dict=False,
    )[0]
    return (velocity.float() - (noise - batch.latents)).square().mean()


class Sampler:
    """Draws batches: plain pictures and composed ones in the fixed share, a tenth of the captions emptied."""

    def __init__(
        self, latents: torch.Tensor, plain_count: int, tokenizer: PreTrainedTokenizerFast, captions: list[str]
    ):
        self.latents, self.plain_count = latents, plain_count
        self.ids, self.mask = tokenize(tokenizer, captions)
        # Exactly what the pipeline encodes for the negative prompt "": `</s>` alone, the rest masked.
        self.empty_ids, self.empty_mask = tokenize(tokenizer, [""])

    def draw(self, count: int, device: str) -> Batch:
        plain = torch.randint(0, self.plain_count, (count,))
        composed = torch.randint(self.plain_count, len(self.latents), (count,))
        chosen = torch.where(torch.rand(count) < COMPOSED, composed, plain)
        dropped = torch.rand(count, 1) < DROPPED
        ids = torch.where(dropped, self.empty_ids, self.ids[chosen])
        mask = torch.where(dropped, self.empty_mask, self.mask[chosen])
        return Batch(self.latents[chosen].float().to(device), ids.to(device), mask.to(device))


def learning_rate(progress: float, step: int) -> float:
    """Warm-up, constant, then a cosine that reaches zero with the end of the time."""
    fall = max(0.0, (progress - CONSTANT_UNTIL) / (1 - CONSTANT_UNTIL))
    return LEARNING_RATE * min(1, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * min(1, fall))) + 1e-6


class Run(NamedTuple):
    """What a run is told on the command line."""

    minutes: float
    groups: list[str]
    width: int
    layers: int
    batch: int
    device: str
    compiled: bool
    fp32: bool


class State:
    """Networks, their running average and the optimizer: everything a killed run needs to go on."""

    def __init__(self, run: Run, vocabulary: int, file: Path):
        self.file, self.shape = file, {"width": run.width, "layers": run.layers, "groups": run.groups}
        torch.manual_seed(0)
        self.models = build(vocabulary, run.width, run.layers)
        start_from_zero(self.models.transformer)
        for model in self.models:
            model.to(run.device).train()
        self.average = Models(*(copy.deepcopy(model).eval().requires_grad_(False) for model in self.models))
        decayed = [p for p in self.models.parameters() if p.ndim > 1]
        rest = [p for p in self.models.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, LEARNING_RATE, betas=(0.9, 0.98), fused=True)
        self.seconds, self.step, self.images = 0.0, 0, 0
        if file.exists():
            self._restore(torch.load(file, weights_only=True, map_location=run.device))

    def _restore(self, stored: dict) -> None:
        if stored["shape"] != self.shape:
            raise SystemExit(f"{self.file} is of another model ({stored['shape']}); move it away to start afresh")
        for networks, weights in ((self.models, stored["models"]), (self.average, stored["average"])):
            for network, values in zip(networks, weights, strict=True):
                network.load_state_dict(values)
        self.optimizer.load_state_dict(stored["optimizer"])
        self.seconds, self.step, self.images = stored["seconds"], stored["step"], stored["images"]
        torch.manual_seed(self.step)

    def save(self) -> None:
        """Replace the state file in one go, so that a kill never leaves half a file."""
        stored = {
            "models": [model.state_dict() for model in self.models],
            "average": [model.state_dict() for model in self.average],
            "optimizer": self.optimizer.state_dict(),
            "shape": self.shape,
            "seconds": self.seconds,
            "step": self.step,
            "images": self.images,
        }
        torch.save(stored, self.file.with_suffix(".tmp"))
        self.file.with_suffix(".tmp").replace(self.file)

    def learn(self, loss: torch.Tensor, rate: float) -> None:
        """One optimizer step and one step of the running average."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.models.parameters(), 1.0)
        self.optimizer.step()
        # The average follows quickly at first, so that early checkpoints are worth looking at.
        keep = min(0.999, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self.average.parameters(), self.models.parameters(), 1 - keep)
        self.step += 1


def report(
    state: State, tokenizer: PreTrainedTokenizerFast, vae: AutoencoderKL, pictures: Pictures, folder: Path
) -> str:
    """Retrieval of 32 known names by the averaged networks, with a contact sheet; one line for the log."""
    pipeline = assemble(state.average, tokenizer, vae)
    chosen = evenly(len(pictures.names), 32)
    generated = generate(pipeline, [pictures.names[i] for i in chosen])
    ranks, nearest = rank_of_true(generated, pictures.rgba, chosen)
    sheet(generated, nearest, chosen, pictures, folder / f"sheet-{int(state.seconds // 60):03d}.png")
    return f"retrieval top-1 {np.mean(ranks == 0):.0%} top-5 {np.mean(ranks < 5):.0%} of 32 names"


def train(run: Run, folder: Path) -> State:
    """Train until `run.minutes` of work are done in all, earlier runs counted in."""
    pictures = load(folder).of_groups(run.groups)
    samples = trained(pictures.names)
    tokenizer = words.build([sample.caption for sample in samples])
    vae = AutoencoderKL.from_pretrained(folder / "autoencoder").to(run.device).eval()
    latents = cached_latents(folder, vae, samples, pictures.rgba, run.device)
    sampler = Sampler(latents, len(pictures.names), tokenizer, [sample.caption for sample in samples])
    state = State(run, len(tokenizer), folder / "text_to_image.pt")
    print(f"{len(pictures.names)} pictures, {len(samples)} captions, {len(tokenizer)} tokens,",
          f"{sum(p.numel() for p in state.models.parameters()) / 1e6:.1f} M parameters", flush=True)  # fmt: skip
    models = (
        Models(state.models.text_encoder, torch.compile(state.models.transformer)) if run.compiled else state.models
    )
    autocast = torch.autocast(run.device.split(":")[0], torch.bfloat16, enabled=not run.fp32)
    started, losses = time.time() - state.seconds, []
    last_images, last_time = state.images, time.time()
    next_save, next_score = state.seconds + SAVE_EVERY, (state.seconds // SCORE_EVERY + 1) * SCORE_EVERY
    while (elapsed := time.time() - started) < run.minutes * 60:
        batch = sampler.draw(run.batch, run.device)
        with autocast:
            loss = flow_loss(models, batch)
        state.learn(loss, learning_rate(elapsed / (run.minutes * 60), state.step))
        state.images, state.seconds = state.images + run.batch, elapsed
        losses.append(loss.detach())
        if state.step % 100 == 0:
            pace = (state.images - last_images) / (time.time() - last_time)
            print(f"step {state.step} {elapsed:.0f} s loss {torch.stack(losses).mean().item():.4f}",
                  f"{pace:.1f} images/s epoch {state.images / len(pictures.names):.1f}", flush=True)  # fmt: skip
            last_images, last_time, losses = state.images, time.time(), []
        if elapsed > next_save:
            next_save = elapsed + SAVE_EVERY
            state.save()
        if elapsed > next_score:
            next_score += SCORE_EVERY
            print(report(state, tokenizer, vae, pictures, folder), flush=True)
            last_images, last_time = state.images, time.time()
    state.save()
    print(f"finished after {state.step} steps, {state.images} images:", report(state, tokenizer, vae, pictures, folder))
    return state


def parsed() -> Run:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=90, help="training time in all (default: 90)")
    parser.add_argument("--groups", nargs="+", default=GROUPS, help=f"groups of emoji (default: {GROUPS})")
    parser.add_argument("--width", type=int, default=256, help="transformer width, a multiple of 128 (default: 256)")
    parser.add_argument("--layers", type=int, default=8, help="transformer layers (default: 8)")
    parser.add_argument("--batch", type=int, default=32, help="pictures a step (default: 32)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--compile", action="store_true", dest="compiled", help="torch.compile the transformer")
    parser.add_argument("--fp32", action="store_true", help="no bf16 autocast")
    return Run(**vars(parser.parse_args()))


def main() -> None:
    run, folder = parsed(), cache_folder()
    (folder / "text_to_image.json").write_text(json.dumps(run._asdict(), indent=2) + "\n", encoding="utf-8")
    train(run, folder)


if __name__ == "__main__":
    main()
