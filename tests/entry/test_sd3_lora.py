"""LoRA of all three text encoders of Stable Diffusion 3."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.fixtures.families import SD3, Tiny
from tests.fixtures.runs import logged, make_images, write_dataset


def test_all_three_text_encoders_are_adapted(tmp_path: Path) -> None:
    """Each with its own learning rate; what was trained is read again and trained on."""
    tiny = Tiny(SD3, SD3.make(tmp_path / "model"))
    dataset = write_dataset(tmp_path / "data.toml", make_images(tmp_path / "images", [(64, 64)] * 2))
    rates = [1e-3, 2e-3, 3e-3]
    options = {"network_args": ["train_t5xxl=True"], "text_encoder_lr": rates, "max_train_steps": 2}
    tiny.train(dataset, tmp_path / "out", **options)
    path = tmp_path / "out" / "tiny.safetensors"
    ups = {name: tensor for name, tensor in load_file(path).items() if name.endswith("lora_up.weight")}
    for number, rate in enumerate(rates, start=1):
        own = [tensor for name, tensor in ups.items() if name.startswith(f"lora_te{number}_")]
        assert own and all(tensor.any() for tensor in own), number
        assert logged(tmp_path / "out", f"lr/textencoder {number}") == pytest.approx([rate] * 2)
    more = {**options, "network_args": None, "network_dim": None, "network_alpha": None}
    tiny.train(dataset, tmp_path / "again", **more, network_weights=path, dim_from_weights=True)
    again = load_file(tmp_path / "again" / "tiny.safetensors")
    assert again.keys() == load_file(path).keys()
