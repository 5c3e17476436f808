"""Data that no one means to train on: pipes, devices, loops of links, absurd sizes and counts end in one line, soon."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from library.config.arguments import DatasetOptions
from library.data import describe
from library.data.dataset import TrainingData
from library.data.dataset_config import load_dataset_config, load_json
from library.data.image_io import has_alpha, read_image, read_size
from library.errors import UserError
from library.inference.prompt_line import MAX_SIZE, parse_image_prompt, parse_prompt_line
from tests.data.samples import SD, draw

Make = Callable[..., TrainingData]

posix = pytest.mark.skipif(sys.platform == "win32", reason="pipes and devices in folders are POSIX")


def pipe(path: Path) -> None:
    os.mkfifo(path)


def endless_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def listening_socket(path: Path) -> None:
    opened = socket.socket(socket.AF_UNIX)
    here = Path.cwd()
    os.chdir(path.parent)  # names of sockets are short
    opened.bind(path.name)
    os.chdir(here)


def loop_of_links(path: Path) -> None:
    path.symlink_to(path.name)


@posix
@pytest.mark.parametrize("make", [pipe, endless_device, listening_socket, loop_of_links])
@pytest.mark.parametrize("name", ["a.png", "a.txt"])
def test_what_is_no_file_is_refused(make_data: Make, folder: Path, make: Callable[[Path], None], name: str) -> None:
    (folder / name).unlink()
    make(folder / name)
    with pytest.raises(UserError, match=rf"{name}: the (image|caption) cannot be read \("):
        make_data()


@posix
def test_images_are_not_waited_for(tmp_path: Path) -> None:
    pipe(tmp_path / "a.png")
    for read in (read_size, read_image, has_alpha):
        with pytest.raises(UserError, match="a pipe or device, not a file"):
            read(tmp_path / "a.png")


@posix
def test_a_folder_within_itself(make_data: Make, folder: Path) -> None:
    (folder / "again").symlink_to(folder)
    assert make_data().image_count() == 7


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 5000 + "]" * 5000,
        "a = " + "{a=" * 5000 + "1" + "}" * 5000,
        "[" + ".".join("a" * 3000) + "]\nb = 1",
    ],
    ids=["lists", "inline tables", "tables"],
)
def test_deeply_nested_toml(tmp_path: Path, text: str) -> None:
    path = tmp_path / "data.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"data\.toml: .*nested too deeply"):
        load_dataset_config(path, DatasetOptions())


def test_deeply_nested_json(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text("[" * 200_000)
    with pytest.raises(UserError, match=r"data\.json: not valid JSON"):
        load_json(path)


def dataset_of(folder: Path, *, subsets: int = 1, **keys: object) -> TrainingData:
    path = folder.parent / "data.toml"
    lines = "".join(f"{key} = {value}\n" for key, value in {"enable_bucket": "true", **keys}.items())
    path.write_text(
        f"[general]\ncaption_extension = '.txt'\n[[datasets]]\n{lines}"
        + f"[[datasets.subsets]]\nimage_dir = '{folder}'\n" * subsets
    )
    return TrainingData(load_dataset_config(path, DatasetOptions()), seed=1, latent=SD)


def test_sizes_that_no_image_has(folder: Path) -> None:
    began = time.monotonic()
    far = dataset_of(folder, resolution=64, min_bucket_reso=32, max_bucket_reso=2_000_000_000, bucket_reso_steps=32)
    near = dataset_of(folder, resolution=64, min_bucket_reso=32, max_bucket_reso=128, bucket_reso_steps=32)
    assert far.datasets[0].bucket_of == near.datasets[0].bucket_of
    with pytest.raises(UserError, match="resolution: 2000000000: at most 65536 pixels"):
        dataset_of(folder, resolution=2_000_000_000, max_bucket_reso=2_000_000_000)
    with pytest.raises(UserError, match="bucket_reso_steps: 1: would make about 2,097,152 bucket sizes"):
        dataset_of(folder, resolution=1024, min_bucket_reso=1, max_bucket_reso=2_000_000_000, bucket_reso_steps=1)
    assert time.monotonic() - began < 10


def test_thousands_of_subsets(folder: Path) -> None:
    """Time grows with their number, not with its square, which would be minutes here."""
    began = time.process_time()
    data = dataset_of(folder, subsets=3000, resolution=64, min_bucket_reso=32, max_bucket_reso=128)
    entries = describe.metadata(data, from_file=True)
    assert len(entries["ss_dataset_dirs"]) == 3000 and entries["ss_num_train_images"] == 3000 * 7
    assert time.process_time() - began < 30


@pytest.mark.parametrize("read", [parse_prompt_line, parse_image_prompt])
def test_prompts_for_images_that_no_memory_holds(read: Callable[[str], object]) -> None:
    for option in ("w", "h"):
        with pytest.raises(UserError, match=f"1000001: must be at most {MAX_SIZE} pixels"):
            read(f"cat --{option} 1000001")
    assert read(f"cat --w {MAX_SIZE}").width == MAX_SIZE


def test_tiny_images_are_trained_on(folder: Path) -> None:
    draw(folder, {"a.png": (8, 8), "b.png": (1, 8)})
    assert dataset_of(folder, resolution=64, min_bucket_reso=32, max_bucket_reso=128).image_count() == 7
    small = dataset_of(folder, resolution=8, min_bucket_reso=8, max_bucket_reso=8, bucket_reso_steps=8)
    assert set(small.datasets[0].bucket_of) == {(8, 8)}


@pytest.mark.parametrize("compressed", [False, True])
def test_a_png_with_megabytes_of_text(tmp_path: Path, compressed: bool) -> None:
    """Programs write their workflows into images."""
    text = PngInfo()
    text.add_text("workflow", "x" * 30_000_000, zip=compressed)
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png", pnginfo=text)
    assert read_size(tmp_path / "a.png") == (64, 48) and read_image(tmp_path / "a.png").shape == (48, 64, 3)
