"""The families' minimal inference scripts against what goes wrong; and that of Stable Diffusion 3 as a user starts it."""

from __future__ import annotations

import importlib
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import sd3_minimal_inference
from library.architectures.minimal_inference import MinimalInference
from library.architectures.registry import minimal_inferences
from library.errors import UserError
from library.inference.minimal_script import generate_with
from networks import lora_sd3
from tests.fixtures.adapted import randomize
from tests.fixtures.drawn import pixels, text_of
from tests.fixtures.file_tools import check_option
from tests.fixtures.runs import ROOT, run_script
from tests.fixtures.tiny_flux import make_tiny_flux
from tests.fixtures.tiny_hunyuan_image import make_tiny_hunyuan
from tests.fixtures.tiny_lumina import make_tiny_lumina
from tests.fixtures.tiny_sd3 import make_tiny_sd3
from tests.fixtures.tiny_sdxl import make_tiny_sdxl

pytestmark = pytest.mark.usefixtures("own_root_logger")

SCRIPTS: Mapping[str, MinimalInference] = minimal_inferences()
SMALL = {"width": 64, "height": 64, "steps": 1}


def small(folder: str) -> dict[str, object]:
    """The options of a small image, by the names of a script."""
    flags = SCRIPTS[folder].flags
    if flags.get("width") == flags.get("height") != None:  # noqa: E711, one option for both
        return {flags["width"]: [64, 64], flags["steps"]: 1}
    return {flags.get(name, name): value for name, value in SMALL.items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """For each script the options that name tiny files."""
    place = tmp_path_factory.mktemp("files")
    for folder in SCRIPTS:
        (place / folder).mkdir()
    flux, lumina = make_tiny_flux(place / "flux"), make_tiny_lumina(place / "lumina")
    sd3, hunyuan = make_tiny_sd3(place / "sd3"), make_tiny_hunyuan(place / "hunyuan_image")
    sdxl = make_tiny_sdxl(place / "sdxl" / "model.safetensors")
    named: dict[str, dict[str, Any]] = {
        "flux": {"ckpt_path": flux.path, "clip_l": flux.clip_l, "t5xxl": flux.t5xxl, "ae": flux.ae},
        "sdxl": {"ckpt_path": sdxl.path},
        "sd3": {"ckpt_path": sd3.path, "t5xxl_token_length": 24},
        "lumina": {"pretrained_model_name_or_path": lumina.path, "gemma2_path": lumina.gemma2, "ae_path": lumina.ae},
        "hunyuan_image": {
            "dit": hunyuan.path, "text_encoder": hunyuan.text_encoder, "byt5": hunyuan.byt5, "vae": hunyuan.vae,
        },
    }  # fmt: skip
    opened = {"sdxl": sdxl, "sd3": sd3, "flux": flux, "lumina": lumina, "hunyuan_image": hunyuan}
    for folder, made in opened.items():
        named[folder]["tokenizer_cache_dir"] = made.tokenizer_cache_dir
    return named


def words(folder: str, given: Mapping[str, Any], out: Path) -> list[str]:
    inference = SCRIPTS[folder]
    values = {**small(folder), **given, inference.flags.get("output_dir", "output_dir"): out}
    found: list[str] = []
    for name, value in values.items():
        found += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return found


def run(folder: str, given: Mapping[str, Any], out: Path, *more: object, lines: str = "") -> list[Path]:
    script = importlib.import_module(f"{folder}_minimal_inference")
    parsed = script.setup_parser().parse_args([*words(folder, given, out), *map(str, more)])
    inference = SCRIPTS[folder]
    return generate_with(inference, inference.options.from_args(parsed), io.StringIO(lines))


def test_the_scripts_are_those_of_the_families() -> None:
    assert {path.name.removesuffix("_minimal_inference.py") for path in ROOT.glob("*_minimal_inference.py")} == set(
        SCRIPTS
    )


@pytest.mark.parametrize("folder", SCRIPTS)
def test_a_session_goes_on_after_mistakes(
    files: dict[str, dict[str, Any]], tmp_path: Path, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong options, sizes, values and strengths cost their line alone; a prompt may be empty, as the negative prompt is."""
    lines = (
        "a cat --d 1", "a cat --q 1", "a cat --w 65", "a cat --h 0", "a cat --s x", "a cat --s 0", "a cat --d -1",
        "a cat --w 1000000", "a cat --m 1", "a cat --seed 1", "--d 3", "a \u732b --d 2 --s 1",
    )  # fmt: skip
    paths = run(folder, files[folder], tmp_path / "out", "--interactive", lines="\n".join((*lines, "", "a cat")))
    assert [text_of(path)["seed"] for path in paths] == ["1", "3", "2"]
    assert text_of(paths[2])["prompt"] == "a \u732b" and pixels(paths[0]).shape == (64, 64, 3)
    said = capsys.readouterr().err
    errors = [line for line in said.splitlines() if line.startswith("ERROR")]
    assert len(errors) == 9, said
    assert "prompt 2: unknown option --q" in errors[0] and "--m: 1 strengths for 0 files" in errors[7]


@pytest.mark.parametrize("folder", SCRIPTS)
def test_files_that_are_damaged_or_no_models(files: dict[str, dict[str, Any]], tmp_path: Path, folder: str) -> None:
    """Each is one line that names the file and an option, before an image is begun."""
    inference, given = SCRIPTS[folder], files[folder]
    flag = inference.model_flag.removeprefix("--")
    whole = Path(given[flag]).read_bytes()
    bad = {
        "cut.safetensors": whole[: len(whole) // 2],
        "header.safetensors": whole[:100],
        "empty.safetensors": b"",
        "text.safetensors": b"<!DOCTYPE html><html>not found</html>",
        "noise.safetensors": bytes(range(256)) * 8,
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    (tmp_path / "folder").mkdir()
    names = (*bad, "other.safetensors", "folder", "gone.safetensors")
    cases = [({**given, flag: tmp_path / name}, (), name) for name in names]
    cases += [
        (given, (inference.lora_flag, tmp_path / name), name)
        for name in ("cut.safetensors", "text.safetensors", "other.safetensors", "gone.safetensors")
    ]
    for options, more, name in cases:
        with pytest.raises(UserError) as raised:
            run(folder, options, tmp_path / "out", "--prompt", "a", *more)
        assert name in str(raised.value), (name, str(raised.value))
    assert not (tmp_path / "out").exists()


# ---- Stable Diffusion 3 ----


@pytest.fixture(scope="module")
def adapter(files: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of all parts with random weights."""
    from library.architectures.sd3.family import SD3

    made = files["sd3"]
    family = SD3
    checkpoint = family.inspect(str(made["ckpt_path"]), vae=None, tokenizer_cache_dir=str(made["tokenizer_cache_dir"]))
    family = family.for_model(checkpoint)
    encoders = family.load_text_encoders(checkpoint, dtype=torch.float32, device="cpu")
    denoiser = family.load_denoiser(checkpoint, dtype=torch.float32, device="cpu")
    network = randomize(lora_sd3.create_network(1.0, 4, 4.0, None, encoders, denoiser), 0.2)
    path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    network.save_weights(str(path), None, {})
    return path


def test_flags_of_stable_diffusion_3_are_the_published_ones() -> None:
    published = json.loads((ROOT / "tests/compat/data/cli/sd3_minimal_inference.json").read_text())["options"]
    actions = {action.dest: action for action in sd3_minimal_inference.setup_parser()._actions if action.dest != "help"}
    assert actions.keys() - {"tokenizer_cache_dir", "vae"} == {option["dest"] for option in published}
    for option in published:
        action = actions[option["dest"]]
        if isinstance(action.default, tuple):
            action.default = list(action.default)
        assert set(option["flags"]) <= set(action.option_strings)
        action.option_strings = option["flags"]  # ours has further spellings
        check_option(action, option)


def test_the_published_command_of_stable_diffusion_3(
    files: dict[str, dict[str, Any]], adapter: Path, tmp_path: Path
) -> None:
    more = ("--bf16", "--offload", "--lora_weights", f"{adapter};0.5", "--merge_lora_weights", "--seed", 7)
    prompt = ("--prompt", "a cat holding a sign", "--negative_prompt", "dog", "--cfg_scale", 4, "--apply_t5_attn_mask")
    given = words("sd3", {**files["sd3"], "width": 80, "height": 64}, tmp_path)
    done = run_script("sd3_minimal_inference.py", *given, *more, *prompt, "--apply_lg_attn_mask", fresh=True)
    assert done.code == 0, done.text
    (image,) = tmp_path.iterdir()
    assert pixels(image).shape == (64, 80, 3)
    said = text_of(image)
    assert (said["seed"], said["scale"], said["network"]) == ("7", "4", "lora.safetensors:0.5")
    assert said["negative_prompt"] == "dog"


def test_each_option_of_stable_diffusion_3_acts(
    files: dict[str, dict[str, Any]], adapter: Path, tmp_path: Path
) -> None:
    (tmp_path / "apart").mkdir()
    apart = make_tiny_sd3(tmp_path / "apart", apart=True, seed=3)
    base = {**files["sd3"], "prompt": "a cat", "steps": 2}
    (plain,) = run("sd3", base, tmp_path / "plain")
    (same,) = run("sd3", base, tmp_path / "same", "--offload")
    assert (pixels(plain) == pixels(same)).all()
    others: list[tuple[dict[str, Any], tuple[object, ...]]] = [
        *(({name: value}, ()) for name, value in {
            "negative_prompt": "dog", "cfg_scale": 2, "seed": 2, "steps": 3, "width": 80, "height": 80, "prompt": "a dog",
            "lora_weights": adapter, "t5xxl_token_length": 12, **apart.apart,
        }.items()),
        *(({}, (f"--{switch}",)) for switch in ("bf16", "fp16", "apply_t5_attn_mask", "apply_lg_attn_mask")),
    ]  # fmt: skip
    unchanged = []
    for number, (changed, switches) in enumerate(others):
        (image,) = run("sd3", {**base, **changed}, tmp_path / str(number), *switches)
        if pixels(image).shape == pixels(plain).shape and (pixels(image) == pixels(plain)).all():
            unchanged.append((changed, switches))
    assert not unchanged
    half = {**base, "lora_weights": f"{adapter};0.5"}
    (applied,) = run("sd3", half, tmp_path / "applied")
    (merged,) = run("sd3", half, tmp_path / "merged", "--merge_lora_weights")
    assert abs(pixels(applied) - pixels(merged)).max() <= 1


@pytest.mark.parametrize("folder", SCRIPTS)
def test_advice_names_flags_of_the_script(folder: str) -> None:
    inference = SCRIPTS[folder]
    flags = {f"--{field}" for group in inference.groups.values() for field in group.__dataclass_fields__}
    named = re.findall(r"--\w+", inference.nan_remedy)
    assert named and set(named) <= flags
