"""Every published option of ``gen_img.py`` and every option of its prompts does something, as a user gives it."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import gen_img
from library.inference.features import prompt_options
from library.inference.prompt_line import IMAGE_OPTIONS
from tests.fixtures.drawn import pixels
from tests.fixtures.runs import ROOT
from tests.fixtures.tiny_sd import MadeCheckpoint, make_tiny_sd
from tests.fixtures.tiny_sdxl import make_tiny_sdxl

pytestmark = pytest.mark.usefixtures("own_root_logger")

SCRIPTS = ("gen_img", "sdxl_gen_img", "gen_img_diffusers")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, MadeCheckpoint]:
    """The tiny models, and beside them another one's VAE, an image and a map of regions."""
    folder = tmp_path_factory.mktemp("models")
    make_tiny_sd(folder / "other.safetensors", seed=7)
    values = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(values).resize((64, 64)).save(folder / "image.png")
    colors = np.zeros((64, 64, 3), np.uint8)
    colors[:, :32], colors[:, 32:] = (255, 0, 0), (255, 255, 0)
    Image.fromarray(colors).save(folder / "regions.png")
    return {
        "sd": make_tiny_sd(folder / "sd.safetensors"),
        "xl": make_tiny_sdxl(folder / "xl.safetensors"),
        "ckpt": make_tiny_sdxl(folder / "xl.ckpt"),
    }


def generate(model: MadeCheckpoint, out: Path, *words: object) -> list[np.ndarray]:
    """The images of a command line, in order; later options win."""
    flags: dict[str, list[str]] = {
        "--ckpt": [str(model.path)], "--tokenizer_cache_dir": [str(model.tokenizer_cache_dir)], "--outdir": [str(out)],
        "--W": ["64"], "--H": ["64"], "--steps": ["4"], "--seed": ["1"], "--sequential_file_name": [],
        "--console_log_simple": [],
    }  # fmt: skip
    flag = ""
    for word in (str(word).replace("{}", str(model.path.parent)) for word in words):
        if word.startswith("--"):
            flag, flags[word] = word, []
        else:
            flags[flag].append(word)
    given = [word for flag, values in flags.items() for word in (flag, *values)]
    gen_img.main(gen_img.setup_parser().parse_args(given))
    return [pixels(path) for path in sorted(out.iterdir())]


def differ(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape != other.shape or int(np.abs(one - other).max()) > 0


#: what the command lines below begin with -> (model, words)
BASES = {
    "plain": ("sd", "--prompt cat"),
    "negative": ("sd", "--prompt=cat --n dog"),
    "from image": ("sd", "--prompt cat --image_path {}/image.png --highres_fix_scale 0.5 --highres_fix_steps 4"),
    "highres": ("sd", "--prompt cat --W 128 --H 128 --highres_fix_scale 0.5 --highres_fix_steps 4"),
    "shrunk": ("sd", "--prompt cat --W 128 --H 128 --ds_depth_1 1"),
    "grown": ("sd", "--prompt cat --W 256 --H 256 --sampler euler_a --steps 6 --gradual_latent_timesteps 900"),
    "xl": ("xl", "--prompt cat"),
    "regions": ("sd", "--prompt=cat AND dog --mask_path {}/regions.png"),
}
#: options that change the image, behind a base
CHANGING = {
    "plain": (
        "--vae {}/other.safetensors", "--clip_skip 2", "--scale 3", "--steps 3", "--sampler euler", "--W 72", "--H 72",
        "--seed 2", "--image_path {}/image.png", "--ds_depth_1 1", "--highres_fix_scale 0.5 --W 128",
        "--noise_offset_prob 1 --noise_offset_range 0.5 0.5", "--pyramid_noise_prob 1",
        "--force_scheduler_zero_steps_offset",
    ),
    "negative": ("--negative_scale 2",),
    "from image": ("--highres_fix_strength 0.3",),
    "highres": ("--highres_fix_latents_upscaling", "--highres_fix_steps 2", "--strength 0.3"),
    "shrunk": (
        "--ds_timesteps_1 900", "--ds_ratio 0.25", "--ds_depth_2 0 --ds_timesteps_2 100", "--ds_depth_1 0",
    ),
    "grown": (
        "--gradual_latent_ratio 0.25", "--gradual_latent_ratio_step 0.5", "--gradual_latent_every_n_steps 1",
        "--gradual_latent_s_noise 1.5", "--gradual_latent_unsharp_params 3,0.5,0.5,1", "--gradual_latent_timesteps 300",
    ),
    "xl": (
        "--original_height 512", "--original_width 512", "--original_height_negative 512",
        "--original_width_negative 512", "--crop_top 32", "--crop_left 32",
    ),
    "regions": ("--network_regional_mask_max_color_codes 2",),
}  # fmt: skip


def words_of(text: str) -> list[str]:
    """``--prompt=cat --n dog`` is one option with all that follows up to the next long option of the script."""
    if text.startswith("--prompt="):
        prompt, mark, rest = text.removeprefix("--prompt=").partition(" --mask_path")
        return ["--prompt", prompt, *f"--mask_path{rest}".split()] if mark else ["--prompt", prompt]
    return text.split()


@pytest.mark.parametrize("base", BASES)
def test_each_option_changes_the_image(models: dict[str, MadeCheckpoint], tmp_path: Path, base: str) -> None:
    model, words = models[BASES[base][0]], words_of(BASES[base][1])
    (plain,) = generate(model, tmp_path / "plain", *words)
    found = {}
    for number, more in enumerate(CHANGING[base]):
        (found[more],) = generate(model, tmp_path / str(number), *words, *more.split())
    assert not [more for more, image in found.items() if not differ(plain, image)]


#: the beginning of prompts, and options of prompts that change the image behind it, for which command line
PROMPTED: Sequence[tuple[str, str, str, Sequence[str]]] = (
    (
        "sd",
        "",
        "cat",
        ("--n dog", "--w 72", "--h 72", "--s 3", "--d 2", "--l 3", "--dsd1 1"),
    ),
    ("sd", "", "cat --n dog", ("--nl 2",)),
    ("sd", "", "cat --dsd1 1 --w 128", ("--dsd2 0 --dst2 100", "--dst2 100 --dsd2 1", "--dst1 900", "--dsr 0.25")),
    ("sd", "--image_path {}/image.png", "cat", ("--t 0.3",)),
    (
        "sd",
        "--sampler euler_a --steps 6 --W 256 --H 256",
        "cat --glt 900",
        ("--glr 0.25", "--gls 0.5", "--gle 1", "--glsn 1.5", "--glus 3,0.5,0.5,1", "--glt 300"),
    ),
    ("xl", "", "cat", ("--ow 512", "--oh 512", "--nw 512", "--nh 512", "--ct 32", "--cl 32")),
)
#: options of prompts whose effect other tests show -> a file of tests, and what it calls the option
ELSEWHERE = {
    "am": ("tests/entry/test_gen_img.py", "--am 0.5"),
    "f": ("tests/entry/test_gen_img.py", "--f own.png"),
    "c": ("tests/inference/test_image_guidance.py", "clip_prompt"),
}


@pytest.mark.parametrize("case", PROMPTED, ids=lambda case: f"{case[0]} {case[2]}")
def test_each_option_of_a_prompt_changes_the_image(
    models: dict[str, MadeCheckpoint], tmp_path: Path, case: tuple[str, str, str, Sequence[str]]
) -> None:
    """All lines in one run: an option of one line has no effect on the next, which is the first one again."""
    model, words, beginning, options = case
    lines = [f"{beginning} --d 1"]
    for option in options:
        lines += [f"{beginning} --d 1 {option}", f"{beginning} --d 1"]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    images = generate(
        models[model], tmp_path / "out", *words.split(), "--from_file", tmp_path / "prompts.txt", "--batch_size", 2
    )
    assert len(images) == len(lines)
    plain = images[0]
    assert not [option for option, image in zip(options, images[1::2], strict=True) if not differ(plain, image)]
    # with the same neighbours in the batch or others
    assert all(int(np.abs(plain - image).max()) <= 1 for image in images[2::2])


def test_every_published_option_is_tried() -> None:
    tests = "".join(path.read_text() for path in (ROOT / "tests" / "entry").glob("test_gen_img*.py"))
    tests += (ROOT / "tests/inference/test_image_guidance.py").read_text()
    published = set()
    for script in SCRIPTS:
        file = ROOT / "tests" / "compat" / "data" / "cli" / f"{script}.json"
        published |= {option["dest"] for option in json.loads(file.read_text())["options"]} if file.exists() else set()
    assert len(published) > 80
    assert not [name for name in published if not re.search(rf"\b{name}\b", tests)]
    tried = " ".join(option for *_, options in PROMPTED for option in options).split()
    names = {option.name for option in (*IMAGE_OPTIONS, *prompt_options())}
    assert names == {word[2:] for word in tried if word.startswith("--")} | ELSEWHERE.keys()
    assert all(text in (ROOT / file).read_text() for file, text in ELSEWHERE.values())


def test_words_on_the_model_the_log_and_attention(
    models: dict[str, MadeCheckpoint], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log.txt"
    sdxl = ("--prompt", "cat", "--sdxl", "--console_log_file", log)
    (image,) = generate(models["ckpt"], tmp_path / "a", *sdxl)  # a pickled file does not say that it is SDXL
    assert image.shape == (64, 64, 3)
    assert "image 1 of 1" in log.read_text()
    capsys.readouterr()
    generate(models["sd"], tmp_path / "b", "--prompt", "cat", "--console_log_level", "ERROR")
    assert "image 1 of 1" not in capsys.readouterr().err and logging.getLogger().level == logging.ERROR
    for words, said in (
        (("--xformers",), "xformers"),
        (("--diffusers_xformers",), "xformers"),
        (("--network_args", "a=1"), "--network_args"),
    ):
        with pytest.raises(SystemExit, match="2"):
            generate(models["sd"], tmp_path / "c", "--prompt", "cat", *words)
        assert said in capsys.readouterr().err
    assert not (tmp_path / "c").exists()
