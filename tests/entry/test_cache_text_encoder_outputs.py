"""``tools/cache_text_encoder_outputs.py`` as a user runs it, and training on what it made."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.fixtures.families import Tiny
from tests.fixtures.runs import launch_script, make_images, run_script, write_dataset

TOOL = "tools/cache_text_encoder_outputs.py"
SUBSET = "shuffle_caption = true\ncaption_dropout_rate = 0.3\ncaption_prefix = 'a photo'"


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    make_images(tmp_path / "images")
    return write_dataset(tmp_path / "data.toml", tmp_path / "images", dataset="batch_size = 2", subset=SUBSET)


def made(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "images").glob("*.npz")}


def test_training_finds_what_the_tool_made(tmp_path: Path, tiny: Tiny, dataset: Path) -> None:
    # one set of flags serves both; those of the network and latents have no effect on the tool
    words = tiny.words(
        dataset,
        tmp_path / "out",
        cache_text_encoder_outputs_to_disk=True,
        text_encoder_cache_variants=3,
        network_train_unet_only=True,
        cache_latents=True,
        clip_skip=2,
    )
    tool = run_script(TOOL, *words, *tiny.family.tool_flags, fresh=True)
    assert tool.code == 0, tool.text
    assert "text encoder outputs: 8 files made, 0 from the cache" in tool.text
    assert "no effect on the cache of text encoder outputs: --" in tool.text and "--network_module" in tool.text
    suffix = tiny.family.text_suffix
    assert made(tmp_path) == {f"empty_caption{suffix}", *(f"{index}{suffix}" for index in range(7))}
    assert not (tmp_path / "out").exists()

    done = run_script(tiny.file, *words)
    assert done.code == 0, done.text
    assert "text encoder outputs: 0 files made, 8 from the cache" in done.text
    assert "on disk, 3 variants" in done.text
    tensors = load_file(tmp_path / "out" / "tiny.safetensors")
    assert any(t.any() for name, t in tensors.items() if "lora_up" in name)
    assert not any(name.startswith("lora_te") for name in tensors)


@pytest.mark.slow
@pytest.mark.parametrize("script", [TOOL, None], ids=["tool", "training"])
def test_processes_share_the_encoding(tmp_path: Path, tiny: Tiny, dataset: Path, script: str | None) -> None:
    """On disk, and in memory, where each process needs all outputs."""
    words = tiny.words(
        dataset,
        tmp_path / "out",
        cache_text_encoder_outputs=True,
        text_encoder_cache_variants=2,
        text_encoder_batch_size=2,
        network_train_unet_only=True,
        mixed_precision="bf16",
    )
    done = launch_script(script, 2, *words, *tiny.family.tool_flags) if script else launch_script(tiny.file, 2, *words)
    assert [one.code for one in done] == [0, 0], done
    assert ("8 files made" if script == TOOL else "captions encoded") in done[0].text
    assert len(made(tmp_path)) == (8 if script == TOOL else 0)
    assert (tmp_path / "out" / "tiny.safetensors").exists() == (script != TOOL)
