"""``tools/check_dataset.py`` as users and their scripts run it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from library.config.config_file import read_args
from tests.data.report.test_near_duplicates import scene
from tests.fixtures.guides import make_pairs
from tests.fixtures.runs import THREE_SHAPES, make_images, run_script
from tests.fixtures.tiny_sd import MadeCheckpoint
from tools.check_dataset import main, setup_parser

TOOL = "tools/check_dataset.py"


def test_one_report_of_everything(tmp_path: Path, tiny_sd: MadeCheckpoint) -> None:
    train, reg = tmp_path / "train" / "3_sks cat", tmp_path / "reg" / "1_cat"
    for folder in (train, reg):
        folder.mkdir(parents=True)
    for index, size in enumerate(THREE_SHAPES):
        scene(index, size).save(train / f"{index}.png")
    (train / "0.caption").write_text("cat " * 80 + "[bold] dog", encoding="utf-8")
    (reg / "r.png").write_bytes((train / "1.png").read_bytes())
    (train / "2.png").write_bytes(b"no image")
    config = tmp_path / "lora.toml"
    config.write_text(
        f"[data]\ntrain_data_dir = '{train.parent}'\nreg_data_dir = '{reg.parent}'\nresolution = '64'\n"
        "enable_bucket = true\nmin_bucket_reso = 32\nmax_bucket_reso = 128\nbucket_reso_steps = 32\n"
        f"[model]\npretrained_model_name_or_path = '{tiny_sd.path}'\n"
        f"tokenizer_cache_dir = '{tiny_sd.tokenizer_cache_dir}'\n[network]\nnetwork_dim = 4\n",
        encoding="utf-8",
    )
    html, report_file = tmp_path / "report.html", tmp_path / "report.json"
    done = run_script(
        TOOL, "--config_file", config, "--html", html, "--json", report_file, "--console_log_simple", fresh=True
    )
    assert done.code == 1, done.text
    assert "Traceback" not in done.text
    for words in ("2.png", "r.png", "64x64", "steps an epoch", "2 errors", "[bold] dog", "does not concern the data"):
        assert words in done.text, words
    assert "--network_dim" in done.err
    report = json.loads(report_file.read_text(encoding="utf-8"))
    kinds = {finding["kind"] for finding in report["findings"] if finding["severity"] != "info"}
    assert {"unreadable", "leakage", "caption_too_long"} <= kinds
    assert report["counts"]["error"] == 2 and report["version"] == 1
    page = html.read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>") and "data:image/jpeg;base64," in page
    # nothing was left beside the images
    assert sorted(path.suffix for path in train.iterdir()) == [".caption"] + [".png"] * 7


def test_pairs_are_shown(tmp_path: Path) -> None:
    """Images stand beside their conditioning images; one without is named."""
    dataset = make_pairs(tmp_path)
    (tmp_path / "guides" / "3.png").unlink()
    page = tmp_path / "page.html"
    assert main(read_args(setup_parser(), ["--dataset_config", str(dataset), "--html", str(page)])) == 1
    assert "has no image of the same name for 3.png" in page.read_text(encoding="utf-8")
    (tmp_path / "images" / "3.png").unlink()
    assert main(read_args(setup_parser(), ["--dataset_config", str(dataset), "--html", str(page)])) == 0
    text = page.read_text(encoding="utf-8")
    assert "mask or conditioning image" in text
    assert text.count(f'<figure title="{tmp_path}/guides/') == text.count(f'<figure title="{tmp_path}/images/') >= 3


def test_exit_codes(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(3):
        scene(index, (64, 64)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text("cat, dog", encoding="utf-8")
    (folder / "2.txt").write_text("", encoding="utf-8")
    dataset = tmp_path / "data.toml"
    dataset.write_text(
        f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{folder}'\ncaption_extension = '.txt'\n"
    )
    clean = run_script(TOOL, "--dataset_config", dataset)
    assert clean.code == 0 and "0 errors, 1 warnings" in clean.out and "were not counted" in clean.out, clean.text
    strict = run_script(TOOL, "--dataset_config", dataset, "--strict")
    assert strict.code == 1, strict.text
    wrong = run_script(TOOL, "--dataset_config", tmp_path / "gone.toml", "--html", tmp_path / "no" / "r.html")
    assert wrong.code == 2 and "there is no folder" in wrong.err and "Traceback" not in wrong.text


@pytest.mark.usefixtures("own_root_logger")
def test_the_family_decides_which_sizes_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_images(tmp_path / "1_cat", [(80, 80)])
    words = ["--train_data_dir", str(folder.parent), "--resolution", "80", "--caption_extension", ".txt"]
    assert main(read_args(setup_parser(), words)) == 0
    with pytest.raises(SystemExit) as ended:
        main(read_args(setup_parser(), [*words, "--sdxl"]))
    assert ended.value.code == 2 and "must be multiples of 32" in capsys.readouterr().err
    # options of its training are taken
    assert main(read_args(setup_parser(), [*words, "--flux", "--ae", "ae.safetensors", "--guidance_scale", "1"])) == 0
    assert "does not concern the data: --guidance_scale" in capsys.readouterr().err
    words[words.index("80")] = "72"
    with pytest.raises(SystemExit) as ended:
        main(read_args(setup_parser(), [*words, "--flux"]))
    assert ended.value.code == 2 and "must be multiples of 16" in capsys.readouterr().err
