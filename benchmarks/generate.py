"""Generate images with ``library.inference`` and with diffusers' pipeline, in turn, on the same random weights.

    python benchmarks/generate.py --size middle --pixels 256 --steps 4 --rounds 3
    python benchmarks/generate.py --arch sdxl --size full --pixels 1024 --steps 20 --dtype bf16 --rounds 3

It prints, for each, the time from the start of loading to the first image, and the median of further images, in seconds
of wall and of processor time. On a GPU only the wall time counts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.architectures.sd import SD
from library.architectures.sdxl import SDXL
from library.diffusion.samplers import create_scheduler_for
from library.inference.generate import generate_images
from library.inference.models import GenerateOptions, ImageModels
from library.inference.settings import ImageSettings
from tests.fixtures import tiny_sd, tiny_sdxl
from tests.fixtures.tiny_sd import MadeCheckpoint

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
#: a prompt -> its image
Generate = Callable[[int], Any]


def made(args: argparse.Namespace, folder: Path) -> MadeCheckpoint:
    xl = args.arch == "sdxl"
    if args.size == "full":
        return (tiny_sdxl.make_full_sdxl if xl else tiny_sd.make_full_sd)(folder / "model")
    if args.size == "tiny":
        return (tiny_sdxl.make_tiny_sdxl if xl else tiny_sd.make_tiny_sd)(folder / "model", layout="diffusers")
    full = tiny_sd.full_sizes(v2=False)
    middle = replace(full, unet_channels=(128, 256, 512, 512), vae_channels=(64, 128, 128, 128), text_layers=4)
    return tiny_sd.make_tiny_sd(folder / "model", layout="diffusers", sizes=replace(middle, text_width=256))


def ours(args: argparse.Namespace, model: MadeCheckpoint, device: torch.device) -> Generate:
    family = SDXL if args.arch == "sdxl" else SD
    dtype, cache = DTYPES[args.dtype], str(model.tokenizer_cache_dir)
    flags = {} if args.arch == "sdxl" else {"v2": False}
    checkpoint = family.inspect(str(model.path), v_parameterization=False, vae=None, tokenizer_cache_dir=cache, **flags)
    models = ImageModels(
        architecture=family,
        tokenizers=family.load_tokenizers(checkpoint),
        text_encoders=family.load_text_encoders(checkpoint, dtype=dtype, device=str(device)),
        denoiser=family.load_denoiser(checkpoint, dtype=dtype, device=str(device)),
        vae=family.load_vae(checkpoint, dtype=dtype, device=str(device)),
    )
    assert models.denoiser is not None
    family.set_attention(models.denoiser, "torch")
    options = GenerateOptions(device=device, dtype=dtype)
    settings = ImageSettings("a cat", "dog", args.pixels, args.pixels, args.steps, 7.5, "ddim", 1)
    return lambda seed: generate_images(models, [replace(settings, seed=seed)], options)[0]


def diffusers(args: argparse.Namespace, model: MadeCheckpoint, device: torch.device) -> Generate:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    kind = StableDiffusionXLPipeline if args.arch == "sdxl" else StableDiffusionPipeline
    more = {"add_watermarker": False} if args.arch == "sdxl" else {"safety_checker": None}
    pipeline = kind.from_pretrained(model.path, torch_dtype=DTYPES[args.dtype], **more).to(device)
    pipeline.scheduler = create_scheduler_for("ddim", v_prediction=False)
    pipeline.set_progress_bar_config(disable=True)
    size = {"width": args.pixels, "height": args.pixels, "num_inference_steps": args.steps}
    return lambda seed: pipeline(
        "a cat", negative_prompt="dog", generator=torch.Generator().manual_seed(seed), guidance_scale=7.5, **size
    ).images[0]


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Return the seconds of wall and processor time."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - processor


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--arch", choices=["sd", "sdxl"], default="sd")
    parser.add_argument("--size", choices=["tiny", "middle", "full"], default="middle")
    parser.add_argument("--pixels", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        model = made(args, Path(folder))
        import diffusers as _

        makers = {"ours": ours, "diffusers": diffusers}
        ready: dict[str, Generate] = {}
        for name, make in makers.items():

            def first(name: str = name, make: Any = make) -> None:
                ready[name] = make(args, model, device)
                ready[name](0)

            wall, processor = timed(first)
            print(f"{name}: loading and first image {wall:.2f} s, processor {processor:.2f} s", flush=True)
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in makers}
        for seed in range(1, args.rounds + 1):
            for name, generate in ready.items():
                found[name].append(timed(lambda generate=generate, seed=seed: generate(seed)))
        for name, times in found.items():
            wall, processor = (statistics.median(values) for values in zip(*times, strict=True))
            print(f"{name}: an image {wall:.2f} s, processor {processor:.2f} s", flush=True)


if __name__ == "__main__":
    main()
