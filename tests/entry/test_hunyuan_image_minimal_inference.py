"""``hunyuan_image_minimal_inference.py`` on tiny files: once as a user starts it, otherwise in this process."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import hunyuan_image_minimal_inference
from library.architectures.hunyuan_image.inference import INFERENCE
from library.errors import UserError
from library.inference.minimal_script import check_options, generate_with
from tests.fixtures.drawn import pixels, text_of
from tests.fixtures.runs import ROOT, lora_arguments, make_images, run_script, train_here, write_dataset
from tests.fixtures.tiny_hunyuan_image import HunyuanFileSizes, MadeHunyuan, make_tiny_hunyuan

PUBLISHED = json.loads((ROOT / "tests/compat/data/cli/hunyuan_image_minimal_inference.json").read_text())["options"]
OURS = {"tokenizer_cache_dir", "merge_lora_weights", "dtype", "offload", "vae_tiling"}
#: required here, where the published script ends with an error later; a list, as one number failed for a LoRA
CHANGED = {"dit": (None, True), "text_encoder": (None, False), "lora_multiplier": ([1.0], False)}
PROMPT = 'a photo of the cat with the text "dog"'
LAYER = "lora_unet_double_blocks_0_img_attn_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeHunyuan:
    return make_tiny_hunyuan(tmp_path_factory.mktemp("hunyuan"))


@pytest.fixture(scope="module")
def lora(made: MadeHunyuan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained by the script, then strengthened: what is trained in a few steps is hard to see."""
    folder = tmp_path_factory.mktemp("lora")
    dataset = write_dataset(folder / "data.toml", make_images(folder / "images"))
    module = {"network_module": "networks.lora_hunyuan_image", "max_train_steps": 2}
    train_here(*lora_arguments(made, dataset, folder, **module), script="hunyuan_image_train_network")
    weights = {name: t * 200 if "lora_up" in name else t for name, t in load_file(folder / "tiny.safetensors").items()}
    save_file(weights, folder / "lora.safetensors")
    return folder / "lora.safetensors"


def words(made: MadeHunyuan, out: Path, *more: object, **changed: object) -> list[str]:
    """A small image in float32; ``changed`` replaces values, or with None drops them."""
    values = {
        "dit": made.path,
        "text_encoder": made.text_encoder,
        "byt5": made.byt5,
        "vae": made.vae,
        "tokenizer_cache_dir": made.tokenizer_cache_dir,
        "save_path": out,
        "prompt": PROMPT,
        "infer_steps": 2,
        "seed": 1,
        "dtype": "fp32",
        **changed,
    }
    given = [word for name, value in values.items() if value is not None for word in (f"--{name}", value)]
    size = () if "--image_size" in more else ("--image_size", 64, 96)
    return [str(word) for word in (*given, *size, *more)]


def draw(made: MadeHunyuan, out: Path, *more: object, lines: str = "", **changed: object) -> list[Path]:
    """A run in this process; ``lines`` are what is typed."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers = []  # so that setting up the console does not close pytest's
    try:
        parsed = hunyuan_image_minimal_inference.setup_parser().parse_args(words(made, out, *more, **changed))
        return generate_with(INFERENCE, INFERENCE.options.from_args(parsed), io.StringIO(lines))
    finally:
        root.handlers[:], root.level = handlers, level


def test_flags_are_the_published_ones() -> None:
    actions = {
        action.dest: action
        for action in hunyuan_image_minimal_inference.setup_parser()._actions
        if action.dest != "help"
    }
    assert actions.keys() - OURS == {option["dest"] for option in PUBLISHED}
    for option in PUBLISHED:
        action = actions[option["dest"]]
        default = list(action.default) if isinstance(action.default, tuple) else action.default
        expected = (option["default"], option["required"])
        if option["nargs"] == "*" and option["default"] is None:
            expected = ([], False)
        assert (default, action.required) == CHANGED.get(option["dest"], expected), option["dest"]
        assert action.nargs == (0 if option["action"] == "store_true" else option["nargs"]), option["dest"]
        assert (list(action.choices) if action.choices else None) == option["choices"], option["dest"]


def test_published_command_in_a_process_of_its_own(made: MadeHunyuan, lora: Path, tmp_path: Path) -> None:
    finished = run_script(
        "hunyuan_image_minimal_inference.py",
        *("--dit", made.path, "--text_encoder", made.text_encoder, "--byt5", made.byt5, "--vae", made.vae),
        *("--lora_weight", lora, "--lora_multiplier", "1.0", "--attn_mode", "torch"),
        *("--tokenizer_cache_dir", made.tokenizer_cache_dir, "--prompt", "A cute cartoon penguin"),
        *"--image_size 64 96 --infer_steps 2 --guidance_scale 3.5 --flow_shift 5.0 --seed 542017".split(),
        *("--save_path", tmp_path / "output_image.png", "--fp8_scaled", "--vae_chunk_size", 2, "--text_encoder_cpu"),
        fresh=True,
    )
    assert finished.code == 0, finished.text
    (image,) = tmp_path.iterdir()
    assert image.name == "output_image.png" and pixels(image).shape == (64, 96, 3)
    said = text_of(image)
    assert said["prompt"] == "A cute cartoon penguin" and said["network"] == "lora.safetensors:1"
    assert (said["apg_start_step_general"], said["flow_shift"], said["seed"]) == ("5", "5", "542017")


def test_memory_options_change_little(made: MadeHunyuan, lora: Path, tmp_path: Path) -> None:
    """And LoRA files, their strengths, and the prompt change much."""

    def image(name: str, *more: object, **changed: object) -> np.ndarray:
        (path,) = draw(made, tmp_path / name, *more, **changed)
        return pixels(path)

    plain = image("plain")
    for number, (more, most) in enumerate(
        [
            (("--offload",), 0),
            (("--vae_chunk_size", 3), 1),
            (("--attn_mode", "sdpa"), 0),
            (("--text_encoder_cpu",), 0),
            (("--fp8",), 40),
            (("--fp8_scaled",), 40),
        ]
    ):
        assert np.abs(image(f"same {number}", *more) - plain).max() <= most, more
    with_lora = image("lora", "--lora_weight", lora)
    merged = image("merged", "--lora_weight", lora, "--merge_lora_weights")
    assert np.abs(with_lora - merged).max() <= 1
    for more in (("--lora_weight", lora), ("--lora_weight", lora, "--lora_multiplier", 0.3)):
        assert np.abs(image(f"other {len(more)}", *more) - plain).max() > 1
    patterns = ("--include_patterns", "double_blocks", "single_blocks", "--exclude_patterns", "single")
    chosen = image("chosen", "--lora_weight", lora, *patterns)
    assert np.array_equal(chosen, image("chosen too", "--lora_weight", lora, "--include_patterns", "double"))
    assert np.abs(chosen - with_lora).max() > 1


def test_saved_latents_are_decoded_to_the_same_image(made: MadeHunyuan, tmp_path: Path) -> None:
    (image,) = draw(made, tmp_path / "both", "--output_type", "latent_images")
    latents = image.with_suffix(".safetensors")
    (decoded,) = draw(made, tmp_path / "later", "--latent_path", latents, prompt=None)
    assert np.array_equal(pixels(decoded), pixels(image)) and text_of(decoded) == text_of(image)
    (only,) = draw(made, tmp_path / "only", "--output_type", "latent", "--no_metadata")
    assert torch.equal(load_file(only)["latent"], load_file(latents)["latent"])
    (tiled,) = draw(made, tmp_path / "tiled", "--latent_path", latents, "--vae_tiling", "--no_metadata", prompt=None)
    assert pixels(tiled).shape == pixels(image).shape and not text_of(tiled)


def test_blocks_in_host_memory_change_nothing(tmp_path: Path) -> None:
    made = make_tiny_hunyuan(tmp_path / "model", sizes=HunyuanFileSizes(double_blocks=4, single_blocks=6))
    plain, swapped = (
        pixels(draw(made, tmp_path / name, *more, "--fp8_scaled")[0])
        for name, more in (("plain", ()), ("swapped", ("--blocks_to_swap", 3)))
    )
    assert np.array_equal(plain, swapped)


def test_tiles_cover_images_larger_than_one(made: MadeHunyuan, tmp_path: Path) -> None:
    """The published script's tiles fail."""
    size = ("--image_size", 416, 448)
    (whole,) = draw(made, tmp_path / "whole", *size, infer_steps=1)
    (tiled,) = draw(made, tmp_path / "tiled", *size, "--vae_tiling", infer_steps=1)
    assert pixels(tiled).shape == (416, 448, 3)
    assert np.abs(pixels(tiled) - pixels(whole)).mean() < 30


def test_prompts_from_files_and_keyboard(made: MadeHunyuan, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --d 5 --g 1 --fs 3\n# no prompt\na dog --s 1 --n red\n", encoding="utf-8")
    first, second = draw(made, tmp_path / "file", "--from_file", prompts, prompt=None)
    assert pixels(first).shape == (64, 64, 3) and text_of(first)["flow_shift"] == "3"
    assert (text_of(first)["seed"], text_of(second)["negative_prompt"]) == ("5", "red")
    (typed,) = draw(
        made, tmp_path / "typed", "--interactive", prompt=None, lines="a cat --w 64 --h 64 --d 5 --l 1 --fs 3\n"
    )
    assert np.array_equal(pixels(typed), pixels(first))


def test_a_prompt_that_is_its_own_negative_prompt_may_come_again(made: MadeHunyuan, tmp_path: Path) -> None:
    """Also the empty one, of a line with options alone."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("--w 64 --h 64 --s 1\n" * 2 + "a cat --w 64 --h 64 --s 1 --n a cat\n" * 2, encoding="utf-8")
    images = [pixels(path) for path in draw(made, tmp_path, "--from_file", prompts, prompt=None)]
    assert np.array_equal(images[0], images[1]) and np.array_equal(images[2], images[3])
    assert not np.array_equal(images[1], images[2])


def test_a_merged_model_is_saved(made: MadeHunyuan, lora: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged.safetensors"
    assert draw(made, tmp_path, "--lora_weight", lora, "--save_merged_model", merged, prompt=None) == [merged]
    before, after, weights = load_file(made.path), load_file(merged), load_file(lora)
    assert before.keys() == after.keys()
    up, down, alpha = (weights[f"{LAYER}.{leaf}"] for leaf in ("lora_up.weight", "lora_down.weight", "alpha"))
    name = "double_blocks.0.img_attn_proj.weight"
    torch.testing.assert_close(after[name], before[name] + up @ down * (alpha / len(down)))
    assert torch.equal(after["img_in.proj.weight"], before["img_in.proj.weight"])
    for source in (lora, made.path):
        with pytest.raises(UserError, match=r"--save_merged_model .*is one of the files that are read"):
            draw(made, tmp_path, "--lora_weight", lora, "--save_merged_model", source, prompt=None)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (("--image_size", "64", "100"), "--image_size 100: must be a multiple of 32"),
        (("--lora_multiplier", "1", "2"), "--lora_multiplier: 2 strengths for 0 files of --lora_weight"),
        (("--attn_mode", "flash"), "the package flash_attn is not installed"),
        (("--from_file", "p.txt"), "--prompt and --from_file exclude each other"),
        (("--guidance_rescale", "2"), "--guidance_rescale 2: must be 0 to 1"),
        (("--flow_shift", "0"), "--flow_shift 0: must be above 0"),
        (("--lycoris",), "--lycoris: its LoHa, LoKr"),
        (("--save_merged_model", "m.safetensors"), "there is nothing to merge"),
        (("--lora_weight", "x", "--include_patterns", "("), "not a regular expression"),
        (("--vae_chunk_size", "0"), "--vae_chunk_size 0"),
    ],
)
def test_mistakes_are_named_before_anything_is_loaded(
    made: MadeHunyuan, tmp_path: Path, more: tuple[str, ...], text: str
) -> None:
    parsed = hunyuan_image_minimal_inference.setup_parser().parse_args(words(made, tmp_path / "out", *more))
    with pytest.raises(UserError) as raised:
        check_options(INFERENCE, INFERENCE.options.from_args(parsed))
    assert text in str(raised.value)


def test_files_of_other_kinds_are_named(made: MadeHunyuan, lora: Path, tmp_path: Path) -> None:
    cases = {
        "--byt5": ({"byt5": made.text_encoder}, "not a T5 encoder (it is Qwen2.5-VL); give byt5_small"),
        "--vae": ({"vae": made.byt5}, "not the VAE of HunyuanImage-2.1 (it is a T5 text encoder)"),
        "--text_encoder": ({"text_encoder": made.vae}, "not Qwen2.5-VL (it is a VAE"),
        "--dit": (
            {"dit": lora},
            "is a LoRA file, not a base model; give the base model here and this file with --lora",
        ),
        "swap": ({"blocks_to_swap": 9}, "--blocks_to_swap 9: the model has 2 and 2 blocks, of which 0 can be swapped"),
        "no byt5": ({"byt5": None}, "--byt5 is required: name byt5_small_glyphxl_fp16.safetensors"),
        "latents": ({"prompt": None, "latent_path": lora}, "not latents of this family (no tensor latent"),
    }  # fmt: skip
    for flag, (changed, text) in cases.items():
        with pytest.raises(UserError) as raised:
            draw(made, tmp_path / "out", **changed)
        assert text in str(raised.value), flag
