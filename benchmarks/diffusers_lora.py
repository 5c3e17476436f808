"""A plain diffusers and peft loop of the same work: what ``train_step.py --compare`` holds the suite against.

    python benchmarks/diffusers_lora.py --model DIR --images DIR --precision bf16 --steps 12

LoRA on the attention of the U-Net of Stable Diffusion 1.x or XL, whichever the folder holds, with AdamW. Latents are
encoded beforehand, captions in each step, unless flags say otherwise. It prints ``first step`` when set-up is over and
one JSON line at the end: wall times of its steps (seconds) and peak device memory (GB). Needs peft. With ``--full`` all
weights of the U-Net are trained instead, in float32, without clipping.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig
from PIL import Image
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]


@dataclass(frozen=True)
class Encoded:
    """Captions for the U-Net."""

    context: torch.Tensor  # (B, 77, D)
    pooled: torch.Tensor | None  # (B, P), of SDXL

    @staticmethod
    def cat(parts: list[Encoded]) -> Encoded:
        pooled = None if parts[0].pooled is None else torch.cat([part.pooled for part in parts])
        return Encoded(torch.cat([part.context for part in parts]), pooled)


def read_image(path: Path) -> torch.Tensor:
    """(1, 3, H, W) in [-1, 1]; images must be of the trained size."""
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None] / 127.5 - 1.0


@torch.no_grad()
def encode_images(vae: AutoencoderKL, *paths: Path) -> torch.Tensor:
    """(B, 4, h, w) scaled latents."""
    pixels = torch.cat([read_image(path) for path in paths])
    latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.sample()
    return latents.float() * vae.config.scaling_factor


def text_encoding(model: Path, load: Callable) -> Callable[[list[str]], Encoded]:
    """Return the function that encodes captions: SD's one encoder, or the last but one layers of SDXL's two."""
    xl = (model / "text_encoder_2").is_dir()
    names = ("", "_2") if xl else ("",)
    tokenizers = [CLIPTokenizer.from_pretrained(model, subfolder=f"tokenizer{name}") for name in names]
    kinds = (CLIPTextModel, CLIPTextModelWithProjection)
    encoders = [load(kind, f"text_encoder{name}") for name, kind in zip(names, kinds, strict=False)]

    @torch.no_grad()
    def encode(captions: list[str]) -> Encoded:
        states, pooled = [], None
        for tokenizer, encoder in zip(tokenizers, encoders, strict=True):
            tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
            out = encoder(tokens.input_ids.to(encoder.device), output_hidden_states=xl)
            states.append(out.hidden_states[-2] if xl else out.last_hidden_state)
            pooled = out.text_embeds if encoder is encoders[-1] and xl else None
        return Encoded(torch.cat(states, dim=-1), pooled)

    return encode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Diffusers folder")
    parser.add_argument("--images", type=Path, required=True, help="folder of square images with .txt captions")
    parser.add_argument("--precision", choices=["no", "bf16"], default="bf16")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rank", type=int, default=8, help="LoRA rank")
    parser.add_argument("--full", action="store_true", help="train all weights of the U-Net")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations of the U-Net")
    parser.add_argument("--cache_text", action="store_true", help="encode captions beforehand")
    parser.add_argument("--uncached", action="store_true", help="encode images in each step")
    parser.add_argument("--adamw8bit", action="store_true", help="AdamW of bitsandbytes")
    parser.add_argument("--compile", action="store_true", help="compile the U-Net's transformer blocks")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32

    def load(kind, name, dtype=dtype):
        return kind.from_pretrained(args.model, subfolder=name, torch_dtype=dtype).requires_grad_(False).to(device)

    image_files = sorted(args.images.glob("*.png"))
    captions = [path.with_suffix(".txt").read_text(encoding="utf-8") for path in image_files]
    vae = load(AutoencoderKL, "vae")
    if not args.uncached:
        latents = [encode_images(vae, path) for path in image_files]
        del vae
    encode = text_encoding(args.model, load)
    if args.cache_text:
        texts = [encode([caption]) for caption in captions]
        del encode
    if args.full:
        unet = load(UNet2DConditionModel, "unet", torch.float32).requires_grad_(True)
    else:
        unet = load(UNet2DConditionModel, "unet")
        unet.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=ATTENTION))
    trained = [p for p in unet.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    if args.checkpointing:
        unet.enable_gradient_checkpointing()
    if args.compile:
        unet.compile_repeated_blocks()
    if args.adamw8bit:
        from bitsandbytes.optim import AdamW8bit

        optimizer = AdamW8bit(trained, lr=1e-4)
    else:
        optimizer = torch.optim.AdamW(trained, lr=1e-4)
    schedule = DDPMScheduler.from_pretrained(args.model, subfolder="scheduler")
    unet.train()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()

    print("first step", flush=True)
    seconds = []
    for step in range(args.steps):
        began = time.perf_counter()
        chosen = [(step * args.batch_size + index) % len(image_files) for index in range(args.batch_size)]
        if args.uncached:
            clean = encode_images(vae, *(image_files[i] for i in chosen))
        else:
            clean = torch.cat([latents[i] for i in chosen])
        noise, t = torch.randn_like(clean), torch.randint(0, 1000, (args.batch_size,), device=device)
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            if args.cache_text:
                text = Encoded.cat([texts[i] for i in chosen])
            else:
                text = encode([captions[i] for i in chosen])
            added = None
            if text.pooled is not None:
                side = 8 * clean.shape[-1]
                sizes = torch.tensor([[side, side, 0, 0, side, side]] * args.batch_size, device=device)
                added = {"text_embeds": text.pooled, "time_ids": sizes}
            noisy = schedule.add_noise(clean, noise, t).to(unet.dtype)
            prediction = unet(noisy, t, text.context, added_cond_kwargs=added).sample
        loss = F.mse_loss(prediction.float(), noise)
        loss.backward()
        if not args.full:
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        seconds.append(time.perf_counter() - began)
    peak = round(torch.cuda.max_memory_allocated() / 1e9, 2) if device == "cuda" else None
    print(json.dumps({"seconds": seconds, "peak_device_gb": peak}))


if __name__ == "__main__":
    main()
