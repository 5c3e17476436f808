"""Known faults of the predecessor's image generation, each with the test that would show it here.

``ELSEWHERE`` names the tests of faults that other files are about; the tests below are those of the others.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import gen_img
from library.architectures.common.clip_text import load_tokenizer, tokenize
from library.architectures.common.emphasis import parse_emphasis
from library.architectures.sd import SD
from library.architectures.sdxl import SDXL
from library.config.image_settings import ImageSettings
from library.inference.dynamic_prompts import expanded, is_dynamic
from library.inference.features.start_noise import StartNoise
from library.inference.latent_upscaler import LatentUpscaler
from networks import dylora, lora, lora_fa, oft
from tests.fixtures.adapted import randomize
from tests.fixtures.control import random_controlnet, save_original
from tests.fixtures.drawn import pixels, text_of
from tests.fixtures.runs import ROOT
from tests.fixtures.tiny_sd import MadeCheckpoint, make_tiny_sd
from tests.fixtures.tiny_sdxl import make_tiny_sdxl

pytestmark = pytest.mark.usefixtures("own_root_logger")

#: fault -> file and name of its test
ELSEWHERE = {
    "gen_img_diffusers.py does not start": "tests/entry/test_gen_img.py::test_old_names",
    "SDXL is recognised by the size of the file": "tests/entry/test_gen_img_more.py::test_the_long_example_of_choices",
    "the default layer of SD 2's text encoder": "tests/inference/test_pipelines.py::test_from_text",
    "the VAE's attention is wrong without xformers": "tests/inference/test_generate.py::test_equals_diffusers_pipeline",
    "--diffusers_xformers fails": "tests/entry/test_gen_img_options.py::test_words_on_the_model_the_log_and_attention",
    "dpmsolver fails": "tests/inference/test_pipelines.py::test_from_text",
    "noise of samplers depends on the batch": "tests/inference/test_generate.py::test_image_does_not_depend_on_its_batch",
    "--seed is not that of --prompt": "tests/inference/test_plan.py::test_one_prompt_counts_up_from_the_seed",
    "--iter_same_seed": "tests/inference/test_plan.py::test_iter_same_seed_compares_prompts",
    "iterations replace each other's files":
        "tests/entry/test_gen_img.py::test_file_of_prompts_is_drawn_the_same_each_time_and_numbers_go_on",
    "--ds* and --gl* stay for later lines":
        "tests/entry/test_gen_img_options.py::test_each_option_of_a_prompt_changes_the_image",
    "choices: count above the variants": "tests/inference/test_dynamic_prompts.py::test_the_grammar",
    "enumerations are repeated": "tests/inference/test_dynamic_prompts.py::test_images_of_a_prompt_with_choices",
    "enumerations of nested groups never end":
        "tests/inference/test_dynamic_prompts.py::test_enumeration_around_and_inside_of_draws",
    "strengths of samplers with more calls than steps": "tests/inference/test_image_to_image.py::test_from_an_image_as_diffusers",
    "the level of img2img's noise": "tests/inference/test_image_to_image.py::test_from_an_image_as_diffusers",
    "batch norms of the upscaler": "tests/training/test_upscaler.py::test_it_learns_what_lanczos_loses",
    "--vae_slices fails": "tests/inference/test_vae_slices.py::test_strips_change_nothing",
    "a fourth network with regions": "tests/inference/test_regions.py::test_maps",
    "canny fails": "tests/entry/test_gen_img_control.py::test_controlnets",
    "XTI has no effect":
        "tests/entry/test_gen_img_control.py::test_each_layer_of_a_controlnet_reads_its_own_text",
}  # fmt: skip


@pytest.mark.parametrize("fault", ELSEWHERE)
def test_the_named_tests_are_there(fault: str) -> None:
    file, _, name = ELSEWHERE[fault].partition("::")
    tree = ast.parse((ROOT / file).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, MadeCheckpoint]:
    folder = tmp_path_factory.mktemp("models")
    return {"sd": make_tiny_sd(folder / "sd.safetensors"), "xl": make_tiny_sdxl(folder / "xl.safetensors")}


@pytest.fixture(scope="module")
def parts(models: dict[str, MadeCheckpoint]) -> dict[str, tuple[list[nn.Module], nn.Module]]:
    """Text encoders and U-Net of both models."""
    found = {}
    for name, family in (("sd", SD), ("xl", SDXL)):
        made = models[name]
        checkpoint = family.inspect(
            str(made.path),
            v2=False,
            v_parameterization=False,
            vae=None,
            tokenizer_cache_dir=str(made.tokenizer_cache_dir),
        )
        encoders = family.load_text_encoders(checkpoint, dtype=torch.float32, device="cpu")
        found[name] = encoders, family.load_denoiser(checkpoint, dtype=torch.float32, device="cpu")
    return found


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "hint.png"
    values = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(values).resize((64, 64)).save(path)
    return path


@pytest.fixture
def run(models: dict[str, MadeCheckpoint], tmp_path: Path) -> Callable[..., list[Path]]:
    """Runs ``gen_img.py``, and returns its files in order."""
    count = iter(range(100))

    def generate(model: str, *words: object) -> list[Path]:
        made, out = models[model], tmp_path / f"out{next(count)}"
        usual = {
            "--ckpt": made.path, "--tokenizer_cache_dir": made.tokenizer_cache_dir, "--outdir": out, "--W": 64, "--H": 64,
            "--steps": 3,
        }  # fmt: skip
        given = [word for flag, value in usual.items() if flag not in words for word in (flag, value)]
        given += ["--console_log_simple", "--sequential_file_name", *words]
        gen_img.main(gen_img.setup_parser().parse_args([str(word) for word in given]))
        return sorted(out.iterdir())

    return generate


def apart(one: Path, other: Path) -> int:
    return int(np.abs(pixels(one) - pixels(other)).max())


# ---- ControlNet ----


def test_a_controlnet_with_one_image_and_channels_last(
    run: Callable[..., list[Path]], parts: dict[str, tuple[list[nn.Module], nn.Module]], image: Path, tmp_path: Path
) -> None:
    """Both failed; so did leaving it out of the second stage with SD."""
    save_original(random_controlnet(parts["sd"][1]), tmp_path / "net.safetensors", prefix="control_model.")
    net = ("--control_net_models", tmp_path / "net.safetensors", "--guide_image_path", image)
    batch = ("--prompt", "cat --d 1,2", "--images_per_prompt", 2, "--batch_size", 2)
    plain, fast = run("sd", *batch, *net), run("sd", *batch, *net, "--opt_channels_last")
    assert [apart(*pair) <= 1 for pair in zip(plain, fast, strict=True)] == [True, True]
    fix = ("--W", 128, "--H", 128, "--highres_fix_scale", 0.5, "--highres_fix_steps", 3)
    (both,) = run("sd", "--prompt", "cat --d 1", *net, *fix)
    (first,) = run("sd", "--prompt", "cat --d 1", *net, *fix, "--highres_fix_disable_control_net")
    assert apart(both, first) > 0


def test_a_controlnet_of_sdxl_does_not_mix_the_images_of_a_batch(
    run: Callable[..., list[Path]], parts: dict[str, tuple[list[nn.Module], nn.Module]], image: Path, tmp_path: Path
) -> None:
    """The images that several ControlNets read were stacked, so that rows of prompt and negative prompt mixed."""
    other = tmp_path / "other.png"
    Image.open(image).rotate(90).save(other)
    for seed in (1, 2):
        save_file(random_controlnet(parts["xl"][1], seed).state_dict(), tmp_path / f"net{seed}.safetensors")
    net = ("--control_net_models", tmp_path / "net1.safetensors", tmp_path / "net2.safetensors")
    guides = ("--guide_image_path", image, other, other, image)
    words = ("--prompt", "cat --d 1,2", "--images_per_prompt", 2, *net, *guides)
    together, alone = run("xl", *words, "--batch_size", 2), run("xl", *words, "--batch_size", 1)
    assert all(apart(*pair) <= 1 for pair in zip(together, alone, strict=True))
    assert apart(*together) > 1


# ---- files and what they say ----


def test_both_stages_say_their_seed_and_are_named_after_the_source(run: Callable[..., list[Path]], image: Path) -> None:
    """The first stage recorded the seed minus 1, and names of sources failed in the second."""
    fix = ("--highres_fix_scale", 0.5, "--highres_fix_steps", 2, "--highres_fix_save_1st", "--image_path", image)
    found = run("sd", "--prompt", "cat --d 5", *fix, "--use_original_file_name", "--W", 128, "--H", 128)
    assert [path.name for path in found] == ["hint.png", "hint_1st.png"]
    assert [text_of(path)["seed"] for path in found] == ["5", "5"]


def test_each_image_of_a_batch_says_its_own_negative_prompt(run: Callable[..., list[Path]], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("cat --n dog --d 1\ncat --n the --d 1\ncat --d 1\n")
    found = run("sd", "--from_file", tmp_path / "prompts.txt", "--batch_size", 3)
    assert [text_of(path).get("negative_prompt", "") for path in found] == ["dog", "the", ""]


def test_images_without_a_prompt_are_named(
    run: Callable[..., list[Path]], image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They were left out of the prompts and not of the images; those of other formats failed."""
    folder = tmp_path / "images"
    folder.mkdir()
    (written,) = run("sd", "--prompt", "cat --d 1")
    (folder / "a.png").write_bytes(written.read_bytes())
    Image.open(image).save(folder / "b.jpg")
    with pytest.raises(SystemExit, match="2"):
        run("sd", "--image_path", folder)
    assert "b.jpg: its PNG texts hold no prompt; give --prompt or --from_file" in capsys.readouterr().err
    (folder / "b.jpg").unlink()
    (again,) = run("sd", "--image_path", folder)
    assert text_of(again)["prompt"] == "cat"


# ---- prompts ----


def test_braces_that_are_text() -> None:
    """A line of such braces alone failed, and full-width braces became ASCII."""
    assert not is_dynamic(r"\{a|b\}")
    assert expanded("\uff5ba\uff5d {b}", 0) == ["\uff5ba\uff5d b"]
    assert expanded("{-1$$a}", 0) == ["a"]


def test_weights_with_two_dots_are_text() -> None:
    assert parse_emphasis("(x:1.2.3)")[0][0].startswith("x")


def test_the_next_window_begins_at_break(models: dict[str, MadeCheckpoint]) -> None:
    """It was found within words, and always added a token of padding."""
    folder = next(models["sd"].tokenizer_cache_dir.iterdir())
    tokenizer = load_tokenizer(folder)

    def windows(text: str, length: int = 150) -> list[list[int]]:
        found = tokenize(tokenizer, [text], max_token_length=length, weighted=True)["input_ids"][0]
        return [row[1:-1].tolist() for row in found]

    (cat, dog), padding = tokenizer("cat dog", add_special_tokens=False).input_ids, tokenizer.pad_token_id
    first, second = windows("cat BREAK dog")
    assert first == [cat, *[padding] * 74] and second == [dog, tokenizer.eos_token_id, *[padding] * 73]
    first, second = windows("cat " * 75 + "BREAK dog")
    assert first == [cat] * 75 and second[0] == dog  # nothing to fill
    plain = tokenizer("catbreakdog", add_special_tokens=False).input_ids
    assert windows("catBREAKdog")[0][: len(plain)] == plain


def test_only_as_many_windows_as_the_texts_need(run: Callable[..., list[Path]], tmp_path: Path) -> None:
    """An image of a short prompt is the same with --max_embeddings_multiples, and does not depend on its batch."""
    lines = ["cat --d 1", f"cat {'dog ' * 80} --d 1", "cat --n the BREAK dog --d 1"]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    words = ("--from_file", tmp_path / "prompts.txt", "--max_embeddings_multiples", 3)
    short, long, broken = run("sd", *words, "--batch_size", 3)
    (plain,) = run("sd", "--prompt", lines[0])
    # matrix products of another number of rows may round otherwise, as the processor likes it
    assert apart(short, plain) <= 1 and apart(short, long) > 1
    for line, image in zip(lines[1:], (long, broken), strict=True):
        (alone,) = run("sd", "--prompt", line, "--max_embeddings_multiples", 2)
        assert apart(alone, image) <= 1


def test_escaped_braces_reach_the_model_as_braces(run: Callable[..., list[Path]]) -> None:
    (found,) = run("sd", "--prompt", r"\{cat\} --d 1")
    assert text_of(found)["prompt"] in ("{cat}", r"\{cat\}")


# ---- noise and guidance ----


def test_an_offset_of_the_noise_lies_in_its_range() -> None:
    """It was drawn from a normal distribution."""
    generation = SimpleNamespace(
        noise=torch.zeros(200, 4, 2, 2),
        settings=[
            ImageSettings("", "", 16, 16, 1, 1.0, "ddim", seed, own={"noise_offset_prob": 1.0, "noise_offset_range": (0.1, 0.3)})
            for seed in range(200)
        ],
        scheduler=SimpleNamespace(init_noise_sigma=1.0),
    )  # fmt: skip
    StartNoise().prepare(generation)  # type: ignore[arg-type]
    offsets = generation.noise[:, 0, 0, 0]
    assert torch.equal(generation.noise, offsets.view(-1, 1, 1, 1).expand_as(generation.noise))
    assert 0.1 <= float(offsets.min()) < 0.12 and 0.28 < float(offsets.max()) <= 0.3


@pytest.mark.parametrize("model", ["sd", "xl"])
def test_a_scale_of_the_negative_prompt(run: Callable[..., list[Path]], model: str) -> None:
    """It failed with a TypeError, and SDXL's sizes had two rows for three."""
    words = ("--prompt", "cat --n dog --d 1")
    (plain,), (scaled,) = run(model, *words), run(model, *words, "--negative_scale", 3)
    assert apart(plain, scaled) > 0


def test_the_upscaler_uses_the_factor_of_the_model() -> None:
    """It used that of SD 1 with every model."""

    class Vae(nn.Module):
        config = SimpleNamespace(scaling_factor=0.5)
        dtype = torch.float32

        def encode(self, images: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: images[:, [0, 1, 2, 0], ::8, ::8]))

    upscaler = LatentUpscaler(4, 2)
    nn.init.zeros_(upscaler.conv_final.weight), nn.init.zeros_(upscaler.conv_final.bias)
    found = upscaler.upscale(Vae(), [Image.new("RGB", (16, 16), "white")], None, torch.float32, 16, 16, 1, 1)
    assert torch.equal(found, torch.full((1, 4, 2, 2), 0.5))


# ---- networks ----


@pytest.mark.parametrize("module", [dylora, lora_fa, lora, oft], ids=lambda module: module.__name__)
def test_every_kind_of_network_in_regions(
    run: Callable[..., list[Path]],
    parts: dict[str, tuple[list[nn.Module], nn.Module]],
    image: Path,
    tmp_path: Path,
    module: object,
) -> None:
    """DyLoRA could not be used at all, LoRA-FA failed with regions, and so did a fourth network."""
    encoders, unet = parts["sd"]
    file = tmp_path / "network.safetensors"
    dim, alpha = (2, 0.01) if module is oft else (4, 4.0)
    network = module.create_network(1.0, dim, alpha, None, encoders[0], unet)  # type: ignore[attr-defined]
    randomize(network).save_weights(str(file), None, {"ss_network_module": module.__name__})  # type: ignore[attr-defined]
    prompt = ("--prompt", "cat AND dog AND the AND cat --d 1", "--mask_path", image)
    files = ("--network_weights", file, file, file, file)
    (plain,) = run("sd", *prompt)
    (adapted,) = run("sd", *prompt, *files, "--network_mul", 0.5, 0.5, 0.5, 0.5)
    assert apart(plain, adapted) > 0


def test_a_lora_of_sdxl_with_diffusers_names_and_in_regions(
    run: Callable[..., list[Path]], parts: dict[str, tuple[list[nn.Module], nn.Module]], image: Path, tmp_path: Path
) -> None:
    """Names were not converted, and both text encoders of a region got a share of every row."""
    from tools import lora as tool

    encoders, unet = parts["xl"]
    published, theirs = tmp_path / "published.safetensors", tmp_path / "diffusers.safetensors"
    network = randomize(lora.create_network(1.0, 4, 4.0, None, encoders, unet))
    network.save_weights(str(published), None, {"ss_network_module": "networks.lora"})
    words = ["convert", str(published), "--to", "diffusers", "--save_to", str(theirs), "--family", "sdxl"]
    tool.main(tool.setup_parser().parse_args(words))
    prompt = ("--prompt", "cat --d 1")
    (plain,) = run("xl", *prompt)
    one, other = (run("xl", *prompt, "--network_weights", path)[0] for path in (published, theirs))
    assert apart(one, other) <= 1 and apart(plain, one) > 1
    everywhere = tmp_path / "white.png"
    Image.new("RGB", (8, 8), "red").save(everywhere)
    (region,) = run("xl", *prompt, "--network_weights", published, "--mask_path", everywhere, "--scale", 1)
    (whole,) = run("xl", *prompt, "--network_weights", published, "--scale", 1)
    assert apart(region, whole) <= 1


def test_a_controlnet_reads_the_shared_text_of_regions(
    run: Callable[..., list[Path]], parts: dict[str, tuple[list[nn.Module], nn.Module]], image: Path, tmp_path: Path
) -> None:
    """It got rows of other prompts: with parts that are equal, the image is that of the prompt alone."""
    save_original(random_controlnet(parts["sd"][1]), tmp_path / "net.safetensors", prefix="control_model.")
    net = ("--control_net_models", tmp_path / "net.safetensors", "--guide_image_path", image)
    mask = tmp_path / "mask.png"
    values = np.zeros((8, 8, 3), np.uint8)
    values[:, :4], values[:, 4:] = (255, 0, 0), (0, 255, 0)
    Image.fromarray(values).save(mask)
    batch = ("--images_per_prompt", 2, "--batch_size", 2)
    parted = run("sd", "--prompt", "cat AND cat --n dog --d 1,2", "--mask_path", mask, *net, *batch)
    plain = run("sd", "--prompt", "cat --n dog --d 1,2", *net, *batch)
    assert all(apart(*pair) <= 1 for pair in zip(parted, plain, strict=True))
