"""``hunyuan_image_train_network.py`` and ``hunyuan_image_train.py``: a step against a plain loop, and what only
this family has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.architectures.common.joined_layout import join
from library.architectures.hunyuan_image.names import diffusers_plan
from library.architectures.hunyuan_image.options import HunyuanOptions
from networks import convert_hunyuan_image_lora_to_comfy as comfyui
from tests.architectures.hunyuan_image.test_model import theirs
from tests.entry.flux.test_step import Drawn, drawn, images  # noqa: F401
from tests.entry.test_hunyuan_image_minimal_inference import draw
from tests.fixtures.drawn import pixels
from tests.fixtures.families import FLUX, HUNYUAN_IMAGE, Tiny
from tests.fixtures.runs import logged, make_images, write_dataset
from tests.fixtures.scaled import write_both
from tests.fixtures.tiny_hunyuan_image import HunyuanFileSizes, MadeHunyuan, make_tiny_hunyuan
from tests.fixtures.whole import Whole
from tests.inference.test_hunyuan_image_pipeline import whole_qwen
from tools import lora as lora_tool

pytestmark = pytest.mark.usefixtures("own_root_logger")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeHunyuan:
    sizes = HunyuanFileSizes(double_blocks=4, single_blocks=6)
    return make_tiny_hunyuan(tmp_path_factory.mktemp("hunyuan"), sizes=sizes)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return write_dataset(folder / "data.toml", make_images(folder / "images", ((64, 64), (64, 64), (96, 48))))


def weights(folder: Path, name: str = "tiny") -> dict[str, Tensor]:
    return load_file(folder / f"{name}.safetensors")


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]


# ---- a step ----


def test_a_step_is_that_of_a_plain_loop_over_diffusers_models(tmp_path: Path, drawn: Drawn) -> None:  # noqa: F811
    """The loss and every gradient: with plain SGD at a rate of 1 a weight moves by its gradient.

    The captions' lengths differ, and one of them quotes text.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanImagePipeline

    made = make_tiny_hunyuan(tmp_path / "model", sizes=HunyuanFileSizes(glyphs_inner=2048))  # which is fixed there
    folder = images(tmp_path / "images")
    captions = ["a red cat", 'a photo of the blue dog with "cat" and \u201cdog\u201d']
    for number, caption in enumerate(captions):
        (folder / f"{number}.txt").write_text(caption, encoding="utf-8")
    data = write_dataset(tmp_path / "d.toml", folder, dataset="batch_size = 2")
    Whole("hunyuan_image_train", HUNYUAN_IMAGE, made).train(
        data, tmp_path, optimizer_type="torch.optim.SGD", learning_rate=1.0, max_grad_norm=0, max_train_steps=1
    )
    own = {"text_encoder": str(made.text_encoder), "byt5": str(made.byt5)}
    family = HUNYUAN_IMAGE.architecture.changed(HunyuanOptions, **own)
    cache = str(made.tokenizer_cache_dir)
    checkpoint = family.inspect(str(made.path), vae=str(made.vae), tokenizer_cache_dir=cache)
    tokenizers = family.load_tokenizers(checkpoint)
    model = theirs(family.load_denoiser(checkpoint, dtype=torch.float32, device="cpu")).requires_grad_(True)
    pipeline = HunyuanImagePipeline(
        transformer=model, scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=whole_qwen(made),
        tokenizer=tokenizers[0], tokenizer_2=tokenizers[1],
        text_encoder_2=family.load_text_encoder(checkpoint, 1, dtype=torch.float32, device="cpu"),
    )  # fmt: skip
    with torch.no_grad():
        encoded = [pipeline.encode_prompt([captions[int(Path(path).stem)]]) for path in drawn.paths]
    states, mask, glyphs, glyphs_mask = (torch.cat(found) for found in zip(*encoded, strict=True))
    longest = int(mask.sum(dim=1).max())  # they are padded to 1000 tokens
    states, mask = states[:, :longest], mask[:, :longest]
    (latents,), (times,), (noise,) = drawn.latents, drawn.timesteps, drawn.noise
    sigma = (times / 1000).view(-1, 1, 1, 1)
    noisy = (1 - sigma) * latents + sigma * noise
    output = model(
        noisy, times, states, mask, timestep_r=None, encoder_hidden_states_2=glyphs,
        encoder_attention_mask_2=glyphs_mask, return_dict=False,
    )[0]  # fmt: skip
    loss = F.mse_loss(output, noise - latents)
    loss.backward()
    assert logged(tmp_path, "loss/current") == pytest.approx([loss.item()], rel=1e-5)
    before, after = load_file(made.path), load_file(tmp_path / "tiny.safetensors")
    moved = {name: (before[name].double() - after[name].double()).float() for name in before}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    plan = diffusers_plan({name: tuple(parameter.shape) for name, parameter in model.named_parameters()})
    assert plan.keys() == moved.keys()
    for name in plan:
        torch.testing.assert_close(moved[name], join(plan, name, gradients.get), rtol=1e-4, atol=1e-6, msg=name)


# ---- runs ----


def test_sample_images_of_training_are_those_of_the_script(tmp_path: Path, made: MadeHunyuan, dataset: Path) -> None:
    """Sides are cut to multiples of 32, prompts may have no seed, and a shift of their own."""
    prompts, line = tmp_path / "prompts.txt", 'a cat with "dog" --w 100 --h 64 --s 3 --l 2 --fs 3'
    prompts.write_text(f"{line} --d 7\n{line}\n")
    Tiny(HUNYUAN_IMAGE, made).train(
        dataset, tmp_path, sample_prompts=prompts, sample_at_first=True, max_train_steps=1, seed=7
    )
    samples = sorted((tmp_path / "sample").glob("*_000000_*.png"))
    assert len(samples) == 2
    (script,) = draw(
        made, tmp_path / "script", "--image_size", 64, 96, prompt='a cat with "dog"', infer_steps=3, guidance_scale=2,
        flow_shift=3, seed=7,
    )  # fmt: skip
    assert all(pixels(sample).shape == (64, 96, 3) for sample in samples)
    assert np.abs(pixels(samples[0]) - pixels(script)).max() <= 1


def test_swapped_blocks_change_no_number(tmp_path: Path, made: MadeHunyuan, dataset: Path) -> None:
    """With a sample image, and a state from which it is resumed with another number of blocks."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text('a cat with "text" --w 64 --h 64 --s 2 --d 5\n')
    tiny = Tiny(HUNYUAN_IMAGE, made)
    settings = {"sample_prompts": prompts, "sample_every_n_steps": 4, "max_train_steps": 4, "cache_latents": True}
    saves = {"save_state": True, "save_every_n_steps": 2}
    tiny.train(dataset, tmp_path / "plain", **settings, gradient_checkpointing=True)
    tiny.train(dataset, tmp_path / "swapped", **settings, **saves, blocks_to_swap=3)
    state = tmp_path / "swapped" / "tiny-step00000002-state"
    tiny.train(dataset, tmp_path / "resumed", **settings, blocks_to_swap=1, resume=state)
    for name in ("swapped", "resumed"):
        assert_equal(weights(tmp_path / "plain"), weights(tmp_path / name))
    one, other = (next((tmp_path / name / "sample").glob("*.png")) for name in ("plain", "swapped"))
    assert Image.open(one).tobytes() == Image.open(other).tobytes()


@pytest.mark.slow
def test_swapped_blocks_of_whole_models_change_no_number(tmp_path: Path, made: MadeHunyuan, dataset: Path) -> None:
    whole = Whole("hunyuan_image_train", HUNYUAN_IMAGE, made)
    options = {"fused_backward_pass": True, "max_grad_norm": 0, "optimizer_type": "Adafactor"}
    options |= {"optimizer_args": ["relative_step=False"], "cache_latents": True}
    whole.train(dataset, tmp_path / "plain", **options, gradient_checkpointing=True)
    whole.train(dataset, tmp_path / "swapped", **options, blocks_to_swap=4)
    assert_equal(weights(tmp_path / "plain"), weights(tmp_path / "swapped"))
    before = load_file(made.path)
    moved = {name for name, tensor in weights(tmp_path / "plain").items() if not torch.equal(tensor, before[name])}
    assert any(name.startswith("double_blocks.0.") for name in moved) and any("single_blocks.5." in n for n in moved)


def test_too_many_swapped_blocks_are_named(
    tmp_path: Path, made: MadeHunyuan, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        Tiny(HUNYUAN_IMAGE, made).train(dataset, tmp_path, blocks_to_swap=5)
    assert "--blocks_to_swap 5: the model has 4 and 6 blocks, of which 4 can be swapped" in capsys.readouterr().err


@pytest.mark.parametrize(
    "block",
    [pytest.param(0, id="a scale for each weight"), pytest.param(8, id="for each 8 inputs", marks=pytest.mark.slow)],
)
def test_files_in_fp8_with_scales_are_their_weights(
    tmp_path: Path, made: MadeHunyuan, dataset: Path, block: int
) -> None:
    """The transformer and both text encoders, as ComfyUI publishes them: numbers times scales."""
    runs = {name: tmp_path / name for name in ("scaled", "plain")}
    for folder in runs.values():
        folder.mkdir()
    parts = {"path": "hunyuan", "text_encoder": "qwen", "byt5": "byt5"}
    models = dict.fromkeys(runs, made)
    for field, stem in parts.items():
        files = {name: folder / f"{stem}.safetensors" for name, folder in runs.items()}
        write_both(
            getattr(made, field), files["scaled"], files["plain"], block=block,
            chosen=lambda name: "_blocks." in name or "layers." in name or "block." in name,
        )  # fmt: skip
        models = {name: replace(models[name], **{field: files[name]}) for name in runs}
    for name, folder in runs.items():
        Tiny(HUNYUAN_IMAGE, models[name]).train(dataset, folder / "out", max_train_steps=2)
    assert_equal(*(weights(folder / "out") for folder in runs.values()))


def test_adapters_with_comfyui_names_are_read(
    tmp_path: Path, made: MadeHunyuan, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training reads them, and so do the tools, which know the model from the metadata or from its widths."""
    tiny = Tiny(HUNYUAN_IMAGE, made)
    tiny.train(dataset, tmp_path / "first", max_train_steps=2)
    own, theirs = tmp_path / "first" / "tiny.safetensors", tmp_path / "comfyui.safetensors"
    assert comfyui.main(comfyui.setup_parser().parse_args([str(own), str(theirs)])) == 0
    assert any(name.endswith("img_mlp_0.lora_up.weight") for name in load_file(theirs))
    lora_tool.main(lora_tool.setup_parser().parse_args(["show", str(theirs)]))
    assert "HunyuanImage-2.1, kohya names" in capsys.readouterr().out
    for name, file in (("own", own), ("theirs", theirs)):
        more = {"network_weights": file, "dim_from_weights": True, "network_dim": None, "network_alpha": None}
        tiny.train(dataset, tmp_path / name, **more)
    assert_equal(weights(tmp_path / "own"), weights(tmp_path / "theirs"))


def test_adapters_of_another_model_with_these_names_are_refused(
    tmp_path: Path, made: MadeHunyuan, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """ComfyUI's names are those of FLUX.1; the metadata of such a file tell, and without them its widths."""
    flux = Tiny(FLUX, FLUX.make(tmp_path / "flux"))
    flux.train(dataset, tmp_path / "other", network_train_unet_only=True, max_train_steps=1)
    file = tmp_path / "other" / "tiny.safetensors"
    wide = {
        name: torch.zeros(tensor.shape[0], 3072) if name.endswith("lora_down.weight") else tensor
        for name, tensor in load_file(file).items()
    }
    save_file(wide, tmp_path / "wide.safetensors")
    for path, words in (
        (file, "it was made for FLUX.1 (ss_base_model_version is flux1), which this model is not"),
        (
            tmp_path / "wide.safetensors",
            "[2, 3072] in the file and [2, 32] in this network; it was made for another model",
        ),
    ):
        more = {"network_weights": path, "dim_from_weights": True, "network_dim": None, "network_alpha": None}
        with pytest.raises(SystemExit):
            Tiny(HUNYUAN_IMAGE, made).train(dataset, tmp_path / "out", **more)
        assert words in capsys.readouterr().err
