"""A new word for what the embedded model can generate, trained and used by the real scripts, read from pixels."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from examples.quickstart.recipe.images import COLORS, POSITIONS, Scene, draw_scene
from examples.quickstart.recipe.recognise import recognise
from tests.fixtures.runs import run_script
from tests.quickstart.test_learning import EXAMPLE, draw

SHAPE, COLOR, SIZE = "star", "purple", "large"
BACKGROUNDS = [color for color in COLORS if color != COLOR]


def scene(number: int) -> Scene:
    return Scene(SHAPE, COLOR, BACKGROUNDS[number % len(BACKGROUNDS)], list(POSITIONS)[number % len(POSITIONS)], SIZE)


def prompt(number: int) -> str:
    return f"a dax {scene(number).place}, {scene(number).background} background"


def shown(folder: Path, *words: object) -> float:
    """The share of 50 images, each of another seed, that show the concept."""
    seen = [recognise(image) for image in draw(folder, [prompt(number) for number in range(50)], *words)]
    return sum((found.shape, found.color) == (SHAPE, COLOR) for found in seen) / len(seen)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_textual_inversion", "train_textual_inversion_XTI"])
def test_a_new_word_means_what_its_images_show(tmp_path: Path, script: str) -> None:
    images, numbers = tmp_path / "images", random.Random(5)
    images.mkdir()
    for number in range(20):
        draw_scene(scene(number), numbers).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text(prompt(number))
    data = tmp_path / "data.toml"
    data.write_text(
        f"[general]\ncaption_extension = '.txt'\n[[datasets]]\nresolution = 64\nbatch_size = 4\n"
        f"[[datasets.subsets]]\nimage_dir = '{images}'\nnum_repeats = 4\n"
    )
    trained = run_script(
        f"{script}.py",
        *("--pretrained_model_name_or_path", EXAMPLE / "model", "--dataset_config", data),
        *("--output_dir", tmp_path / "out", "--token_string", "dax", "--init_word", "circle", "--seed", 1),
        *("--learning_rate", 5e-3, "--lr_scheduler", "cosine", "--max_train_steps", 400, "--min_snr_gamma", 5),
        *("--cache_latents", "--sdpa", "--max_data_loader_n_workers", 0, "--save_model_as", "safetensors"),
    )
    assert trained.code == 0, trained.text
    option = "--XTI_embeddings" if script.endswith("XTI") else "--textual_inversion_embeddings"
    word = (option, tmp_path / "out" / "dax.safetensors")
    assert shown(tmp_path / "with", *word) >= 0.8
    # the text encoder is the same for all other words
    others = ["a large red circle in the center, white background", "a small blue square on the left, black background"]
    before = [image.tobytes() for image in draw(tmp_path / "before", others)]
    assert [image.tobytes() for image in draw(tmp_path / "after", others, *word)] == before


@pytest.mark.slow
def test_without_training_the_word_means_something_else(tmp_path: Path) -> None:
    assert shown(tmp_path / "base") <= 0.1
