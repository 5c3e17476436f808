"""The trainer with everything our LoRA can, with averages, and with a third party's network module."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.fixtures.runs import lora_arguments, metadata_of, train_here, write_dataset
from tests.fixtures.tiny_sd import MadeCheckpoint


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    return write_dataset(folder / "data.toml", pictures, general="flip_aug = true", dataset="batch_size = 2")


def assert_same(one: Path, other: Path) -> None:
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]


EXTRAS = {
    "network_args": [
        "dora=True", "rs_lora=True", "conv_dim=2", "network_reg_dims=attn2=3", "up_lr_weight=cosine+.25",
        "loraplus_unet_lr_ratio=4", "network_reg_lrs=mlp=2e-4,ff_net=3e-3", "rank_dropout=0.1",
    ],
    "text_encoder_lr": [5e-4],
    "scale_weight_norms": 1.0,
    "ema_decay": 0.7,
    "max_train_steps": 4,
    "save_every_n_steps": 2,
    "save_last_n_steps": 2,
    "save_last_n_steps_state": 10,
    "save_state": True,
}  # fmt: skip


def test_the_extras_of_our_lora_and_averages_resume_exactly(
    tmp_path: Path, tiny_sd: MadeCheckpoint, dataset: Path
) -> None:
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    train_here(*lora_arguments(tiny_sd, dataset, whole, **EXTRAS))
    final, average = whole / "tiny.safetensors", whole / "tiny-ema.safetensors"
    entries = metadata_of(average)
    assert entries["ss_ema_decay"] == "0.7" and "ss_ema_decay" not in metadata_of(final)
    assert json.loads(entries["ss_network_args"])["dora"] == "True"
    assert json.loads(entries["ss_network_args"])["rs_lora"] == "True"
    tensors, averages = load_file(final), load_file(average)
    assert tensors.keys() == averages.keys()
    assert any(not torch.equal(tensors[name], averages[name]) for name in tensors)
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_q"
    assert tensors[f"{name}.lora_down.weight"].shape[0] == 3
    assert float(tensors[f"{name}.alpha"]) == pytest.approx(3**0.5)
    assert tensors[f"{name}.dora_scale"].shape == (1, tensors[f"{name}.lora_down.weight"].shape[1])

    train_here(
        *lora_arguments(tiny_sd, dataset, rest, **EXTRAS, resume=whole / "tiny-step00000002-state"),
    )
    assert_same(rest / "tiny.safetensors", final)
    assert_same(rest / "tiny-ema.safetensors", average)


PLUG_IN = '''
"""A third party's network: it shifts each attention query. It speaks the oldest form of the protocol and no more."""
import torch
from safetensors.torch import load_file, save_file

class Shift(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.shift = torch.nn.Parameter(torch.zeros(module.out_features))
        self.module = [module]

    def hook(self):
        own = self.module[0].forward
        self.module[0].forward = lambda x: own(x) + self.shift

class ShiftNetwork(torch.nn.Module):
    def __init__(self, unet):
        super().__init__()
        for name, module in unet.named_modules():
            if name.endswith("to_q"):
                self.add_module("shift_" + name.replace(".", "_"), Shift(module))

    def apply_to(self, text_encoder, unet, apply_text_encoder=True, apply_unet=True):
        for shift in self.children():
            shift.hook()

    def prepare_optimizer_params(self, text_encoder_lr, unet_lr):
        group = {"params": list(self.parameters())}
        return [group if unet_lr is None else {**group, "lr": unet_lr}]

    def prepare_grad_etc(self, text_encoder, unet):
        self.requires_grad_(True)

    def on_epoch_start(self, text_encoder, unet):
        self.train()

    def get_trainable_params(self):
        return self.parameters()

    def load_weights(self, file):
        return self.load_state_dict(load_file(file))

    def save_weights(self, file, dtype, metadata):
        save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, file, metadata)

def create_network(multiplier, network_dim, network_alpha, vae, text_encoder, unet, **kwargs):
    assert (multiplier, network_dim, network_alpha, kwargs) == (1.0, 3, 2.0, {"words": "a=b", "dropout": 0.25})
    return ShiftNetwork(unet)
'''


@pytest.fixture
def plug_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, object]]:
    (tmp_path / "shift_network.py").write_text(PLUG_IN)
    monkeypatch.syspath_prepend(tmp_path)
    yield {
        "network_module": "shift_network",
        "network_dim": 3,
        "network_alpha": 2,
        "network_dropout": 0.25,
        "network_args": ["words=a=b"],
        "network_train_unet_only": True,
    }
    sys.modules.pop("shift_network", None)


def test_a_network_module_of_anyone_s(
    tmp_path: Path, tiny_sd: MadeCheckpoint, dataset: Path, plug_in: dict[str, object]
) -> None:
    more = {"max_train_steps": 4, "save_every_n_steps": 2, "save_state": True, "gradient_checkpointing": True}
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    train_here(*lora_arguments(tiny_sd, dataset, whole, **plug_in, **more))
    weights = load_file(whole / "tiny.safetensors")
    assert weights and all(name.startswith("shift_") and tensor.any() for name, tensor in weights.items())
    assert metadata_of(whole / "tiny.safetensors")["ss_network_module"] == "shift_network"
    state = whole / "tiny-step00000002-state"
    train_here(*lora_arguments(tiny_sd, dataset, rest, **plug_in, **more, resume=state))
    assert_same(rest / "tiny.safetensors", whole / "tiny.safetensors")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"scale_weight_norms": 1.0}, "--scale_weight_norms: networks of shift_network cannot do it"),
        ({"base_weights": ["a.safetensors"]}, "--base_weights: shift_network has no create_network_from_weights"),
    ],
)
def test_what_it_cannot_do_is_said(
    tmp_path: Path,
    tiny_sd: MadeCheckpoint,
    dataset: Path,
    plug_in: dict[str, object],
    capsys: pytest.CaptureFixture[str],
    settings: dict[str, object],
    said: str,
) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"")
    if "base_weights" in settings:
        settings = {"base_weights": [tmp_path / "a.safetensors"]}
    with pytest.raises(SystemExit, match="2"):
        train_here(*lora_arguments(tiny_sd, dataset, tmp_path / "out", **plug_in, **settings))
    assert said in capsys.readouterr().err
