"""Adapter files whose damage would go unnoticed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from library.errors import UserError
from networks.files.adapter_file import read_adapter
from networks.weights import check_adapter_file, read_weights

NAME = "lora_unet_down_blocks_1_attentions_0_proj_in"
GOOD = {
    f"{NAME}.lora_down.weight": torch.ones(2, 8),
    f"{NAME}.lora_up.weight": torch.ones(8, 2),
    f"{NAME}.alpha": torch.tensor(1.0),
}


def written(folder: Path, **changed: Tensor) -> Path:
    tensors = {**GOOD, **{f"{NAME}.{name.replace('__', '.')}": tensor for name, tensor in changed.items()}}
    save_file(tensors, folder / "lora.safetensors")
    return folder / "lora.safetensors"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"lora_up__weight": torch.ones(8, 2, dtype=torch.int32)}, "lora_up.weight holds int32 numbers"),
        ({"lora_up__weight": torch.full((8, 2), float("nan"))}, "lora_up.weight holds NaN or infinity"),
        ({"alpha": torch.tensor(0.0)}, "alpha is 0, with which the adapter changes nothing"),
        ({"alpha": torch.tensor(0)}, "alpha is 0, with which the adapter changes nothing"),
        ({"alpha": torch.tensor(float("inf"))}, "alpha holds NaN or infinity"),
        ({"alpha": torch.ones(5)}, "alpha: holds 5 numbers, and an alpha is one"),
    ],
)
def test_damage_is_named(tmp_path: Path, changed: dict[str, Tensor], words: str) -> None:
    path = written(tmp_path, **changed)
    for read in (check_adapter_file, read_weights, read_adapter):
        with pytest.raises(UserError, match=words) as found:
            read(path)
        assert str(path) in str(found.value) and NAME in str(found.value)


def test_alphas_of_old_files_are_integers(tmp_path: Path) -> None:
    path = written(tmp_path, alpha=torch.tensor(2), extra=torch.ones(3, dtype=torch.int64))
    check_adapter_file(path)
    assert read_weights(path)[f"{NAME}.alpha"] == 2


def test_an_alpha_of_zero_means_something_else_without_a_rank(tmp_path: Path) -> None:
    """OFT's alpha bounds the rotation; 0 is no bound."""
    save_file(
        {f"{NAME}.oft_blocks": torch.ones(2, 4, 4), f"{NAME}.alpha": torch.tensor(0.0)}, tmp_path / "oft.safetensors"
    )
    check_adapter_file(tmp_path / "oft.safetensors")
