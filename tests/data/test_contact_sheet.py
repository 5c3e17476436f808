"""Contact sheets show a batch's samples as the model gets them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont

from library.data.contact_sheet import CELLS, LARGEST_SIDE, SheetWriter, Shown, draw_sheet, samples_of, wrapped
from library.data.dataset import TrainingData
from library.data.image_io import read_image


def made(data: TrainingData) -> list[Shown]:
    refs = data.batches(0)
    found = []
    for number, ref in enumerate(refs, start=1):
        found += samples_of(data.maker.make(ref, lambda captions: {}), epoch=1, step=number, number=number)
    return found


def test_samples_are_what_a_batch_holds(make_data: Callable[..., TrainingData], folder: Path) -> None:
    samples = made(make_data(subset="flip_aug = true\nnum_repeats = 4"))
    assert len(samples) == 7 * 4
    plain = {s.flipped: s for s in samples if Path(s.path).name == "a.png"}  # 64x64, neither resized nor cropped
    pixels = read_image(folder / "a.png")
    assert np.array_equal(plain[False].pixels, pixels)
    assert np.array_equal(plain[True].pixels, pixels[:, ::-1])
    wide = next(s for s in samples if Path(s.path).name == "e.png")
    assert (wide.size, wide.bucket, wide.pixels.shape) == ((140, 36), (128, 32), (32, 128, 3))
    assert wide.facts()["caption"] == "cat, dog, e" and wide.facts()["mean_mask"] is None
    assert "file 140x36" in " ".join(wide.lines())


def test_masks_and_weights(make_data: Callable[..., TrainingData], folder: Path) -> None:
    pixels = read_image(folder / "a.png")
    alpha = np.zeros(pixels.shape[:2], np.uint8)
    alpha[:, :16] = 255  # the left quarter
    Image.fromarray(np.dstack([pixels, alpha])).save(folder / "a.png")
    masked = next(s for s in made(make_data(subset="alpha_mask = true")) if Path(s.path).name == "a.png")
    assert masked.mask is not None and np.array_equal(masked.mask, alpha)
    assert "mask 25% on average" in " ".join(masked.lines())
    sheet = np.asarray(draw_sheet([masked]))
    # the image and, beside it, its mask: white on the left, black behind
    assert np.array_equal(sheet[8 + 30, 8 : 8 + 64], masked.pixels[30])
    assert sheet[8 + 30, 80 : 80 + 16].min() == 255 and sheet[8 + 30, 80 + 16 : 80 + 64].max() == 0


def sample(**changes: object) -> Shown:
    settings: dict[str, object] = {
        "epoch": 1, "step": 1, "batch": 1, "place": 1, "path": "p.png", "pixels": np.full((32, 64, 3), 200, np.uint8),
        "mask": None, "conditioning": None, "caption": "cat", "bucket": (64, 32), "size": (64, 32), "corner": (0, 0),
        "flipped": False, "loss_weight": 1.0,
    }  # fmt: skip
    return Shown(**{**settings, **changes})  # type: ignore[arg-type]


def test_large_images_are_drawn_smaller() -> None:
    large = sample(pixels=np.zeros((2000, 1000, 3), np.uint8), bucket=(1000, 2000))
    sheet = draw_sheet([large] * 5)
    assert sheet.width < 5 * LARGEST_SIDE and sheet.height < 3 * LARGEST_SIDE


@pytest.mark.parametrize("caption", ["", "x" * 3000, "tag, " * 1000, "日本語 \udcff \n two", "a\tb"])
def test_any_caption_can_be_drawn(caption: str, tmp_path: Path) -> None:
    assert draw_sheet([sample(caption=caption, conditioning=np.zeros((32, 64, 3), np.uint8))]).height < 600


def test_lines_fit() -> None:
    font = ImageFont.load_default(13)
    text = "one two three " * 20 + "y" * 100
    lines = wrapped(text, font, 100, 1000)
    assert all(font.getlength(line) <= 100 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert len(wrapped(text, font, 100, 3)) == 3 and wrapped(text, font, 100, 3)[-1].endswith(" ...")


def test_batches_stay_whole_and_old_sheets_go(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "sheets"
    for batches, sheets in ((6, 3), (2, 1)):
        writer = SheetWriter(folder)
        for number in range(batches):
            writer.add([sample(batch=number + 1, place=place) for place in range(1, CELLS // 2 + 2)])
        writer.close()
        assert writer.sheets == sheets
        assert sorted(path.name for path in folder.glob("*.jpg")) == [f"sheet_{n + 1:04d}.jpg" for n in range(sheets)]
        facts = [json.loads(line) for line in (folder / "images.jsonl").read_text(encoding="utf-8").splitlines()]
        assert len(facts) == batches * (CELLS // 2 + 1)
    (folder / "mine.jpg").touch()
    SheetWriter(folder)
    assert [path.name for path in folder.glob("*.jpg")] == ["mine.jpg"]
