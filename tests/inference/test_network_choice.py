"""The network module that reads a file, where the command line does not name one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from library.errors import UserError
from library.inference.networks import choose_networks, module_of_file

LORA = "lora_unet_x.lora_up.weight"


@pytest.mark.parametrize(
    ("tensor", "metadata", "module"),
    [
        (LORA, {"ss_network_module": "networks.lora_fa"}, "networks.lora_fa"),
        (LORA, {"ss_network_module": "lycoris.kohya"}, "lycoris.kohya"),
        (LORA, {}, "networks.lora"),
        (LORA, {"ss_network_module": "os"}, "networks.lora"),  # nothing but networks is imported
        ("lora_unet_x.oft_blocks", {}, "networks.oft"),
        ("lora_unet_x.lokr_w1", {}, "lycoris.kohya"),
    ],
)
def test_the_module_of_a_file(tmp_path: Path, tensor: str, metadata: dict[str, str], module: str) -> None:
    path = tmp_path / "net.safetensors"
    save_file({tensor: torch.zeros(1)}, path, metadata)
    assert module_of_file(path) == module
    (choice,) = choose_networks(None, [str(path)], [0.5], None)
    assert (choice.module, choice.multiplier) == (module, 0.5)


def test_a_pickled_file(tmp_path: Path) -> None:
    torch.save({"lora_unet_x.hada_w1_a": torch.zeros(1)}, tmp_path / "net.pt")
    assert module_of_file(tmp_path / "net.pt") == "lycoris.kohya"


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gone: no such file"):
        choose_networks(None, ["gone"], None, None)
    save_file({LORA: torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="2 files for 1 networks"):
        choose_networks(["networks.lora"], [str(tmp_path / "a.safetensors")] * 2, None, None)
