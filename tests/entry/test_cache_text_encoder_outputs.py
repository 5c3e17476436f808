"""``tools/cache_text_encoder_outputs.py`` as a user runs it, and training on what it made."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.fixtures.runs import ROOT, environment, lora_arguments, make_pictures, run_script, write_dataset
from tests.fixtures.tiny_sd import MadeCheckpoint

TOOL = "tools/cache_text_encoder_outputs.py"
SUBSET = "shuffle_caption = true\ncaption_dropout_rate = 0.3\ncaption_prefix = 'a photo'"


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    make_pictures(tmp_path / "pictures")
    return write_dataset(tmp_path / "data.toml", tmp_path / "pictures", dataset="batch_size = 2", subset=SUBSET)


def made(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "pictures").glob("*.npz")}


def test_training_finds_what_the_tool_made(tmp_path: Path, tiny_sd: MadeCheckpoint, dataset: Path) -> None:
    # one set of flags serves both; those of the network and latents have no effect on the tool
    words = lora_arguments(
        tiny_sd,
        dataset,
        tmp_path / "out",
        cache_text_encoder_outputs_to_disk=True,
        text_encoder_cache_variants=3,
        network_train_unet_only=True,
        cache_latents=True,
        clip_skip=2,
    )
    tool = run_script(TOOL, *words)
    assert tool.code == 0, tool.text
    assert "no effect on the cache of text encoder outputs: --" in tool.text and "--network_module" in tool.text
    assert made(tmp_path) == {"empty_caption_sd_te.npz", *(f"{index}_sd_te.npz" for index in range(7))}
    assert not (tmp_path / "out").exists()

    done = run_script("train_network.py", *words)
    assert done.code == 0, done.text
    assert "text encoder outputs: 0 files made, 8 from the cache" in done.text
    assert "on disk, 3 variants" in done.text
    tensors = load_file(tmp_path / "out" / "tiny.safetensors")
    assert any(t.any() for name, t in tensors.items() if "lora_up" in name)
    assert not any(name.startswith("lora_te") for name in tensors)


@pytest.mark.slow
def test_two_processes_share_the_work(tmp_path: Path, tiny_sd: MadeCheckpoint, dataset: Path) -> None:
    """Both as a tool and in training, where they cache in memory."""
    settings = {"text_encoder_cache_variants": 2, "network_train_unet_only": True, "max_train_steps": 2}
    for script, how in (
        (TOOL, "cache_text_encoder_outputs_to_disk"),
        ("train_network.py", "cache_text_encoder_outputs"),
    ):
        words = lora_arguments(tiny_sd, dataset, tmp_path / "out", mixed_precision="bf16", **{how: True}, **settings)
        launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--mixed_precision", "no"]
        done = subprocess.run(
            [sys.executable, *launch, str(ROOT / script), *map(str, words)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=300,
            env=environment(),
        )
        assert done.returncode == 0, done.stdout + done.stderr
        if script == TOOL:
            assert made(tmp_path) == {"empty_caption_sd_te.npz", *(f"{index}_sd_te.npz" for index in range(7))}
            assert "8 files made" in done.stdout + done.stderr
        else:
            assert "captions encoded" in done.stdout + done.stderr
            assert (tmp_path / "out" / "tiny.safetensors").exists()
