"""Network modules of other projects get models with the module paths of published files."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from library.architectures.common.ldm_unet import ldm_unet_layout
from library.architectures.lora_target import LORA_TARGET
from networks.third_party import denoiser_argument, text_argument
from tests.networks.test_lora_layouts import sdxl_models as published_models
from tests.networks.test_lora_layouts import table_of

THEIRS = "lycoris.kohya"


def classes(model: nn.Module) -> Counter:
    return Counter(type(module).__name__ for module in model.modules())


def test_sdxls_unet_has_the_paths_of_its_file(sdxl_models):
    _, unet = sdxl_models
    view = denoiser_argument(THEIRS, unet)
    keys = ldm_unet_layout(unet.config).keys
    parameters = dict(unet.named_parameters())
    assert {name: id(tensor) for name, tensor in view.named_parameters()} == {
        keys.to_file(name): id(tensor) for name, tensor in parameters.items()
    }
    for kind in ("Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"):
        assert classes(view)[kind] == classes(unet)[kind] > 0
    assert type(view.get_submodule("input_blocks.1.0")).__name__ == "ResnetBlock2D"
    down = view.get_submodule(f"input_blocks.{unet.config.layers_per_block + 1}.0")
    assert type(down).__name__ == "Downsample2D"
    assert view.config is unet.config and view.dtype == torch.float32


def test_what_needs_no_other_paths_is_itself(sdxl_models, tiny_unet):
    assert denoiser_argument("networks.lora", sdxl_models[1]) is sdxl_models[1]
    assert getattr(tiny_unet, LORA_TARGET, None) is None
    assert denoiser_argument(THEIRS, tiny_unet) is tiny_unet


@pytest.mark.slow
def test_lycoris_names_what_a_lora_names():
    """With its default preset, whose files programs have read for years."""
    kohya = pytest.importorskip("lycoris.kohya")
    encoders, unet = published_models()
    with torch.device("meta"):
        network = kohya.create_network(
            1.0, 4, 1.0, None, text_argument(encoders), denoiser_argument(THEIRS, unet), conv_dim=4
        )
    modules = {name.partition(".")[0] for name in table_of("lora_sdxl_conv")["keys"]}
    assert {adapter.lora_name for adapter in (*network.unet_loras, *network.text_encoder_loras)} == modules
