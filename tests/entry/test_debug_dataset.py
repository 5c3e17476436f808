"""``train_network.py --debug_dataset`` as a user runs it: no model, no weights, sheets and their list."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from tests.fixtures.runs import make_images, run_script, write_dataset

NO_DISPLAY = {"DISPLAY": "", "WAYLAND_DISPLAY": ""}


def test_sheets_are_written_without_a_model(tmp_path: Path) -> None:
    images = make_images(tmp_path / "images")  # seven
    subset = "num_repeats = 2\nshuffle_caption = true\nkeep_tokens = 1\nflip_aug = true"
    dataset = write_dataset(tmp_path / "data.toml", images, dataset="batch_size = 2", subset=subset)
    flags = ["--dataset_config", dataset, "--output_dir", tmp_path / "out", "--seed", 3, "--debug_dataset"]
    done = run_script("train_network.py", *flags, "--console_log_simple", env=NO_DISPLAY)
    assert done.code == 0, done.text
    folder = tmp_path / "out" / "debug_dataset"
    assert str(folder) in done.text and "there is no display" in done.text
    facts = [json.loads(line) for line in (folder / "images.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(facts) == 14 and {fact["epoch"] for fact in facts} == {1}
    assert {Path(fact["image_path"]).name for fact in facts} == {f"{n}.png" for n in range(7)}
    assert all(fact["caption"].startswith("a cat, ") for fact in facts)
    sheets = sorted(folder.glob("sheet_*.jpg"))
    assert len(sheets) == 2
    with Image.open(sheets[0]) as sheet:
        assert sheet.width > 200 and sheet.height > 200
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["debug_dataset"]  # nothing else was begun

    dataset.write_text(dataset.read_text().replace("flip_aug", "flip_agu"))
    wrong = run_script("train_network.py", *flags, env=NO_DISPLAY)
    assert wrong.code == 2 and 'did you mean "flip_aug"' in wrong.err and "Traceback" not in wrong.text
