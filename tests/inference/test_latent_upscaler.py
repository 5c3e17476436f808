"""The latent upscaler: published names, its use by the highres fix, and its program."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from library.config.image_settings import ImageSettings
from library.errors import UserError
from library.inference.highres_fix import HighresFix, latents_of_two_stages
from library.inference.latent_upscaler import LatentUpscaler, load_latent_upscaler
from library.inference.models import GenerateOptions, ImageModels
from library.inference.upscaling import load_upscaler
from tests.fixtures.drawn import pixels
from tests.fixtures.runs import run_script
from tests.fixtures.tiny_sd import MadeCheckpoint


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("upscaler") / "upscaler.safetensors"
    save_file(LatentUpscaler(8, 8).state_dict(), path)
    return path


def test_names_and_shapes_are_the_published_ones() -> None:
    found = {name: tuple(tensor.shape) for name, tensor in LatentUpscaler().state_dict().items()}
    norm = {"weight": (1,), "bias": (1,), "running_mean": (1,), "running_var": (1,), "num_batches_tracked": ()}
    expected: dict[str, tuple[int, ...]] = {"conv_final.weight": (4, 64, 1, 1), "conv_final.bias": (4,)}
    for conv, bn, shape in (
        ("conv1", "bn1", (128, 4, 3, 3)),
        ("conv2", "bn2", (64, 128, 3, 3)),
        ("conv3", "bn3", (64, 64, 3, 3)),
        *((f"resblock{n}.conv{k}", f"resblock{n}.bn{k}", (128, 128, 3, 3)) for n in range(1, 21) for k in (1, 2)),
    ):
        expected[f"{conv}.weight"] = shape
        expected |= {f"{bn}.{leaf}": tuple(side * shape[0] for side in one) for leaf, one in norm.items()}
    assert found == expected


def test_the_highres_fix_enlarges_with_it(
    models: ImageModels, options: GenerateOptions, settings: ImageSettings, weights: Path
) -> None:
    upscaler = load_upscaler("tools.latent_upscaler", f"weights={weights}", torch.device("cpu"), torch.float32)
    large = replace(settings, width=128, height=128, strength=0.5)
    found = {}
    for name, module in (("plain", None), ("upscaler", upscaler)):
        fix = HighresFix(scale=0.5, steps=2, upscaler=module)
        _, found[name] = latents_of_two_stages(models, [large], options, {}, fix)
    assert found["upscaler"].shape == (1, 4, 16, 16)
    assert (found["upscaler"] - found["plain"]).abs().max() > 1e-3


def test_the_program(folder: MadeCheckpoint, weights: Path, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 255, (20, 36, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png")
    Image.fromarray(values[:16, :16]).save(tmp_path / "b.png")
    words = ("--vae_path", folder.path, "--weights", weights, "--image_pattern", tmp_path / "*.png")
    finished = run_script("tools/latent_upscaler.py", *words, "--output_dir", tmp_path / "out", "--debug")
    assert finished.code == 0, finished.text
    assert pixels(tmp_path / "out" / "a_upscaled.png").shape == (40, 72, 3)
    assert pixels(tmp_path / "out" / "b_upscaled.png").shape == (32, 32, 3)
    assert pixels(tmp_path / "out" / "b_lanczos4.png").shape == (32, 32, 3)
    finished = run_script("tools/latent_upscaler.py", *words[:4], "--image_pattern", "gone/*.png")
    assert finished.code == 2 and "--image_pattern gone/*.png: no such image" in finished.err


def test_no_image_replaces_another(folder: MadeCheckpoint, weights: Path, tmp_path: Path) -> None:
    """Nor a source; an image that cannot be read, or is too small, is named after the others are done."""
    (tmp_path / "in").mkdir()
    for name, side in (("a.png", 16), ("a_upscaled.png", 16), ("b.png", 16), ("b.jpg", 16), ("c.png", 2)):
        Image.new("RGB", (side, side), (200, 30, 30)).save(tmp_path / "in" / name)
    (tmp_path / "in" / "d.png").write_bytes(b"no image")
    words = ("--vae_path", folder.path, "--weights", weights, "--image_pattern")
    for pattern, target, said in (
        ("a*", "in", "would replace one of --image_pattern"),
        ("b*", "out", "would replace that of"),
        ("[a-d].png", "out", "d.png: not an image"),
    ):
        before = {path: path.read_bytes() for path in (tmp_path / "in").iterdir()}
        given = (*words, tmp_path / "in" / pattern, "--output_dir", tmp_path / target)
        finished = run_script("tools/latent_upscaler.py", *given)
        assert finished.code == 2 and said in finished.err and "Traceback" not in finished.text, finished.text
        assert {path: path.read_bytes() for path in (tmp_path / "in").iterdir()} == before
    assert "c.png: is 2x2; the shorter side must be 4 at least" in finished.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a_upscaled.png", "b_upscaled.png"]


def test_mistakes(tmp_path: Path, weights: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="holds no latent upscaler"):
        load_latent_upscaler(tmp_path / "other.safetensors")
    for name, arguments, message in (
        ("no.such.module", None, "cannot be imported"),
        ("json", None, "has no create_upscaler"),
        ("tools.latent_upscaler", "weights", "is not key=value"),
        ("tools.latent_upscaler", "a=b", "cannot be made with"),
        ("tools.latent_upscaler", "weights=gone.pt", "gone.pt: no such file"),
    ):
        with pytest.raises(UserError, match=message):
            load_upscaler(name, arguments, torch.device("cpu"), torch.float32)
