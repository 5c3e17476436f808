"""A mistake of a user of flux_train_network.py is one line, before any weights are loaded."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from library.architectures.flux import Flux
from tests.entry.flux.test_training import T5
from tests.fixtures.runs import (
    Made,
    lora_arguments,
    train_here,
    write_dataset,
)
from tests.fixtures.tiny_flux import MadeFlux
from tests.fixtures.tiny_sd import make_tiny_sd
from tests.fixtures.tiny_sdxl import make_tiny_sdxl

pytestmark = pytest.mark.usefixtures("own_root_logger")

Train = Callable[..., dict[str, Tensor]]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"clip_l": None}, ["--clip_l: name the CLIP-L", "--model_type chroma"]),
        ({"t5xxl": None}, ["--t5xxl: name the T5-XXL"]),
        ({"ae": None}, ["--ae: name the autoencoder"]),
        ({"ae": "no/such.safetensors"}, ["--ae no/such.safetensors: no such file"]),
        ({"t5xxl": "no/such.safetensors"}, ["--t5xxl no/such.safetensors: no such file"]),
        (
            {"model_type": "chroma", "guidance_scale": 0, "apply_t5_attn_mask": True, "clip_l": None},
            ["FLUX.1 dev", "use --model_type flux"],
        ),
        (
            {"model_type": "chroma", "guidance_scale": 0, "clip_l": None},
            ["Chroma is made for masked captions; add --apply_t5_attn_mask"],
        ),
        (
            {"model_type": "chroma", "apply_t5_attn_mask": True, "clip_l": None},
            ["--guidance_scale 3.5: Chroma is made for 0"],
        ),
        ({"guidance_scale": -1}, ["--guidance_scale -1.0: must be at least 0"]),
        ({"t5xxl_max_token_length": 0}, ["--t5xxl_max_token_length 0: must be at least 1"]),
        (
            {"network_train_unet_only": True, **T5},
            ["train_t5xxl=True: not with --network_train_unet_only"],
        ),
        ({"network_module": "networks.lora"}, ["networks.lora:", "networks.lora_flux"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_mistakes_are_one_line(
    train: Train,
    tmp_path: Path,
    settings: dict[str, object],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("a cat\n")
    monkeypatch.setattr(Flux, "load_denoiser", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(SystemExit) as ended:
        train("out", **settings)
    said = capsys.readouterr().err
    (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 2 and all(word in error for word in words), error


def test_what_does_not_fit_the_model_is_found_before_anything_is_cached(
    train: Train, chroma: MadeFlux, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train("chroma", model=chroma, max_train_steps=1)
    oft = {"network_module": "networks.oft_flux", "network_dim": 5}
    mistakes: list[tuple[dict[str, object], str]] = [
        ({"network_args": ["train_double_block_indices=7"]}, "the model has 2 double blocks"),
        ({"network_args": ["network_reg_lrs=middle=1e-4"]}, '"middle" is in none of the'),
        ({**oft, "network_train_unet_only": True}, "--network_dim 5: must divide the 32 output features"),
        ({"network_weights": tmp_path / "chroma" / "tiny.safetensors", "model": chroma, "network_dim": 4}, "is [2, "),
        (
            {"network_weights": tmp_path / "chroma" / "tiny.safetensors", "dim_from_weights": True},
            "made for chroma, and the model is flux1",
        ),
    ]
    for work in ("encode_images", "encode_text"):
        monkeypatch.setattr(Flux, work, lambda *_, **__: pytest.fail("something was encoded"))
    for settings, words in mistakes:
        capsys.readouterr()
        with pytest.raises(SystemExit):
            train("cached", cache_latents=True, **settings)
        (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert words in error, error


def test_files_that_are_swapped_are_named(
    train: Train, dev: MadeFlux, chroma: MadeFlux, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """One line each: the option, the file, and what that is."""
    assert dev.clip_l is not None
    pointer = tmp_path / "pointer.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n")
    kinds = {
        "pretrained_model_name_or_path": (dev.path, "a FLUX.1 model"),
        "clip_l": (dev.clip_l, "a bare CLIP text encoder"),
        "t5xxl": (dev.t5xxl, "a T5 text encoder"),
        "ae": (dev.ae, "a VAE"),
        "chroma": (chroma.path, "Chroma"),
        "pointer": (pointer, "a git-lfs pointer"),
        "folder": (tmp_path, "no weight file"),
    }
    flags = ("pretrained_model_name_or_path", "clip_l", "t5xxl", "ae")
    for flag, (own, (path, what)) in itertools.product(flags, kinds.items()):
        if flag == own:
            continue
        with pytest.raises(SystemExit):
            train("out", **{flag: path})
        (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert error.startswith(f"error: --{flag} {path}") and what in error, error


@pytest.mark.parametrize(("script", "make"), [("train_network", make_tiny_sd), ("sdxl_train_network", make_tiny_sdxl)])
def test_scripts_of_other_families_name_a_file_of_flux(
    script: str,
    make: Callable[..., Made],
    tmp_path: Path,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    dev: MadeFlux,
) -> None:
    data, own = write_dataset(tmp_path / "d.toml", folder), make(tmp_path / "own.safetensors")
    for path, what in ((dev.path, "a FLUX.1 model; use flux_train_network.py"), (dev.t5xxl, "a T5 text encoder")):
        with pytest.raises(SystemExit):
            flags = lora_arguments(own, data, tmp_path / "out", pretrained_model_name_or_path=path)
            train_here(*flags, script=script)
        assert f"error: --pretrained_model_name_or_path {path} is {what}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        given = {"pretrained_model_name_or_path": own.path, "network_module": "networks.lora_flux"}
        train_here(*lora_arguments(dev, data, tmp_path / "out", **given), script="flux_train_network")
    said = capsys.readouterr().err
    assert f"error: --pretrained_model_name_or_path {own.path} is a Stable" in said and f"use {script}.py" in said


def test_what_has_no_effect_is_said(train: Train, dev: MadeFlux, capsys: pytest.CaptureFixture[str]) -> None:
    train("out", max_train_steps=1, clip_skip=2, weighted_captions=True, max_token_length=150, vae=dev.ae, v2=True)
    said = capsys.readouterr().err
    for name in ("clip_skip", "weighted_captions", "max_token_length", "vae", "v2"):
        assert f"--{name} has no effect with FLUX.1" in said


def test_what_chroma_has_no_use_for_is_said(
    train: Train, dev: MadeFlux, chroma: MadeFlux, capsys: pytest.CaptureFixture[str]
) -> None:
    useless = {"clip_l": dev.clip_l, "text_encoder_lr": 1e-3, "max_train_steps": 1, "model": chroma}
    train("out", **useless)
    said = capsys.readouterr().err
    assert "--clip_l has no effect with --model_type chroma" in said
    assert "--text_encoder_lr has no effect with Chroma" in said
    train("t5", **useless, **T5)
    assert "--text_encoder_lr" not in capsys.readouterr().err
