"""Whole models in every form that they are saved in: read again by our scripts and by diffusers, with equal outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from library.architectures.sd import SD
from library.architectures.sdxl import SDXL
from tests.fixtures.runs import train_here
from tests.fixtures.tiny_sd import make_tiny_sd
from tests.fixtures.tiny_sdxl import make_tiny_sdxl
from tests.fixtures.whole import Whole

FORMS = {"safetensors": "tiny.safetensors", "ckpt": "tiny.ckpt", "diffusers": "tiny", "diffusers_safetensors": "tiny"}


def parts_of(architecture: Any, path: Path, flags: dict[str, object]) -> dict[str, dict[str, Tensor]]:
    """Every part's tensors by the models' names, in float32."""
    more = {"v2": bool(flags.get("v2", False))} if architecture is SD else {}
    checkpoint = architecture.inspect(
        str(path), v_parameterization=False, vae=None, tokenizer_cache_dir=str(flags["tokenizer_cache_dir"]), **more
    )
    like = {"dtype": torch.float32, "device": "cpu"}
    encoders = architecture.load_text_encoders(checkpoint, **like)
    models = {
        "denoiser": architecture.load_denoiser(checkpoint, **like),
        "vae": architecture.load_vae(checkpoint, **like),
        **{f"text {number}": encoder for number, encoder in enumerate(encoders)},
    }
    return {name: model.state_dict() for name, model in models.items()}


def assert_equal(one: dict[str, dict[str, Tensor]], other: dict[str, dict[str, Tensor]]) -> None:
    for name, tensors in one.items():
        assert tensors.keys() == other[name].keys()
        assert all(torch.equal(tensor, other[name][key]) for key, tensor in tensors.items()), name


@pytest.mark.parametrize("source", ["file", "folder"])
@pytest.mark.parametrize("family", ["sd", *(pytest.param(n, marks=pytest.mark.slow) for n in ("sd2", "sdxl"))])
def test_every_form_holds_the_same_model(tmp_path: Path, dataset: Path, family: str, source: str) -> None:
    place = tmp_path / ("base.safetensors" if source == "file" else "base")
    layout = "ldm" if source == "file" else "diffusers"
    flags: dict[str, object] = {"v2": True} if family == "sd2" else {}
    if family == "sdxl":
        model, script, architecture = make_tiny_sdxl(place, layout=layout), "sdxl_train", SDXL
    else:
        model, script, architecture = make_tiny_sd(place, layout=layout, v2=family == "sd2"), "fine_tune", SD
    whole = Whole(script, None, model)  # type: ignore[arg-type]
    options = {**flags, "train_text_encoder": True, "max_train_steps": 1}
    found = {}
    for form, name in FORMS.items():
        whole.train(dataset, tmp_path / form, **options, save_model_as=form)
        known = {**flags, **model.flags}
        found[form] = parts_of(architecture, tmp_path / form / name, known)
    first = found.pop("safetensors")
    for other in found.values():
        assert_equal(first, other)
    base = parts_of(architecture, place, {**flags, **model.flags})
    assert_equal({"vae": first["vae"]}, base)
    assert not torch.equal(*(next(iter(p["denoiser"].values())) for p in (first, base)))
    # as the base model, if not said
    whole.train(dataset, tmp_path / "like", **options)
    assert (tmp_path / "like" / "tiny").is_dir() == (source == "folder")


def test_diffusers_loads_them_and_predicts_the_same(tmp_path: Path, dataset: Path) -> None:
    from diffusers import StableDiffusionPipeline

    model = make_tiny_sd(tmp_path / "base.safetensors")
    whole = Whole("fine_tune", None, model)  # type: ignore[arg-type]
    for form in ("safetensors", "diffusers", "diffusers_safetensors"):
        whole.train(dataset, tmp_path / form, train_text_encoder=True, max_train_steps=1, save_model_as=form)
    folder = StableDiffusionPipeline.from_pretrained(tmp_path / "diffusers_safetensors" / "tiny", local_files_only=True)
    pickled = StableDiffusionPipeline.from_pretrained(tmp_path / "diffusers" / "tiny", local_files_only=True)
    single = StableDiffusionPipeline.from_single_file(
        str(tmp_path / "safetensors" / "tiny.safetensors"),
        config=str(tmp_path / "diffusers_safetensors" / "tiny"),
        local_files_only=True,
    )
    own = parts_of(SD, tmp_path / "safetensors" / "tiny.safetensors", dict(model.flags))
    noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[598, *range(5, 80), 599]])
    answers = []
    for pipeline in (folder, pickled, single):
        assert all(torch.equal(t, own["denoiser"][name]) for name, t in pipeline.unet.state_dict().items())
        with torch.no_grad():
            context = pipeline.text_encoder(ids).last_hidden_state
            answers.append(pipeline.unet(noisy, 500, context).sample)
    for answer in answers[1:]:
        torch.testing.assert_close(answer, answers[0], rtol=0, atol=1e-5)


def test_a_model_keeps_what_else_its_file_holds(tmp_path: Path, dataset: Path) -> None:
    """Averaged weights and counters of other programs, position ids; --vae is what is saved."""
    from safetensors.torch import save_file

    model = make_tiny_sd(tmp_path / "base.safetensors", position_ids=True, dtype=torch.float16)
    tensors = load_file(model.path)
    tensors["model_ema.decay"] = torch.tensor(0.5)
    save_file(tensors, model.path)
    other = make_tiny_sd(tmp_path / "vae" / "other.safetensors", seed=5)
    whole = Whole("fine_tune", None, model)  # type: ignore[arg-type]
    whole.train(dataset, tmp_path / "out", vae=other.path, max_train_steps=1, save_precision="fp16")
    saved, vae = load_file(tmp_path / "out" / "tiny.safetensors"), load_file(other.path)
    assert saved.keys() == tensors.keys()
    for name, tensor in saved.items():
        if name.startswith("first_stage_model."):
            assert torch.equal(tensor, vae[name].half())
        elif not name.startswith("model.diffusion_model."):
            assert torch.equal(tensor.float(), tensors[name].float()), name


def test_a_saved_model_is_trained_on(tmp_path: Path, flux_train: Whole, dataset: Path) -> None:
    """FLUX, whose file is the transformer alone: our own LoRA script takes it."""
    flux_train.train(dataset, tmp_path, save_precision="bf16", max_train_steps=1)
    words = flux_train.words(
        dataset,
        tmp_path / "lora",
        pretrained_model_name_or_path=tmp_path / "tiny.safetensors",
        network_module="networks.lora_flux",
        network_dim=2,
    )
    train_here(*words, script="flux_train_network")
    assert (tmp_path / "lora" / "tiny.safetensors").exists()
