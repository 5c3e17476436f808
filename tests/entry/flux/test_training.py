"""Whole runs of FLUX.1 and Chroma: only what is their own; the tests of ``tiny`` cover what all families share."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from library.architectures.flux import FLUX, Flux
from library.architectures.flux.options import FluxModelOptions
from library.config.config_file import read_args
from library.memory import stored_layers
from tests.fixtures.runs import (
    ROOT,
    logged,
    make_images,
    metadata_of,
    train_here,
    write_dataset,
)
from tests.fixtures.tiny_flux import MadeFlux, make_tiny_controlnet, make_tiny_flux
from tests.fixtures.tiny_flux_files import write_bundle, write_diffusers_folder, write_pipeline

pytestmark = pytest.mark.usefixtures("own_root_logger")

PAGE = ROOT / "docs" / "flux_train_network.md"
Train = Callable[..., dict[str, Tensor]]


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], atol: float = 0.0) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=atol, msg=name)


def moved(weights: dict[str, Tensor]) -> set[str]:
    """The parts whose adapters were trained, by their prefixes in the file."""
    return {name.split("_")[1] for name, tensor in weights.items() if "lora_up" in name and tensor.any()}


def parts(weights: dict[str, Tensor]) -> set[str]:
    return {name.split("_")[1] for name in weights}


# ---- what is trained ----

T5_ARGS = ("train_t5xxl=True",)
T5 = {"network_args": list(T5_ARGS)}
ROWS = {
    "transformer": ({"network_train_unet_only": True}, {"unet"}),
    "transformer and CLIP-L": ({}, {"unet", "te1"}),
    "transformer, CLIP-L and T5": (T5, {"unet", "te1", "te3"}),
    "CLIP-L": ({"network_train_text_encoder_only": True}, {"te1"}),
    "CLIP-L and T5": ({"network_train_text_encoder_only": True, **T5}, {"te1", "te3"}),
}


@pytest.mark.parametrize(
    "row", [row if row == "transformer and CLIP-L" else pytest.param(row, marks=pytest.mark.slow) for row in ROWS]
)
def test_what_is_trained_and_which_outputs_may_be_cached(
    row: str, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, expected = ROWS[row]
    plain = train("plain", **settings)
    assert moved(plain) == parts(plain) == expected
    if "te3" not in expected:
        # T5's outputs are then those of the cache, and CLIP-L's too, if it is not trained
        assert_same(train("cached", cache_text_encoder_outputs=True, **settings), plain, 1e-6)
        return
    with pytest.raises(SystemExit):
        train("cached", cache_text_encoder_outputs=True, **settings)
    assert "--cache_text_encoder_outputs: not while the text encoder is trained" in capsys.readouterr().err


@pytest.mark.slow
def test_a_network_that_adapts_t5_is_refused_before_its_outputs_are_cached(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options show neither a file's contents nor what a third-party module adapts; a dry run refuses both, too."""
    train("t5", max_train_steps=1, **T5)
    train("clip", max_train_steps=1)
    of_files = {
        name: {"network_weights": tmp_path / name / "tiny.safetensors", "dim_from_weights": True}
        for name in ("t5", "clip")
    }
    (tmp_path / "their_network.py").write_text(
        "from networks import lora_flux\n\n"
        "def create_network(*args, **options):\n"
        "    return lora_flux.create_network(*args, **options, train_t5xxl='True')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    capsys.readouterr()
    encode = Flux.encode_text
    monkeypatch.setattr(Flux, "encode_text", lambda *_, **__: pytest.fail("captions were encoded"))
    cached = {"cache_latents": True, "cache_text_encoder_outputs": True}
    for network in (of_files["t5"], {"network_module": "their_network"}):
        for more in ({"dry_run": True}, {}):
            with pytest.raises(SystemExit):
                train("cached", **cached, **network, **more)
            said = capsys.readouterr().err
            assert "it adapts a text encoder whose outputs are cached" in said and "latents:" not in said
    monkeypatch.setattr(Flux, "encode_text", encode)
    assert moved(train("cached", **cached, **of_files["clip"], network_args=["verbose=True"])) == {"unet", "te1"}
    # what a module says of its network is said once
    assert capsys.readouterr().err.count("double_blocks_0_img_attn_proj: rank 2, alpha 1") == 1


def test_cached_outputs_let_their_encoders_go(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """T5 is not loaded any more, also where sample images are drawn; CLIP-L is, where it is trained."""
    loads: list[tuple[int, str]] = []
    load = Flux.load_text_encoder

    def spy(self: Any, checkpoint: Any, index: int, **settings: Any) -> Any:
        encoder = load(self, checkpoint, index, **settings)
        loads.append((index, next(encoder.parameters()).device.type))
        return encoder

    monkeypatch.setattr(Flux, "load_text_encoder", spy)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 1 --d 5 --l 2 --n dog\n")
    draws = {"sample_prompts": prompts, "sample_every_n_steps": 3}
    cached = {"cache_text_encoder_outputs_to_disk": True}
    plain = train("plain", **draws)
    loads.clear()
    assert_same(train("cached", **draws, **cached), plain, 1e-6)
    # the network is made without weights first, to look at before anything is encoded
    stages = [tuple(device for _, device in loads[first : first + 2]) for first in range(0, len(loads), 2)]
    assert stages == [("meta", "meta"), ("cpu", "cpu"), ("cpu", "meta")]
    train("alone", network_train_unet_only=True, **cached)
    assert [device for _, device in loads[6:]] == ["meta"] * 4
    # CLIP-L's part of the prompt is encoded with its adapters: the images are those of a run without a cache
    one, other = (next((tmp_path / name / "sample").glob("*.png")) for name in ("plain", "cached"))
    assert one.read_bytes()[:16] == other.read_bytes()[:16]
    difference = np.abs(np.asarray(Image.open(one), dtype=int) - np.asarray(Image.open(other), dtype=int))
    assert difference.max() <= 1


@pytest.mark.slow
def test_runs_beside_outputs_that_are_cached_in_part_validate_draw_and_resume_exactly(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """T5's outputs, several for each caption, beside the tokens of CLIP-L, which is trained."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 1 --d 5 --l 2 --n dog\n")
    settings = {
        "dataset": "validation_split = 0.4\nshuffle_caption = true\ncaption_dropout_rate = 0.1",
        "subset": "num_repeats = 3",
        "cache_text_encoder_outputs_to_disk": True,
        "text_encoder_cache_variants": 2,
        "cache_latents": True,
        "validate_every_n_steps": 1,
        "sample_prompts": prompts,
        "sample_every_n_steps": 2,
        "max_train_steps": 4,
        "save_every_n_steps": 2,
        "save_state": True,
        "mixed_precision": "bf16",
        "gradient_checkpointing": True,
    }
    whole = train("whole", **settings)
    losses = re.findall(r"validation after step (\d): loss ([\d.]+)", capsys.readouterr().err)
    assert [step for step, _ in losses] == list("1234") and moved(whole) == {"unet", "te1"}
    assert_same(train("rest", **settings, resume=tmp_path / "whole" / "tiny-step00000002-state"), whole)
    said = capsys.readouterr().err
    assert "text encoder outputs: 0 files made" in said
    assert re.findall(r"validation after step (\d): loss ([\d.]+)", said) == losses[2:]


@pytest.mark.slow
def test_rates_of_both_encoders(train: Train, tmp_path: Path) -> None:
    train("two", text_encoder_lr=[1e-3, 2e-3], **T5)
    assert metadata_of(tmp_path / "two" / "tiny.safetensors")["ss_text_encoder_lr"] == "[0.001, 0.002]"
    rates = [logged(tmp_path / "two", f"lr/textencoder {number}")[-1] for number in (1, 2)]
    assert rates == pytest.approx([1e-3, 2e-3])
    assert moved(train("first", text_encoder_lr2=0, **T5)) == {"unet", "te1"}


@pytest.mark.slow
def test_chromas_only_encoder_is_t5(train: Train, chroma: MadeFlux) -> None:
    assert moved(train("plain", model=chroma)) == {"unet"}
    cached = train("cached", model=chroma, cache_text_encoder_outputs=True)
    assert_same(cached, train("unet", model=chroma, network_train_unet_only=True), 1e-6)
    assert moved(train("t5", model=chroma, **T5)) == {"unet", "te3"}


# ---- what the transformer is given ----


@pytest.fixture
def model_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Record the inputs of each call of FLUX.1's transformer."""
    from library.architectures.flux.model import Flux as Model

    calls: list[dict[str, Any]] = []
    forward = Model.forward

    def spy(self: Any, latents: Any, timesteps: Any, context: Any, pooled: Any, guidance: Any, **more: Any) -> Any:
        seen = {"times": timesteps.tolist(), "guidance": guidance.tolist(), "mask": more["text_mask"]}
        calls.append({**seen, "tokens": context.shape[1], "image": more.get("image")})
        return forward(self, latents, timesteps, context, pooled, guidance, **more)

    monkeypatch.setattr(Model, "forward", spy)
    return calls


def test_guidance_timesteps_and_mask(train: Train, tmp_path: Path, model_calls: list[dict[str, Any]]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(
        "a cat --w 64 --h 64 --s 2 --d 5\na cat --w 64 --h 64 --s 2 --d 5 --g 1.5 --l 3 --n a dog --fs 4\n"
    )
    draws = {"sample_prompts": prompts, "sample_every_n_steps": 3, "network_train_unet_only": True}
    train("plain", guidance_scale=1.0, min_timestep=100, max_timestep=200, timestep_sampling="flux_shift", **draws)
    steps, (first, second, guided, last) = model_calls[:-4], model_calls[-4:]
    assert len(steps) == 3
    for call in steps:
        assert set(call["guidance"]) == {1.0} and call["mask"] is None and call["tokens"] == 24
        assert all(0.1 <= time < 0.2 for time in call["times"])
    assert first["guidance"] == [3.5] and first["times"] == [1.0] and 0.5 < second["times"][0] < 0.7
    # both directions in one pass; 4 / (1 + 3) of half the way
    assert guided["guidance"] == [1.5, 1.5] and last["times"] == pytest.approx([0.8, 0.8])
    entries = metadata_of(tmp_path / "plain" / "tiny.safetensors")
    assert (entries["ss_guidance_scale"], entries["ss_timestep_sampling"]) == ("1.0", "flux_shift")
    assert entries["ss_apply_t5_attn_mask"] == "False" and entries["modelspec.timestep_range"] == "100,200"

    model_calls.clear()
    masked = train("masked", apply_t5_attn_mask=True, t5xxl_max_token_length=32, **draws)
    # the tags of a caption and its end, not what it is filled up with
    assert all(call["tokens"] == 32 and 10 < int(call["mask"][0].sum()) < 32 for call in model_calls[:3])
    assert metadata_of(tmp_path / "masked" / "tiny.safetensors")["ss_apply_t5_attn_mask"] == "True"
    assert moved(masked) == {"unet"}


@pytest.mark.slow
def test_schnell(
    train: Train,
    tmp_path: Path,
    schnell: MadeFlux,
    model_calls: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(
        "a cat --w 64 --h 64 --s 4 --d 5 --g 3 --n dog\n# a dog\na dog --g 4 --w 64 --h 64 --s 1 --g 0\n"
    )
    weights = train(
        "out",
        model=schnell,
        guidance_scale=1.0,
        t5xxl_max_token_length=None,
        sample_prompts=prompts,
        sample_every_n_steps=3,
        network_args=["in_dims=[2,2,2,0,2]"],
    )
    said = capsys.readouterr().err
    assert "--guidance_scale has no effect with FLUX.1 schnell" in said
    assert "--g of a sample prompt has no effect with FLUX.1 schnell" in said
    assert "--n of a sample prompt has no effect at a guidance scale of 1; add --l 4" in said
    with Image.open(next((tmp_path / "out" / "sample").glob("*_00_*.png"))) as image:
        assert "guidance_scale" not in image.text
    assert "lora_unet_img_in.lora_up.weight" in weights and not any("guidance_in" in name for name in weights)
    assert {call["tokens"] for call in model_calls} == {256}
    assert [call["times"] for call in model_calls[3:]] == [[1.0], [0.75], [0.5], [0.25], [1.0]]
    entries = metadata_of(tmp_path / "out" / "tiny.safetensors")
    assert entries["modelspec.architecture"] == "flux-1-schnell/lora" and entries["ss_base_model_version"] == "flux1"


def test_lengths_of_captions() -> None:
    assert FLUX.t5_length == 512 and FLUX.changed(FluxModelOptions, t5xxl_max_token_length=77).t5_length == 77


@pytest.mark.slow
def test_losses_data_and_noise_together(train: Train, tmp_path: Path, folder: Path) -> None:
    """Two resolutions of the same images, masks, validation, perturbed inputs, Huber loss, weighted timesteps."""
    masks = make_images(tmp_path / "masks", ((64, 64), (100, 44), (64, 66)))
    dataset = (
        "validation_split = 0.4\n[[datasets.subsets]]\n"
        f"image_dir = '{folder}'\ncaption_extension = '.txt'\nconditioning_data_dir = '{masks}'\n"
        "[[datasets]]\nresolution = 96\nbatch_size = 1\nenable_bucket = true\nmin_bucket_reso = 32\n"
        "max_bucket_reso = 128\nbucket_reso_steps = 32"
    )
    weights = train(
        "out",
        dataset=dataset,
        subset=f"conditioning_data_dir = '{masks}'",
        masked_loss=True,
        ip_noise_gamma=0.1,
        loss_type="huber",
        weighting_scheme="logit_normal",
        logit_mean=0.5,
        cache_latents=True,
        cache_latents_to_disk=True,
        validate_every_n_steps=3,
        max_train_steps=6,
    )
    assert moved(weights) == {"unet", "te1"}
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert len(logged(tmp_path / "out", "loss/validation/step_average")) >= 1
    with np.load(folder / "0_0064x0064_flux.npz") as file:
        assert {"latents_8x8", "latents_12x12"} <= set(file.files)


# ---- caches ----


def test_caches_change_nothing_and_have_the_published_layout(
    train: Train, folder: Path, capsys: pytest.CaptureFixture[str], chroma: MadeFlux
) -> None:
    unet = {"network_train_unet_only": True}
    plain = train("plain", cache_latents=True, **unet)
    disk = {**unet, "cache_latents_to_disk": True, "cache_text_encoder_outputs_to_disk": True}
    assert_same(train("cached", **disk), plain, 1e-6)
    with np.load(folder / "1_flux_te.npz") as file:
        found = {name: (file[name].shape, str(file[name].dtype)) for name in file.files if name != "stamp"}
        assert not file["apply_t5_attn_mask"] and not file["txt_ids"].any()
        assert set(file["t5_attn_mask"].tolist()) == {0, 1}
    assert found == {
        "l_pooled": ((32,), "float32"),
        "t5_out": ((24, 32), "float32"),
        "txt_ids": ((24, 3), "float32"),
        "t5_attn_mask": ((24,), "int64"),
        "apply_t5_attn_mask": ((), "bool"),
    }
    with np.load(folder / "1_0100x0044_flux.npz") as file:
        (latents,) = (name for name in file.files if name.startswith("latents_"))
        assert latents == "latents_4x12" and file[latents].shape == (16, 4, 12)
        assert file["original_size_4x12"].tolist() == [100, 44]

    for changed in ({"apply_t5_attn_mask": True}, {"apply_t5_attn_mask": True, "t5xxl_max_token_length": 30}):
        capsys.readouterr()
        train("changed", **disk, **changed)
        said = capsys.readouterr().err
        assert "text encoder outputs: 3 files made, 0 from the cache" in said
        assert f"made with another --{list(changed)[-1]}" in said
    with np.load(folder / "1_flux_te.npz") as file:
        assert file["apply_t5_attn_mask"] and file["t5_out"].shape == (30, 32)

    # Chroma's files have the place of CLIP-L's output too, which other programs look for
    train("chroma", model=chroma, **disk)
    with np.load(folder / "1_flux_te.npz") as file:
        assert file["l_pooled"].shape == (768,) and not file["l_pooled"].any() and file["apply_t5_attn_mask"]


def test_files_of_other_programs_are_read(
    train: Train, folder: Path, model_calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Written here by hand as published: no word on what they are of, half precision, another length of captions."""
    generator, tokens = np.random.default_rng(0), 16
    for path, (h, w) in zip(sorted(folder.glob("*.png")), ((8, 8), (4, 12), (8, 8)), strict=True):
        size = Image.open(path).size
        latents = {
            f"latents_{h}x{w}": generator.standard_normal((16, h, w)).astype(np.float32),
            f"original_size_{h}x{w}": np.array(size),
            f"crop_ltrb_{h}x{w}": np.array([0, 0, *size]),
        }
        np.savez(folder / f"{path.stem}_{size[0]:04d}x{size[1]:04d}_flux.npz", **latents)
        text = {
            "l_pooled": generator.standard_normal(32).astype(np.float16),
            "t5_out": generator.standard_normal((tokens, 32)).astype(np.float16),
            "txt_ids": np.zeros((tokens, 3), np.float32),
            "t5_attn_mask": (np.arange(tokens) < 9).astype(np.int64),
            "apply_t5_attn_mask": np.array(False),
        }
        np.savez(folder / f"{path.stem}_flux_te.npz", **text)
    before = {path: path.read_bytes() for path in folder.glob("*.npz")}
    settings = {"network_train_unet_only": True, "cache_latents_to_disk": True}
    settings["cache_text_encoder_outputs_to_disk"] = True
    train("trusted", skip_cache_check=True, **settings)
    said = capsys.readouterr().err
    assert "latents: 0 encoded, 3 from the cache" in said
    assert "text encoder outputs: 0 files made, 3 from the cache" in said
    assert {path: path.read_bytes() for path in folder.glob("*.npz")} == before
    assert {call["tokens"] for call in model_calls} == {tokens}
    # that they are of these captions nobody knows: without --skip_cache_check encoded captions are made again
    train("checked", **settings)
    said = capsys.readouterr().err
    assert "latents: 0 encoded, 3 from the cache" in said
    assert "text encoder outputs: 3 files made" in said and "--skip_cache_check would trust it" in said


# ---- files ----


@pytest.mark.slow
def test_a_diffusers_folder_trains_as_the_single_file(train: Train, tmp_path: Path, dev: MadeFlux) -> None:
    folder = write_diffusers_folder(dev.path, tmp_path / "pipeline")
    plain = train("file")
    assert_same(train("folder", pretrained_model_name_or_path=folder), plain, 1e-5)
    shard = folder / "transformer" / "diffusion_pytorch_model-00001-of-00002.safetensors"
    assert_same(train("shard", pretrained_model_name_or_path=shard, disable_mmap_load_safetensors=True), plain, 1e-5)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    with pytest.raises(SystemExit):
        train("other", pretrained_model_name_or_path=folder)


@pytest.mark.parametrize("kind", ["dev", pytest.param("chroma", marks=pytest.mark.slow)])
def test_parts_that_are_not_named_are_the_models_own(
    kind: str, train: Train, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    made: MadeFlux = request.getfixturevalue(kind)
    plain = train("files", model=made, **T5)
    unnamed = {"clip_l": None, "t5xxl": None, "ae": None, "model": made, **T5}
    folder, bundle = write_pipeline(made, tmp_path / "pipeline"), write_bundle(made, tmp_path / "all.safetensors")
    own_tokenizers = {"tokenizer_cache_dir": tmp_path / "empty"}
    of_folder = train("folder", pretrained_model_name_or_path=folder, **unnamed, **own_tokenizers)
    assert_same(of_folder, plain, 1e-5)
    assert_same(train("bundle", pretrained_model_name_or_path=bundle, **unnamed), plain, 1e-5)
    # named ones go before, and may be in the same places
    capsys.readouterr()
    assert_same(train("named", pretrained_model_name_or_path=folder, model=made, **T5), plain, 1e-5)
    named = {**unnamed, "t5xxl": folder, "ae": bundle, "clip_l": made.clip_l and folder / "text_encoder"}
    assert_same(train("places", **named), plain, 1e-5)
    shutil.rmtree(folder / "vae")
    with pytest.raises(SystemExit):
        train("incomplete", pretrained_model_name_or_path=folder, **unnamed)
    assert "error: --ae: name the autoencoder" in capsys.readouterr().err


@pytest.mark.slow
def test_files_in_fp8(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_tiny_flux(tmp_path / "fp8", dtype=torch.float8_e4m3fn)
    settings = {"mixed_precision": "bf16", "fp8_base": True, "gradient_checkpointing": True, "model": made}
    kept: list[str] = []
    store = stored_layers.store_weights
    monkeypatch.setattr(
        stored_layers,
        "store_weights",
        lambda model, *args, **more: kept.append(type(model).__name__) or store(model, *args, **more),
    )
    # the transformer alone, then the encoders, too
    train("alone", fp8_base_unet=True, max_train_steps=1, **settings)
    assert kept == ["Flux"]
    kept.clear()
    weights = train("out", **settings)
    assert sorted(kept) == ["CLIPTextModel", "Flux", "T5EncoderModel"]
    assert moved(weights) == {"unet", "te1"} and all(tensor.isfinite().all() for tensor in weights.values())
    assert moved(train("t5", full_bf16=True, **settings, **T5)) == {"unet", "te1", "te3"}


# ---- network modules ----


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"network_args": ["split_qkv=True", "ggpo_sigma=0.03", "ggpo_beta=0.01", "rank_dropout=0.1", *T5_ARGS]},
        {"network_module": "networks.oft_flux", "network_args": ["enable_all_linear=True"], "network_alpha": 1e-3},
    ],
    ids=["lora", "oft"],
)
def test_network_modules_resume_exactly(train: Train, tmp_path: Path, settings: dict[str, object]) -> None:
    saves = {"max_train_steps": 4, "save_every_n_steps": 2, "save_state": True, "mixed_precision": "bf16"}
    whole = train("whole", **settings, **saves)
    rest = train("rest", **settings, **saves, resume=tmp_path / "whole" / "tiny-step00000002-state")
    assert_same(rest, whole)
    assert all(tensor.isfinite().all() for tensor in whole.values())


# ---- ControlNet ----


@pytest.mark.slow
def test_beside_a_controlnet(
    train: Train,
    tmp_path: Path,
    model_calls: list[dict[str, Any]],
    dev: MadeFlux,
    chroma: MadeFlux,
    capsys: pytest.CaptureFixture[str],
) -> None:
    images = make_images(tmp_path / "control", ((64, 64), (100, 44), (64, 66)))
    net = make_tiny_controlnet(tmp_path / "net")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 1 --d 5\n")
    subset = f"conditioning_data_dir = '{images}'"
    settings = {"controlnet_model_name_or_path": net, "subset": subset, "cache_latents": True, "save_state": True}
    settings |= {"sample_prompts": prompts, "sample_every_n_steps": 3, "gradient_checkpointing": True}
    beside = train("beside", **settings)
    steps, drawn = model_calls[:3], model_calls[3:]
    assert all(call["image"].any() for call in steps) and len({call["image"].shape[1:] for call in steps}) >= 2
    assert [call["image"] for call in drawn] == [None]
    # the LoRA is one of the transformer and CLIP-L as ever, and another than without the ControlNet
    plain = train("plain")
    assert beside.keys() == plain.keys() and moved(beside) == {"unet", "te1"}
    name = "lora_unet_double_blocks_1_img_attn_qkv.lora_down.weight"
    assert (beside[name] - plain[name]).abs().max() > 1e-6
    # it does read the images
    blank = tmp_path / "blank"
    shutil.copytree(images, blank)
    for path in blank.glob("*.png"):
        Image.new("RGB", Image.open(path).size).save(path)
    other = train("other", **{**settings, "subset": f"conditioning_data_dir = '{blank}'"})
    assert (beside[name] - other[name]).abs().max() > 1e-6
    file = net / "diffusion_pytorch_model.safetensors"
    assert_same(train("file", **{**settings, "controlnet_model_name_or_path": file}), beside, 1e-5)
    in_fp8 = {"fp8_base": True, "mixed_precision": "bf16"}
    assert moved(train("fp8", **{**settings, **in_fp8})) == {"unet", "te1"}

    for wrong, words in (
        ({"subset": ""}, "conditioning_data_dir: is missing"),
        ({"masked_loss": True}, "--masked_loss: not with --controlnet_model_name_or_path"),
        ({"model": chroma}, "not for Chroma"),
        ({"controlnet_model_name_or_path": dev.path}, "not a ControlNet of FLUX.1"),
        ({"controlnet_model_name_or_path": make_tiny_controlnet(tmp_path / "u", num_mode=2)}, "a union ControlNet"),
        (
            {"controlnet_model_name_or_path": make_tiny_controlnet(tmp_path / "w", joint_attention_dim=16)},
            "of other sizes than the transformer",
        ),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            train("wrong", **{**settings, **wrong})
        assert words in capsys.readouterr().err


COMMANDS = [
    shlex.split(line)
    for block in re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]


@pytest.mark.slow
def test_commands_of_the_page(tmp_path: Path, folder: Path, dev: MadeFlux, chroma: MadeFlux) -> None:
    dataset = write_dataset(tmp_path / "data.toml", folder)
    assert len(COMMANDS) == 4
    for words in COMMANDS:
        script, *words = words[next(place for place, word in enumerate(words) if word.endswith(".py")) :]
        model = chroma if "chroma" in words else dev
        values = {
            "flux1-dev.safetensors": model.path,
            "Chroma.safetensors": model.path,
            "clip_l.safetensors": model.clip_l,
            "t5xxl_fp16.safetensors": model.t5xxl,
            "ae.safetensors": model.ae,
            "dataset.toml": dataset,
            "output": tmp_path / "out",
            "10": 1,
        }
        given = [str(values.get(word, word)) for word in words]
        given += ["--tokenizer_cache_dir", str(model.tokenizer_cache_dir), "--max_data_loader_n_workers", "0"]
        if script == "flux_train_network.py":
            train_here(*given, "--strict", script="flux_train_network")
            continue
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        tool = {"cache_latents": "CacheLatents", "cache_text_encoder_outputs": "CacheTextEncoderOutputs"}
        getattr(module, tool[Path(script).stem])().run(read_args(module.setup_parser(), given))
    assert {path.stem for path in (tmp_path / "out").glob("*.safetensors")} == {"my_lora", "my_chroma_lora"}
    assert len(list(folder.glob("*_flux.npz"))) == len(list(folder.glob("?_flux_te.npz"))) == 3
