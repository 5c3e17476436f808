"""A LoRA network made from a table, for a transformer that no family has: the table alone decides."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from library.architectures.lora_table import BlockList, LoraTable
from library.architectures.lora_target import LoraTarget
from library.errors import UserError
from networks.transformer_lora import preset


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.mlp = nn.Linear(8, 24), nn.Linear(8, 8)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = Block()


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.refiner = nn.ModuleList(Block() for _ in range(2))
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.embedder = nn.Linear(4, 8)


TARGET = LoraTarget(
    "lora_unet", ("Block",), stacked_widths=lambda path, layer: (8, 8, 8) if "attention" in path else ()
)
TABLE = LoraTable(
    title="Toy 1",
    denoiser=TARGET,
    encoder_target=lambda encoder: LoraTarget("lora_te", ("Block",)),
    layers={"attn_dim": re.compile(r".*attention$"), "refiner_dim": re.compile(r"refiner\.")},
    instead="attn_dim",
    blocks=(
        BlockList("refiner", re.compile(r"refiner\.(\d+)\.")),
        BlockList("layer", re.compile(r"layers\.(\d+)\."), "train_block_indices"),
    ),
    choice_key="train_blocks",
    choices={"refiners": ("refiner",), "transformer": ("layer",)},
    embedders_key="emb_dims",
    embedders=("embedder", "other"),
    encoders={"train_text": "lora_te"},
    perturbs=False,
)
Network = preset("ToyNetwork", "networks.lora_toy", TABLE)


def ranks(**args: str) -> dict[str, int]:
    network = Network.create(1.0, 4, 2.0, None, Encoder(), Transformer(), **args)
    return {adapter.lora_name.removeprefix("lora_"): adapter.rank for adapter in network.adapters}


def test_keys_give_ranks_and_choose_blocks_and_encoders():
    plain = ranks()
    assert len(plain) == 10 and set(plain.values()) == {4} and not any(name.startswith("te") for name in plain)
    # the first key that matches wins
    found = ranks(attn_dim="6", refiner_dim="3", emb_dims="2,0", train_text="True")
    assert found["unet_refiner_0_attention"] == 6 and found["unet_refiner_0_mlp"] == 3
    assert found["unet_layers_2_attention"] == 6 and found["unet_layers_2_mlp"] == 4
    assert found["unet_embedder"] == 2 and {name for name in found if name.startswith("te")}
    assert {name[:12] for name in ranks(train_blocks="refiners")} == {"unet_refiner"}
    assert set(ranks(train_blocks="transformer", train_block_indices="1-2")) == {
        f"unet_layers_{n}_{kind}" for n in (1, 2) for kind in ("attention", "mlp")
    }
    assert ranks(split_qkv="True")["unet_layers_0_attention"] == 12


def test_it_learns_and_saves(tmp_path):
    model = Transformer()
    network = Network.create(1.0, 4, 2.0, None, [], model, split_qkv="True")
    network.apply_to([], model)
    groups, _ = network.prepare_optimizer_params(None, 1e-2, None)
    optimizer = torch.optim.AdamW(groups)
    x, before = torch.randn(2, 8), model.layers[0].attention(torch.ones(1, 8)).detach()
    for _ in range(2):
        model.layers[0].attention(x).square().sum().backward()
        optimizer.step()
    assert not torch.equal(model.layers[0].attention(torch.ones(1, 8)), before)
    network.save_weights(tmp_path / "a.safetensors", None, {})
    again, _ = Network.create_from_weights(1.0, str(tmp_path / "a.safetensors"), None, [], Transformer())
    assert type(again).__module__ == "networks.lora_toy" and len(again.adapters) == len(network.adapters)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"conv_dim": "4"}, "networks.lora_toy cannot do it: Toy 1 has no convolutions"),
        ({"block_dims": "4"}, "counts the blocks of a U-Net; Toy 1 has attn_dim"),
        ({"ggpo_sigma": "1"}, 'no option "ggpo_sigma"'),
        ({"train_blocks": "double"}, "must be all, refiners or transformer"),
        ({"train_blocks": "refiners", "train_block_indices": "1"}, "exclude each other"),
        ({"train_block_indices": "3"}, "3 is out of range; the model has 3 layer blocks, 0-2"),
        ({"emb_dims": "0,2"}, "emb_dims: the model has no other; give 0 in its place"),
        ({"emb_dims": "2"}, "must have 2 comma-separated values"),
    ],
)
def test_what_the_table_does_not_have_is_refused(args, said):
    with pytest.raises(UserError, match=said):
        ranks(**args)
