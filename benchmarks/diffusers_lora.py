"""A plain diffusers and peft loop of the same work: what ``train_step.py --compare`` holds the suite against.

    python benchmarks/diffusers_lora.py --model DIR --images DIR --precision bf16 --steps 12

LoRA on the attention of an SD 1.x U-Net, latents encoded beforehand, captions encoded in each step, AdamW. It prints
``first step`` when set-up is over and one JSON line with the wall times of its steps (seconds) at the end. Needs peft.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]


def encode(vae: AutoencoderKL, path: Path) -> torch.Tensor:
    """(1, 4, h, w) scaled latents of one picture, which must be of the trained size."""
    pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None]
    with torch.no_grad():
        latents = vae.encode(pixels.to(vae.dtype) / 127.5 - 1.0).latent_dist.sample()
    return latents.float() * vae.config.scaling_factor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Diffusers folder")
    parser.add_argument("--images", type=Path, required=True, help="folder of pictures with .txt captions")
    parser.add_argument("--precision", choices=["no", "bf16"], default="bf16")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rank", type=int, default=8, help="LoRA rank")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32

    def load(kind, name):
        return kind.from_pretrained(args.model, subfolder=name, torch_dtype=dtype).requires_grad_(False).to(device)

    vae = load(AutoencoderKL, "vae")
    pictures = sorted(args.images.glob("*.png"))
    latents = [encode(vae, path).to(device) for path in pictures]
    captions = [path.with_suffix(".txt").read_text(encoding="utf-8") for path in pictures]
    del vae
    tokenizer = CLIPTokenizer.from_pretrained(args.model, subfolder="tokenizer")
    text_encoder, unet = load(CLIPTextModel, "text_encoder"), load(UNet2DConditionModel, "unet")
    unet.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=ATTENTION))
    trained = [p for p in unet.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    schedule = DDPMScheduler.from_pretrained(args.model, subfolder="scheduler")
    unet.train()

    print("first step", flush=True)
    seconds = []
    for step in range(args.steps):
        began = time.perf_counter()
        chosen = [(step * args.batch_size + index) % len(latents) for index in range(args.batch_size)]
        clean = torch.cat([latents[index] for index in chosen])
        tokens = tokenizer([captions[i] for i in chosen], padding="max_length", truncation=True, return_tensors="pt")
        noise, t = torch.randn_like(clean), torch.randint(0, 1000, (args.batch_size,), device=device)
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            with torch.no_grad():
                context = text_encoder(tokens.input_ids.to(device))[0]
            prediction = unet(schedule.add_noise(clean, noise, t).to(dtype), t, context).sample
        loss = F.mse_loss(prediction.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        seconds.append(time.perf_counter() - began)
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main()
