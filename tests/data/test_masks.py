"""Masks and conditioning images go where their image goes: cropped, resized, mirrored, cached."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.config.arguments import DatasetOptions
from library.data.batch import Batch
from library.data.conditioning import check_roles
from library.data.dataset import TrainingData
from library.data.dataset_config import load_dataset_config
from library.errors import UserError
from tests.data.samples import SD, Encoder, dataset_file, tokenize

Make = Callable[..., TrainingData]

#: no two are of one shape; at the 64x32 (W x H) of the tests all are cropped and none is resized
SHAPES = {"a.png": (64, 32), "b.png": (90, 32), "c.png": (64, 75)}
SIZE = "resolution = [64, 32]\nenable_bucket = false"
MANY = "num_repeats = 6\nflip_aug = true"


def pattern(name: str, size: tuple[int, int]) -> np.ndarray:
    """uint8 (H, W), different at every place."""
    return np.random.default_rng(sum(map(ord, name))).integers(0, 256, size[::-1], dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Grey images whose opacity is their pattern, beside masks with the pattern in their red channel."""
    images, masks = tmp_path / "images", tmp_path / "masks"
    images.mkdir()
    masks.mkdir()
    for name, size in SHAPES.items():
        values = pattern(name, size)
        grey = np.full_like(values, 80)
        Image.fromarray(np.dstack([grey, grey, grey, values])).save(images / name)
        (images / name).with_suffix(".txt").write_text("cat", encoding="utf-8")
        Image.fromarray(np.dstack([values, grey, 255 - values])).save(masks / name)
    return images


@pytest.fixture
def masks(folder: Path) -> str:
    return f"conditioning_data_dir = '{folder.parent / 'masks'}'"


def load(data: TrainingData, **settings: object) -> list[Batch]:
    return list(data.dataloader(epoch=0, start_batch=0, tokenize=tokenize, **{"num_workers": 0, **settings}))


def expected(batch: Batch, index: int) -> np.ndarray:
    """The pattern of a sample, cut by hand: mirrored, then cropped at the recorded corner."""
    name = Path(batch.paths[index]).name
    values = pattern(name, SHAPES[name])
    if batch.flipped[index]:
        values = values[:, ::-1]
    top, left = batch.crop_top_lefts[index].tolist()
    return values[top : top + 32, left : left + 64]


def assert_masks_are(batches: list[Batch], made: Callable[[np.ndarray], np.ndarray] = lambda values: values) -> None:
    seen = set()
    for batch in batches:
        assert batch.loss_masks.shape == (len(batch.paths), 32, 64)
        assert batch.loss_masks.dtype == torch.float32
        for index, path in enumerate(batch.paths):
            seen.add((Path(path).name, batch.flipped[index]))
            weights = (made(expected(batch, index)) / 255.0).astype(np.float32)
            np.testing.assert_allclose(batch.loss_masks[index].numpy(), weights, rtol=0, atol=1e-7)
    assert {name for name, _ in seen} == set(SHAPES) and len(seen) > len(SHAPES)  # some mirrored, some not


@pytest.mark.parametrize("crop", ["", "random_crop = true"])
def test_the_alpha_channel_follows_the_image(make_data: Make, crop: str) -> None:
    batches = load(make_data(dataset=SIZE, subset=f"alpha_mask = true\n{MANY}\n{crop}"))
    assert_masks_are(batches)
    # the image itself was cut at the same place: it is grey 80 laid on white by its opacity
    for batch in batches:
        for index, mask in enumerate(batch.loss_masks):
            seen = (batch.images[index, 0] + 1) * 127.5
            assert (seen - (80 * mask + 255 * (1 - mask))).abs().max() <= 1


@pytest.mark.parametrize("crop", ["", "random_crop = true"])
def test_the_red_channel_of_masks_follows_the_image(make_data: Make, masks: str, crop: str) -> None:
    assert_masks_are(load(make_data(dataset=SIZE, subset=f"{masks}\n{MANY}\n{crop}")))


def test_both_multiply(make_data: Make, masks: str) -> None:
    batches = load(make_data(dataset=SIZE, subset=f"{masks}\nalpha_mask = true\n{MANY}"))
    assert_masks_are(batches, lambda values: values.astype(float) ** 2 / 255.0)


def test_no_masks_are_asked_for(make_data: Make) -> None:
    assert all(batch.loss_masks is None for batch in load(make_data(dataset=SIZE)))


def test_samples_without_mask_count_in_full(make_data: Make, folder: Path) -> None:
    more = f"[[datasets.subsets]]\nimage_dir = '{folder}'"
    data = make_data(dataset=f"{SIZE}\nbatch_size = 6", subset="alpha_mask = true", more=more)
    (batch,) = load(data)
    full = [bool((mask == 1).all()) for mask in batch.loss_masks]
    assert sum(full) == 3
    assert [index for index, visit in enumerate(full) if not visit]


def test_masks_of_another_size_are_resized_with_the_image(make_data: Make, folder: Path, masks: str) -> None:
    for name, (width, height) in SHAPES.items():
        large = np.kron(pattern(name, (width, height)), np.ones((2, 2), np.uint8))
        Image.fromarray(large).save(folder.parent / "masks" / name)
    assert_masks_are(load(make_data(dataset=SIZE, subset=f"{masks}\n{MANY}")))


def test_masks_shrink_with_the_image_whatever_its_interpolation(make_data: Make, masks: str) -> None:
    small = "resolution = [32, 16]\nenable_bucket = false"
    batches = load(make_data(dataset=small, subset=f"{masks}\nresize_interpolation = 'nearest'"))
    for batch in batches:
        for index, path in enumerate(batch.paths):
            if path.endswith("a.png"):  # 64x32, the others are cropped too
                means = pattern("a.png", (64, 32)).reshape(16, 2, 32, 2).mean(axis=(1, 3))
                assert np.abs(batch.loss_masks[index].numpy() * 255 - means).max() <= 0.5 + 1e-4


def test_what_is_transparent_in_a_mask_is_not_learned(make_data: Make, folder: Path, masks: str) -> None:
    for name, size in SHAPES.items():
        drawn = np.full((*size[::-1], 4), 255, np.uint8)
        drawn[:, : size[0] // 2, 3] = 0
        Image.fromarray(drawn).save(folder.parent / "masks" / name)
    for batch in load(make_data(dataset=SIZE, subset=masks)):
        assert (batch.loss_masks[:, :, :31] == 0).all() and (batch.loss_masks[:, :, 33:] == 1).all()


def test_workers_and_spawned_workers_agree(make_data: Make, masks: str) -> None:
    settings = {"dataset": SIZE, "subset": f"{masks}\nalpha_mask = true\ncolor_aug = true\nrandom_crop = true\n{MANY}"}
    here = load(make_data(**settings))
    data = make_data(**settings)
    sent = pickle.loads(pickle.dumps(data.maker))
    for others in (load(make_data(**settings), num_workers=2), [sent.make(ref, tokenize) for ref in data.batches(0)]):
        assert len(others) == len(here)
        for one, other in zip(here, others, strict=True):
            assert torch.equal(one.loss_masks, other.loss_masks) and torch.equal(one.images, other.images)


def test_masks_move_with_their_batch(make_data: Make, masks: str) -> None:
    batch = load(make_data(dataset=SIZE, subset=masks))[0].to("meta")
    assert batch.loss_masks.device.type == "meta"


# ---- colours and faces ----


def test_colours_change_by_the_visit_and_masks_do_not(make_data: Make, masks: str) -> None:
    plain = load(make_data(dataset=SIZE, subset=f"{masks}\nnum_repeats = 3"))
    varied = load(make_data(dataset=SIZE, subset=f"{masks}\nnum_repeats = 3\ncolor_aug = true"))
    for one, other in zip(plain, varied, strict=True):
        assert torch.equal(one.loss_masks, other.loss_masks)
        difference = (one.images - other.images).abs()
        assert 0 < difference.max() < 0.2
    looks = {image.numpy().tobytes() for b in varied for i, image in enumerate(b.images) if "a.png" in b.paths[i]}
    assert len(looks) == 3


def test_faces_are_cropped_around(make_data: Make, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    pixels = np.zeros((400, 500, 3), np.uint8)
    pixels[280:320, 380:420] = 255  # a face of 40x40 at (400, 300)
    Image.fromarray(pixels).save(folder / "cat_400_300_40_40.png")
    (folder / "cat.txt").write_text("cat", encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        data = make_data(dataset=SIZE, subset="face_crop_aug_range = [1.6, 1.6]\nnum_repeats = 2\nflip_aug = true")
    assert "3 images, such as a.png" in caplog.text
    found = 0
    for batch in load(data):
        for index, path in enumerate(batch.paths):
            if "cat_" not in path:
                continue
            found += 1
            # the crop's shorter side, 32 pixels, is 1.6 * 40 of the image: the face is 20x20 of 64x32
            bright = batch.images[index, 0] > 0
            rows, columns = bright.any(dim=1).nonzero().flatten(), bright.any(dim=0).nonzero().flatten()
            assert (rows.min().item(), rows.max().item()) == (6, 25)
            assert (columns.min().item(), columns.max().item()) == (22, 41)
            # recorded in the resized image, 250x200, and in the mirrored one
            assert batch.crop_top_lefts[index].tolist() == [134, 250 - 232 if batch.flipped[index] else 168]
    assert found == 2


def test_no_face_at_all(make_data: Make) -> None:
    with pytest.raises(UserError, match=r"subsets\]\] 1: face_crop_aug_range: no image's name tells .* = \[\] here"):
        make_data(dataset=SIZE, subset="face_crop_aug_range = [2, 4]")


# ---- what is missing ----


def lines(make: Callable[[], object]) -> list[str]:
    with pytest.raises(UserError) as error:
        make()
    return str(error.value).splitlines()


def test_missing_and_doubled_masks_are_named(make_data: Make, folder: Path, masks: str) -> None:
    place = folder.parent / "masks"
    (place / "a.png").unlink()
    (place / "b.png").rename(place / "b.webp")
    Image.new("RGB", (90, 32)).save(place / "b.bmp")
    missing, doubled = lines(lambda: make_data(dataset=SIZE, subset=masks))
    assert missing.endswith(f"conditioning_data_dir: {place} has no image of the same name for a.png")
    assert "[[datasets.subsets]] 1" in missing
    assert doubled.endswith("has several images of one name: b.bmp, b.webp; keep one")


def test_extra_masks_are_named(make_data: Make, folder: Path, masks: str) -> None:
    place = folder.parent / "masks"
    for letter in "vwxyz":
        Image.new("RGB", (8, 8)).save(place / f"{letter}.png")
    (line,) = lines(lambda: make_data(dataset=SIZE, subset=masks))
    assert line.startswith(f"conditioning_data_dir {place}: no image has the name of v.png, w.png, x.png and 2 more;")


def test_subsets_may_share_a_folder_of_masks(make_data: Make, folder: Path, masks: str) -> None:
    other = folder.parent / "others"
    other.mkdir()
    for name in ("a.png", "a.txt"):
        (folder / name).rename(other / name)
    assert_masks_are(
        load(
            make_data(
                dataset=SIZE,
                subset=f"{masks}\n{MANY}",
                more=f"[[datasets.subsets]]\nimage_dir = '{other}'\n{masks.replace('masks', 'masks/../masks')}\n{MANY}",
            )
        )
    )


def test_an_unreadable_mask_is_named_before_the_run(make_data: Make, folder: Path, masks: str) -> None:
    path = folder.parent / "masks" / "a.png"
    path.write_text("<html>")
    assert lines(lambda: make_data(dataset=SIZE, subset=masks)) == [f"{path}: not an image; remove or replace it"]


def test_what_is_left_out_is_left_out_with_its_mask(
    make_data: Make, folder: Path, masks: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An image that cannot be read leaves no extra mask behind, and a mask that cannot be read takes its image."""
    place = folder.parent / "masks"
    (folder / "a.png").write_bytes(b"no image")
    (place / "b.png").write_text("<html>")
    with caplog.at_level(logging.WARNING):
        data = make_data(dataset=SIZE, subset=masks, on_bad_image="skip")
    kept = {record.name for record in data.datasets[0].records}
    assert kept == {path.name for path in folder.glob("*.png")} - {"a.png", "b.png"} != set()
    assert f"{place / 'b.png'}: not an image; remove or replace it; left out with its image" in caplog.text
    Image.new("RGB", (8, 8)).save(place / "x.png")
    (line,) = lines(lambda: make_data(dataset=SIZE, subset=masks, on_bad_image="skip"))
    assert "no image has the name of x.png;" in line


def test_without_any_readable_mask_nothing_is_left(make_data: Make, folder: Path, masks: str) -> None:
    broken = sorted((folder.parent / "masks").iterdir())
    for path in broken:
        path.write_text("<html>")
    found = lines(lambda: make_data(dataset=SIZE, subset=masks, on_bad_image="skip"))
    assert found[0] == f"{broken[0]}: not an image; remove or replace it"


def test_masks_of_another_shape_are_told(
    make_data: Make, folder: Path, masks: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        make_data(dataset=SIZE, subset=masks)
    assert not caplog.text
    Image.new("RGB", (64, 64)).save(folder.parent / "masks" / "b.png")
    with caplog.at_level(logging.WARNING):
        make_data(dataset=SIZE, subset=masks)
    assert "to which they are stretched: b.png" in caplog.text


# ---- trainers that condition on images ----


def test_conditioning_images(tmp_path: Path, folder: Path, masks: str) -> None:
    path = dataset_file(tmp_path / "data.toml", folder, dataset=SIZE, subset=f"{masks}\n{MANY}\nrandom_crop = true")
    config = load_dataset_config(path, DatasetOptions())
    check_roles(config, "image", masked_loss=False)
    for batch in load(TrainingData(config, seed=1, latent=SD, conditioning_as="image")):
        assert batch.loss_masks is None
        assert batch.conditioning_images.shape == batch.images.shape
        for index in range(len(batch.paths)):
            values = expected(batch, index)
            wanted = np.stack([values, np.full_like(values, 80), 255 - values]) / 127.5 - 1
            np.testing.assert_allclose(batch.conditioning_images[index].numpy(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("subset", "role", "masked_loss", "words"),
    [
        ("alpha_mask = true", "image", False, "1: conditioning_data_dir: is missing"),
        ("MASKS", "mask", False, "1: conditioning_data_dir: mask images are used with --masked_loss only"),
        ("", "mask", True, "--masked_loss: DATA names no masks; set conditioning_data_dir"),
        ("MASKS", "mask", True, None),
        ("alpha_mask = true", "mask", True, None),
        ("alpha_mask = true", "mask", False, None),
        ("", "mask", False, None),
    ],
)
def test_what_a_trainer_does_with_them(
    tmp_path: Path, folder: Path, masks: str, subset: str, role: str, masked_loss: bool, words: str | None
) -> None:
    path = dataset_file(tmp_path / "data.toml", folder, dataset=SIZE, subset=subset.replace("MASKS", masks))
    config = load_dataset_config(path, DatasetOptions())
    if words is None:
        check_roles(config, role, masked_loss=masked_loss)
    else:
        (line,) = lines(lambda: check_roles(config, role, masked_loss=masked_loss))
        assert words.replace("DATA", str(path)) in line


# ---- cached ----


def fill(data: TrainingData, *, to_disk: bool = True, **settings: object) -> int:
    encoder = Encoder()
    data.cache_latents(lambda: encoder, batch_size=2, to_disk=to_disk, vae_identity="vae", **settings)
    return encoder.encoded


ALPHA = {"dataset": SIZE, "subset": f"alpha_mask = true\n{MANY}"}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("to_disk", [True, False])
def test_cached_masks_follow_their_latents(make_data: Make, to_disk: bool, workers: int) -> None:
    data = make_data(**ALPHA)
    assert fill(data, to_disk=to_disk) == 6
    batches = load(data, num_workers=workers)
    assert all(batch.images is None for batch in batches)
    assert_masks_are(batches)


@pytest.mark.parametrize("to_disk", [True, False])
def test_mask_images_beside_cached_latents(make_data: Make, masks: str, to_disk: bool) -> None:
    data = make_data(dataset=SIZE, subset=f"{masks}\n{MANY}")
    fill(data, to_disk=to_disk)
    assert_masks_are(load(data))


def test_published_layout(make_data: Make, folder: Path) -> None:
    fill(make_data(**ALPHA))
    with np.load(folder / "b_0090x0032_sd.npz", allow_pickle=False) as file:
        assert "latents_flipped" in file.files
        mask, crop = file["alpha_mask"], file["crop_ltrb"].tolist()
        assert (mask.shape, str(mask.dtype)) == ((32, 64), "float32")
        cut = pattern("b.png", (90, 32))[crop[1] : crop[3], crop[0] : crop[2]]  # not mirrored
        np.testing.assert_allclose(mask, cut / 255.0, rtol=0, atol=1e-7)


def test_several_sizes_in_a_file(make_data: Make, folder: Path) -> None:
    flux = replace(SD, cache_suffix="_flux.npz", multi_resolution=True)
    fill(make_data(**ALPHA, latent=flux))
    with np.load(folder / "b_0090x0032_flux.npz", allow_pickle=False) as file:
        assert file["alpha_mask_4x8"].shape == (32, 64)
    assert fill(make_data(**ALPHA, latent=flux)) == 0


def test_files_without_mask_are_made_again(make_data: Make, folder: Path) -> None:
    assert fill(make_data(dataset=SIZE)) == 3
    assert fill(make_data(dataset=SIZE, subset="alpha_mask = true")) == 3
    assert fill(make_data(dataset=SIZE, subset="alpha_mask = true")) == 0
    assert fill(make_data(dataset=SIZE)) == 0  # more than is needed does no harm


def rewrite(path: Path, **changes: np.ndarray | None) -> None:
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    arrays.update(changes)
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


@pytest.mark.parametrize(
    "mask",
    [
        None,
        np.ones((4, 8), np.float32),  # of latent size
        np.ones((64, 32), np.float32),  # W and H swapped
        np.ones((32, 64), np.uint8),
        np.full((32, 64), np.nan, np.float32),
    ],
    ids=["missing", "latent size", "swapped", "bytes", "nan"],
)
def test_masks_that_do_not_fit_are_made_again(make_data: Make, folder: Path, mask: np.ndarray | None) -> None:
    fill(make_data(**ALPHA))
    rewrite(folder / "a_0064x0032_sd.npz", alpha_mask=mask, stamp=None)
    data = make_data(**ALPHA)
    assert fill(data) == 2
    assert_masks_are(load(data))


def test_a_fitting_mask_of_a_file_without_stamp_is_used(make_data: Make, folder: Path) -> None:
    fill(make_data(**ALPHA))
    rewrite(folder / "a_0064x0032_sd.npz", alpha_mask=np.full((32, 64), 0.3, np.float64), stamp=None)
    data = make_data(**ALPHA)
    assert fill(data) == 0
    found = [b.loss_masks[i] for b in load(data) for i, path in enumerate(b.paths) if path.endswith("a.png")]
    assert found and all(torch.equal(mask, torch.full((32, 64), 0.3)) for mask in found)


def test_a_file_trusted_without_mask_is_named(make_data: Make, folder: Path) -> None:
    fill(make_data(dataset=SIZE))
    data = make_data(dataset=SIZE, subset="alpha_mask = true")
    assert fill(data, trust=True) == 0
    (line,) = lines(lambda: load(data))
    assert "_sd.npz: has no alpha mask of 64x32; start again without --skip_cache_check" in line


@pytest.mark.parametrize("to_disk", [True, False])
def test_one_subset_may_mask_what_another_does_not(make_data: Make, folder: Path, to_disk: bool) -> None:
    more = f"[[datasets.subsets]]\nimage_dir = '{folder}'\nalpha_mask = true"
    data = make_data(dataset=f"{SIZE}\nbatch_size = 6", more=more)
    assert fill(data, to_disk=to_disk) == 3
    (batch,) = load(data)
    assert sum(bool((mask == 1).all()) for mask in batch.loss_masks) == 3
