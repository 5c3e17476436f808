"""The tools for adapter files, on files of Lumina-Image 2.0 as training writes them."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.errors import UserError
from tests.architectures.lumina.opened import diffusers_transformer, in_diffusers_names, opened
from tests.fixtures.tiny_lumina import MadeLumina, make_tiny_lumina
from tools import lora as tool

pytestmark = pytest.mark.usefixtures("own_root_logger")


def run(*words: object) -> None:
    args = tool.setup_parser().parse_args([str(word) for word in words])
    args.run(args)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeLumina:
    return make_tiny_lumina(tmp_path_factory.mktemp("lumina"))


@pytest.fixture(scope="module")
def lora(made: MadeLumina, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter for each layer of the transformer, the embedders too."""
    family, checkpoint = opened(made)
    denoiser = family.load_denoiser(checkpoint, dtype=torch.float32, device="cpu")
    module = importlib.import_module("networks.lora_lumina")
    network = module.create_network(1.0, 2, 1.0, None, [], denoiser, embedder_dims="[2,2,2]")
    network.apply_to([], denoiser, False, True)
    torch.manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    network.save_weights(path, None, {"ss_base_model_version": "lumina2"})
    return path


def outputs(made: MadeLumina, model: Path, lora: Path | None = None) -> Tensor:
    """The transformer's prediction, with an adapter file."""
    family, checkpoint = opened(MadeLumina(model, made.gemma2, made.ae, made.tokenizer_cache_dir))
    denoiser = family.load_denoiser(checkpoint, dtype=torch.float32, device="cpu")
    if lora is not None:
        module = importlib.import_module("networks.lora_lumina")
        network, _ = module.create_network_from_weights(1.0, str(lora), None, [], denoiser)
        network.apply_to([], denoiser, False, True)
        network.load_weights(str(lora))
    torch.manual_seed(1)
    inputs = torch.randn(2, 16, 8, 8), torch.tensor([0.2, 0.7]), torch.randn(2, 8, 32), torch.ones(2, 8)
    with torch.no_grad():
        return denoiser(*inputs)


def test_merged_into_the_model(made: MadeLumina, lora: Path, tmp_path: Path) -> None:
    run("merge", lora, "--into", made.path, "--save_to", tmp_path / "merged.safetensors")
    merged, beside = outputs(made, tmp_path / "merged.safetensors"), outputs(made, made.path, lora)
    torch.testing.assert_close(merged, beside, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(merged, outputs(made, made.path), atol=1e-2)


def test_extracted_from_two_models(made: MadeLumina, lora: Path, tmp_path: Path) -> None:
    run("merge", lora, "--into", made.path, "--save_to", tmp_path / "tuned.safetensors")
    run("extract", made.path, tmp_path / "tuned.safetensors", "--rank", 2, "--save_to", tmp_path / "found.safetensors")
    assert "lora_unet_layers_0_attention_qkv.lora_down.weight" in load_file(tmp_path / "found.safetensors")
    state, found = load_file(tmp_path / "tuned.safetensors"), load_file(made.path)
    outer = {name for name in state if name.startswith(("x_embedder", "t_embedder", "cap_embedder"))}
    save_file({**state, **{name: found[name] for name in outer}}, tmp_path / "inner.safetensors")
    expected = outputs(made, tmp_path / "inner.safetensors")  # usual adapters leave the embedders out
    torch.testing.assert_close(outputs(made, made.path, tmp_path / "found.safetensors"), expected, rtol=1e-3, atol=1e-3)


def test_resized(made: MadeLumina, lora: Path, tmp_path: Path) -> None:
    run("resize", lora, "--rank", 1, "--save_to", tmp_path / "small.safetensors")
    down = load_file(tmp_path / "small.safetensors")["lora_unet_layers_0_attention_qkv.lora_down.weight"]
    assert down.shape == (1, 72)
    outputs(made, made.path, tmp_path / "small.safetensors")


def test_diffusers_reads_a_converted_file(made: MadeLumina, lora: Path, tmp_path: Path) -> None:
    """Its own loader reads it; queries, keys and values are modules of their own there, of 72 and 24 features."""
    from diffusers import Lumina2Pipeline

    run("convert", lora, "--to", "diffusers", "--save_to", tmp_path / "diffusers.safetensors")
    family, checkpoint = opened(made)
    transformer = diffusers_transformer(family.load_denoiser(checkpoint, dtype=torch.float32, device="cpu"))
    pipeline = Lumina2Pipeline(transformer, None, None, None, None)
    pipeline.load_lora_weights(tmp_path / "diffusers.safetensors")
    torch.manual_seed(1)
    latents, times, context = torch.randn(2, 16, 8, 8), torch.tensor([0.2, 0.7]), torch.randn(2, 8, 32)
    mask = torch.ones(2, 8, dtype=torch.bool)
    with torch.no_grad():
        found = pipeline.transformer(latents, times, context, mask, return_dict=False)[0]
    torch.testing.assert_close(found, outputs(made, made.path, lora), rtol=1e-4, atol=1e-4)


def test_a_transformer_in_diffusers_layout_is_merged_into(made: MadeLumina, lora: Path, tmp_path: Path) -> None:
    family, checkpoint = opened(made)
    denoiser = family.load_denoiser(checkpoint, dtype=torch.float32, device="cpu")
    (tmp_path / "transformer").mkdir()
    save_file(in_diffusers_names(denoiser), tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    run("merge", lora, "--into", tmp_path / "transformer", "--save_to", tmp_path / "merged.safetensors")
    merged = outputs(made, tmp_path / "merged.safetensors")
    torch.testing.assert_close(merged, outputs(made, made.path, lora), rtol=1e-4, atol=1e-5)


def test_an_adapter_of_another_model_is_refused(made: MadeLumina, lora: Path, tmp_path: Path) -> None:
    other = make_tiny_lumina(tmp_path, seed=1)
    wide = {name: torch.cat([t, t]) if "w1.lora_up" in name else t for name, t in load_file(lora).items()}
    save_file(wide, tmp_path / "wide.safetensors")
    with pytest.raises(UserError, match="feed_forward_w1"):
        outputs(other, other.path, tmp_path / "wide.safetensors")
