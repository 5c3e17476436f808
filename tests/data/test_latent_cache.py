"""Cache files: the published layout, and that nothing outdated or damaged is ever trained on."""

from __future__ import annotations

import logging
import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from library.data.dataset import TrainingData
from library.errors import UserError
from tests.data.damage import cut, empty, flip_a_bit, foreign_stamp, not_a_zip, rewrite
from tests.data.samples import SD, SIZES, Encoder, draw, tokenize

Make = Callable[..., TrainingData]

#: published: array -> (shape, dtype) of a 64x32 (W x H) latent
PUBLISHED = {
    "latents": ((4, 4, 16), "float32"),
    "original_size": ((2,), "int64"),
    "crop_ltrb": ((4,), "int64"),
    "latents_flipped": ((4, 4, 16), "float32"),
}
FLUX = replace(SD, channels=16, cache_suffix="_flux.npz", multi_resolution=True)


def fill(
    data: TrainingData, *, to_disk: bool = True, vae: str = "vae", trust: bool = False, batch_size: int = 2
) -> int:
    """Number of images that the VAE was given, mirrored ones too."""
    encoder = Encoder()
    data.cache_latents(lambda: encoder, batch_size=batch_size, to_disk=to_disk, vae_identity=vae, trust=trust)
    return encoder.encoded


def latents(data: TrainingData) -> dict[str, Tensor]:
    """Return latents by name and flip, over one epoch."""
    found = {}
    for batch in data.dataloader(epoch=0, start_batch=0, tokenize=tokenize, num_workers=0):
        assert batch.images is None
        for i, path in enumerate(batch.paths):
            found[f"{Path(path).name} {batch.flipped[i]}"] = batch.latents[i]
    return found


def test_published_layout(make_data: Make, folder: Path) -> None:
    assert fill(make_data(subset="flip_aug = true")) == 2 * len(SIZES)
    assert not list(folder.glob(".*"))  # no temporary file is left
    assert {p.name for p in folder.glob("*.npz")} == {
        f"{name.split('.')[0]}_{w:04d}x{h:04d}_sd.npz" for name, (w, h) in SIZES.items()
    }
    with zipfile.ZipFile(folder / "e_0140x0036_sd.npz") as file:
        assert {info.compress_type for info in file.infolist()} == {zipfile.ZIP_STORED}
    with np.load(folder / "e_0140x0036_sd.npz", allow_pickle=False) as file:
        assert set(file.files) - {"stamp"} == set(PUBLISHED)
        for name, (shape, dtype) in PUBLISHED.items():
            assert (file[name].shape, str(file[name].dtype)) == (shape, dtype), name
        assert file["original_size"].tolist() == [140, 36]
        assert file["crop_ltrb"].tolist() == [0, 0, 128, 32]  # 128x33 cut to 128x32


def test_a_full_cache_needs_no_vae(make_data: Make) -> None:
    fill(make_data())
    data = make_data()

    def no_vae() -> Encoder:
        raise AssertionError("the VAE was loaded")

    assert data.cache_latents(no_vae, batch_size=1, to_disk=True, vae_identity="vae") == 0
    assert latents(data).keys() == {f"{name} False" for name in SIZES}


def test_disk_and_memory_and_batch_sizes_agree(make_data: Make) -> None:
    made = []
    for to_disk, batch_size in ((True, 1), (False, 1), (False, 4)):
        data = make_data(subset="flip_aug = true\nnum_repeats = 4")
        fill(data, to_disk=to_disk, batch_size=batch_size)
        made.append(latents(data))
    assert len(made[0]) > len(SIZES)  # some mirrored, some not
    for other in made[1:]:
        assert other.keys() == made[0].keys()
        assert all(torch.equal(other[name], made[0][name]) for name in other)


def test_mirrored_latents_are_of_the_mirrored_image(make_data: Make, folder: Path) -> None:
    fill(make_data(subset="flip_aug = true"))
    with np.load(folder / "a_0064x0064_sd.npz") as file:
        assert np.abs(file["latents_flipped"] - file["latents"][:, :, ::-1]).max() < 0.1  # but for the draw
        assert np.abs(file["latents_flipped"] - file["latents"]).max() > 0.1


def test_every_draw_from_the_posterior_is_its_own(make_data: Make, folder: Path) -> None:
    """Equal images of one colour differ in nothing but the draw: by name, and mirrored or not."""
    for name in ("y", "z"):
        Image.new("RGB", (64, 64)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text("cat", encoding="utf-8")
    fill(make_data(subset="flip_aug = true"))
    draws = []
    for name in ("y", "z"):
        with np.load(folder / f"{name}_0064x0064_sd.npz") as file:
            draws += [file["latents"], file["latents_flipped"]]
    assert len({values.tobytes() for values in draws}) == 4


def test_an_edited_image_is_encoded_again(make_data: Make, folder: Path) -> None:
    fill(make_data())
    before = latents_of(folder, "a_0064x0064_sd.npz")
    shutil.move(draw(folder / "inner", {"a.png": (64, 64)}) / "a.png", folder / "a.png")
    assert fill(make_data()) == 1
    assert not np.array_equal(latents_of(folder, "a_0064x0064_sd.npz"), before)
    assert fill(make_data()) == 0


def test_swapped_images_are_encoded_again(make_data: Make, folder: Path) -> None:
    """Sizes and times of the two files are equal: only the bytes tell them apart."""
    x, y = folder / "x.bmp", folder / "y.bmp"
    draw(folder, {"x.bmp": (64, 64), "y.bmp": (64, 64)})
    for path in (x, y):
        os.utime(path, ns=(0, 0))
    fill(make_data())
    x.rename(folder / "z")
    y.rename(x)
    (folder / "z").rename(y)
    assert (x.stat().st_size, x.stat().st_mtime_ns) == (y.stat().st_size, y.stat().st_mtime_ns)
    assert fill(make_data()) == 2


def latents_of(folder: Path, name: str) -> np.ndarray:
    with np.load(folder / name) as file:
        return file["latents"]


def test_a_touched_or_copied_image_is_not(make_data: Make, folder: Path, tmp_path: Path) -> None:
    fill(make_data())
    os.utime(folder / "a.png", ns=(1, 1))
    shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "copy", folder)
    assert fill(make_data()) == 0


@pytest.mark.parametrize(
    ("change", "encoded"),
    [
        ({"vae": "another"}, 7),
        ({"subset": "resize_interpolation = 'nearest'"}, 7),
        ({"subset": "flip_aug = true"}, 14),
        ({"dataset": "batch_size = 3", "seed": 9}, 0),
    ],
)
def test_what_latents_depend_on(make_data: Make, change: dict[str, object], encoded: int) -> None:
    fill(make_data())
    change = dict(change)
    vae = change.pop("vae", "vae")
    assert fill(make_data(**change), vae=vae) == encoded


def test_another_resolution_is_encoded_again(make_data: Make) -> None:
    fill(make_data())
    # the tall and the wide ones stay as they are: 128 is the longest side
    assert fill(make_data(dataset="resolution = 96")) == 4


def plain_npy(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def lacks_sizes(path: Path) -> None:
    rewrite(path, original_size=None)


def not_finite(path: Path) -> None:
    rewrite(path, latents=np.full((4, 8, 8), np.nan, np.float32))


@pytest.mark.parametrize(
    "damage", [cut, flip_a_bit, not_a_zip, plain_npy, empty, lacks_sizes, not_finite, foreign_stamp]
)
def test_damaged_files_are_made_again(
    make_data: Make, folder: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    fill(make_data())
    path = folder / "a_0064x0064_sd.npz"
    good = latents_of(folder, path.name)
    damage(path)
    with caplog.at_level(logging.WARNING):
        assert fill(make_data()) == 1
    assert path.name in caplog.text
    assert np.array_equal(latents_of(folder, path.name), good)
    assert fill(make_data()) == 0


def test_files_without_stamp_are_used_when_they_fit(make_data: Make, folder: Path) -> None:
    fill(make_data())
    path = folder / "a_0064x0064_sd.npz"
    mine = np.full((4, 8, 8), 0.5, np.float32)
    rewrite(path, stamp=None, latents=mine)
    assert fill(make_data()) == 0
    assert np.array_equal(latents_of(folder, path.name), mine)
    rewrite(path, stamp=None, latents=np.zeros((4, 8, 16), np.float32))
    assert fill(make_data()) == 1


def test_an_old_file_name_is_read_and_written(make_data: Make, folder: Path) -> None:
    fill(make_data())
    os.rename(folder / "a_0064x0064_sd.npz", folder / "a.npz")
    assert fill(make_data()) == 0
    assert fill(make_data(), vae="another") == 7
    assert not (folder / "a_0064x0064_sd.npz").exists()


def test_an_old_file_of_a_image_of_another_size_is_not_used(make_data: Make, folder: Path) -> None:
    """Its name does not tell the size, and its content has no stamp: only its record of the size does."""
    fill(make_data())
    os.rename(folder / "a_0064x0064_sd.npz", folder / "a.npz")
    rewrite(folder / "a.npz", stamp=None)
    assert fill(make_data()) == 0
    draw(folder, {"a.png": (72, 72)})  # of the same bucket
    assert fill(make_data()) == 1


def test_skip_check_looks_for_the_file_only(make_data: Make, folder: Path) -> None:
    fill(make_data())
    assert fill(make_data(), vae="another", trust=True) == 0
    not_a_zip(folder / "a_0064x0064_sd.npz")
    data = make_data()
    assert fill(data, trust=True) == 0
    with pytest.raises(UserError, match="a_0064x0064_sd.npz: damaged"):
        latents(data)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_vanishes_is_named(make_data: Make, folder: Path, workers: int) -> None:
    data = make_data()
    fill(data)
    (folder / "a_0064x0064_sd.npz").unlink()
    with pytest.raises(UserError) as error:
        list(data.dataloader(epoch=0, start_batch=0, tokenize=tokenize, num_workers=workers))
    assert str(error.value).startswith(str(folder / "a_0064x0064_sd.npz"))
    assert "Traceback" not in str(error.value)


def test_several_sizes_share_a_file_where_the_format_has_them(make_data: Make, folder: Path) -> None:
    flux = replace(FLUX, channels=4)
    more = f"[[datasets]]\nresolution = 32\n[[datasets.subsets]]\nimage_dir = '{folder}'"
    data = make_data(more=more, latent=flux)
    fill(data)
    with np.load(folder / "a_0064x0064_flux.npz") as file:
        assert set(file.files) == {
            f"{name}_{size}" for name in ("latents", "original_size", "crop_ltrb", "stamp") for size in ("8x8", "4x4")
        }
    assert fill(make_data(more=more, latent=flux)) == 0
    assert fill(make_data(latent=flux)) == 0
    assert len(
        list(data.dataloader(epoch=0, start_batch=0, tokenize=tokenize, num_workers=0))
    ) == data.batches_per_process(1)


def test_latents_that_would_overwrite_each_other_are_refused(make_data: Make, folder: Path) -> None:
    more = f"[[datasets]]\nresolution = 32\n[[datasets.subsets]]\nimage_dir = '{folder}'"
    with pytest.raises(UserError, match=r"a.png: a_0064x0064_sd.npz holds one size .* 64x64 \(default\) and 32x32"):
        fill(make_data(more=more))
    fill(make_data(more=more), to_disk=False)
    draw(folder, {"a.jpg": (64, 64)})
    with pytest.raises(UserError, match="a.jpg and .*a.png: both would be cached"):
        fill(make_data())


@pytest.mark.parametrize("to_disk", [True, False])
@pytest.mark.parametrize("mirrors_first", [True, False])
def test_one_subset_may_mirror_what_another_does_not(
    make_data: Make, folder: Path, mirrors_first: bool, to_disk: bool
) -> None:
    one, other = ("flip_aug = true\nnum_repeats = 5", "") if mirrors_first else ("", "flip_aug = true\nnum_repeats = 5")
    data = make_data(subset=one, more=f"[[datasets.subsets]]\nimage_dir = '{folder}'\n{other}")
    assert fill(data, to_disk=to_disk) == 7 + 7
    assert len(latents(data)) > len(SIZES)


def test_latents_that_are_not_finite_end_the_run(make_data: Make, folder: Path) -> None:
    def nan(pixels: Tensor, generators: object) -> Tensor:
        return torch.full((len(pixels), 4, pixels.shape[2] // 8, pixels.shape[3] // 8), torch.nan)

    with pytest.raises(UserError, match=r"f.jpg: .*not finite; use --no_half_vae"):
        make_data().cache_latents(lambda: nan, batch_size=4, to_disk=True, vae_identity="vae")
    assert not list(folder.glob("*.npz"))


def test_an_unreadable_image_is_named(make_data: Make, folder: Path) -> None:
    content = (folder / "c.png").read_bytes()
    (folder / "c.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="c.png: the image cannot be read"):
        fill(make_data())
