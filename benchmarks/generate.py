"""Generate images with ``gen_img.py`` and with diffusers' pipelines, in turn, from the same random weights.

    python benchmarks/generate.py --steps 6 --rounds 3
    python benchmarks/generate.py --arch sdxl --size full --pixels 1024 --steps 20 --dtype bf16 --rounds 3

For each kind of work (txt2img, img2img, ControlNet, a batch of four) it measures, for both sides:

- the first image: whole programs in turn, from their start to the saved file, with the memory that they took at most;
- further images, in turn in one process, from the prompt to the saved file: seconds a step, by the difference of images
  of many steps and of one, and the seconds of everything else (text, VAE, file).

Both have float32, or the same half precision, DDIM and guidance. Times are of the wall and, in brackets, of the
processor, which counts where other work is on the machine and there is no GPU.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.peak_memory import PeakMemory

WORKS = ("txt2img", "img2img", "controlnet", "batch")
SIDES = ("ours", "diffusers")
BATCH = 4
STRENGTH = 0.75


@dataclass(frozen=True)
class Times:
    """Seconds of the wall and of the processor."""

    wall: float
    processor: float

    @staticmethod
    def now() -> Times:
        return Times(time.perf_counter(), time.process_time())

    def since(self, before: Times) -> Times:
        return Times(self.wall - before.wall, self.processor - before.processor)

    def __str__(self) -> str:
        return f"{self.wall:.2f} s ({self.processor:.2f} s)"


def median(times: list[Times]) -> Times:
    return Times(*(statistics.median(values) for values in zip(*((t.wall, t.processor) for t in times), strict=True)))


# ---- the files that both read ----


def make_files(folder: Path, arch: str, size: str) -> None:
    """Write a model, a ControlNet for it and an image."""
    import numpy as np
    import torch
    from PIL import Image

    from tests.fixtures import tiny_sd, tiny_sdxl
    from tests.fixtures.control import random_controlnet

    model = folder / "model"
    base = replace(tiny_sd.full_sizes(v2=False), vae_channels=(64, 128, 128, 128), text_layers=4, text_width=256)
    base = replace(base, text_inner=1024)
    if arch == "sdxl":
        small = tiny_sdxl.SdxlSizes(replace(base, unet_channels=(128, 256, 512), unet_depths=(0, 1, 2)), 320, 4, 1280)
        if size == "full":
            tiny_sdxl.make_full_sdxl(model)
        else:
            tiny_sdxl.make_tiny_sdxl(model, layout="diffusers", sizes=small if size == "middle" else None)
    elif size == "full":
        tiny_sd.make_full_sd(model)
    else:
        sizes = replace(base, unet_channels=(128, 256, 512, 512)) if size == "middle" else tiny_sd.Sizes()
        tiny_sd.make_tiny_sd(model, layout="diffusers", sizes=sizes)
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(model / "unet", torch_dtype=torch.float16 if size == "full" else None)
    random_controlnet(unet).save_pretrained(folder / "control")
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((512, 512)).save(folder / "image.png")


# ---- ours ----


def our_words(args: argparse.Namespace, folder: Path, work: str) -> list[str]:
    """Return the command line of ``gen_img.py``."""
    given: dict[str, object] = {
        "ckpt": folder / "model", "outdir": folder / "ours", "W": args.pixels, "H": args.pixels, "steps": args.steps,
        "tokenizer_cache_dir": folder / "tokenizers", "sampler": "ddim", "scale": 7.5,
    }  # fmt: skip
    if work == "img2img":
        given |= {"image_path": folder / "image.png", "strength": STRENGTH}
    if work == "controlnet":
        given |= {"control_net_models": folder / "control", "guide_image_path": folder / "image.png"}
    if work == "batch":
        given |= {"images_per_prompt": BATCH, "batch_size": BATCH}
    words = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
    return [*words, *([f"--{args.dtype}"] if args.dtype != "fp32" else []), "--console_log_simple"]


class Turns(io.TextIOBase):
    """The prompts of an interactive session: when the next one is asked for, the image before is saved.

    Args:
        jobs: (seed, steps) of each image.
        other: generates the same image with diffusers.
    """

    def __init__(self, jobs: list[tuple[int, int]], other: Callable[[int, int], None]) -> None:
        self._jobs, self._other = jobs, other
        self._next = 0
        self._began: Times | None = None
        self.times: dict[str, list[Times]] = {side: [] for side in SIDES}

    def readline(self, size: int = -1) -> str:  # type: ignore[override]
        if self._began is not None:
            self.times["ours"].append(_synchronized().since(self._began))
        if self._next == len(self._jobs):
            return "\n"
        seed, steps = self._jobs[self._next]
        self._next += 1
        before = _synchronized()
        self._other(seed, steps)
        self.times["diffusers"].append(_synchronized().since(before))
        self._began = _synchronized()
        return f"a cat --n dog --d {seed} --s {steps}\n"

    def isatty(self) -> bool:
        return False


def _synchronized() -> Times:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Times.now()


# ---- diffusers ----


def pipeline(args: argparse.Namespace, folder: Path, work: str) -> Callable[[int, int], None]:
    """Return a function that generates and saves the images of a seed in so many steps."""
    import diffusers
    import torch

    xl = "XL" if args.arch == "sdxl" else ""
    kinds = {"img2img": "Img2Img", "controlnet": "ControlNet"}
    kind = getattr(diffusers, f"StableDiffusion{xl}{kinds.get(work, '')}Pipeline")
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[args.dtype]
    more: dict[str, Any] = {"add_watermarker": False} if xl else {"safety_checker": None}
    if work == "controlnet":
        more["controlnet"] = diffusers.ControlNetModel.from_pretrained(folder / "control", torch_dtype=dtype)
    made = kind.from_pretrained(folder / "model", torch_dtype=dtype, **more)
    made.scheduler = diffusers.DDIMScheduler.from_config(made.scheduler.config, clip_sample=False, steps_offset=1)
    made.set_progress_bar_config(disable=True)
    made.to("cuda" if torch.cuda.is_available() else "cpu")
    given: dict[str, Any] = {"negative_prompt": "dog", "guidance_scale": 7.5}
    size = {"width": args.pixels, "height": args.pixels}
    if work in kinds:
        image = diffusers.utils.load_image(str(folder / "image.png")).resize((args.pixels, args.pixels))
        given["image"] = image
    given |= {"strength": STRENGTH} if work == "img2img" else size
    if work == "batch":
        given["num_images_per_prompt"] = BATCH
    (folder / "diffusers").mkdir(exist_ok=True)

    def generate(seed: int, steps: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        found = made("a cat", generator=generator, num_inference_steps=steps, **given).images
        for number, image in enumerate(found):
            image.save(folder / "diffusers" / f"{seed}_{steps}_{number}.png")

    return generate


# ---- measuring ----


def first_image(args: argparse.Namespace, folder: Path, work: str, side: str) -> tuple[Times, float]:
    """Run a whole program that saves one image; returns its times and its memory at most in GB."""
    if side == "ours":
        command = [str(ROOT / "gen_img.py"), *our_words(args, folder, work), "--prompt", "a cat --n dog --d 1"]
    else:
        own = ["--arch", args.arch, "--pixels", str(args.pixels), "--steps", str(args.steps), "--dtype", args.dtype]
        command = [__file__, *own, "--works", work, "--only_diffusers", str(folder)]
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    with PeakMemory(process.pid) as peak:
        said = process.stderr.read()
        _, status, used = os.wait4(process.pid, 0)
    wall = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(said.decode())
    return Times(wall, used.ru_utime + used.ru_stime), peak.bytes / 1e9


def further_images(args: argparse.Namespace, folder: Path, work: str) -> dict[str, tuple[Times, Times]]:
    """Generate in turn; returns for each side the times of a step, and of everything else."""
    import gen_img
    from library.inference.families import family_of
    from library.inference.gen_img import generate_all
    from library.inference.options import image_options

    options = image_options(gen_img.setup_parser().parse_args([*our_words(args, folder, work), "--interactive"]))
    # at a strength, a share of the steps is run; the short image runs one of them
    short = -(-1 // STRENGTH) if work == "img2img" else 1
    short = int(short)
    jobs = [(seed, steps) for seed in range(args.rounds + 1) for steps in (short, args.steps)]
    turns = Turns(jobs, pipeline(args, folder, work))
    generate_all(options, family_of(options.model), turns)
    run = int(args.steps * STRENGTH) if work == "img2img" else args.steps
    found = {}
    for side, times in turns.times.items():
        # the first of each length makes ready what the others use
        small, large = median(times[2::2]), median(times[3::2])
        step = Times(*(value / (run - 1) for value in (large.wall - small.wall, large.processor - small.processor)))
        found[side] = step, Times(small.wall - step.wall, small.processor - step.processor)
    return found


def measure(args: argparse.Namespace, folder: Path, work: str) -> dict[str, dict[str, Any]]:
    """Return side -> what was measured, and print it."""
    starts: dict[str, list[tuple[Times, float]]] = {side: [] for side in SIDES}
    for _ in range(args.starts):
        for side in SIDES:
            starts[side].append(first_image(args, folder, work, side))
    further = further_images(args, folder, work)
    found: dict[str, dict[str, Any]] = {}
    for side in SIDES:
        step, rest = further[side]
        first, memory = median([times for times, _ in starts[side]]), max(memory for _, memory in starts[side])
        found[side] = {"first": first, "step": step, "rest": rest, "memory": memory}
        print(
            f"{args.arch} {work}, {side}: first image {first}, a step {step}, the rest of an image {rest}, "
            f"{memory:.2f} GB",
            flush=True,
        )
    ours, theirs = found["ours"], found["diffusers"]
    counted = [
        (name, *(getattr(one[name], args.clock) for one in (ours, theirs))) for name in ("first", "step", "rest")
    ]
    counted.append(("memory", ours["memory"], theirs["memory"]))
    shown = ", ".join(f"{name} {one / other:.2f}" for name, one, other in counted)
    print(f"{args.arch} {work}, ours over diffusers ({args.clock}): {shown}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--arch", choices=["sd", "sdxl"], default="sd")
    parser.add_argument("--size", choices=["tiny", "middle", "full"], default="middle")
    parser.add_argument("--works", nargs="*", choices=WORKS, default=list(WORKS))
    parser.add_argument("--pixels", type=int, default=256)
    parser.add_argument("--steps", type=int, default=6, help="of the long images, 3 at least")
    parser.add_argument("--rounds", type=int, default=3, help="images of each length")
    parser.add_argument("--starts", type=int, default=2, help="programs of each side, in turn")
    parser.add_argument("--dtype", choices=["fp32", "fp16", "bf16"], default="fp32")
    parser.add_argument("--clock", choices=["wall", "processor"], default="wall", help="of the ratios")
    parser.add_argument("--only_diffusers", help=argparse.SUPPRESS)  # the program of the other side
    args = parser.parse_args()
    if args.only_diffusers:
        pipeline(args, Path(args.only_diffusers), args.works[0])(1, args.steps)
        return
    if args.steps < 3:
        raise SystemExit("--steps: must be at least 3")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as folder:
        make_files(Path(folder), args.arch, args.size)
        results = {work: measure(args, Path(folder), work) for work in args.works}
    print(json.dumps(results, default=vars))


if __name__ == "__main__":
    main()
