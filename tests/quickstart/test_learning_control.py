"""A ControlNet of the embedded model, trained and used by the real scripts: its image decides where the shape is."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from examples.quickstart.recipe.images import POSITIONS, RADII, SHAPES, SIZE, draw_scene, random_scene
from examples.quickstart.recipe.recognise import foreground, recognise
from tests.fixtures.runs import run_script
from tests.quickstart.test_learning import EXAMPLE, draw

PROMPTS = [
    f"a {('red', 'blue', 'yellow')[n % 3]} {SHAPES[n % 6]}, {('white', 'black', 'green')[n // 3 % 3]} background"
    for n in range(30)
]


def box(bounds: tuple[float, float, float, float]) -> Image.Image:
    """A white rectangle on black, (left, top, right, bottom) in pixels."""
    guide = Image.new("RGB", (SIZE, SIZE))
    ImageDraw.Draw(guide).rectangle(bounds, fill=(255, 255, 255))
    return guide


def make_data(folder: Path) -> Path:
    """Scenes whose captions say nothing of the place, and guides that are white where the shape is."""
    images, guides, numbers = folder / "images", folder / "boxes", random.Random(3)
    images.mkdir()
    guides.mkdir()
    for number in range(200):
        scene = random_scene(numbers)
        image = draw_scene(scene, numbers)
        ys, xs = np.where(foreground(np.asarray(image).astype(float)))
        image.save(images / f"{number}.png")
        box((xs.min(), ys.min(), xs.max(), ys.max())).save(guides / f"{number}.png")
        (images / f"{number}.txt").write_text(f"a {scene.color} {scene.shape}, {scene.background} background")
    data = folder / "data.toml"
    data.write_text(
        "[general]\ncaption_extension = '.txt'\n[[datasets]]\nresolution = 64\nbatch_size = 8\n"
        f"[[datasets.subsets]]\nimage_dir = '{images}'\nconditioning_data_dir = '{guides}'\n"
    )
    return data


@pytest.mark.slow
def test_the_image_decides_where_the_shape_is(tmp_path: Path) -> None:
    trained = run_script(
        "train_control_net.py",
        *("--pretrained_model_name_or_path", EXAMPLE / "model", "--dataset_config", make_data(tmp_path)),
        *("--output_dir", tmp_path / "out", "--output_name", "boxes", "--seed", 1, "--cache_latents", "--sdpa"),
        *("--learning_rate", 1e-3, "--lr_warmup_steps", 20, "--lr_scheduler", "cosine"),
        *("--max_train_steps", 400, "--max_data_loader_n_workers", 0),
    )
    assert trained.code == 0, trained.text
    wanted = tmp_path / "wanted"
    wanted.mkdir()
    for number, (x, y) in enumerate(POSITIONS.values()):
        reach = RADII["large"]
        box(tuple(64 * side for side in (x - reach, y - reach, x + reach, y + reach))).save(wanted / f"{number}.png")  # type: ignore[arg-type]
    controlled = draw(
        tmp_path / "with", PROMPTS,
        *("--control_net_models", tmp_path / "out" / "boxes.safetensors", "--guide_image_path", wanted),
    )  # fmt: skip
    places = [list(POSITIONS)[number % len(POSITIONS)] for number in range(len(PROMPTS))]

    def share(images: list[Image.Image]) -> float:
        return sum(recognise(image).position == place for image, place in zip(images, places, strict=True)) / 30

    assert share(controlled) >= 0.7
    assert share(draw(tmp_path / "without", PROMPTS)) <= 0.35
