"""Images kept for validation: the asked share of files, keyed, and never a file that is trained on."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from library.config.arguments import DatasetOptions, ValidationOptions
from library.data.batch import Batch
from library.data.dataset import TrainingData
from library.data.dataset_config import load_dataset_config
from library.data.describe import metadata, summary_rows, validation_set
from library.data.validation_data import ValidationData
from library.data.validation_split import count_of
from library.errors import UserError
from tests.data.samples import SD, Encoder, draw, tokenize

NAMES = [f"{number:02d}.png" for number in range(20)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return draw(tmp_path / "images", dict.fromkeys(NAMES, (64, 64)))


def make(tmp_path: Path, text: str, *, seed: int = 1, **flags: object) -> TrainingData:
    """Data of datasets at 64 pixels whose tables follow ``[general]``."""
    path = tmp_path / "data.toml"
    path.write_text(f"[general]\ncaption_extension = '.txt'\nresolution = 64\nbatch_size = 3\n{text}", encoding="utf-8")
    config = load_dataset_config(path, DatasetOptions(), ValidationOptions(**flags))
    return TrainingData(config, seed=seed, latent=SD)


def table(folder: Path, *, dataset: str = "", subset: str = "") -> str:
    return f"[[datasets]]\n{dataset}\n[[datasets.subsets]]\nimage_dir = '{folder}'\n{subset}\n"


def trained(data: TrainingData) -> set[str]:
    return {record.name for dataset in data.datasets for record in dataset.records}


def kept(data: TrainingData) -> list[str]:
    return sorted(record.name for dataset in data.validation_datasets for record in dataset.records)


def batches(data: TrainingData, *, workers: int = 0, **settings: int) -> list[Batch]:
    return list(ValidationData(data, **settings).batches(tokenize=tokenize, num_workers=workers))


def names(batches: Sequence[Batch]) -> list[str]:
    return [Path(path).name for batch in batches for path in batch.paths]


# ---- how many ----


@pytest.mark.parametrize(
    ("total", "share", "expected"),
    [(20, 0.1, 2), (20, 0.12, 2), (20, 0.13, 3), (20, 0.0, 0), (20, 1.0, 20), (3, 0.1, 1), (2, 0.9, 1), (1, 0.5, 0),
     (1, 1.0, 1), (10, 0.25, 3)],
)  # fmt: skip
def test_the_nearest_number_and_one_at_least(total: int, share: float, expected: int) -> None:
    assert count_of(total, share) == expected


@pytest.mark.parametrize("written", ["0", "0.0"])
def test_none_with_zero(tmp_path: Path, folder: Path, written: str) -> None:
    data = make(tmp_path, table(folder, dataset=f"validation_split = {written}"), validation_split=0.5)
    assert (trained(data), kept(data)) == (set(NAMES), [])


@pytest.mark.parametrize("written", ["1", "1.0"])
def test_a_whole_dataset(tmp_path: Path, folder: Path, written: str) -> None:
    more = draw(tmp_path / "more", {f"m{number}.png": (64, 64) for number in range(3)})
    data = make(tmp_path, table(more) + table(folder, dataset=f"validation_split = {written}"))
    assert (sorted(trained(data)), kept(data)) == (["m0.png", "m1.png", "m2.png"], NAMES)
    assert len(data.datasets) == len(data.validation_datasets) == 1
    # training is that of a run which never heard of these images
    alone = make(tmp_path, table(more))
    assert data.batches(2) == alone.batches(2)


def test_the_share_comes_from_anywhere(tmp_path: Path, folder: Path) -> None:
    assert len(kept(make(tmp_path, table(folder), validation_split=0.2))) == 4
    general = "validation_split = 0.1\n"
    assert len(kept(make(tmp_path, general + table(folder), validation_split=0.5))) == 2
    assert len(kept(make(tmp_path, general + table(folder, dataset="validation_split = 0.3")))) == 6
    assert len(kept(make(tmp_path, general + table(folder, subset="validation_split = 0.4")))) == 8


def test_small_folders_together_give_no_more_than_a_large_one(tmp_path: Path) -> None:
    folders = [draw(tmp_path / f"f{n}", {"a.png": (64, 64), "b.png": (64, 64)}) for n in range(10)]
    subsets = "".join(f"[[datasets.subsets]]\nimage_dir = '{folder}'\n" for folder in folders)
    data = make(tmp_path, f"validation_split = 0.1\n[[datasets]]\n{subsets}")
    assert len(kept(data)) == 2


# ---- which ----


def test_the_choice_is_keyed(tmp_path: Path, folder: Path) -> None:
    first = make(tmp_path, table(folder), validation_split=0.25)
    assert kept(make(tmp_path, table(folder), validation_split=0.25)) == kept(first)
    other = make(tmp_path, table(folder), validation_split=0.25, seed=2)
    assert kept(other) != kept(first)  # by the run's seed
    text = "validation_seed = 7\n" + table(folder)
    seeded = [make(tmp_path, text, validation_split=0.25, seed=seed) for seed in (1, 2)]
    assert kept(seeded[0]) == kept(seeded[1]) != kept(first)
    assert kept(make(tmp_path, table(folder), validation_split=0.25, validation_seed=7)) == kept(seeded[0])
    for data in (first, other, *seeded):
        assert trained(data) | set(kept(data)) == set(NAMES) and not trained(data) & set(kept(data))
    assert validation_set(seeded[0]) == validation_set(seeded[1]) != validation_set(first)


def test_a_new_image_changes_little(tmp_path: Path, folder: Path) -> None:
    before = set(kept(make(tmp_path, table(folder), validation_split=0.25)))
    for number in range(12):
        draw(folder, {f"n{number}.png": (64, 64)})
        after = set(kept(make(tmp_path, table(folder), validation_split=0.25)))
        assert len(after - before) <= 1 and len(before - after) <= 1
        before = after
    assert len(before) == 8


def test_the_folder_may_move(tmp_path: Path, folder: Path) -> None:
    before = kept(make(tmp_path, table(folder), validation_split=0.25))
    moved = tmp_path / "elsewhere" / "images"
    moved.parent.mkdir()
    folder.rename(moved)
    assert kept(make(tmp_path, table(moved), validation_split=0.25)) == before


def test_a_metadata_dataset(tmp_path: Path, folder: Path) -> None:
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps({name: {"caption": "a cat"} for name in NAMES}))
    text = f"[[datasets]]\n[[datasets.subsets]]\nmetadata_file = '{meta}'\nimage_dir = '{folder}'\n"
    data = make(tmp_path, text, validation_split=0.25)
    assert len(kept(data)) == 5 and not trained(data) & set(kept(data))
    # the same files as by caption files
    assert kept(data) == kept(make(tmp_path, table(folder), validation_split=0.25))


# ---- one file in several places ----


def test_several_sizes_of_one_folder_keep_the_same(tmp_path: Path, folder: Path) -> None:
    text = "validation_split = 0.25\n" + table(folder) + table(folder, dataset="resolution = 32")
    data = make(tmp_path, text)
    assert not trained(data) & set(kept(data))
    first, second = ([record.name for record in dataset.records] for dataset in data.validation_datasets)
    assert first == second and len(first) == 5


@pytest.mark.parametrize("other_first", [True, False])
def test_what_is_validated_on_anywhere_is_trained_on_nowhere(
    tmp_path: Path, folder: Path, other_first: bool, caplog: pytest.LogCaptureFixture
) -> None:
    links = tmp_path / "links"
    links.mkdir()
    for name in NAMES:
        (links / f"l{name}").symlink_to(folder / name) if name < "10" else os.link(folder / name, links / f"l{name}")
        (links / f"l{name}").with_suffix(".txt").write_text("a cat")
    tables = [table(links), table(folder, dataset="validation_split = 0.25")]
    data = make(tmp_path, "".join(tables if other_first else tables[::-1]))
    assert len(kept(data)) == 5
    assert len(trained(data)) == 15 + 15
    assert not trained(data) & {f"l{name}" for name in kept(data)}
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    place = 1 if other_first else 2
    assert f"[[datasets]] {place} > [[datasets.subsets]] 1: left out of training" in line and "5 images" in line


def test_subsets_of_one_dataset_share_a_folder(tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = table(folder) + f"[[datasets.subsets]]\nimage_dir = '{folder}'\ncaption_prefix = 'p'\n"
    data = make(tmp_path, text, validation_split=0.25)
    assert len(kept(data)) == 5  # each file once
    assert not trained(data) & set(kept(data))
    assert sum(len(dataset.records) for dataset in data.datasets) == 30
    assert not caplog.records
    data = make(tmp_path, text + "validation_split = 0\n", validation_split=0.25)
    assert len(kept(data)) == 5 and not trained(data) & set(kept(data))
    assert "[[datasets.subsets]] 2: left out of training" in caplog.text


def test_equal_datasets_validate_once(tmp_path: Path, folder: Path) -> None:
    data = make(tmp_path, "validation_split = 0.25\n" + table(folder) * 2)
    assert len(kept(data)) == len(names(batches(data))) == 5


# ---- regularization images ----


def test_regularization_images_are_not_split(tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    reg = draw(tmp_path / "reg", {f"r{number}.png": (64, 64) for number in range(8)})
    regularised = f"[[datasets.subsets]]\nimage_dir = '{reg}'\nis_reg = true\n"
    data = make(tmp_path, table(folder) + regularised, validation_split=0.25)
    assert len(kept(data)) == 5 and not any(name.startswith("r") for name in kept(data))
    assert (data.datasets[0].num_train, data.datasets[0].num_reg) == (15, 8)
    assert not caplog.records
    make(tmp_path, table(folder) + regularised + "validation_split = 0.5\n")
    assert "validation_split has no effect: regularization images" in caplog.text


def test_regularization_images_alone_are_left_out(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reg, more = (draw(tmp_path / name, {f"{name}.png": (64, 64)}) for name in ("reg", "more"))
    regularised = f"[[datasets.subsets]]\nimage_dir = '{reg}'\nis_reg = true\n"
    data = make(tmp_path, table(folder, dataset="validation_split = 1") + regularised + table(more))
    assert (trained(data), kept(data)) == ({"more.png"}, NAMES)
    assert "its regularization images are left out" in caplog.text


# ---- nothing on one side ----


def test_something_must_be_left_to_train_on(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UserError) as found:
        make(tmp_path, table(folder), validation_split=1.0)
    assert str(found.value).endswith(
        "data.toml: validation_split: all images are validated on; nothing is left to train on"
    )


def test_a_single_image_is_not_divided(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="data.toml: validation_split: of a single image no share can be kept"):
        make(tmp_path, table(draw(tmp_path / "one", {"a.png": (64, 64)})), validation_split=0.5)


# ---- batches ----

VARIED = (
    "num_repeats = 4\nflip_aug = true\nrandom_crop = true\ncolor_aug = true\nshuffle_caption = true\n"
    "caption_dropout_rate = 0.9\ncaption_tag_dropout_rate = 0.5\ntoken_warmup_step = 0.9\ncaption_prefix = 'p'\n"
    "caption_dropout_every_n_epochs = 1\n"
)


def test_each_image_once_without_chance(tmp_path: Path, folder: Path) -> None:
    data = make(tmp_path, table(folder, subset=VARIED), validation_split=0.5)
    validation = ValidationData(data)
    assert validation.image_count == 10 and len(validation) == 4
    first = list(validation.batches(tokenize=tokenize, num_workers=0))
    again = list(validation.batches(tokenize=tokenize, num_workers=0))
    in_workers = batches(data, workers=1)
    assert sorted(names(first)) == kept(data)
    for one, two, three in zip(first, again, in_workers, strict=True):
        assert one.visits == two.visits == three.visits
        assert one.captions == [f"p cat, dog, {Path(path).stem}" for path in one.paths] == two.captions
        assert torch.equal(one.images, two.images) and torch.equal(one.images, three.images)
        assert not any(one.flipped) and one.loss_weights.tolist() == [1.0] * len(one.paths)
        assert one.crop_top_lefts.sum() == 0
    assert len({visit for batch in first for visit in batch.visits}) == 10


def test_processes_that_must_go_together_have_as_many_batches(tmp_path: Path, folder: Path) -> None:
    data = make(tmp_path, table(folder), validation_split=0.5)
    alone = ValidationData(data)
    shares = [ValidationData(data, rank=rank, world_size=3, equal_counts=True) for rank in range(3)]
    assert (len(alone), [len(share) for share in shares]) == (4, [2, 2, 2])
    assert [share.counted for share in shares] == [2, 1, 1]
    taken = [list(share.batches(tokenize=tokenize, num_workers=0)) for share in shares]
    counted = [batch for share, found in zip(shares, taken, strict=True) for batch in found[: share.counted]]
    assert sorted(names(counted)) == kept(data)
    assert taken[1][1].paths == taken[2][1].paths == taken[0][0].paths


def test_a_wildcard_is_chosen_once_for_each_image(tmp_path: Path, folder: Path) -> None:
    subset = "enable_wildcard = true\ncaption_prefix = '{red|blue}'"
    data = make(tmp_path, table(folder, subset=subset), validation_split=0.9)
    captions = [caption for batch in batches(data) for caption in batch.captions]
    assert captions == [caption for batch in batches(data) for caption in batch.captions]
    assert {caption.split()[0] for caption in captions} == {"red", "blue"}


def test_a_images_noise_is_its_own(tmp_path: Path, folder: Path) -> None:
    """It stays when images are added, and with a validation seed in runs of other seeds too."""

    def visits(**settings: int) -> dict[str, int]:
        data = make(tmp_path, table(folder), validation_split=0.5, **settings)
        return {Path(path).name: visit for b in batches(data) for path, visit in zip(b.paths, b.visits, strict=True)}

    before = visits(validation_seed=3)
    assert visits(validation_seed=3, seed=9) == before
    draw(folder, {"new.png": (64, 64), "0.png": (64, 64)})
    after = visits(validation_seed=3)
    common = before.keys() & after.keys()
    assert len(common) > 7 and all(before[name] == after[name] for name in common)
    other = visits(validation_seed=4)
    assert all(other[name] != after[name] for name in other.keys() & after.keys())


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_processes_share_the_batches(tmp_path: Path, folder: Path, world_size: int) -> None:
    data = make(tmp_path, table(folder), validation_split=0.5)
    shares = [batches(data, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert sorted(name for share in shares for name in names(share)) == kept(data)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_at_most_so_many_batches_and_always_the_same(tmp_path: Path, folder: Path) -> None:
    data = make(tmp_path, table(folder), validation_split=0.5)
    two = batches(data, max_batches=2)
    assert names(two) == names(batches(data))[: len(names(two))] and len(two) == 2
    halves = [batches(data, max_batches=3, rank=rank, world_size=2) for rank in range(2)]
    assert [len(half) for half in halves] == [2, 1]
    assert len(batches(data, max_batches=99)) == 4


@pytest.mark.parametrize("to_disk", [False, True])
def test_latents_are_cached_too(tmp_path: Path, folder: Path, to_disk: bool) -> None:
    data = make(tmp_path, table(folder, subset="flip_aug = true"), validation_split=0.25)
    assert data.image_count() == 20
    assert data.cache_latents(Encoder, batch_size=4, to_disk=to_disk, vae_identity="v") == 20
    for batch in batches(data):
        assert batch.images is None and batch.latents.shape[1:] == (4, 8, 8)
    # only images that are trained on are needed mirrored
    assert sum(wanted.flip for wanted in data._wanted()) == 15


def test_masks_are_used(tmp_path: Path, folder: Path) -> None:
    masks = draw(tmp_path / "masks", dict.fromkeys(NAMES, (64, 64)), captions=False)
    data = make(tmp_path, table(folder, subset=f"conditioning_data_dir = '{masks}'"), validation_split=0.25)
    for batch in batches(data):
        assert batch.loss_masks.shape == (len(batch.paths), 64, 64)
        assert 0 < batch.loss_masks.mean() < 1


def test_records_for_people_and_files(tmp_path: Path, folder: Path) -> None:
    data = make(tmp_path, table(folder, subset="num_repeats = 2"), validation_split=0.25)
    entries = metadata(data, from_file=True)
    assert (entries["ss_num_train_images"], entries["ss_num_validation_images"]) == (30, 5)
    assert dict(summary_rows(data))["validation"] == "5 images"
    assert entries["ss_dataset_dirs"] == {"images": {"n_repeats": 2, "img_count": 15}}
    assert "validation" not in dict(summary_rows(make(tmp_path, table(folder))))


# ---- the file ----


@pytest.mark.parametrize("level", ["general", "dataset", "subset"])
@pytest.mark.parametrize("wrong", ["true", "1.5", "-0.1", "'0.1'", "nan"])
def test_a_share_is_a_number_from_0_to_1(tmp_path: Path, folder: Path, level: str, wrong: str) -> None:
    line = f"validation_split = {wrong}\n"
    text = line + table(folder) if level == "general" else table(folder, **{level: line})
    with pytest.raises(UserError, match="validation_split: .*: write a number from 0 to 1"):
        make(tmp_path, text)


@pytest.mark.parametrize("wrong", [1.5, -0.1])
def test_a_share_of_the_command_line_is_too(tmp_path: Path, folder: Path, wrong: float) -> None:
    with pytest.raises(UserError, match="--validation_split .*: write a number from 0 to 1"):
        make(tmp_path, table(folder), validation_split=wrong)


def test_misplaced_keys_are_told_their_place(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UserError) as found:
        make(tmp_path, table(folder, dataset="validate_every_n_steps = 5", subset="validation_seed = true"))
    lines = str(found.value).splitlines()
    assert "belongs on the command line: --validate_every_n_steps" in lines[0]
    assert "validation_seed: belongs into [general] or [[datasets]]" in lines[1]
