"""networks/convert_lora.py on files of networks.oft and networks.oft_flux: the layout that other programs read."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.architectures.flux.targets import CHROMA_DENOISER
from library.architectures.lora_target import LORA_TARGET
from library.errors import UserError
from networks import lora_flux, oft, oft_flux
from networks.files.convert import convert
from networks.files.oft import joined
from tests.fixtures.adapted import randomize
from tests.fixtures.adapted_flux import flux_models
from tests.fixtures.runs import metadata_of
from tests.networks.conftest import make_tiny_unet

ALL = {"enable_all_linear": "True", "enable_conv": "True"}


def read_elsewhere(blocks, alpha, weight):
    """W' - W as ComfyUI computes it of ``oft_blocks`` (comfy/weight_adapter/oft.py), in float64."""
    blocks, weight = blocks.double(), weight.double()
    skew = blocks - blocks.transpose(1, 2)
    norm = torch.linalg.vector_norm(skew) + 1e-8
    if alpha > 0 and norm > alpha:
        skew = skew * alpha / norm
    unit = torch.eye(blocks.shape[-1], dtype=torch.float64)
    rotation = (unit + skew) @ torch.linalg.inv(unit - skew)
    parts = weight.view(*blocks.shape[:2], *weight.shape[1:])
    return torch.einsum("knm,kn...->km...", rotation - unit, parts).reshape(weight.shape)


def networks_of(kind):
    if kind == "unet":
        network = oft.create_network(1.0, 2, 0.05, None, None, make_tiny_unet(), **ALL)
        return randomize(network, 0.3)
    models = flux_models("dev")
    return randomize(oft_flux.create_network(1.0, 4, 0.05, None, *models, enable_all_linear="True"), 0.3)


@pytest.mark.parametrize("to", ["kohya", "comfyui"])
@pytest.mark.parametrize("kind", ["unet", "flux"])
def test_another_program_changes_the_weights_alike(tmp_path, kind, to):
    network = networks_of(kind)
    network.save_weights(tmp_path / "a.safetensors", None, {"ss_network_module": network.module_name})
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to, family="sd" if kind == "unet" else "flux")
    written = load_file(tmp_path / "b.safetensors")
    names = {key.rpartition(".")[0] for key in written}
    assert len(names) == len(network.adapters)
    prefix = {"kohya": "lora_unet_", "comfyui": "diffusion_model."}[to]
    assert all(name.startswith(prefix) for name in names)
    # in order of the network's modules, whatever the naming
    by_place = {name.removeprefix(prefix).replace(".", "_"): name for name in names}
    bounded = 0
    for adapter in network.adapters:
        place = adapter.lora_name.removeprefix("oft_unet_")
        if to == "comfyui" and kind == "unet":
            continue  # other paths there; the names themselves are tested with LoRA
        name = by_place[place]
        found = read_elsewhere(
            written[f"{name}.oft_blocks"], float(written[f"{name}.alpha"]), adapter.original.weight.detach()
        )
        torch.testing.assert_close(found.float(), adapter.get_weight(1.0).detach(), atol=2e-6, rtol=1e-5)
        bounded += float(found.norm()) > 0
    assert bounded or to == "comfyui"
    metadata = metadata_of(tmp_path / "b.safetensors")
    assert metadata["ss_network_module"] == "lycoris.kohya" and json.loads(metadata["ss_network_args"])["algo"]


def test_lycoris_computes_the_same(tmp_path):
    functional = pytest.importorskip("lycoris.functional.diag_oft")
    network = networks_of("unet")
    network.save_weights(tmp_path / "a.safetensors", None, {})
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya", family="sd")
    written = load_file(tmp_path / "b.safetensors")
    for adapter in network.adapters:
        name = adapter.lora_name.replace("oft_unet_", "lora_unet_")
        found = functional.diff_weight(adapter.original.weight, written[f"{name}.oft_blocks"], None, constraint=0)
        torch.testing.assert_close(found, adapter.get_weight(1.0), atol=2e-6, rtol=1e-4)


def test_projections_of_several_sizes_share_blocks_that_hold_each_whole():
    parts = [torch.ones(4, 2, 2)] * 3 + [torch.ones(4, 8, 8)]
    blocks = joined(parts)
    assert blocks.shape == (7, 8, 8)
    whole = torch.block_diag(*blocks)
    assert torch.equal(whole, torch.block_diag(*(block for part in parts for block in part)))
    # 2 + 2 and 3: nothing smaller than the whole has no block cut
    assert joined([torch.ones(2, 2, 2), torch.ones(1, 3, 3)]).shape == (1, 7, 7)


def test_a_cast_is_refused(tmp_path):
    networks_of("unet").save_weights(tmp_path / "a.safetensors", None, {})
    with pytest.raises(UserError, match="rotations of an OFT are kept in float"):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya", family="sd", dtype=torch.bfloat16)
    assert not (tmp_path / "b.safetensors").exists()


# ---- adapters for models whose modules have the same names ----


def test_an_adapter_for_chroma_is_refused_by_flux_and_the_other_way_round(tmp_path, caplog):
    chroma, dev = flux_models("chroma"), flux_models("dev")
    setattr(chroma[1], LORA_TARGET, CHROMA_DENOISER)  # as the family's loader marks them
    network = lora_flux.create_network(1.0, 4, 1.0, None, *chroma)
    file = tmp_path / "chroma.safetensors"
    network.save_weights(file, None, {"ss_base_model_version": "chroma"})
    with pytest.raises(UserError, match="made for Chroma"):
        lora_flux.create_network_from_weights(1.0, str(file), None, *dev)
    # without a word in the file its names still tell
    save_file(load_file(file), tmp_path / "silent.safetensors")
    lora_flux.create_network_from_weights(1.0, str(tmp_path / "silent.safetensors"), None, *dev)
    assert "no adapters for 3 kinds of layers" in caplog.text and "img_mod_lin" in caplog.text

    only = {"img_mod_dim": "0", "txt_mod_dim": "0", "single_mod_dim": "0"}
    network = lora_flux.create_network(1.0, 4, 1.0, None, [], dev[1], **only)
    network.save_weights(tmp_path / "flux.safetensors", None, {"ss_base_model_version": "flux1"})
    with pytest.raises(UserError, match="made for FLUX.1"):
        lora_flux.create_network_from_weights(1.0, str(tmp_path / "flux.safetensors"), None, [], chroma[1])
    target = lora_flux.create_network(1.0, 4, 1.0, None, [], chroma[1])
    with pytest.raises(UserError, match="made for FLUX.1"):
        target.load_weights(tmp_path / "flux.safetensors")
