"""Caption files that the settings pass over are named before anything is trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.config.arguments import DatasetOptions
from library.config.no_effect import report
from library.data.dataset_config import load_dataset_config
from library.data.dataset_spec import DatasetConfig
from library.data.unread_captions import unread_captions
from library.errors import UserError
from tests.data.samples import draw

IMAGES = {"a.png": (8, 8), "b.png": (8, 8), "c.png": (8, 8)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as most data sets have it: ``2_sks`` with a .txt file for each image."""
    return draw(tmp_path / "train" / "2_sks", IMAGES)


def config_of(folder: Path, **options: object) -> DatasetConfig:
    return load_dataset_config(None, DatasetOptions(train_data_dir=str(folder.parent), resolution="64", **options))


def test_captions_with_another_ending(folder: Path) -> None:
    (warning,) = unread_captions(config_of(folder))
    assert warning.endswith(
        f'caption_extension .caption: 3 .txt files in {folder} have no effect, and "sks" is the caption of all images; '
        "set caption_extension to .txt (--caption_extension .txt)"
    )
    with pytest.raises(UserError, match=r"3 \.txt files.*\(an error by --strict\)"):
        report([warning], strict=True)


def test_all_is_well(folder: Path) -> None:
    assert unread_captions(config_of(folder, caption_extension=".txt")) == []


def test_captions_of_which_some_are_missing(folder: Path) -> None:
    (folder / "b.txt").unlink()
    (warning,) = unread_captions(config_of(folder, caption_extension=".txt"))
    assert warning.endswith(f'1 of 3 images in {folder} have no caption file (.txt), so "sks" is their caption: b.png')


def test_captions_of_two_kinds(folder: Path) -> None:
    (folder / "b.txt").rename(folder / "b.caption")
    (warning,) = unread_captions(config_of(folder))
    assert "2 .txt files" in warning and '"sks" is the caption of 2 of 3 images' in warning


def test_class_tokens_alone_are_a_choice(folder: Path) -> None:
    for path in folder.glob("*.txt"):
        path.unlink()
    (folder / "README.txt").write_text("no caption")
    assert unread_captions(config_of(folder)) == []


def test_a_folder_of_several_datasets_is_named_once(folder: Path, tmp_path: Path) -> None:
    dataset = f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{folder}'\nclass_tokens = 'sks'\n"
    (tmp_path / "data.toml").write_text(dataset * 2)
    assert len(unread_captions(load_dataset_config(tmp_path / "data.toml", DatasetOptions()))) == 1


def test_training_says_so_before_it_loads_anything(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The trainer's own checks, which ``--dry_run`` shares, refuse it with --strict."""
    import train_network

    parser = train_network.setup_parser()
    flags = ["--train_data_dir", str(folder.parent), "--resolution", "64", "--network_module", "networks.lora"]
    base = ["--pretrained_model_name_or_path", "missing.safetensors", "--output_dir", "out", "--output_name", "x"]
    args = parser.parse_args([*flags, *base, "--dry_run", "--strict"])
    with pytest.raises(SystemExit) as ended:
        train_network.NetworkTrainer().train(args)
    assert ended.value.code == 2
    assert "3 .txt files" in capsys.readouterr().err
