"""Further features of ``gen_img.py``, as a user runs it: prompt modules, growing latents, noise, strips, upscalers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from library.inference.latent_upscaler import LatentUpscaler
from tests.fixtures.drawn import pixels, text_of
from tests.fixtures.runs import Finished, run_script
from tests.fixtures.tiny_sd import MadeCheckpoint, Sizes, make_tiny_sd
from tests.fixtures.tiny_sdxl import make_tiny_sdxl

MODULE = """
class Prompter:
    def __init__(self, args):
        self.words = args.prompter_module_args.split(",")

    def __call__(self, args, models, rng, seed, index, step):
        if index == len(self.words):
            return None
        return f"{self.words[index]} {rng.randint(0, 9)} --s {step + 2}"

    def shuffle(self):
        self.words = self.words[::-1]


def get_prompter(args, models, networks):
    assert models.denoiser is not None and networks == []
    return Prompter(args)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> MadeCheckpoint:
    return make_tiny_sd(tmp_path_factory.mktemp("tiny") / "model.safetensors")


def draw(model: MadeCheckpoint, out: Path, *arguments: object) -> Finished:
    usual = ("--ckpt", model.path, "--tokenizer_cache_dir", model.tokenizer_cache_dir, "--outdir", out)
    more = ("--console_log_simple", "--sequential_file_name", "--seed", 1)
    sizes = () if "--W" in arguments else ("--W", 64, "--H", 64)
    steps = () if "--steps" in arguments else ("--steps", 3)
    return run_script("gen_img.py", *usual, *more, *sizes, *steps, *arguments)


def images(finished: Finished, out: Path) -> list[np.ndarray]:
    assert finished.code == 0, finished.text
    return [pixels(path) for path in sorted(out.iterdir())]


def test_prompts_of_a_module(model: MadeCheckpoint, tmp_path: Path) -> None:
    (tmp_path / "prompter.py").write_text(MODULE)
    words = ("--from_module", tmp_path / "prompter.py", "--prompter_module_args", "cat,dog", "--n_iter", 2)
    assert len(images(draw(model, tmp_path / "out", *words, "--shuffle_prompts"), tmp_path / "out")) == 4
    texts = [text_of(path) for path in sorted((tmp_path / "out").iterdir())]
    assert [text["prompt"].split()[0] for text in texts] == ["dog", "cat", "cat", "dog"]
    assert [text["steps"] for text in texts] == ["2", "3", "4", "5"] and len({text["seed"] for text in texts}) == 4
    draw(model, tmp_path / "again", *words, "--shuffle_prompts")
    assert [text_of(path) for path in sorted((tmp_path / "again").iterdir())] == texts
    (tmp_path / "wrong.py").write_text("def other(): pass")
    finished = draw(model, tmp_path / "none", "--from_module", tmp_path / "wrong.py")
    assert finished.code == 2 and "it has no function get_prompter" in finished.err


def test_growing_latents_other_noise_and_emphasis(model: MadeCheckpoint, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("(cat:1.5) BREAK dog --d 1\n(cat:1.5) BREAK dog --d 1 --glt 800 --glr 0.5 --gls 0.5 --gle 1\n")
    words = ("--from_file", prompts, "--sampler", "euler_a", "--max_embeddings_multiples", 2, "--W", 128, "--H", 128)
    plain, grown = images(draw(model, tmp_path / "a", *words), tmp_path / "a")
    assert plain.shape == grown.shape == (128, 128, 3) and np.abs(plain - grown).max() > 1
    assert text_of(tmp_path / "a" / "im_000002.png")["gradual_latent_timesteps"] == "800"
    noise = ("--pyramid_noise_prob", 1, "--pyramid_noise_discount_range", 0.3, 0.5, "--noise_offset_prob", 1)
    other = (*words, *noise, "--noise_offset_range", 0.1, 0.2, "--emb_normalize_mode", "none", "--vae_slices", 4)
    noisy, _ = images(draw(model, tmp_path / "b", *other), tmp_path / "b")
    assert np.abs(plain - noisy).max() > 1
    modes = []
    for mode in ("original", "none", "abs"):
        one = ("--prompt", "(cat:1.8) dog --d 1", "--emb_normalize_mode", mode, "--force_scheduler_zero_steps_offset")
        modes += images(draw(model, tmp_path / mode, *one, "--scale", 20), tmp_path / mode)
    assert len({image.tobytes() for image in modes}) == 3


#: an example of the guide to ControlNet-LLLite
LONG = (
    "{portrait|digital art|anime screen cap|detailed illustration} of 1girl, "
    "{standing|sitting|walking|running|dancing} on {classroom|street|town|beach|indoors|outdoors}, "
    "{looking at viewer|looking away|looking at another}, {in|wearing} {shirt and skirt|school uniform|casual wear} "
    "{ |, dynamic pose}, (solo), teen age, {0-1$$smile,|blush,|kind smile,|expression less,|happy,|sadness,} "
    "{0-1$$upper body,|full body,|cowboy shot,|face focus,} trending on pixiv, "
    "{0-2$$depth of fields,|8k wallpaper,|highly detailed,|pov,} {0-1$$summer, |winter, |spring, |autumn, } "
    "beautiful face { |, from below|, from above|, from side|, from behind|, from back} "
    "--n nsfw, bad face, lowres, low quality, worst quality, low effort, watermark, signature, ugly, poorly drawn"
)


def test_the_long_example_of_choices(tmp_path: Path) -> None:
    model = make_tiny_sdxl(tmp_path / "xl.safetensors")
    words = ("--n_iter", 1, "--scale", 10, "--steps", 2, "--original_width", 2048, "--original_height", 2048, "--bf16")
    more = ("--sampler", "ddim", "--batch_size", 4, "--vae_batch_size", 2, "--images_per_prompt", 6)
    compiled = ("--torch_compile", "--dynamo_backend", "eager", "--vae_tiling", "--max_embeddings_multiples", 3)
    finished = draw(model, tmp_path / "out", *words, *more, *compiled, "--prompt", LONG)
    assert len(images(finished, tmp_path / "out")) == 6
    texts = [text_of(path) for path in sorted((tmp_path / "out").iterdir())]
    assert len({text["prompt"] for text in texts}) == 6 and not any("{" in text["prompt"] for text in texts)
    assert {text["negative_prompt"] for text in texts} == {LONG.partition("--n ")[2]}


def test_strength_0_upscalers_and_inpainting_models(model: MadeCheckpoint, tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file(LatentUpscaler(8, 8).state_dict(), tmp_path / "upscaler.safetensors")
    fix = ("--highres_fix_scale", 0.5, "--highres_fix_steps", 2, "--highres_fix_upscaler", "tools.latent_upscaler")
    weights = ("--highres_fix_upscaler_args", f"weights={tmp_path / 'upscaler.safetensors'}", "--W", 128, "--H", 128)
    (large,) = images(draw(model, tmp_path / "large", "--prompt", "cat --d 1", *fix, *weights), tmp_path / "large")
    assert large.shape == (128, 128, 3)
    source = tmp_path / "large" / "im_000001.png"
    again = ("--prompt", "dog", "--image_path", source, "--strength", 0)
    found = [images(draw(model, tmp_path / n, *again), tmp_path / n)[0] for n in "xy"]
    assert np.array_equal(found[0], found[1]) and found[0].shape == (64, 64, 3)
    inpainting = make_tiny_sd(tmp_path / "inpainting.safetensors", sizes=Sizes(in_channels=9))
    masked = ("--prompt", "cat --d 1", "--image_path", source, "--mask_path", source)
    (one,) = images(draw(inpainting, tmp_path / "i", *masked), tmp_path / "i")
    (two,) = images(draw(inpainting, tmp_path / "t", "--prompt", "cat --d 1"), tmp_path / "t")
    assert one.shape == two.shape == (64, 64, 3) and text_of(tmp_path / "i" / "im_000001.png")["input_channels"] == "9"
