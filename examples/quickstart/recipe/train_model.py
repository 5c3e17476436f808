"""Make the embedded model from nothing: tokenizer, autoencoder, then text encoder and denoiser together.

    python -m examples.quickstart.recipe.train_model --work scratch --output my_model

About 80 minutes on two CPU cores. The folder's README says how the shipped one was made and measured.
The diffusion mathematics is the project's own (``library.diffusion``); the networks are diffusers' and
transformers' classes in the layout of Stable Diffusion 1.x.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from examples.quickstart.recipe.images import (
    SIZE,
    draw_anything,
    draw_scene,
    random_caption,
    random_scene,
)
from library.diffusion.ddpm import NoiseSchedule, add_noise
from library.diffusion.weighting import min_snr_weight
from library.files.atomic import MANIFEST_NAME, atomic_directory
from library.files.safetensors_io import load_tensors, save_tensors

SEED = 0
STAGES = ["tokenizer", "autoencoder", "decoder", "denoiser", "refined", "write"]
LATENT_SCALE = 0.18215  # of every Stable Diffusion 1.x model
TOKENS = 77
START, END = "<|startoftext|>", "<|endoftext|>"

VAE_CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (16, 32, 64, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "norm_num_groups": 2,  # with few channels in a group the norm would take away their brightness
    "sample_size": SIZE,
    "scaling_factor": LATENT_SCALE,
}
TEXT_CONFIG: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,  # 64 wide each, as in every published text encoder
    "max_position_embeddings": TOKENS,
    "hidden_act": "quick_gelu",
    "projection_dim": 128,
}
UNET_CONFIG: dict[str, Any] = {
    "sample_size": SIZE // 8,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (64, 96, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": TEXT_CONFIG["hidden_size"],
    "attention_head_dim": 8,  # which means 8 heads, as in Stable Diffusion 1.x
    "norm_num_groups": 8,  # channels in a group as in Stable Diffusion 1.x, which is wider
}


# ---- tools of all stages ----


def to_pixels(images: Sequence[Image.Image]) -> Tensor:
    """uint8 (N, 3, H, W)."""
    return torch.from_numpy(np.stack([np.asarray(p) for p in images])).permute(0, 3, 1, 2).contiguous()


def unit(pixels: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1.0


class Averaged:
    """An exponential moving average of parameters, which draws better than the last step's."""

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self._parameters = list(parameters)
        self._decay = decay
        self._average = [p.detach().clone() for p in self._parameters]
        self._steps = 0

    @torch.no_grad()
    def update(self) -> None:
        # short at first, so that the random start is soon forgotten
        decay = min(self._decay, (1 + self._steps) / (10 + self._steps))
        self._steps += 1
        torch._foreach_lerp_(self._average, [p.detach() for p in self._parameters], 1 - decay)

    @torch.no_grad()
    def apply(self) -> None:
        for parameter, average in zip(self._parameters, self._average, strict=True):
            parameter.copy_(average)


def fit(
    name: str,
    parameters: Sequence[nn.Parameter],
    loss: Callable[[], Tensor],
    *,
    steps: int,
    rate: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    average: float,
) -> None:
    """AdamW with warm-up and cosine decay; the parameters end as their moving average."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=betas, weight_decay=weight_decay)
    averaged = Averaged(parameters, average)
    began, shown = time.monotonic(), None
    for step in range(steps):
        warm = min(1.0, (step + 1) / 100)
        for group in optimizer.param_groups:
            group["lr"] = rate * warm * (0.5 * (1 + math.cos(math.pi * step / steps)) + 0.01)
        value = loss()
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        averaged.update()
        shown = value.item() if shown is None else 0.98 * shown + 0.02 * value.item()
        if step % 100 == 0 or step == steps - 1:
            print(f"{name}: step {step}/{steps}  loss {shown:.4f}  {time.monotonic() - began:.0f} s", flush=True)
    averaged.apply()


def distance(drawn: Tensor, wanted: Tensor) -> Tensor:
    """L1 + L2 with four times the weight where something stands out from the background; both (N, 3, H, W)."""
    border = torch.cat([wanted[..., :2, :].flatten(2), wanted[..., -2:, :].flatten(2)], dim=-1).median(dim=-1).values
    stands_out = (wanted - border[..., None, None]).abs().sum(dim=1, keepdim=True) > 0.3
    weight = 1.0 + 3.0 * stands_out
    difference = (drawn - wanted).abs()
    return ((difference + difference.square()) * weight).mean() / weight.mean()


# ---- stages ----


def write_tokenizer(folder: Path, captions: Sequence[str]) -> None:
    """A byte-level BPE with CLIP's conventions, its merges learned from the captions.

    All bytes are in it, alone and as a word's end, so that any text can be encoded.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    words = pre_tokenizers.Split(Regex(r"[a-z]+|[0-9]|[^\sa-z0-9]+"), "isolated")
    learner.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.WhitespaceSplit()])
    trainer = trainers.BpeTrainer(vocab_size=4000, end_of_word_suffix="</w>", show_progress=False, min_frequency=2)
    learner.train_from_iterator(captions, trainer)
    merges = [
        tuple(m) if isinstance(m, list) else tuple(m.split(" "))
        for m in json.loads(learner.to_str())["model"]["merges"]
    ]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(m) for m in merges] + [START, END]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(m) for m in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": TOKENS,
        "do_lower_case": True,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    special = {name: settings[name] for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=1), encoding="utf-8")


def autoencoder_images(count: int) -> Tensor:
    rng = random.Random(SEED)
    return to_pixels([draw_anything(rng) for _ in range(count)])


def train_autoencoder(steps: int, images: int) -> nn.Module:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    vae = AutoencoderKL(**VAE_CONFIG)
    pool = autoencoder_images(images)
    chooser = torch.Generator().manual_seed(SEED)

    def loss() -> Tensor:
        wanted = unit(pool[torch.randint(len(pool), (16,), generator=chooser)])
        posterior = vae.encode(wanted).latent_dist
        latents = posterior.sample()
        # a light pull towards the unit normal, per latent value
        return distance(vae.decode(latents).sample, wanted) + 2e-4 * posterior.kl().mean() / latents[0].numel()

    fit("autoencoder", list(vae.parameters()), loss, steps=steps, rate=1.5e-3, betas=(0.9, 0.99), average=0.99)
    return vae


def train_decoder(vae: nn.Module, steps: int, images: int) -> None:
    """Go on with the decoder alone, whose quality the eye sees; the latents stay as they are."""
    pool = autoencoder_images(images)
    chooser = torch.Generator().manual_seed(SEED + 4)
    with torch.no_grad():
        posteriors = [vae.encode(unit(pool[i : i + 100])).latent_dist for i in range(0, len(pool), 100)]
        means = torch.cat([p.mean for p in posteriors])
        spreads = torch.cat([p.std for p in posteriors])

    def loss() -> Tensor:
        chosen = torch.randint(len(pool), (16,), generator=chooser)
        latents = means[chosen] + spreads[chosen] * torch.randn_like(means[chosen])
        return distance(vae.decode(latents).sample, unit(pool[chosen]))

    parts = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    fit("decoder", parts, loss, steps=steps, rate=2e-3, betas=(0.9, 0.99), average=0.998)


@torch.no_grad()
def normalise_latents(vae: nn.Module, mean: Tensor, spread: Tensor) -> None:
    """Fold ``(latents - mean) / spread`` into the VAE's last layer before the latents and its first one after them.

    Args:
        mean, spread: (C,) of the latents' channels.
    """
    half = len(mean)  # the layer gives means, then log variances
    vae.quant_conv.weight[:half] /= spread[:, None, None, None]
    vae.quant_conv.bias[:half] = (vae.quant_conv.bias[:half] - mean) / spread
    vae.quant_conv.bias[half:] -= 2 * spread.log()
    weight = vae.post_quant_conv.weight
    vae.post_quant_conv.bias += weight[:, :, 0, 0] @ mean
    weight *= spread[None, :, None, None]


def timestep_weights(schedule: NoiseSchedule) -> Tensor:
    """Weights of the squared error of the noise, float32 (T,), 1 on average.

    Min-SNR (gamma 5), and up to thirty times as much where the noise drowns the image: there the error of the
    image is the noise's divided by the signal-to-noise ratio, and there shape, place and colour are decided.
    In a trial of 400 steps this halved the image's error at timestep 900.
    """
    timesteps = torch.arange(len(schedule.alphas_cumprod))
    signal = schedule.alphas_cumprod.float()
    weights = min_snr_weight(timesteps, schedule, 5.0, False) * ((1 - signal) / signal).clamp(1, 30)
    return weights / weights.mean()


def new_denoiser(tokenizer: Any) -> tuple[nn.Module, nn.Module]:
    """Text encoder and U-Net with random weights."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    text = CLIPTextModel(
        CLIPTextConfig(
            **TEXT_CONFIG,
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    return text, UNet2DConditionModel(**UNET_CONFIG)


def train_denoiser(
    name: str,
    models: tuple[nn.Module, nn.Module],
    vae: nn.Module,
    tokenizer: Any,
    statistics: Mapping[str, Tensor] | None,
    *,
    steps: int,
    rate: float,
    images: int,
    seed: int,
) -> dict[str, Tensor]:
    """Text encoder and U-Net together, on latents of captioned scenes; one caption in ten is left out.

    Args:
        statistics: mean and spread of the latents' channels, each (C,); ``None`` measures them.

    Returns:
        the statistics.
    """
    text, unet = models
    rng = random.Random(seed)
    scenes = [random_scene(rng) for _ in range(images)]
    captions = [random_caption(scene, rng) for scene in scenes]
    pixels = to_pixels([draw_scene(scene, rng) for scene in scenes])
    with torch.no_grad():
        latents = torch.cat([vae.encode(unit(pixels[i : i + 100])).latent_dist.mean for i in range(0, images, 100)])
    if statistics is None:
        statistics = {"mean": latents.mean(dim=(0, 2, 3)), "spread": latents.std(dim=(0, 2, 3))}
    latents = (latents - statistics["mean"][:, None, None]) / statistics["spread"][:, None, None]

    def tokens(texts: Sequence[str]) -> Tensor:
        return torch.tensor(tokenizer(list(texts), padding="max_length", max_length=TOKENS, truncation=True).input_ids)

    ids, empty = tokens(captions), tokens([""])
    schedule = NoiseSchedule.scaled_linear()
    weights = timestep_weights(schedule)
    chooser = torch.Generator().manual_seed(seed + 1)

    def loss() -> Tensor:
        chosen = torch.randint(images, (64,), generator=chooser)
        clean, input_ids = latents[chosen], ids[chosen].clone()
        input_ids[torch.rand(64, generator=chooser) < 0.1] = empty  # for classifier-free guidance
        timesteps = torch.randint(0, 1000, (64,), generator=chooser)
        noise = torch.randn(clean.shape, generator=chooser)
        context = text(input_ids).last_hidden_state
        predicted = unet(add_noise(schedule, clean, noise, timesteps), timesteps, context).sample
        each = (predicted - noise).square().mean(dim=(1, 2, 3))
        return (each * weights[timesteps]).mean()

    parameters = [*text.parameters(), *unet.parameters()]
    fit(name, parameters, loss, steps=steps, rate=rate, weight_decay=0.01, average=0.999)
    return dict(statistics)


def write_model(folder: Path, tokenizer_folder: Path, vae: nn.Module, text: nn.Module, unet: nn.Module) -> None:
    """A Diffusers folder in fp16, with tensor names as published ones have them."""
    import shutil

    half = torch.float16
    shutil.copytree(tokenizer_folder, folder / "tokenizer", ignore=shutil.ignore_patterns(MANIFEST_NAME))
    for name, module in (("vae", vae), ("unet", unet)):
        module.to(half).save_pretrained(folder / name)
    text.to(half).save_pretrained(folder / "text_encoder")
    # transformers 5 leaves out the prefix that published files have
    weights = folder / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{name.removeprefix('text_model.')}": t for name, t in text.state_dict().items()}
    save_tensors(weights, {name: t for name, t in tensors.items() if "position_ids" not in name}, {"format": "pt"})
    (folder / "scheduler").mkdir()
    scheduler = {
        "_class_name": "DDIMScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=1), encoding="utf-8")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


# ---- command line ----


def run_stage(stage: str, args: argparse.Namespace) -> None:
    """Run one stage; it reads what earlier ones left in the work folder and leaves its own there."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from transformers import CLIPTokenizer

    torch.manual_seed(SEED)
    work: Path = args.work
    if stage == "tokenizer":
        rng = random.Random(SEED + 3)
        with atomic_directory(work / "tokenizer") as folder:
            write_tokenizer(folder, [random_caption(random_scene(rng), rng) for _ in range(4000)])
    elif stage == "autoencoder":
        with atomic_directory(work / "autoencoder") as folder:
            train_autoencoder(args.autoencoder_steps, args.images).save_pretrained(folder)
    elif stage == "decoder":
        vae = AutoencoderKL.from_pretrained(work / "autoencoder")
        with atomic_directory(work / "decoder") as folder:
            train_decoder(vae, args.decoder_steps, args.images)
            vae.save_pretrained(folder)
    elif stage in ("denoiser", "refined"):
        vae = AutoencoderKL.from_pretrained(work / "autoencoder")
        tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
        if stage == "denoiser":
            models, statistics = new_denoiser(tokenizer), None
            settings = {"steps": args.denoiser_steps, "rate": 1.2e-3, "seed": SEED + 1}
        else:
            models, statistics = _read_denoiser(work / "denoiser")
            settings = {"steps": args.refined_steps, "rate": 6e-4, "seed": SEED + 5}
        with atomic_directory(work / stage) as folder:
            statistics = train_denoiser(stage, models, vae, tokenizer, statistics, images=args.images, **settings)
            models[0].save_pretrained(folder / "text_encoder")
            models[1].save_pretrained(folder / "unet")
            save_tensors(folder / "latents.safetensors", statistics)
    else:
        vae = AutoencoderKL.from_pretrained(work / "decoder")
        (text, unet), statistics = _read_denoiser(work / "refined")
        # the denoiser sees latents times LATENT_SCALE, and is to see the ones it was trained on
        normalise_latents(vae, statistics["mean"], statistics["spread"] * LATENT_SCALE)
        with atomic_directory(args.output) as folder:
            write_model(folder, work / "tokenizer", vae, text, unet)
        (args.output / MANIFEST_NAME).unlink()


def _read_denoiser(folder: Path) -> tuple[tuple[nn.Module, nn.Module], dict[str, Tensor]]:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextModel

    text = CLIPTextModel.from_pretrained(folder / "text_encoder")
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    return (text.train(), unet.train()), load_tensors(folder / "latents.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--work", type=Path, required=True, help="folder where each stage leaves its result")
    parser.add_argument(
        "--stages",
        nargs="+",
        choices=STAGES,
        default=STAGES,
        help="which to run; decoder and denoiser can run side by side",
    )
    parser.add_argument("--autoencoder_steps", type=int, default=5000)
    parser.add_argument("--decoder_steps", type=int, default=3000)
    parser.add_argument("--denoiser_steps", type=int, default=3200)
    parser.add_argument("--refined_steps", type=int, default=1800)
    parser.add_argument("--images", type=int, default=12000, help="images drawn for each stage")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    for stage in args.stages:
        run_stage(stage, args)
    print(f"done: {', '.join(args.stages)}")


if __name__ == "__main__":
    main()
