"""Conditioning images as people have them: of every mode, size and orientation, beside pixels and cached latents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.config.arguments import DatasetOptions
from library.data.batch import Batch
from library.data.conditioning import check_roles
from library.data.dataset import TrainingData
from library.data.dataset_config import load_dataset_config
from library.errors import UserError
from library.inference.sources import read_pixels
from tests.data.samples import SD, Encoder, tokenize

SIZE = (64, 32)  # (W, H)
RNG = np.random.default_rng(5)
COLOURS = RNG.integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
OPACITY = RNG.integers(0, 256, SIZE[::-1], dtype=np.uint8)
GREY = COLOURS[..., 0]


def three(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=2)


def turned(folder: Path) -> None:
    """A camera's image: stored on its side, with the orientation that turns it upright."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(np.ascontiguousarray(np.rot90(COLOURS))).save(folder / "0.png", exif=exif)


def paletted(folder: Path) -> None:
    image = Image.fromarray(GREY // 64).convert("P")
    image.putpalette([value for level in range(4) for value in (level, 80, 255 - level)])
    image.save(folder / "0.png")


#: how an image is written -> what is read
MODES: dict[str, tuple[Callable[[Path], None], np.ndarray]] = {
    "colours": (lambda f: Image.fromarray(COLOURS).save(f / "0.png"), COLOURS),
    "another format": (lambda f: Image.fromarray(COLOURS).save(f / "0.webp", lossless=True), COLOURS),
    "grey": (lambda f: Image.fromarray(GREY).save(f / "0.png"), three(GREY)),
    "black and white": (
        lambda f: Image.fromarray(GREY > 127).save(f / "0.png"), three(np.where(GREY > 127, 255, 0)),
    ),
    "16 bits, as of depth": (lambda f: Image.fromarray(GREY.astype(np.uint16) * 257).save(f / "0.png"), three(GREY)),
    "transparent is black": (
        lambda f: Image.fromarray(np.dstack([COLOURS, OPACITY])).save(f / "0.png"),
        COLOURS * (OPACITY[..., None] / 255.0),
    ),
    "transparent grey": (
        lambda f: Image.fromarray(np.dstack([GREY, OPACITY]), "LA").save(f / "0.png"), three(GREY * (OPACITY / 255.0)),
    ),
    "palette": (paletted, np.stack([GREY // 64, np.full_like(GREY, 80), 255 - GREY // 64], axis=2)),
    "turned": (turned, COLOURS),
    "twice as large": (
        lambda f: Image.fromarray(COLOURS.repeat(2, 0).repeat(2, 1)).save(f / "0.png"), COLOURS,
    ),
}  # fmt: skip


def data_of(folder: Path, write: Callable[[Path], None], *, size: tuple[int, int] = SIZE, subset: str = "") -> Path:
    images, guides = folder / "images", folder / "guides"
    images.mkdir()
    guides.mkdir()
    Image.fromarray(COLOURS).resize(size).save(images / "0.png")
    (images / "0.txt").write_text("cat", encoding="utf-8")
    write(guides)
    path = folder / "data.toml"
    path.write_text(
        f"[general]\ncaption_extension = 'txt'\n[[datasets]]\nresolution = {list(SIZE)}\nenable_bucket = false\n"
        f"batch_size = 1\n[[datasets.subsets]]\nimage_dir = '{images}'\nconditioning_data_dir = '{guides}'\n{subset}\n",
        encoding="utf-8",
    )
    return path


def batches(path: Path, *, cached: bool = False) -> list[Batch]:
    config = load_dataset_config(path, DatasetOptions())
    check_roles(config, "image", masked_loss=False)
    data = TrainingData(config, seed=1, latent=SD, conditioning_as="image")
    if cached:
        data.cache_latents(Encoder, batch_size=1, to_disk=False, vae_identity="vae")
    return list(data.dataloader(epoch=0, start_batch=0, tokenize=tokenize, num_workers=0))


@pytest.mark.parametrize("mode", MODES)
def test_every_kind_of_image(tmp_path: Path, mode: str) -> None:
    """Training reads what is meant, and so do sample images and gen_img.py."""
    write, wanted = MODES[mode]
    (batch,) = batches(data_of(tmp_path, write))
    pixels = (batch.conditioning_images[0].permute(1, 2, 0).numpy() + 1) * 127.5
    np.testing.assert_allclose(pixels, wanted, rtol=0, atol=1)
    (file,) = (tmp_path / "guides").iterdir()
    generated = (read_pixels(file, SIZE, background="black").permute(1, 2, 0).numpy() + 1) * 127.5
    bound = 60 if mode == "twice as large" else 1  # it is shrunk with another filter
    np.testing.assert_allclose(generated, wanted, rtol=0, atol=bound)


@pytest.mark.parametrize("cached", [False, True])
def test_it_is_mirrored_and_cut_with_its_image(tmp_path: Path, cached: bool) -> None:
    """An image of another shape, whose conditioning image has its shape at half the size."""

    def half(folder: Path) -> None:
        shown = np.zeros((32, 64, 3), np.uint8)  # of an image of 128x64, of which the middle 64x32 is used when shrunk
        shown[:, :32] = 255
        Image.fromarray(shown).save(folder / "0.png")

    path = data_of(tmp_path, half, size=(128, 64), subset="flip_aug = true\nnum_repeats = 12")
    seen = set()
    for batch in batches(path, cached=cached):
        (flipped,) = batch.flipped
        seen.add(flipped)
        left, right = batch.conditioning_images[0, :, :, :30], batch.conditioning_images[0, :, :, 34:]
        assert (left.mean() > 0) != flipped and (right.mean() > 0) == flipped
        assert batch.conditioning_images.shape == (1, 3, 32, 64)
        assert (batch.images is None) == cached
    assert seen == {True, False}


def test_one_subset_without_is_named(tmp_path: Path) -> None:
    path = data_of(tmp_path, MODES["colours"][0])
    with path.open("a", encoding="utf-8") as file:
        file.write(f"[[datasets.subsets]]\nimage_dir = '{tmp_path / 'images'}'\n")
    with pytest.raises(UserError) as error:
        batches(path)
    (line,) = str(error.value).splitlines()
    assert "[[datasets.subsets]] 2" in line and "conditioning_data_dir: is missing" in line


def test_regularization_images_have_their_own(tmp_path: Path) -> None:
    path = data_of(tmp_path, MODES["colours"][0])
    other = tmp_path / "other"
    other.mkdir()
    data_of(other, MODES["grey"][0])
    with path.open("a", encoding="utf-8") as file:
        file.write(
            f"[[datasets.subsets]]\nimage_dir = '{other / 'images'}'\nis_reg = true\n"
            f"conditioning_data_dir = '{other / 'guides'}'\n"
        )
    found = {
        Path(batch.paths[0]).parent.parent.name: (batch.conditioning_images[0, 1].numpy() + 1) * 127.5
        for batch in batches(path)
    }
    np.testing.assert_allclose(found["other"], GREY, rtol=0, atol=1)
    np.testing.assert_allclose(found[tmp_path.name], COLOURS[..., 1], rtol=0, atol=1)
