"""The commands of docs/captioning.md, run as they stand, with tiny models in folders of the names that the page has."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import pytest

from tests.fixtures.pages import commands_of, files_of
from tests.fixtures.runs import ROOT, make_images, train_here
from tests.fixtures.tiny_captioners import (
    write_tiny_blip,
    write_tiny_florence,
    write_tiny_git,
    write_tiny_llava,
    write_tiny_qwen,
    write_wd_onnx,
)
from tests.fixtures.tiny_sd import make_tiny_sd

pytestmark = pytest.mark.usefixtures("own_root_logger")

PAGE = ROOT / "docs" / "captioning.md"
#: the page's models and what stands for them
MODELS = {
    "Salesforce/blip-image-captioning-large": write_tiny_blip,
    "microsoft/git-large-textcaps": write_tiny_git,
    "Qwen/Qwen3-VL-4B-Instruct": write_tiny_qwen,
    "fancyfeast/llama-joycaption-beta-one-hf-llava": write_tiny_llava,
    "florence-community/Florence-2-large": write_tiny_florence,
    "SmilingWolf/wd-swinv2-tagger-v3": write_wd_onnx,
}


def test_the_page_has_commands_of_every_script() -> None:
    scripts = {str(path.relative_to(ROOT)) for path in (ROOT / "finetune").glob("*.py")}
    assert scripts <= {command.script for command in commands_of(PAGE)}


def test_the_page_works_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    images = make_images(Path("images"), ((256, 256), (288, 256), (256, 320)))
    for text in images.glob("*.txt"):
        text.unlink()
    for name, write in MODELS.items():
        write(Path(name))
    for name, text in files_of(PAGE).items():
        Path(name).write_text(text)
    sd = make_tiny_sd(tmp_path / "sd" / "tiny.safetensors")
    shutil.copy(sd.path, "model.safetensors")
    for command in commands_of(PAGE):
        words = [word.replace("512,512", "256,256").replace("simple background", "long hair") for word in command.words]
        if command.script == "train_network.py":
            continue
        module = importlib.import_module(command.script.removesuffix(".py").replace("/", "."))
        more = ["--max_new_tokens", "6"] if "vlm" in command.script else []
        assert not module.main(module.setup_parser().parse_args([*words, *more]))
    for ending in (".txt", ".caption", ".git", ".joy", ".florence"):
        assert len(list(images.glob(f"*{ending}"))) == 3, ending
    assert Path("review.html").exists() and len(json.loads(Path("tags.json").read_text())) == 3
    assert len(list(images.glob("*_sd.npz"))) == 3

    Path("prepared.toml").write_text(Path("prepared.toml").read_text().replace("512", "256"))
    train = next(command for command in commands_of(PAGE) if command.script == "train_network.py")
    words = [{"1000": "1"}.get(word, word) for word in train.words]
    train_here(
        *words,
        "--tokenizer_cache_dir",
        sd.tokenizer_cache_dir,
        "--console_log_simple",
        "--max_data_loader_n_workers",
        0,
    )
    assert Path("output/tagged.safetensors").exists()
