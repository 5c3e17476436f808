"""``sdxl_minimal_inference.py`` on tiny files: once as a user starts it, otherwise in this process."""

from __future__ import annotations

import importlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sdxl_minimal_inference
from library.architectures.sdxl import SDXL
from library.architectures.sdxl.inference import INFERENCE
from library.diffusion.samplers import create_scheduler_for
from library.errors import UserError
from library.inference.minimal_script import check_options, generate_with
from tests.fixtures.adapted import randomize
from tests.fixtures.drawn import pixels, text_of
from tests.fixtures.file_tools import check_option
from tests.fixtures.runs import ROOT, run_script
from tests.fixtures.tiny_sd import MadeCheckpoint
from tests.fixtures.tiny_sdxl import make_tiny_sdxl

PUBLISHED = json.loads((ROOT / "tests/compat/data/cli/sdxl_minimal_inference.json").read_text())["options"]
PROMPT, SECOND = "a photo of the cat", "red dog on a mat"

pytestmark = [
    pytest.mark.usefixtures("own_root_logger"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeCheckpoint:
    """A Diffusers folder, which diffusers itself can load, too."""
    return make_tiny_sdxl(tmp_path_factory.mktemp("sdxl") / "model", layout="diffusers")


def network_file(made: MadeCheckpoint, module: str, path: Path) -> Path:
    """Write adapters of all parts with random weights."""
    given = {"vae": None, "tokenizer_cache_dir": str(made.tokenizer_cache_dir)}
    checkpoint = SDXL.inspect(str(made.path), v_parameterization=False, **given)
    encoders = SDXL.load_text_encoders(checkpoint, dtype=torch.float32, device="cpu")
    denoiser = SDXL.load_denoiser(checkpoint, dtype=torch.float32, device="cpu")
    create = importlib.import_module(module).create_network
    randomize(create(1.0, 4, 4.0, None, encoders, denoiser), 0.2).save_weights(str(path), None, {})
    return path


@pytest.fixture(scope="module")
def lora(made: MadeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return network_file(made, "networks.lora", tmp_path_factory.mktemp("lora") / "lora.safetensors")


def words(made: MadeCheckpoint, out: Path, *more: object, **changed: object) -> list[str]:
    """A small image; ``changed`` replaces values, or with None drops them."""
    values = {
        "ckpt_path": made.path, "tokenizer_cache_dir": made.tokenizer_cache_dir, "output_dir": out, "prompt": PROMPT,
        "width": 64, "height": 64, "steps": 3, "seed": 1, **changed,
    }  # fmt: skip
    given = [word for name, value in values.items() if value is not None for word in (f"--{name}", value)]
    return [str(word) for word in (*given, *more)]


def draw(made: MadeCheckpoint, out: Path, *more: object, lines: str = "", **changed: object) -> list[Path]:
    """A run in this process; ``lines`` are typed."""
    parsed = sdxl_minimal_inference.setup_parser().parse_args(words(made, out, *more, **changed))
    return generate_with(INFERENCE, INFERENCE.options.from_args(parsed), io.StringIO(lines))


def difference(first: Path, second: Path) -> int:
    return int(np.abs(pixels(first) - pixels(second)).max())


def test_flags_are_the_published_ones() -> None:
    actions = {a.dest: a for a in sdxl_minimal_inference.setup_parser()._actions if a.dest != "help"}
    for option in PUBLISHED:
        action = actions[option["dest"]]
        if isinstance(action.default, tuple):
            action.default = list(action.default)
        assert set(option["flags"]) <= set(action.option_strings)
        action.option_strings = option["flags"]  # ours has further spellings
        check_option(action, option)


def test_the_published_command_in_a_process_of_its_own(made: MadeCheckpoint, lora: Path, tmp_path: Path) -> None:
    more = ("--lora_weights", f"{lora};0.5", "--prompt2", SECOND, "--negative_prompt", "dog")
    done = run_script(
        "sdxl_minimal_inference.py", *words(made, tmp_path, *more, "--bf16", "--offload", width=72), fresh=True
    )
    assert done.code == 0, done.text
    (image,) = tmp_path.iterdir()
    assert pixels(image).shape == (64, 72, 3)
    expected = {"prompt": PROMPT, "prompt2": SECOND, "negative_prompt": "dog", "scale": "7", "sampler": "euler"}
    assert text_of(image).items() >= {**expected, "network": "lora.safetensors:0.5"}.items()


@pytest.mark.parametrize("second", [None, SECOND])
def test_images_are_those_of_diffusers(made: MadeCheckpoint, tmp_path: Path, second: str | None) -> None:
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(made.path, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = create_scheduler_for("euler", v_prediction=False)
    prompts: dict[str, Any] = {"prompt": PROMPT, "negative_prompt": "dog"}
    if second is not None:
        prompts["prompt_2"] = second
    (expected,) = pipeline(
        **prompts, width=64, height=64, num_inference_steps=3, guidance_scale=7.0,
        generator=torch.Generator().manual_seed(1),
    ).images  # fmt: skip
    (image,) = draw(made, tmp_path, prompt2=second, negative_prompt="dog")
    assert np.abs(pixels(image) - np.asarray(expected).astype(np.int16)).max() <= 1


def test_each_option_acts(made: MadeCheckpoint, lora: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = make_tiny_sdxl(tmp_path / "other" / "model", layout="diffusers", seed=3)
    (plain,) = draw(made, tmp_path / "plain")
    for number, same in enumerate(({"prompt2": PROMPT}, {"sampler": "euler", "cfg_scale": 7})):
        (image,) = draw(made, tmp_path / f"same{number}", "--offload", **same)
        assert difference(plain, image) == 0, same
    changes: list[tuple[dict[str, Any], tuple[object, ...]]] = [
        *(({name: value}, ()) for name, value in {
            "prompt": "a dog", "prompt2": SECOND, "negative_prompt": "dog", "cfg_scale": 2, "seed": 2, "steps": 4,
            "sampler": "ddim", "width": 72, "height": 72, "vae": other.path / "vae", "lora_weights": lora,
        }.items()),
        *(({}, (f"--{switch}",)) for switch in ("bf16", "fp16")),
    ]  # fmt: skip
    unchanged = []
    for number, (changed, switches) in enumerate(changes):
        (image,) = draw(made, tmp_path / str(number), *switches, **changed)
        if pixels(image).shape == pixels(plain).shape and difference(image, plain) == 0:
            unchanged.append((changed, switches))
    assert not unchanged


@pytest.mark.parametrize("module", ["networks.lora", "networks.oft"])
def test_merged_adapters_give_the_same_image_and_change_it(made: MadeCheckpoint, tmp_path: Path, module: str) -> None:
    file = network_file(made, module, tmp_path / "network.safetensors")
    (plain,) = draw(made, tmp_path / "plain")
    (beside,) = draw(made, tmp_path / "beside", "--lora_weights", file)
    (merged,) = draw(made, tmp_path / "merged", "--lora_weights", file, "--merge_lora_weights", "--offload")
    assert difference(beside, merged) <= 1 < difference(plain, beside)


def test_a_model_that_predicts_v(tmp_path: Path) -> None:
    """A file says so by a tensor; its images are others than those of the same weights that predict noise."""
    for name in ("v", "noise"):
        (tmp_path / name).mkdir()
    v = make_tiny_sdxl(tmp_path / "v" / "model.safetensors", v_prediction=True)
    noise = make_tiny_sdxl(tmp_path / "noise" / "model.safetensors")
    with pytest.raises(UserError, match="--v_parameterization"):
        draw(v, tmp_path / "out")
    (one,) = draw(v, tmp_path / "out", "--v_parameterization")
    (other,) = draw(noise, tmp_path / "out")
    assert difference(one, other) > 1


def test_typed_prompts(made: MadeCheckpoint, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line may have a second prompt of its own, or none; without the option it has that of the command line."""
    lines = f"{PROMPT} --p {SECOND} --n dog --d 5 --s 2 --w 72 --m 0.5\n{PROMPT}\n{PROMPT} --p -\n{PROMPT} --w 65\n\n"
    more = ("--interactive", "--lora_weights", lora)
    typed = draw(made, tmp_path / "typed", *more, lines=lines, prompt=None, prompt2="a dog")
    assert len(typed) == 3 and "width 65: must be a multiple of 8" in capsys.readouterr().err
    own = {"negative_prompt": "dog", "seed": 5, "steps": 2, "width": 72, "lora_weights": f"{lora};0.5"}
    common = {"lora_weights": lora}
    for image, second, given in zip(typed, (SECOND, "a dog", ""), (own, common, common), strict=True):
        (same,) = draw(made, tmp_path / "same", prompt2=second or None, **given)
        assert difference(image, same) == 0, second
        assert text_of(image)["prompt2"] == second
    assert difference(typed[1], typed[2]) > 0


def test_what_is_cut_is_told_of_each_text(
    made: MadeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(made, tmp_path, prompt2="dog " * 76 + "photo of the cat")
    said = capsys.readouterr().err
    assert said.count("is cut: it has 80 tokens, of which the text encoder reads 75") == 1
    assert 'it loses "dog photo of the cat"' in said


def test_all_mistakes_are_named_before_anything_is_loaded(made: MadeCheckpoint, tmp_path: Path) -> None:
    given = words(
        made, tmp_path, "--fp16", "--bf16", "--merge_lora_weights", width=65, steps=0, cfg_scale="nan", seed=-1
    )
    parsed = sdxl_minimal_inference.setup_parser().parse_args(given)
    with pytest.raises(UserError) as error:
        check_options(INFERENCE, INFERENCE.options.from_args(parsed))
    for word in (
        "--fp16 and --bf16 exclude each other", "--width 65: must be a multiple of 8", "--steps 0", "--cfg_scale nan",
        "--seed -1", "--merge_lora_weights: there is nothing to merge",
    ):  # fmt: skip
        assert word in str(error.value), word
