"""The autoencoder: names, sizes, pieces and tiles."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library.architectures.common import kl_vae
from library.architectures.hunyuan_image import vae
from library.errors import UserError
from tests.fixtures.layouts import table
from tests.fixtures.tiny_hunyuan_image import HunyuanFileSizes, MadeHunyuan, make_tiny_hunyuan


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeHunyuan:
    return make_tiny_hunyuan(tmp_path_factory.mktemp("hunyuan"))


def loaded(made: MadeHunyuan, **settings: object):
    return vae.load_vae(vae.vae_source(str(made.vae)), dtype=torch.float32, device="cpu", **settings)


def test_the_published_file_is_that_of_the_table() -> None:
    shapes = table("hunyuan_image_21_vae")
    config = vae.infer_config(shapes)
    assert config["block_out_channels"] == (128, 256, 512, 512, 1024, 1024) and config["layers_per_block"] == 2
    assert (config["latent_channels"], config["spatial_compression_ratio"]) == (64, 32)
    with torch.device("meta"):
        model = vae.build_vae(config)
    layout = vae.published_layout(config)
    written = {name: tuple(tensor.shape) for name, tensor in layout.write(model.state_dict())}
    assert written == shapes


def test_what_is_loaded_is_written_bit_by_bit(made: MadeHunyuan) -> None:
    source, before = vae.vae_source(str(made.vae)), load_file(made.vae)
    after = dict(source.layout.write(loaded(made).state_dict()))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_diffusers_folder_is_the_same(made: MadeHunyuan, tmp_path: Path) -> None:
    loaded(made).save_pretrained(tmp_path / "vae")
    again = vae.load_vae(vae.vae_source(str(tmp_path)), dtype=torch.float32, device="cpu")
    latents = torch.randn(1, 64, 2, 1)
    assert torch.equal(kl_vae.decode_latents(again, latents), kl_vae.decode_latents(loaded(made), latents))


@pytest.mark.parametrize("chunk", [1, 3, 16])
@pytest.mark.parametrize("height", [32, 96])
def test_pieces_change_nothing_whatever_the_height(made: MadeHunyuan, chunk: int, height: int) -> None:
    """The published code loses a row where a map is about as high as a piece."""
    whole, split = loaded(made), loaded(made, chunk_size=chunk)
    pixels = torch.randn(1, 3, height, 64, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    with torch.no_grad():
        moments, in_pieces = (model.encode(pixels).latent_dist.parameters for model in (whole, split))
        images, from_pieces = (kl_vae.decode_latents(model, moments[:, :64]) for model in (whole, split))
    assert moments.shape == (1, 128, height // 32, 2) and images.shape == pixels.shape
    torch.testing.assert_close(in_pieces, moments, rtol=0, atol=1e-5)
    torch.testing.assert_close(from_pieces, images, rtol=0, atol=1e-5)


def test_one_convolution_in_pieces_of_any_size() -> None:
    torch.manual_seed(0)
    plain = torch.nn.Conv2d(2, 3, 3, padding=1)
    split = torch.nn.Conv2d(2, 3, 3, padding=1)
    split.load_state_dict(plain.state_dict())
    for height in range(1, 9):
        x = torch.randn(1, 2, height, 5)
        for chunk in range(1, 10):
            vae.split_convolutions(torch.nn.Sequential(split), chunk)
            split.chunk = chunk
            torch.testing.assert_close(split(x), plain(x), rtol=0, atol=1e-6)


def test_tiles_blend_into_each_other(made: MadeHunyuan) -> None:
    """A line between two tiles is the mean of both, weighted by the distance to either side."""
    model = loaded(made)
    model.enable_tiling()
    latents = torch.randn(1, 64, 1, 14, generator=torch.Generator().manual_seed(1))  # 448 pixels wide
    with torch.no_grad():
        tiled = model.decode(latents).sample
        left, right = (model.decoder(latents[..., start : start + 12]) for start in (0, 9))
    assert tiled.shape == (1, 3, 32, 448)
    torch.testing.assert_close(tiled[..., :288], left[..., :288])
    share = torch.arange(96) / 96
    torch.testing.assert_close(tiled[..., 288:384], left[..., 288:] * (1 - share) + right[..., :96] * share)
    torch.testing.assert_close(tiled[..., 384:], right[..., 96:160])


def test_damaged_and_other_files_are_named(made: MadeHunyuan) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(made.vae).items()}
    with pytest.raises(UserError, match="incomplete"):
        vae.infer_config({name: shape for name, shape in shapes.items() if not name.startswith("decoder.conv_in")})
    with pytest.raises(UserError, match="5 levels in its decoder where 6 are expected"):
        vae.infer_config({name: shape for name, shape in shapes.items() if not name.startswith("decoder.up.5")})
    with pytest.raises(UserError, match="not the VAE of HunyuanImage-2.1"):
        vae.vae_source(str(made.path))
    assert HunyuanFileSizes().vae_channels == vae.infer_config(shapes)["block_out_channels"]
