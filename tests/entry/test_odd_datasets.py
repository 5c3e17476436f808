"""Data sets as people have them, through the real script: names, texts, links and folders of all sorts."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

from tests.fixtures.runs import lora_arguments, make_images, run_script
from tests.fixtures.tiny_sd import MadeCheckpoint


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes on Linux alone")
def test_names_and_texts_of_all_sorts(tmp_path: Path, tiny_sd: MadeCheckpoint) -> None:
    place = make_images(tmp_path / "made", [(64, 64)])
    odd = tmp_path / os.fsdecode(b"Bilder f\xfcr [LoRA] (1)")  # of an archive in another encoding
    odd.mkdir()
    names = ["a b.PNG", "日本語 {x|y}.png", "%d %s.Png", "a.b.c.png", os.fsdecode(b"caf\xe9.png")]
    for index, name in enumerate(names):
        shutil.copy(place / "0.png", odd / name)
        text = (b"\xef\xbb\xbfa cat,\r\n\r\nsecond\r\n", b"", b"50% {caf\xc3\xa9|b}", b"a,,b , ", b"\n\nx")[index]
        (odd / name).with_suffix(".txt").write_bytes(text)
    (odd / "link.png").symlink_to(place / "0.png")
    (odd / "link.txt").symlink_to(place / "0.txt")
    (odd / "inner.png").mkdir()
    Image.new("RGB", (1, 1)).save(odd / "one.png")
    Image.new("L", (20_000, 1)).save(odd / "line.png")
    (tmp_path / "again").symlink_to(odd)
    folders = [str(odd), str(tmp_path / "again")]
    content = {
        "general": {"resolution": 64, "enable_wildcard": True, "caption_extension": "txt", "validation_split": 0},
        "datasets": [
            {"batch_size": 50, "subsets": [{"image_dir": f, "class_tokens": "cat %s", "cache_info": True}]}
            for f in folders
        ],
    }
    config = tmp_path / "data.json"
    config.write_text(f"\ufeff{json.dumps(content)}", encoding="utf-8")
    more = {"max_train_steps": 2, "max_data_loader_n_workers": 1, "cache_latents_to_disk": True}
    flags = lora_arguments(tiny_sd, config, tmp_path / "out", **more)
    done = run_script("train_network.py", *flags, env={"PYTHONIOENCODING": "utf-8:strict"})
    assert done.code == 0, done.text
    assert "Traceback" not in done.text and "Logging error" not in done.text
    with safe_open(tmp_path / "out" / "tiny.safetensors", framework="pt") as file:
        assert file.metadata()["ss_num_train_images"] == "16"
    assert len(list(odd.glob("*_sd.npz"))) == 8
