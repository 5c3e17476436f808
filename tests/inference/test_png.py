"""PNG files say what they were made with."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from library.config.image_settings import ImageSettings
from library.errors import UserError
from library.inference.png import save_png


def test_settings_are_in_the_file(tmp_path: Path) -> None:
    settings = ImageSettings("a cat", "blurry", 64, 72, 20, 7.5, "euler_a", 3)
    image = Image.new("RGB", (64, 72), (1, 2, 3))
    path = tmp_path / "new" / "a.png"
    save_png(image, path, settings.record(model="m.safetensors", network="l.safetensors:1"))
    with Image.open(path) as saved:
        saved.load()
        assert saved.getpixel((0, 0)) == (1, 2, 3)
        assert saved.text == {
            "parameters": "a cat\nNegative prompt: blurry\nSteps: 20, Sampler: euler_a, CFG scale: 7.5, Seed: 3, "
            "Size: 64x72, Model: m.safetensors, Network: l.safetensors:1",
            "prompt": "a cat",
            "negative_prompt": "blurry",
            "seed": "3",
            "steps": "20",
            "scale": "7.5",
            "sampler": "euler_a",
            "size": "64x72",
            "model": "m.safetensors",
            "network": "l.safetensors:1",
        }
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


def test_any_script_and_no_network(tmp_path: Path) -> None:
    settings = ImageSettings("猫 – été", "", 64, 64, 1, 1.0, "ddim", 0)
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", settings.record(model="m"))
    with Image.open(tmp_path / "a.png") as saved:
        assert saved.text["prompt"] == "猫 – été"
        assert saved.text["parameters"].startswith("猫 – été\nSteps: 1, ")
        assert "network" not in saved.text


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/sub: cannot be"):
        save_png(Image.new("RGB", (8, 8)), tmp_path / "file" / "sub" / "a.png", {"prompt": "p"})
