"""The Python code of docs/using_the_file.md runs as it stands there, with a LoRA that the quickstart's run leaves."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from tests.fixtures.runs import ROOT, train_here

pytestmark = pytest.mark.usefixtures("own_root_logger")


def test_diffusers_generates_with_the_trained_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    run = ["--config_file", "examples/quickstart/lora.toml", "--max_train_steps", 3, "--learning_rate", 0.02]
    train_here(*run, "--lr_warmup_steps", 0, "--lr_scheduler", "constant", "--max_data_loader_n_workers", 0)
    (snippet,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs/using_the_file.md").read_text(encoding="utf-8"), re.DOTALL
    )
    snippet = snippet.replace("num_inference_steps=20", "num_inference_steps=4")
    images = {}
    for strength in ("0.8", "0.0"):
        exec(compile(snippet.replace("0.8", strength), "using_the_file.md", "exec"), {})
        images[strength] = Image.open("wug.png").tobytes()
    assert Image.open("wug.png").size == (64, 64)
    assert images["0.8"] != images["0.0"], "the LoRA acts"
