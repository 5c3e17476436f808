"""A step of whole models is that of a plain torch loop over other implementations: the loss and every gradient.

With plain SGD at a learning rate of 1 a weight moves by its gradient, so that the saved model tells all of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from library.training import batch_losses
from library.training.batch_losses import BatchLosses
from tests.entry.flux.test_step import T5_LENGTH, Drawn, drawn, images, mean_square, plain_step  # noqa: F401
from tests.fixtures.runs import logged, make_images, write_dataset
from tests.fixtures.tiny_flux import make_tiny_flux
from tests.fixtures.tiny_sd import Sizes, diffusers_configs
from tests.fixtures.tiny_sdxl import make_tiny_sdxl
from tests.fixtures.whole import Whole

#: rates that keep the loss of significance in ``before - after`` small
RATE = 1.0
SGD = {"optimizer_type": "torch.optim.SGD", "learning_rate": RATE, "max_grad_norm": 0, "max_train_steps": 1}


class Seen:
    """The inputs of the step: drawn numbers and data, and nothing that models compute from them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.latents, self.noise, self.timesteps = [], [], []
        self.captions: list[str] = []
        self.sizes: list[list[int]] = []  # (H, W) of the images, and the corners of their crops
        self.corners: list[list[int]] = []
        noisy, at = batch_losses.make_noisy, BatchLosses.at

        def make_noisy(latents: Tensor, *args: Any, **more: Any) -> Any:
            made = noisy(latents, *args, **more)
            self.latents.append(latents.clone())
            self.noise.append(made.target.clone())  # of models that predict noise, and flow models' noise - latents
            self.timesteps.append(made.timesteps.clone())
            return made

        def record(losses: BatchLosses, batch: Any, *args: Any, **more: Any) -> Tensor:
            self.captions += batch.captions
            self.sizes += batch.original_sizes.tolist()
            self.corners += batch.crop_top_lefts.tolist()
            return at(losses, batch, *args, **more)

        monkeypatch.setattr(batch_losses, "make_noisy", make_noisy)
        monkeypatch.setattr(BatchLosses, "at", record)


def gradients(before: dict[str, Tensor], after: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return gradients by the file's names below ``prefix``."""
    return {
        name.removeprefix(prefix): (before[name].double() - after[name].double()).float() / RATE
        for name in before
        if name.startswith(prefix)
    }


def their_unet(path: Path) -> nn.Module:
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    unet = UNet2DConditionModel.from_config(diffusers_configs(Sizes())["unet"])
    unet.load_state_dict(convert_ldm_unet_checkpoint(load_file(path), dict(unet.config)))
    return unet


def their_clip(path: Path) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    model = CLIPTextModel(CLIPTextConfig(**diffusers_configs(Sizes())["text_encoder"]))
    prefix = "cond_stage_model.transformer.text_model."
    state = {n.removeprefix(prefix): t for n, t in load_file(path).items() if n.startswith(prefix)}
    model.load_state_dict(state, strict=False)
    return model


@pytest.mark.parametrize("script", ["fine_tune", "train_db"])
def test_a_step_of_stable_diffusion(
    tmp_path: Path, script: str, request: pytest.FixtureRequest, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``fine_tune.py`` trains the U-Net, ``train_db.py`` the text encoder too."""
    from diffusers import DDPMScheduler
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
    from transformers import CLIPTokenizer

    seen, whole = Seen(monkeypatch), request.getfixturevalue(script)
    whole.train(dataset, tmp_path, **SGD)
    path = whole.model.path
    unet, clip = their_unet(path), their_clip(path)
    tokenizer = CLIPTokenizer.from_pretrained(str(whole.model.tokenizer_cache_dir / "openai_clip-vit-large-patch14"))
    ids = tokenizer(seen.captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    schedule = DDPMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    latents, noise, timesteps = seen.latents[0], seen.noise[0], seen.timesteps[0]
    context = clip(ids).last_hidden_state
    prediction = unet(schedule.add_noise(latents, noise, timesteps), timesteps, context).sample
    loss = F.mse_loss(prediction, noise)
    loss.backward()
    assert logged(tmp_path, "loss/current") == pytest.approx([loss.item()], rel=1e-6)

    before, after = load_file(path), load_file(tmp_path / "tiny.safetensors")
    moved = {name: before[name].double() - after[name].double() for name in before}
    ours = convert_ldm_unet_checkpoint({n: t.float() for n, t in moved.items()}, dict(unet.config))
    for name, parameter in unet.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
    text = gradients(before, after, "cond_stage_model.transformer.text_model.")
    for name, parameter in clip.named_parameters():
        expected = parameter.grad if script == "train_db" else torch.zeros_like(parameter)
        torch.testing.assert_close(text[name], expected, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["dev", pytest.param("chroma", marks=pytest.mark.slow)])
def test_a_step_of_flux_train(tmp_path: Path, drawn: Drawn, kind: str) -> None:  # noqa: F811
    from library.architectures.common.joined_layout import join
    from library.architectures.flux.diffusers_layout import diffusers_plan

    made = make_tiny_flux(tmp_path / "model", model=kind)
    data = write_dataset(tmp_path / "d.toml", images(tmp_path / "images"), dataset="batch_size = 2")
    more = {
        "model_prediction_type": "raw",
        "guidance_scale": 0 if kind == "chroma" else 1.5,
        "t5xxl_max_token_length": T5_LENGTH,
    }
    Whole("flux_train", None, made).train(data, tmp_path, **SGD, **more)  # type: ignore[arg-type]
    plain = plain_step(kind, made, drawn, guidance=1.5, masked=kind == "chroma", weigh=mean_square)
    assert logged(tmp_path, "loss/current") == pytest.approx([plain.loss.item()], rel=1e-6)
    before, after = load_file(made.path), load_file(tmp_path / "tiny.safetensors")
    moved = {name: (before[name].double() - after[name].double()).float() for name in after}
    plan = diffusers_plan({name: tuple(tensor.shape) for name, tensor in after.items()})
    seen = 0
    for name, parameter in plain.transformer.named_parameters():
        if parameter.grad is None:
            continue
        seen += 1
        ours = join(plan, name, moved.__getitem__)
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert seen == len(plan)


def test_a_step_of_sd3_train(tmp_path: Path, sd3_train: Whole, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The transformer and both CLIPs, against diffusers' transformer and its pipeline's encoding of captions."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    from library.architectures.sd3 import SD3
    from tests.architectures.sd3.test_model import theirs
    from tests.fixtures.tiny_sd3 import MODELS

    seen, made = Seen(monkeypatch), sd3_train.model
    sd3_train.train(dataset, tmp_path, **SGD, train_text_encoder=True, training_shift=2.0)
    checkpoint = SD3.inspect(str(made.path), vae=None, tokenizer_cache_dir=str(made.tokenizer_cache_dir))
    encoders = SD3.load_text_encoders(checkpoint, dtype=torch.float32, device="cpu")
    tokenizers = SD3.load_tokenizers(checkpoint)
    for encoder in encoders[:2]:  # the tiny tokenizer's end token is not the last of the tiny vocabulary
        encoder.text_model.eos_token_id = tokenizers[0].eos_token_id
        encoder.requires_grad_(True)
    transformer = theirs(MODELS["medium"])
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=SD3.load_vae(checkpoint, dtype=torch.float32, device="cpu"),
        **{f"text_encoder{n}": encoder for n, encoder in zip(("", "_2", "_3"), encoders, strict=True)},
        **{f"tokenizer{n}": tokenizer for n, tokenizer in zip(("", "_2", "_3"), tokenizers, strict=True)},
    )
    context, _, pooled, _ = pipeline.encode_prompt(
        seen.captions, None, None, do_classifier_free_guidance=False, max_sequence_length=24
    )
    # the target is the velocity times sigma, for which clean latents are compared
    latents, added, timesteps = seen.latents[0], seen.noise[0], seen.timesteps[0]
    sigma = (timesteps / 1000).view(-1, 1, 1, 1)
    noisy = latents + added
    output = transformer(noisy, encoder_hidden_states=context, pooled_projections=pooled, timestep=timesteps).sample
    loss = F.mse_loss(noisy - sigma * output, latents)
    loss.backward()
    assert logged(tmp_path, "loss/current") == pytest.approx([loss.item()], rel=1e-6)

    before, after = load_file(made.path), load_file(tmp_path / "tiny.safetensors")
    moved = gradients({name: before[name] for name in after}, after, "model.diffusion_model.")
    assert not moved["pos_embed"].any()
    ours = convert_sd3_transformer_checkpoint_to_diffusers(dict(moved))
    for name, parameter in transformer.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
    for option, encoder in zip(("clip_l", "clip_g"), encoders, strict=False):
        prefix = f"text_encoders.{option}.transformer."
        own = {name.removeprefix(prefix): tensor for name, tensor in before.items() if name.startswith(prefix)}
        text = gradients(own, load_file(tmp_path / f"tiny_{option}.safetensors"), "")
        for name, parameter in encoder.named_parameters():
            found = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            torch.testing.assert_close(text[name], found, rtol=1e-4, atol=1e-6, msg=f"{option} {name}")


@pytest.mark.slow
def test_a_step_of_sdxl_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The U-Net and both text encoders, from a folder, against diffusers' pipeline of the same folder."""
    from diffusers import DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    seen, made = Seen(monkeypatch), make_tiny_sdxl(tmp_path / "model", layout="diffusers")
    data = write_dataset(
        tmp_path / "d.toml", make_images(tmp_path / "images", [(64, 64)] * 2), dataset="batch_size = 2"
    )
    Whole("sdxl_train", None, made).train(data, tmp_path, **SGD, train_text_encoder=True)  # type: ignore[arg-type]
    pipeline = StableDiffusionXLPipeline.from_pretrained(str(made.path), torch_dtype=torch.float32)
    # the tiny tokenizer's end token is not the largest id of the vocabulary
    pipeline.text_encoder_2.text_model.eos_token_id = pipeline.tokenizer_2.eos_token_id
    for part in (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2):
        part.requires_grad_(True)
    context, _, pooled, _ = pipeline.encode_prompt(seen.captions, do_classifier_free_guidance=False)
    schedule = DDPMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    latents, noise, timesteps = seen.latents[0], seen.noise[0], seen.timesteps[0]
    sizes = torch.tensor([[64, 64, 0, 0, 64, 64]] * 2)
    prediction = pipeline.unet(
        schedule.add_noise(latents, noise, timesteps),
        timesteps,
        context,
        added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes},
    ).sample
    loss = F.mse_loss(prediction, noise)
    loss.backward()
    assert logged(tmp_path, "loss/current") == pytest.approx([loss.item()], rel=1e-6)

    for folder, kind, part in (
        ("unet", UNet2DConditionModel, pipeline.unet),
        ("text_encoder", CLIPTextModel, pipeline.text_encoder),
        ("text_encoder_2", CLIPTextModelWithProjection, pipeline.text_encoder_2),
    ):
        after = dict(kind.from_pretrained(tmp_path / "tiny" / folder, torch_dtype=torch.float32).named_parameters())
        for name, parameter in part.named_parameters():
            expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            found = (parameter.detach().double() - after[name].detach().double()).float()
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6, msg=f"{folder} {name}")
