"""``lumina_minimal_inference.py`` on tiny files: once as a user starts it, otherwise in this process."""

from __future__ import annotations

import importlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import lumina_minimal_inference
from library.architectures.lumina.inference import INFERENCE
from library.errors import UserError
from library.inference.minimal_script import check_options, generate_with
from tests.architectures.lumina.opened import opened
from tests.fixtures.drawn import pixels, text_of
from tests.fixtures.families import LUMINA, Tiny
from tests.fixtures.runs import ROOT, run_script, write_dataset
from tests.fixtures.tiny_lumina import MadeLumina, make_tiny_lumina

PUBLISHED = json.loads((ROOT / "tests/compat/data/cli/lumina_minimal_inference.json").read_text())["options"]
PROMPT = "a photo of the cat"

pytestmark = pytest.mark.usefixtures("own_root_logger")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeLumina:
    return make_tiny_lumina(tmp_path_factory.mktemp("lumina"))


@pytest.fixture(scope="module")
def lora(made: MadeLumina, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters with random weights on the transformer and Gemma2."""
    family, checkpoint = opened(made)
    encoders = family.load_text_encoders(checkpoint, dtype=torch.float32, device="cpu")
    denoiser = family.load_denoiser(checkpoint, dtype=torch.float32, device="cpu")
    module = importlib.import_module("networks.lora_lumina")
    network = module.create_network(1.0, 2, 1.0, None, encoders, denoiser)
    network.apply_to(encoders, denoiser, True, True)
    torch.manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    network.save_weights(path, None, {})
    return path


def words(made: MadeLumina, out: Path, *more: object, **changed: object) -> list[str]:
    """A small image in float32; ``changed`` replaces values, or with None drops them."""
    values = {
        "pretrained_model_name_or_path": made.path,
        "gemma2_path": made.gemma2,
        "ae_path": made.ae,
        "tokenizer_cache_dir": made.tokenizer_cache_dir,
        "gemma2_max_token_length": 48,
        "output_dir": out,
        "prompt": PROMPT,
        "image_width": 64,
        "image_height": 64,
        "steps": 3,
        "seed": 1,
        "dtype": "fp32",
        "gemma2_dtype": "fp32",
        "ae_dtype": "fp32",
        **changed,
    }
    switches = [f"--{name}" for name, value in values.items() if value is True]
    valued = {name: value for name, value in values.items() if value is not None and value is not True}
    given = [word for name, value in valued.items() for word in (f"--{name}", value)]
    return [str(word) for word in (*given, *switches, *more)]


def draw(made: MadeLumina, out: Path, *more: object, lines: str = "", **changed: object) -> list[Path]:
    """A run in this process; ``lines`` are typed."""
    parsed = lumina_minimal_inference.setup_parser().parse_args(words(made, out, *more, **changed))
    return generate_with(INFERENCE, INFERENCE.options.from_args(parsed), io.StringIO(lines))


def difference(first: Path, second: Path) -> int:
    return int(np.abs(pixels(first) - pixels(second)).max())


def test_flags_are_the_published_ones() -> None:
    """Gemma2 and the autoencoder need not be named: a folder or file of the whole model has its own."""
    actions = {a.dest: a for a in lumina_minimal_inference.setup_parser()._actions if a.dest != "help"}
    assert actions.keys() - {"tokenizer_cache_dir"} == {option["dest"] for option in PUBLISHED}
    for option in PUBLISHED:
        action = actions[option["dest"]]
        assert set(option["flags"]) <= set(action.option_strings), option["dest"]
        assert (list(action.default) if isinstance(action.default, tuple) else action.default) == option["default"]
        assert action.nargs == (0 if option["action"] == "store_true" else option["nargs"]), option["dest"]
        converter = "bool" if action.nargs == 0 else getattr(action.type, "__name__", "str")
        assert converter == option["type"] and action.help, option["dest"]


def test_the_published_command_in_a_process_of_its_own(made: MadeLumina, lora: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    finished = run_script(
        "lumina_minimal_inference.py",
        *("--pretrained_model_name_or_path", made.path, "--gemma2_path", made.gemma2, "--ae_path", made.ae),
        *("--tokenizer_cache_dir", made.tokenizer_cache_dir, "--image_width", 80, "--image_height", 64, "--steps", 2),
        *("--offload", "--device", "cpu", "--gemma2_dtype", "fp8", "--output_dir", out, "--seed", 1234),
        *("--prompt", PROMPT, "--system_prompt", "You paint.", "--lora_weights", f"{lora};0.5"),
        fresh=True,
    )
    assert finished.code == 0, finished.text
    (image,) = out.iterdir()
    assert pixels(image).shape == (64, 80, 3)
    texts = text_of(image)
    expected = {"prompt": PROMPT, "seed": "1234", "scale": "3.5", "cfg_trunc_ratio": "0.25", "renorm_cfg": "1"}
    assert texts.items() >= {**expected, "flow_shift": "6", "network": "lora.safetensors:0.5"}.items()


def test_merged_adapters_give_the_same_image_and_change_it(made: MadeLumina, lora: Path, tmp_path: Path) -> None:
    (plain,) = draw(made, tmp_path / "plain")
    (beside,) = draw(made, tmp_path / "beside", "--lora_weights", lora)
    (merged,) = draw(made, tmp_path / "merged", "--lora_weights", lora, "--merge_lora_weights", "--offload")
    assert difference(beside, merged) <= 1 < difference(plain, beside)


def test_the_system_prompt_and_where_it_stands(made: MadeLumina, tmp_path: Path) -> None:
    common = {"negative_prompt": "a dog", "cfg_trunc_ratio": 1}
    (plain,) = draw(made, tmp_path / "plain", **common)
    (system,) = draw(made, tmp_path / "system", system_prompt="You paint.", **common)
    more = ("--add_system_prompt_to_negative_prompt",)
    (both,) = draw(made, tmp_path / "both", *more, system_prompt="You paint.", **common)
    # prompts with the system prompt written out, where the script puts it
    (written,) = draw(made, tmp_path / "written", prompt=f"You paint. <Prompt Start> {PROMPT}", **common)
    assert difference(system, written) == 0 < min(difference(plain, system), difference(system, both))


def test_typed_prompts(made: MadeLumina, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (
        f"{PROMPT} --g 2 --ctr 1 --rcfg 0 --fs 3 --n a dog --d 5 --s 2 --w 80 --m 0.5\n{PROMPT} --ctr 2\n{PROMPT}\n\n"
    )
    typed = draw(made, tmp_path / "out", "--interactive", "--lora_weights", lora, lines=lines, prompt=None)
    assert len(typed) == 2 and "--ctr 2: a number from 0 to 1 is needed" in capsys.readouterr().err
    assert pixels(typed[0]).shape == (64, 80, 3)
    (same,) = draw(
        made, tmp_path / "same", "--lora_weights", f"{lora};0.5", guidance_scale=2, cfg_trunc_ratio=1, renorm_cfg=0,
        discrete_flow_shift=3, negative_prompt="a dog", seed=5, steps=2, image_width=80,
    )  # fmt: skip
    assert difference(typed[0], same) == 0


@pytest.mark.slow
def test_sample_images_of_training_are_those_of_the_script(made: MadeLumina, images: Path, tmp_path: Path) -> None:
    """Before the first step: with the same colours, so that latents are scaled back once."""
    dataset = write_dataset(tmp_path / "data.toml", images)
    prompts = tmp_path / "prompts.txt"
    lines = [f"{PROMPT} --n {PROMPT} --w 64 --h 64 --s 3 --d {seed}" for seed in (0, 7)]
    prompts.write_text("\n".join(lines))
    tiny, out = Tiny(LUMINA, made), tmp_path / "out"
    common = {"gemma2_max_token_length": 48, "system_prompt": "You paint.", "sample_prompts": prompts}
    for name, cached in (("fresh", {}), ("cached", {"cache_text_encoder_outputs": True, "sample_batch_size": 2})):
        unet = {"network_train_unet_only": True}
        tiny.train(dataset, out / name, **common, **unet, **cached, sample_at_first=True, max_train_steps=1)
    for seed in (0, 7):
        (script,) = draw(made, out / str(seed), seed=seed, negative_prompt=PROMPT, system_prompt="You paint.")
        for name in ("fresh", "cached"):
            (sample,) = (out / name / "sample").glob(f"*_000000_*_{seed}.png")
            assert difference(sample, script) <= 1, (name, seed)


def test_all_mistakes_are_named_before_anything_is_loaded(made: MadeLumina, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    words_ = words(
        made, tmp_path / "file", "--use_flash_attn", "--add_system_prompt_to_negative_prompt", "--merge_lora_weights",
        image_width=60, steps=0, guidance_scale="nan", cfg_trunc_ratio=2, renorm_cfg=-1, discrete_flow_shift=0,
        gemma2_max_token_length=0, dtype="fp8",
    )  # fmt: skip
    parsed = lumina_minimal_inference.setup_parser().parse_args(words_)
    with pytest.raises(UserError) as error:
        check_options(INFERENCE, INFERENCE.options.from_args(parsed))
    text = str(error.value)
    for word in (
        "--image_width 60", "--steps 0", "--guidance_scale nan", "--cfg_trunc_ratio 2: must be 0 to 1",
        "--renorm_cfg -1",
        "--discrete_flow_shift 0", "--gemma2_max_token_length 0", "--dtype fp8", "--output_dir", "--merge_lora_weights",
        "--use_flash_attn: the package flash_attn is not installed", "--add_system_prompt_to_negative_prompt: there",
    ):  # fmt: skip
        assert word in text, word


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"device": "gpu"}, "--device gpu: there is no such device here"),
        ({"gemma2_path": None}, "--gemma2_path: name the Gemma2 text encoder"),
        ({"ae_path": "nothing.safetensors"}, "--ae_path nothing.safetensors: no such file"),
        ({"device": "gpu", "use_sage_attn": True}, "--use_sage_attn: works in half precision only; use --dtype bf16"),
    ],
)
def test_wrong_files_and_devices(made: MadeLumina, tmp_path: Path, changed: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        draw(made, tmp_path, **changed)


def test_a_file_of_another_family_names_its_script(made: MadeLumina, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a Gemma2 text encoder"):
        draw(made, tmp_path, pretrained_model_name_or_path=made.gemma2)
