"""ControlNets trained by the real scripts: a step is that of a plain loop, and other programs read the files."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from library.training import batch_losses
from library.training.batch_losses import BatchLosses
from tests.entry.full.test_step import Seen, their_clip, their_unet
from tests.fixtures.families import SD, SDXL
from tests.fixtures.guides import make_pairs
from tests.fixtures.killed import train_killed
from tests.fixtures.runs import logged, metadata_of
from tests.fixtures.tiny_sd import make_tiny_sd
from tests.fixtures.tiny_sdxl import make_tiny_sdxl
from tests.fixtures.whole import Whole

SCRIPTS = {"sd": ("train_control_net", SD), "sdxl": ("sdxl_train_control_net", SDXL)}


@pytest.fixture(scope="module", params=["sd", pytest.param("sdxl", marks=pytest.mark.slow)])
def controlnet(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    torch.set_num_threads(1)
    script, family = SCRIPTS[request.param]
    return Whole(script, family, family.make(tmp_path_factory.mktemp(request.param)))


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    torch.set_num_threads(1)
    return Whole("train_control_net", SD, SD.make(tmp_path_factory.mktemp("sd")))


class Guides:
    """The conditioning images that the step was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.images: list[Tensor] = []
        at = BatchLosses.at

        def record(losses: BatchLosses, batch: Any, *args: Any, **more: Any) -> Tensor:
            self.images.append(batch.conditioning_images.clone())
            return at(losses, batch, *args, **more)

        monkeypatch.setattr(batch_losses.BatchLosses, "at", record)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_is_that_of_a_plain_diffusers_loop(
    tmp_path: Path, sd: Whole, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    """With plain SGD at a rate of 1 weights move by their gradient. The second step has outputs that are not zero."""
    from diffusers import ControlNetModel, DDPMScheduler
    from transformers import CLIPTokenizer

    dataset = make_pairs(tmp_path)
    seen, guides = Seen(monkeypatch), Guides(monkeypatch)
    descent = {"optimizer_type": "torch.optim.SGD", "learning_rate": 1.0, "max_grad_norm": 0}
    sd.train(
        dataset, tmp_path / "out", **descent, max_train_steps=2, save_every_n_steps=1, controlnet_layout="diffusers",
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    path = sd.model.path
    unet, clip = their_unet(path), their_clip(path)
    unet.requires_grad_(False)
    folder = sd.model.tokenizer_cache_dir / "openai_clip-vit-large-patch14"  # type: ignore[attr-defined]
    tokenizer = CLIPTokenizer.from_pretrained(str(folder))
    schedule = DDPMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    first = ControlNetModel.from_pretrained(tmp_path / "out" / "tiny-step00000001")
    last = ControlNetModel.from_pretrained(tmp_path / "out" / "tiny").state_dict()
    read = tokenizer(seen.captions[2:4], padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    context = clip(read.input_ids).last_hidden_state.detach()
    latents, noise, timesteps = seen.latents[1], seen.noise[1], seen.timesteps[1]
    noisy = schedule.add_noise(latents, noise, timesteps)
    down, middle = first(noisy, timesteps, context, (guides.images[1] + 1) / 2, return_dict=False)
    assert middle.abs().max() > 0
    prediction = unet(
        noisy, timesteps, context, down_block_additional_residuals=down, mid_block_additional_residual=middle
    ).sample
    loss = F.mse_loss(prediction, noise)
    loss.backward()
    assert logged(tmp_path / "out", "loss/current")[1] == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in first.named_parameters():
        moved = parameter.detach() - last[name]
        torch.testing.assert_close(moved, parameter.grad, rtol=1e-3, atol=2e-6, msg=name)


@pytest.mark.slow
def test_a_step_of_sdxl_is_that_of_a_plain_diffusers_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With both learning rates at 1; the texts are those of diffusers' pipeline of the same folder."""
    from diffusers import ControlNetModel, DDPMScheduler, StableDiffusionXLPipeline

    made = make_tiny_sdxl(tmp_path / "model", layout="diffusers")
    dataset = make_pairs(tmp_path, ((64, 64),) * 2)
    seen, guides = Seen(monkeypatch), Guides(monkeypatch)
    descent = {"optimizer_type": "torch.optim.SGD", "learning_rate": 1.0, "control_net_lr": 1.0, "max_grad_norm": 0}
    Whole("sdxl_train_control_net", SDXL, made).train(
        dataset, tmp_path / "out", **descent, max_train_steps=2, save_every_n_steps=1, controlnet_layout="diffusers"
    )
    pipeline = StableDiffusionXLPipeline.from_pretrained(str(made.path), torch_dtype=torch.float32)
    # the tiny tokenizer's end token is not the largest id of the vocabulary
    pipeline.text_encoder_2.text_model.eos_token_id = pipeline.tokenizer_2.eos_token_id
    with torch.no_grad():
        context, _, pooled, _ = pipeline.encode_prompt(seen.captions[2:4], do_classifier_free_guidance=False)
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[64, 64, 0, 0, 64, 64]] * 2)}
    schedule = DDPMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    first = ControlNetModel.from_pretrained(tmp_path / "out" / "tiny-step00000001")
    last = ControlNetModel.from_pretrained(tmp_path / "out" / "tiny").state_dict()
    latents, noise, timesteps = seen.latents[1], seen.noise[1], seen.timesteps[1]
    noisy = schedule.add_noise(latents, noise, timesteps)
    image = (guides.images[1] + 1) / 2
    down, middle = first(noisy, timesteps, context, image, added_cond_kwargs=added, return_dict=False)
    assert middle.abs().max() > 0
    prediction = pipeline.unet.requires_grad_(False)(
        noisy, timesteps, context, down_block_additional_residuals=down, mid_block_additional_residual=middle,
        added_cond_kwargs=added,
    ).sample  # fmt: skip
    loss = F.mse_loss(prediction, noise)
    loss.backward()
    assert logged(tmp_path / "out", "loss/current")[1] == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in first.named_parameters():
        torch.testing.assert_close(parameter.detach() - last[name], parameter.grad, rtol=1e-3, atol=2e-6, msg=name)


def test_it_starts_from_the_unet_and_changes_nothing(tmp_path: Path, controlnet: Whole) -> None:
    """The copied layers are the U-Net's bits, the outputs are zero; the loss of the first step is that without it."""
    dataset = make_pairs(tmp_path)
    still = {"learning_rate": 1e-30, "max_train_steps": 1}
    if controlnet.family is SDXL:
        still["control_net_lr"] = 1e-30
    controlnet.train(dataset, tmp_path / "out", **still, controlnet_layout="control_model")
    saved, base = load_file(tmp_path / "out" / "tiny.safetensors"), load_file(controlnet.model.path)
    assert {name.partition(".")[0] for name in saved} == {"control_model"}
    copied = 0
    for name, tensor in saved.items():
        theirs = base.get(name.replace("control_model.", "model.diffusion_model."))
        if theirs is not None:
            assert torch.equal(tensor, theirs), name
            copied += 1
        elif ".zero_convs." in name or ".middle_block_out." in name or ".input_hint_block.14." in name:
            assert tensor.abs().max() < 1e-29, name
    assert copied > 30


def test_it_is_trained_resumed_and_read_again(tmp_path: Path, controlnet: Whole) -> None:
    """Killed and resumed the run ends with the bits of one left alone; another run starts from its file."""
    dataset = make_pairs(tmp_path)
    options: dict[str, Any] = {"max_train_steps": 4, "save_every_n_steps": 1, "save_state": True, "ema_decay": 0.9,
               "save_last_n_steps": 1}  # fmt: skip
    prompts, guides = tmp_path / "prompts.txt", tmp_path / "guides"
    prompts.write_text(
        "".join(f"a cat --w 64 --h 64 --s 2 --d 1 --l 3 --n dog --cn {guides}/{n}.png\n" for n in (0, 1))
    )
    options |= {"sample_prompts": prompts, "sample_every_n_steps": 4}
    controlnet.train(dataset, tmp_path / "alone", **options)
    first, second = (Image.open(image).tobytes() for image in sorted((tmp_path / "alone" / "sample").glob("*.png")))
    assert first != second
    train_killed(partial(controlnet.train, dataset, tmp_path / "out", **options), tmp_path / "out", steps=[3])
    for name in ("tiny", "tiny-ema"):
        alone, resumed = (load_file(tmp_path / folder / f"{name}.safetensors") for folder in ("alone", "out"))
        assert alone and all(torch.equal(tensor, resumed[key]) for key, tensor in alone.items())
    assert metadata_of(tmp_path / "alone" / "tiny.safetensors")["modelspec.architecture"].endswith("/controlnet")
    group = "control_net" if controlnet.family is SDXL else "controlnet"
    assert logged(tmp_path / "alone", f"lr/{group}") == pytest.approx([1e-4 if group == "control_net" else 1e-3] * 4)

    start = tmp_path / "alone" / "tiny.safetensors"
    still = {"learning_rate": 1e-30, "max_train_steps": 1}
    if controlnet.family is SDXL:
        still["control_net_lr"] = 1e-30
    controlnet.train(dataset, tmp_path / "again", **still, controlnet_model_name_or_path=start)
    again, alone = load_file(tmp_path / "again" / "tiny.safetensors"), load_file(start)
    assert alone.keys() == again.keys()
    assert all(torch.equal(tensor, again[key]) for key, tensor in alone.items())


def test_the_published_names(tmp_path: Path, controlnet: Whole) -> None:
    """Bare original names for SD, diffusers' names for SDXL; in pickles too."""
    dataset = make_pairs(tmp_path)
    controlnet.train(dataset, tmp_path / "out", max_train_steps=1, save_model_as="pt", save_precision="fp16")
    saved = torch.load(tmp_path / "out" / "tiny.pt", weights_only=True)
    assert all(tensor.dtype == torch.float16 for tensor in saved.values())
    expected = {"input_hint_block.14.weight", "zero_convs.0.0.bias", "middle_block_out.0.weight", "time_embed.0.weight"}
    if controlnet.family is SDXL:
        expected = {"controlnet_cond_embedding.conv_in.weight", "controlnet_down_blocks.0.weight"}
        expected |= {"down_blocks.0.resnets.0.conv1.bias"}
    assert expected <= saved.keys()


@pytest.mark.slow
def test_diffusers_generates_with_the_folder(tmp_path: Path) -> None:
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    model = make_tiny_sd(tmp_path / "model", layout="diffusers")
    dataset = make_pairs(tmp_path)
    trained = Whole("train_controlnet", SD, model)
    trained.train(dataset, tmp_path / "out", controlnet_layout="diffusers", learning_rate=0.01)
    network = ControlNetModel.from_pretrained(tmp_path / "out" / "tiny")
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(
        tmp_path / "model", controlnet=network, local_files_only=True, safety_checker=None
    )
    guide = Image.open(tmp_path / "guides" / "0.png")
    image = pipeline("a cat", image=guide, num_inference_steps=2, height=64, width=64).images[0]
    assert image.size == (64, 64)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"masked_loss": True}, "--masked_loss: the images of conditioning_data_dir are what a ControlNet reads"),
        ({"learning_rate": 0}, "nothing to train: --learning_rate is 0"),
        ({"on_nan": "skip"}, "--on_nan skip: keeps a copy"),
        ({"controlnet_model_name_or_path": "absent.safetensors"}, "--controlnet_model_name_or_path absent.safetensors"),
        ({"controlnet_model_name_or_path": "MODEL"}, "the file holds no ControlNet"),
        ({"sample_prompts": "PROMPTS", "sample_at_first": True}, 'the prompt "a cat" has no conditioning image'),
        ({"dataset_config": "PLAIN"}, "conditioning_data_dir: is missing"),
        ({"dataset_config": "EXTRA"}, "no image has the name of 9.png"),
        ({"dataset_config": "LESS"}, "has no image of the same name for 0.png"),
    ],
)  # fmt: skip
def test_mistakes(
    tmp_path: Path, sd: Whole, options: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.fixtures.runs import write_dataset

    dataset = make_pairs(tmp_path)
    options = dict(options)
    if options.get("controlnet_model_name_or_path") == "MODEL":
        options["controlnet_model_name_or_path"] = sd.model.path
    if "sample_prompts" in options:
        options["sample_prompts"] = tmp_path / "prompts.txt"
        options["sample_prompts"].write_text("a cat\n")
    kind = options.pop("dataset_config", None)
    if kind == "PLAIN":
        dataset = write_dataset(tmp_path / "plain.toml", tmp_path / "images")
    elif kind == "EXTRA":
        (tmp_path / "guides" / "9.png").write_bytes((tmp_path / "guides" / "0.png").read_bytes())
    elif kind == "LESS":
        (tmp_path / "guides" / "0.png").unlink()
    with pytest.raises(SystemExit) as ended:
        sd.train(dataset, tmp_path / "out", **options)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 2 and len(lines) == 1 and words in lines[0], lines


def test_it_trains_in_half_precision(tmp_path: Path, sd: Whole, monkeypatch: pytest.MonkeyPatch) -> None:
    """The residuals that it adds to features of the denoiser have their dtype, also in sample images."""
    from library.architectures.common import latent_diffusion

    found: list[torch.dtype] = []
    original = latent_diffusion.residuals

    def noted(*args: Any, **more: Any) -> Any:
        made = original(*args, **more)
        found.extend(part.dtype for part in [*made["down"], made["mid"]])
        return made

    monkeypatch.setattr(latent_diffusion, "residuals", noted)
    dataset, prompts = make_pairs(tmp_path), tmp_path / "prompts.txt"
    prompts.write_text(f"a cat --w 64 --h 64 --s 1 --d 1 --l 1 --cn {tmp_path}/guides/0.png\n")
    sd.train(
        dataset, tmp_path / "out", mixed_precision="bf16", max_train_steps=2, cache_latents=True,
        sample_prompts=prompts, sample_every_n_steps=2,
    )  # fmt: skip
    assert found and set(found) == {torch.bfloat16}
    assert len(list((tmp_path / "out" / "sample").glob("*.png"))) == 1
