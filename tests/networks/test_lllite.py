"""ControlNet-LLLite: published names, the formula, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from library.architectures.common.ldm_unet import build_unet
from library.architectures.conditioning import Conditioning
from library.architectures.lora_target import LORA_TARGET
from library.architectures.sdxl import SDXL
from library.errors import UserError
from networks.lllite import LLLiteNetwork
from tests.fixtures.control import save_lllite
from tests.fixtures.tiny_sdxl import full_sizes as full_sdxl_sizes
from tests.fixtures.tiny_sdxl import make_tiny_sdxl, sdxl_configs


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    return make_tiny_sdxl(tmp_path_factory.mktemp("sdxl") / "model.safetensors")


@pytest.fixture
def unet(made) -> nn.Module:  # type: ignore[no-untyped-def]
    cache = str(made.tokenizer_cache_dir)
    checkpoint = SDXL.inspect(str(made.path), v_parameterization=False, vae=None, tokenizer_cache_dir=cache)
    return SDXL.load_denoiser(checkpoint, dtype=torch.float32, device="cpu")


def predict(unet: nn.Module, height: int = 64, width: int = 64, rows: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    conditioning = Conditioning(
        {
            "hidden_state1": torch.randn(rows, 77, 32, generator=generator),
            "hidden_state2": torch.randn(rows, 77, 64, generator=generator),
            "pool2": torch.randn(rows, 64, generator=generator),
            "sizes": torch.full((rows, 6), 64),
        }
    )
    noisy = torch.randn(rows, 4, height // 8, width // 8, generator=generator)
    with torch.inference_mode():
        return SDXL.predict(unet, noisy, torch.full((rows,), 500), conditioning)


def published_names() -> dict[str, tuple[int, ...]]:
    """Names and shapes of a file for SDXL with an embedding of 32 features and an inner width of 64."""
    blocks = {f"input_blocks_{n}_1": (640, 2, 2) for n in (4, 5)}
    blocks |= {f"input_blocks_{n}_1": (1280, 10, 3) for n in (7, 8)}
    blocks["middle_block_1"] = (1280, 10, 3)
    names: dict[str, tuple[int, ...]] = {}
    for block, (width, count, depth) in blocks.items():
        for index in range(count):
            for layer in ("attn1_to_k", "attn1_to_q", "attn1_to_v", "attn2_to_q"):
                at = f"lllite_unet_{block}_transformer_blocks_{index}_{layer}"
                shapes = {
                    "conditioning1.0": (16, 3, 4, 4),
                    "down.0": (64, width),
                    "mid.0": (64, 96),
                    "up.0": (width, 64),
                }
                if depth == 2:
                    shapes["conditioning1.2"] = (32, 16, 4, 4)
                else:
                    shapes |= {"conditioning1.2": (16, 16, 4, 4), "conditioning1.4": (32, 16, 2, 2)}
                for part, shape in shapes.items():
                    names |= {f"{at}.{part}.weight": shape, f"{at}.{part}.bias": shape[:1]}
    return names


def test_names_and_shapes_of_published_files() -> None:
    config = sdxl_configs(full_sdxl_sizes())["unet"]
    with torch.device("meta"):
        unet = build_unet(config)
        setattr(unet, LORA_TARGET, SDXL.denoiser_target_of(type("Source", (), {"config": config})))
        network = LLLiteNetwork(unet, cond_emb_dim=32, mlp_dim=64)
    found = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert found == published_names()
    assert len(found) == 1600


def test_a_new_network_changes_nothing(unet: nn.Module) -> None:
    plain = predict(unet)
    network = LLLiteNetwork(unet)
    network.apply_to_denoiser()
    network.set_images(torch.rand(1, 3, 64, 64) * 2 - 1)
    torch.testing.assert_close(predict(unet), plain)


def test_it_is_read_applied_and_removed(unet: nn.Module, tmp_path: Path) -> None:
    plain = predict(unet)
    path = save_lllite(unet, tmp_path / "lines.safetensors")
    network = LLLiteNetwork.from_file(path, unet, flag="--control_net_lllite_models")
    network.apply_to_denoiser()
    torch.testing.assert_close(predict(unet), plain)  # without an image
    network.set_images(torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1)
    changed = predict(unet)
    assert (changed - plain).abs().max() > 1e-3
    network.set_multiplier(0.0)
    torch.testing.assert_close(predict(unet), plain)
    network.set_multiplier(1.0)
    torch.testing.assert_close(predict(unet), changed)
    network.remove()
    torch.testing.assert_close(predict(unet), plain)


def test_the_formula(unet: nn.Module, tmp_path: Path) -> None:
    """layer(x + multiplier up(relu(mid([image, relu(down(x))]))))."""
    path = save_lllite(unet, tmp_path / "lines.safetensors")
    network = LLLiteNetwork.from_file(path, unet, flag="")
    name, part = next(iter(network.named_children()))
    weights = {key.removeprefix(f"{name}."): t for key, t in load_file(path).items() if key.startswith(f"{name}.")}
    layer = part._layer[0]
    x, image = torch.randn(4, 16, layer.in_features), torch.rand(2, 3, 64, 64)

    def linear(at: str, value: torch.Tensor) -> torch.Tensor:
        return functional.linear(value, weights[f"{at}.weight"], weights[f"{at}.bias"])

    embedding = functional.conv2d(image, weights["conditioning1.0.weight"], weights["conditioning1.0.bias"], 4).relu()
    embedding = functional.conv2d(embedding, weights["conditioning1.2.weight"], weights["conditioning1.2.bias"], 4)
    tokens = embedding.flatten(2).transpose(1, 2).repeat(2, 1, 1)
    change = linear("up.0", linear("mid.0", torch.cat([tokens, linear("down.0", x).relu()], dim=2)).relu())
    expected = layer(x + 0.5 * change)
    part.embed(image)
    part.multiplier = 0.5
    part.apply_to_layer()
    torch.testing.assert_close(layer(x), expected)


def test_sizes_that_the_levels_do_not_divide(unet: nn.Module, tmp_path: Path) -> None:
    network = LLLiteNetwork.from_file(save_lllite(unet, tmp_path / "a.safetensors"), unet, flag="")
    plain = predict(unet, 72, 104)
    network.apply_to_denoiser()
    network.set_images(torch.rand(2, 3, 72, 104))
    assert (predict(unet, 72, 104) - plain).abs().max() > 1e-3


def test_gradients_reach_all_of_it(unet: nn.Module) -> None:
    network = LLLiteNetwork(unet, cond_emb_dim=8, mlp_dim=8).train()
    part = network.parts[0]
    nn.init.normal_(part.up[0].weight)
    part.embed(torch.rand(1, 3, 64, 64))
    part.change(torch.randn(1, 16, part.down[0].in_features)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in part.parameters())


def test_wrong_files_are_refused(unet: nn.Module, tmp_path: Path) -> None:
    flag = "--control_net_lllite_models"
    path = save_lllite(unet, tmp_path / "a.safetensors")
    weights = load_file(path)
    first = next(name for name in weights if name.endswith("up.0.bias"))
    for change, message in (
        ({first: torch.zeros(3)}, "fits no layer of this model"),
        ({"lora_unet_x.lora_down.weight": torch.zeros(2, 2)}, "holds no ControlNet-LLLite"),
        ({first: None}, "is missing; the file is damaged"),
    ):
        save_file({n: t for n, t in {**weights, **change}.items() if t is not None}, path)
        with pytest.raises(UserError, match=message):
            LLLiteNetwork.from_file(path, unet, flag=flag)
    with pytest.raises(UserError, match=f"{flag} none: no such file"):
        LLLiteNetwork.from_file("none", unet, flag=flag)
    with pytest.raises(UserError, match="is for the U-Nets of SD 1.x, 2.x and SDXL"):
        LLLiteNetwork(nn.Linear(2, 2))
