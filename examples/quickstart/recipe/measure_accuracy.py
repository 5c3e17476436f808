"""Measure how often the model draws what its prompt says: shape and colour, recognised from the pixels.

    python -m examples.quickstart.recipe.measure_accuracy --model examples/quickstart/model

Ends with code 1 below the wanted accuracy.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from examples.quickstart.recipe.images import SIZE, Scene, random_scene
from examples.quickstart.recipe.recognise import recognise
from library.architectures.sd import SD
from library.config.image_settings import ImageSettings
from library.inference.generate import GenerateOptions, ImageModels, generate_images

WANTED = 0.9
STEPS = 20
SCALE = 4.0


@dataclass(frozen=True)
class Accuracy:
    shape: float
    color: float
    both: float
    position: float


def load_models(model: Path, device: str = "cpu") -> ImageModels:
    """The embedded model in float32."""
    checkpoint = SD.inspect(str(model), v2=False, v_parameterization=False, vae=None, tokenizer_cache_dir=None)
    return ImageModels(
        architecture=SD,
        tokenizers=SD.load_tokenizers(checkpoint),
        text_encoders=SD.load_text_encoders(checkpoint, dtype=torch.float32, device=device),
        denoiser=SD.load_denoiser(checkpoint, dtype=torch.float32, device=device),
        vae=SD.load_vae(checkpoint, dtype=torch.float32, device=device),
    )


def draw(
    models: ImageModels, prompts: Sequence[str], *, first_seed: int = 0, batch_size: int = 25
) -> list[Image.Image]:
    """One image for each prompt, with seeds that count on."""
    settings = [
        ImageSettings(prompt, "", SIZE, SIZE, STEPS, SCALE, "ddim", first_seed + i) for i, prompt in enumerate(prompts)
    ]
    options = GenerateOptions(device=next(models.denoiser.parameters()).device)
    drawn: list[Image.Image] = []
    for start in range(0, len(settings), batch_size):
        drawn += generate_images(models, settings[start : start + batch_size], options)
    return drawn


def asked_scenes(count: int, seed: int = 2024) -> list[Scene]:
    """Scenes to ask for, the same each time."""
    rng = random.Random(seed)
    return [random_scene(rng) for _ in range(count)]


def measure(models: ImageModels, scenes: Sequence[Scene]) -> Accuracy:
    """Draw each scene from its full caption and recognise it."""
    images = draw(models, [scene.full_caption() for scene in scenes])
    seen = [recognise(image) for image in images]
    pairs = list(zip(seen, scenes, strict=True))
    count = len(scenes)
    return Accuracy(
        shape=sum(s.shape == scene.shape for s, scene in pairs) / count,
        color=sum(s.color == scene.color for s, scene in pairs) / count,
        both=sum((s.shape, s.color) == (scene.shape, scene.color) for s, scene in pairs) / count,
        position=sum(s.position == scene.position for s, scene in pairs) / count,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(__file__).resolve().parents[1] / "model")
    parser.add_argument("--prompts", type=int, default=200, help="how many prompts")
    args = parser.parse_args()
    found = measure(load_models(args.model), asked_scenes(args.prompts))
    shares = f"shape {found.shape:.1%}, colour {found.color:.1%}, both {found.both:.1%}; place {found.position:.1%}"
    print(f"{args.prompts} prompts: {shares}")
    if found.both < WANTED:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
