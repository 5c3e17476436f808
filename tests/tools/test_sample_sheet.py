"""``tools/sample_sheet.py`` lays out what training leaves in its folder of samples."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tools.sample_sheet import GAP, LINE, find_samples, main, setup_parser

COLOURS = ["red", "green", "blue", "white"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two prompts at two steps and after an epoch; the second prompt at step 2 was generated twice."""
    samples = tmp_path / "sample"
    samples.mkdir()
    names = ["000000_00", "000000_01", "000002_00", "000002_01", "e000001_00"]
    for index, name in enumerate(names):
        info = PngInfo()
        info.add_text("prompt", f"prompt {name[-1]}")
        Image.new("RGB", (20, 10), COLOURS[index % 4]).save(
            samples / f"my_lora_{name}_20260101000000_7.png", pnginfo=info
        )
    Image.new("RGB", (20, 10), "black").save(samples / "my_lora_000002_01_20260101000001_7.png")
    (samples / "notes.png").write_bytes(b"no sample")
    return samples


def test_rows_are_saves_and_columns_are_prompts(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "sheet.png"
    main(setup_parser().parse_args([str(folder), str(target), "--size", "40"]))
    assert str(target) in capsys.readouterr().out
    made = Image.open(target)
    assert made.height == LINE + GAP + 3 * (40 + GAP)

    def at(row: int, column: int) -> tuple[int, ...]:
        return made.getpixel((90 + column * (40 + GAP) + 20, LINE + GAP + row * (40 + GAP) + 10))

    # epochs come before steps, as their names are sorted
    assert at(0, 0) == (255, 0, 0) and at(1, 0) == (255, 0, 0) and at(1, 1) == (0, 128, 0)
    assert at(2, 0) == (0, 0, 255) and at(2, 1) == (0, 0, 0), "of two images of one place, the newer"


def test_only_some_steps(folder: Path) -> None:
    assert {sample.number for sample in find_samples(folder, at=[2])} == {2}


def test_a_folder_without_samples_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(setup_parser().parse_args([str(tmp_path), str(tmp_path / "sheet.png")]))
    assert f"error: {tmp_path}: holds no sample images" in capsys.readouterr().err
