"""Adapter files are recognised, and act on models that are loaded one after the other as on both at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from library.errors import UserError
from library.inference.adapter_files import adapt, open_adapters, read_choice
from networks.third_party import text_argument
from tests.fixtures.adapted_flux import flux_outputs
from tests.fixtures.loaded_flux import family_of, make_adapter, models_of
from tests.fixtures.tiny_flux import MadeFlux, make_tiny_flux

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, MadeFlux]:
    return {kind: make_tiny_flux(tmp_path_factory.mktemp(kind), model=kind) for kind in ("dev", "chroma")}


@pytest.fixture(scope="module")
def adapters(made: dict[str, MadeFlux], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, dev = tmp_path_factory.mktemp("adapters"), made["dev"]
    return {
        "lora": make_adapter("dev", dev, folder / "lora.safetensors", train_t5xxl="True"),
        "split": make_adapter("dev", dev, folder / "split.safetensors", split_qkv="True", seed=1),
        "oft": make_adapter("dev", dev, folder / "oft.safetensors", module="networks.oft_flux", seed=2),
        "chroma": make_adapter("chroma", made["chroma"], folder / "chroma.safetensors", train_t5xxl="True"),
    }


def outlines(kind: str, made: MadeFlux) -> tuple[list[nn.Module], nn.Module]:
    family, checkpoint = family_of(kind, made)
    load = {"dtype": torch.float32, "device": "meta"}
    return family.load_text_encoders(checkpoint, **load), family.load_denoiser(checkpoint, **load)


def loaded(made: MadeFlux) -> tuple[list[nn.Module], Any]:
    models = models_of("dev", made)
    return list(models.text_encoders), models.denoiser


def test_choices(adapters: dict[str, Path], tmp_path: Path) -> None:
    path = adapters["lora"]
    assert read_choice(str(path), "--lora_weights") == (path, 1.0)
    assert read_choice(f"{path};0.5", "--lora_weights") == (path, 0.5)
    assert read_choice(f"{path};-1", "--lora_weights") == (path, -1.0)
    odd = tmp_path / "a;b.safetensors"
    odd.write_bytes(path.read_bytes())
    assert read_choice(str(odd), "--lora_weights") == (odd, 1.0)
    assert read_choice(f"{odd};2", "--lora_weights") == (odd, 2.0)
    for text, said in (
        (f"{path};half", '"half" is no strength'),
        (f"{path};nan", '"nan" is no strength'),
        (f"{path};", '"" is no strength'),
        (str(path.with_name("lor.safetensors")), 'no such file (did you mean "lora.safetensors"?)'),
    ):
        with pytest.raises(UserError, match="--lora_weights") as raised:
            read_choice(text, "--lora_weights")
        assert said in str(raised.value)


def test_files_are_recognised(made: dict[str, MadeFlux], adapters: dict[str, Path]) -> None:
    opened = open_adapters([(adapters[name], 1.0) for name in ("lora", "split", "oft")], *outlines("dev", made["dev"]))
    names = [(file.module.__name__, file.adapts_text, file.adapts_denoiser) for file in opened]
    assert names == [
        ("networks.lora_flux", True, True),
        ("networks.lora_flux", True, True),
        ("networks.oft_flux", False, True),
    ]


@pytest.mark.parametrize("merge", [False, True])
def test_halves_act_as_the_whole(made: dict[str, MadeFlux], adapters: dict[str, Path], merge: bool) -> None:
    files, strengths = [adapters["lora"], adapters["oft"]], [0.7, 0.4]
    before = flux_outputs(*loaded(made["dev"]))
    encoders, denoiser = loaded(made["dev"])
    for file, strength, name in zip(files, strengths, ("lora", "oft"), strict=True):
        module = __import__(f"networks.{name}_flux", fromlist=[name])
        network, weights = module.create_network_from_weights(
            strength, str(file), None, text_argument(encoders), denoiser, for_inference=True
        )
        network.apply_to(text_argument(encoders), denoiser)
        network.load_state_dict(weights, strict=False)
    expected = flux_outputs(encoders, denoiser)

    meta = outlines("dev", made["dev"])
    opened = open_adapters(list(zip(files, strengths, strict=True)), *meta)
    encoders, denoiser = loaded(made["dev"])
    on_text = adapt(opened, strengths, encoders, meta[1], text=True, merge=merge, device=CPU)
    half = flux_outputs(encoders, denoiser)
    on_denoiser = adapt(opened, strengths, meta[0], denoiser, text=False, merge=merge, device=CPU)
    whole = flux_outputs(encoders, denoiser)
    for name, output in expected.items():
        torch.testing.assert_close(whole[name], output, rtol=1e-4, atol=1e-4)
        assert (output - before[name]).abs().max() > 1e-3
        torch.testing.assert_close(half[name], before[name] if name == "prediction" else whole[name])
    if merge:
        assert on_text == on_denoiser == [None, None]
    else:
        assert on_text[1] is None and None not in on_denoiser
        for network in (*on_text, *on_denoiser):
            if network is not None:
                network.set_multiplier(0.0)
        off = flux_outputs(encoders, denoiser)
        for name, output in before.items():
            torch.testing.assert_close(off[name], output, rtol=1e-5, atol=1e-5)


def renamed(path: Path, source: Path, old: str, new: str) -> Path:
    save_file({name.replace(old, new): tensor for name, tensor in load_file(source).items()}, path)
    return path


def test_other_files_are_refused(made: dict[str, MadeFlux], adapters: dict[str, Path], tmp_path: Path) -> None:
    lora, oft = adapters["lora"], adapters["oft"]
    cases = {
        renamed(
            tmp_path / "sdxl.safetensors", lora, "lora_unet_double_blocks_0", "lora_unet_input_blocks_4_1"
        ): "Stable Diffusion XL",
        renamed(tmp_path / "loha.safetensors", lora, ".lora_down.weight", ".hada_w1_a"): "a LoHa of LyCORIS",
        renamed(tmp_path / "lokr.safetensors", lora, ".lora_down.weight", ".lokr_w1"): "a LoKr of LyCORIS",
        renamed(tmp_path / "oft.safetensors", oft, "oft_blocks.0", "oft_diag"): "an OFT of LyCORIS",
        renamed(tmp_path / "sd_oft.safetensors", oft, "double_blocks_0_img_attn", "input_blocks_4_1_attn1"): "no place",
        renamed(
            tmp_path / "d.safetensors", lora, "lora_unet_single_blocks_0_", "transformer.single_transformer_blocks."
        ): ("d.safetensors --to kohya --save_to NEW.safetensors gives it those that are read here"),
        made["dev"].path: "a whole transformer",
        made["dev"].ae: "holds no tensors of networks.lora_flux",
        adapters["chroma"]: "",
    }
    meta = outlines("dev", made["dev"])
    for path, said in cases.items():
        if said:
            with pytest.raises(UserError) as raised:
                open_adapters([(path, 1.0)], *meta)
            assert said in str(raised.value) and str(path) in str(raised.value)
            assert "\n" not in str(raised.value)
    # one of Chroma's fits FLUX.1, whose modules are more; not the other way round
    assert open_adapters([(adapters["chroma"], 1.0)], *meta)
    with pytest.raises(UserError, match="have no place in this network"):
        open_adapters([(lora, 1.0)], *outlines("chroma", made["chroma"]))
