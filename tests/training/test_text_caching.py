"""Training with cached text encoder outputs: the same run, without its text encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from library.architectures.sd import SD
from tests.fixtures.runs import lora_arguments, make_images, write_dataset
from tests.fixtures.tiny_sd import MadeCheckpoint, make_tiny_sd

ON_DISK = {"cache_text_encoder_outputs_to_disk": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> MadeCheckpoint:
    return make_tiny_sd(tmp_path_factory.mktemp("model") / "tiny.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of this test alone, as is their cache."""
    return make_images(tmp_path / "images", [(64, 64)] * 4)


@pytest.fixture
def train(
    tmp_path: Path, model: MadeCheckpoint, folder: Path, monkeypatch: pytest.MonkeyPatch, own_root_logger: None
) -> Any:
    """Runs the script's trainer in this process; returns the trained weights."""
    import train_network

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(name: str, *, subset: str = "", **settings: object) -> dict[str, Tensor]:
        dataset = write_dataset(tmp_path / "data.toml", folder, dataset="batch_size = 2", subset=subset)
        settings = {"network_train_unet_only": True, "max_train_steps": 4, **settings}
        words = lora_arguments(model, dataset, tmp_path / name, **settings)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # runs are compared bit for bit
        try:
            trainer = train_network.NetworkTrainer()
            trainer.train(train_network.setup_parser().parse_args([str(word) for word in words]))
        finally:
            torch.set_num_threads(threads)
        return load_file(tmp_path / name / "tiny.safetensors")

    return run


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert one.keys() == other.keys() and any(t.any() for name, t in one.items() if "lora_up" in name)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=tolerance, msg=name)


FIXED = "caption_prefix = 'a photo'\ncaption_suffix = 'outside'\ncaption_dropout_rate = 0.4"


def test_the_same_weights_as_without(train: Any, folder: Path) -> None:
    settings = {"weighted_captions": True, "max_token_length": 150, "clip_skip": 2}
    plain = train("plain", subset=FIXED, **settings)
    one_by_one = train("memory", subset=FIXED, cache_text_encoder_outputs=True, text_encoder_batch_size=1, **settings)
    assert_same(one_by_one, plain)
    on_disk = train("disk", subset=FIXED, max_data_loader_n_workers=1, **ON_DISK, **settings)
    assert_same(on_disk, plain, 1e-6)
    assert {p.name for p in folder.glob("*.npz")} == {"empty_caption_sd_te.npz", *(f"{i}_sd_te.npz" for i in range(4))}


def test_a_full_cache_needs_the_encoder_for_previews_only(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train("first", **ON_DISK)
    loads, encodes = [], []
    load, encode = type(SD).load_text_encoder, type(SD).encode_text

    def counted_load(self: Any, *args: Any, **settings: Any) -> Any:
        loads.append(settings["device"])
        return load(self, *args, **settings)

    def counted_encode(self: Any, encoders: Any, tokens: Any, **settings: Any) -> Any:
        encodes.append(len(tokens["input_ids"]))
        return encode(self, encoders, tokens, **settings)

    monkeypatch.setattr(type(SD), "load_text_encoder", counted_load)
    monkeypatch.setattr(type(SD), "encode_text", counted_encode)
    assert_same(train("second", **ON_DISK), first)
    # for the network, which is made for it too: to look at before, and for training
    assert (loads, encodes) == (["meta", "meta"], [])
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 1 --l 1 --d 5\n")
    drawn = train("third", sample_prompts=prompts, sample_every_n_steps=4, **ON_DISK)
    assert_same(drawn, first)
    # the prompt is encoded before training, and the encoder let go again
    assert (loads[2:], encodes) == (["meta", "cpu", "meta"], [1])
    assert list((tmp_path / "third" / "sample").glob("*.png"))


def test_resume_is_exact_with_variants(train: Any, tmp_path: Path) -> None:
    settings = {
        "subset": "shuffle_caption = true\ncaption_dropout_rate = 0.2\nnum_repeats = 3",
        "text_encoder_cache_variants": 3,
        "max_train_steps": 6,
        "save_every_n_steps": 3,
        "save_state": True,
        **ON_DISK,
    }
    whole = train("whole", **settings)
    state = tmp_path / "whole" / "tiny-step00000003-state"
    assert_same(train("resumed", resume=state, **settings), whole)
    in_memory = {**settings, "cache_text_encoder_outputs_to_disk": False, "cache_text_encoder_outputs": True}
    assert_same(train("memory", **in_memory), whole, 1e-6)
