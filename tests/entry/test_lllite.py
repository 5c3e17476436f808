"""ControlNet-LLLites trained by the real scripts: a step is that of a plain loop, files are the published ones."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.entry.full.test_step import Seen, their_clip, their_unet
from tests.entry.test_controlnet import Guides
from tests.fixtures.families import SD, SDXL
from tests.fixtures.guides import make_pairs
from tests.fixtures.killed import train_killed
from tests.fixtures.runs import logged, metadata_of, run_script
from tests.fixtures.whole import Whole

SCRIPTS = {"sd": ("train_control_net_lllite", SD), "sdxl": ("sdxl_train_control_net_lllite", SDXL)}
SIZES = {"cond_emb_dim": 4, "network_dim": 8}


@pytest.fixture(scope="module", params=["sd", pytest.param("sdxl", marks=pytest.mark.slow)])
def lllite(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    torch.set_num_threads(1)
    script, family = SCRIPTS[request.param]
    return Whole(script, family, family.make(tmp_path_factory.mktemp(request.param)))


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    torch.set_num_threads(1)
    script, family = SCRIPTS["sd"]
    return Whole(script, family, family.make(tmp_path_factory.mktemp("sd")))


def hook_plain(unet: nn.Module, weights: dict[str, Tensor], images: Tensor) -> None:
    """Change the inputs of a diffusers U-Net's layers by the published formula."""
    places = {"input_blocks_1_1": "down_blocks.0.attentions.0", "middle_block_1": "mid_block.attentions.0"}
    names = {name.partition(".")[0] for name in weights}
    assert len(names) == 8
    for name in names:
        block, _, layer = name.removeprefix("lllite_unet_").partition("_transformer_blocks_0_")
        linear = unet.get_submodule(f"{places[block]}.transformer_blocks.0.{layer.replace('_to_', '.to_')}")

        def changed(module: nn.Module, inputs: tuple[Tensor], name: str = name) -> tuple[Tensor]:
            def of(part: str) -> tuple[Tensor, Tensor]:
                return weights[f"{name}.{part}.weight"], weights[f"{name}.{part}.bias"]

            (x,) = inputs
            first, second = of("conditioning1.0"), of("conditioning1.2")
            kernel = second[0].shape[-1]
            embedded = F.conv2d(F.relu(F.conv2d(images, *first, stride=4)), *second, stride=kernel)
            condition = embedded.flatten(2).transpose(1, 2)
            hidden = F.relu(F.linear(torch.cat([condition, F.relu(F.linear(x, *of("down.0")))], dim=2), *of("mid.0")))
            return (x + F.linear(hidden, *of("up.0")),)

        linear.register_forward_pre_hook(changed)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_is_that_of_a_plain_loop(
    tmp_path: Path, sd: Whole, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    """With plain SGD at a rate of 1 weights move by their gradient. The second step has outputs that are not zero."""
    from diffusers import DDPMScheduler
    from transformers import CLIPTokenizer

    dataset = make_pairs(tmp_path)
    seen, guides = Seen(monkeypatch), Guides(monkeypatch)
    descent = {"optimizer_type": "torch.optim.SGD", "learning_rate": 1.0, "max_grad_norm": 0}
    sd.train(
        dataset, tmp_path / "out", **SIZES, **descent, max_train_steps=2, save_every_n_steps=1,
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    path = sd.model.path
    unet, clip = their_unet(path), their_clip(path)
    unet.requires_grad_(False)
    folder = sd.model.tokenizer_cache_dir / "openai_clip-vit-large-patch14"  # type: ignore[attr-defined]
    tokenizer = CLIPTokenizer.from_pretrained(str(folder))
    first = load_file(tmp_path / "out" / "tiny-step00000001.safetensors")
    last = load_file(tmp_path / "out" / "tiny.safetensors")
    for tensor in first.values():
        tensor.requires_grad_()
    hook_plain(unet, first, guides.images[1])
    read = tokenizer(seen.captions[2:4], padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    context = clip(read.input_ids).last_hidden_state.detach()
    schedule = DDPMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    latents, noise, timesteps = seen.latents[1], seen.noise[1], seen.timesteps[1]
    loss = F.mse_loss(unet(schedule.add_noise(latents, noise, timesteps), timesteps, context).sample, noise)
    loss.backward()
    assert logged(tmp_path / "out", "loss/current")[1] == pytest.approx(loss.item(), rel=1e-5)
    for name, tensor in first.items():
        torch.testing.assert_close(tensor.detach() - last[name], tensor.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_dropout_acts_with_and_without_checkpointing(tmp_path: Path, sd: Whole) -> None:
    """Its numbers follow from seed and step, so that checkpointing changes nothing; another share changes them."""
    dataset = make_pairs(tmp_path)
    found = {}
    for name, more in (
        ("none", {}),
        ("half", {"network_dropout": 0.5}),
        ("half again", {"network_dropout": 0.5, "gradient_checkpointing": True}),
    ):
        sd.train(dataset, tmp_path / name, **SIZES, **more, max_train_steps=3, learning_rate=0.05)
        found[name] = load_file(tmp_path / name / "tiny.safetensors")
    moved = [name for name in found["none"] if name.endswith("up.0.weight")]
    assert all(not torch.equal(found["none"][name], found["half"][name]) for name in moved)
    for name, tensor in found["half"].items():
        torch.testing.assert_close(found["half again"][name], tensor, rtol=1e-3, atol=1e-5, msg=name)


def test_it_is_trained_resumed_and_read_again(tmp_path: Path, lllite: Whole) -> None:
    """Killed and resumed the run ends with the bits of one left alone; samples use the image of their prompt."""
    dataset = make_pairs(tmp_path)
    prompts = tmp_path / "prompts.txt"
    guides = tmp_path / "guides"
    prompts.write_text(
        "".join(f"a cat --w 64 --h 64 --s 2 --d 1 --l 3 --n dog --cn {guides}/{n}.png\n" for n in (0, 1))
    )
    options = {**SIZES, "max_train_steps": 4, "save_every_n_steps": 1, "save_state": True, "ema_decay": 0.9,
               "learning_rate": 0.05, "sample_prompts": prompts, "sample_every_n_steps": 4,
               "network_dropout": 0.1}  # fmt: skip
    lllite.train(dataset, tmp_path / "alone", **options)
    first, second = (Image.open(image).tobytes() for image in sorted((tmp_path / "alone" / "sample").glob("*.png")))
    assert first != second
    train_killed(partial(lllite.train, dataset, tmp_path / "out", **options), tmp_path / "out", steps=[3])
    for name in ("tiny", "tiny-ema"):
        alone, resumed = (load_file(tmp_path / folder / f"{name}.safetensors") for folder in ("alone", "out"))
        assert alone and all(torch.equal(tensor, resumed[key]) for key, tensor in alone.items())
    file = tmp_path / "alone" / "tiny.safetensors"
    assert metadata_of(file)["modelspec.architecture"].endswith("/control-net-lllite")

    still = {"learning_rate": 1e-30, "max_train_steps": 1}
    lllite.train(dataset, tmp_path / "again", **still, network_weights=file)
    again = load_file(tmp_path / "again" / "tiny.safetensors")
    for name, tensor in load_file(file).items():  # those at exactly 0 move by the learning rate
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=1e-29)
    lllite.train(dataset, tmp_path / "dry", dry_run=True, network_weights=file)


@pytest.mark.slow
def test_gen_img_generates_with_it(tmp_path: Path, lllite: Whole) -> None:
    dataset = make_pairs(tmp_path)
    lllite.train(dataset, tmp_path / "out", **SIZES, learning_rate=0.5)
    images = []
    for index in (0, 1):
        folder = tmp_path / str(index)
        done = run_script(
            "gen_img.py",
            *("--ckpt", lllite.model.path, "--tokenizer_cache_dir", lllite.model.flags["tokenizer_cache_dir"]),
            *("--prompt", "a cat --d 1", "--outdir", folder, "--W", 64, "--H", 64, "--steps", 2),
            *("--images_per_prompt", 1, "--control_net_lllite_models", tmp_path / "out" / "tiny.safetensors"),
            *("--guide_image_path", tmp_path / "guides" / f"{index}.png"),
            *(["--sdxl"] if lllite.family is SDXL else []),
        )
        assert done.code == 0, done.text
        images.append(Image.open(next(folder.glob("*.png"))).tobytes())
    assert images[0] != images[1]


def test_it_changes_nothing_at_first(tmp_path: Path, sd: Whole) -> None:
    """The loss of the first step is that of a run with other sizes, as no network acts yet."""
    dataset = make_pairs(tmp_path)
    losses = []
    for name, sizes in (("small", SIZES), ("large", {"cond_emb_dim": 16, "network_dim": 32}), ("usual", {})):
        sd.train(dataset, tmp_path / name, **sizes, max_train_steps=1)
        losses += logged(tmp_path / name, "loss/current")
    assert losses[0] == losses[1] == losses[2]
    usual = load_file(tmp_path / "usual" / "tiny.safetensors")
    assert usual["lllite_unet_middle_block_1_transformer_blocks_0_attn1_to_q.mid.0.weight"].shape == (64, 96)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cond_emb_dim": 3}, "--cond_emb_dim 3: must be even"),
        ({"network_weights": "MODEL"}, "holds no ControlNet-LLLite"),
        ({"masked_loss": True}, "--masked_loss: the images of conditioning_data_dir are what the network reads"),
        ({"learning_rate": 0}, "nothing to train: --learning_rate is 0"),
    ],
)
def test_mistakes(
    tmp_path: Path, sd: Whole, options: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = make_pairs(tmp_path)
    if "network_weights" in options:
        options = {"network_weights": sd.model.path}
    with pytest.raises(SystemExit) as ended:
        sd.train(dataset, tmp_path / "out", **options)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 2 and len(lines) == 1 and words in lines[0], lines
