"""``gen_img.py`` as a user runs it, on a tiny random model."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.fixtures.drawn import pixels, text_of
from tests.fixtures.runs import ROOT, Finished, environment, run_script
from tests.fixtures.tiny_sd import MadeCheckpoint, make_tiny_sd

PUBLISHED = json.loads((ROOT / "tests/compat/data/cli/gen_img.json").read_text())["options"]
OURS = {
    "grid", "torch_compile", "dynamo_backend", "vae_tiling", "attn_mode", "split_attn",
    # of the published gen_img_diffusers.py
    "XTI_embeddings", "clip_guidance_scale", "clip_image_guidance_scale", "vgg16_guidance_scale",
    "vgg16_guidance_layer",
}  # fmt: skip
TYPES = {"str": str, "int": int, "float": float, "bool": None}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> MadeCheckpoint:
    return make_tiny_sd(tmp_path_factory.mktemp("tiny") / "model.safetensors")


@pytest.fixture(scope="session")
def lora(tmp_path_factory: pytest.TempPathFactory, model: MadeCheckpoint) -> Path:
    """A LoRA file whose ups are not zero."""
    from library.architectures.sd import SD
    from networks import lora as lora_module

    checkpoint = SD.inspect(
        str(model.path),
        v2=False,
        v_parameterization=False,
        vae=None,
        tokenizer_cache_dir=str(model.tokenizer_cache_dir),
    )
    (text_encoder,) = SD.load_text_encoders(checkpoint, dtype=torch.float32, device="cpu")
    denoiser = SD.load_denoiser(checkpoint, dtype=torch.float32, device="cpu")
    network = lora_module.create_network(1.0, 4, 4, None, text_encoder, denoiser)
    network.apply_to(text_encoder, denoiser)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * (0.3 if "lora_up" in name else 0.1)
    path = tmp_path_factory.mktemp("lora") / "tiny.safetensors"
    network.save_weights(str(path), torch.float32, {"ss_network_module": "networks.lora"})
    return path


def draw(model: MadeCheckpoint, outdir: Path, *arguments: object) -> Finished:
    """Run the script with a tiny model and image; ``arguments`` win."""
    usual = {
        "--ckpt": model.path, "--tokenizer_cache_dir": model.tokenizer_cache_dir, "--outdir": outdir,
        "--W": 64, "--H": 64, "--steps": 2,
    }  # fmt: skip
    words = [word for flag, value in usual.items() if flag not in arguments for word in (flag, value)]
    return run_script("gen_img.py", *words, "--console_log_simple", *arguments)


def drawn(finished: Finished, outdir: Path) -> list[Path]:
    assert finished.code == 0, finished.text
    return sorted(outdir.iterdir())


# ---- the parser ----


def parser() -> argparse.ArgumentParser:
    spec = importlib.util.spec_from_file_location("gen_img", ROOT / "gen_img.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.setup_parser()


def test_flags_are_the_published_ones() -> None:
    actions = {action.dest: action for action in parser()._actions if action.dest != "help"}
    assert set(actions) == {option["dest"] for option in PUBLISHED} | OURS
    for option in PUBLISHED:
        action = actions[option["dest"]]
        assert set(option["flags"]) <= set(action.option_strings), option["dest"]
        assert action.default == option["default"], option["dest"]
        assert action.required == option["required"], option["dest"]
        assert list(action.choices or []) == (option["choices"] or []), option["dest"]
        if option["action"] == "store_true":
            assert action.nargs == 0
            assert action.const is True
        else:
            assert action.nargs == option["nargs"], option["dest"]
            assert (action.type or str) is TYPES[option["type"]], option["dest"]
        assert action.help, option["dest"]


# ---- generating ----


def test_prompt_and_options_in_it(model: MadeCheckpoint, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prompt = "n girl --n dog --w 72 --h 80 --d 5 --s 3 --l -2"
    finished = draw(model, out, "--prompt", prompt, "--images_per_prompt", 2, "--batch_size", 2)
    first, second = drawn(finished, out)
    assert re.fullmatch(r"im_\d{14}_000001_5\.png", first.name)
    assert re.fullmatch(r"im_\d{14}_000002_6\.png", second.name)
    assert pixels(first).shape == (80, 72, 3)
    assert not np.array_equal(pixels(first), pixels(second))
    assert text_of(first) == {
        "parameters": "n girl\nNegative prompt: dog\nSteps: 3, Sampler: ddim, CFG scale: -2, Seed: 5, Size: 72x80, "
        "Model: model.safetensors",
        "prompt": "n girl",
        "negative_prompt": "dog",
        "seed": "5",
        "steps": "3",
        "scale": "-2",
        "sampler": "ddim",
        "size": "72x80",
        "model": "model.safetensors",
    }


def test_file_of_prompts_is_drawn_the_same_each_time_and_numbers_go_on(model: MadeCheckpoint, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# two\ncat\n\ndog --w 65\n")
    out = tmp_path / "out"
    arguments = ("--from_file", prompts, "--n_iter", 2, "--seed", 3, "--sequential_file_name", "--sampler", "k_euler_a")
    finished = draw(model, out, *arguments)
    assert [path.name for path in drawn(finished, out)] == [f"im_{n:06d}.png" for n in (1, 2, 3, 4)]
    assert f"{prompts}:4: width 65" in finished.text
    assert pixels(out / "im_000002.png").shape == (64, 64, 3)
    draw(model, out, *arguments, "--batch_size", 4)
    assert len(list(out.iterdir())) == 8
    for n in (1, 2, 3, 4):
        again = out / f"im_{n + 4:06d}.png"
        assert text_of(out / f"im_{n:06d}.png") == text_of(again)
        assert np.abs(pixels(out / f"im_{n:06d}.png") - pixels(again)).max() <= 1
    assert len({text_of(path)["seed"] for path in out.iterdir()}) == 4


def test_lora_multiplier_changes_the_image(model: MadeCheckpoint, lora: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("cat --d 1\ncat --d 1 --am 0\ncat --d 1 --am 0.5\ncat --d 1\n")
    network = ("--network_module", "networks.lora", "--network_weights", lora)
    sequential = ("--sequential_file_name", "--from_file", prompts)
    finished = draw(model, out, *sequential, *network, "--network_mul", 0.8, "--network_show_meta")
    applied, zero, half, again = (pixels(path) for path in drawn(finished, out))
    assert "ss_network_module" in finished.text
    assert text_of(out / "im_000001.png")["network"] == "tiny.safetensors:0.8"
    assert text_of(out / "im_000003.png")["network"] == "tiny.safetensors:0.5"
    assert np.array_equal(applied, again)
    assert np.abs(applied - zero).max() > 3
    assert np.abs(applied - half).max() > 1

    out = tmp_path / "plain"
    (plain,) = drawn(draw(model, out, "--prompt", "cat --d 1"), out)
    assert np.abs(pixels(plain) - zero).max() <= 1

    out = tmp_path / "merged"
    unnamed = ("--network_weights", lora)  # the file tells its module
    (merged,) = drawn(draw(model, out, "--prompt", "cat --d 1", *unnamed, "--network_mul", 0.8, "--network_merge"), out)
    assert np.abs(pixels(merged) - applied).max() <= 1

    out = tmp_path / "precalc"
    calculated = ("--network_weights", lora, lora, "--network_mul", 0.3, 0, "--network_pre_calc", "--seed", 1)
    prompts.write_text("cat --d 1 --am 0.8\ncat --d 1 --am 0\ncat --d 1 --am 0.3,0.5\n")
    finished = draw(model, out, "--sequential_file_name", "--from_file", prompts, *calculated)
    strong, none, joined = (pixels(path) for path in drawn(finished, out))
    assert (
        np.abs(strong - applied).max() <= 1 and np.abs(none - zero).max() <= 1 and np.abs(joined - applied).max() <= 1
    )

    out = tmp_path / "regions"
    Image.fromarray(np.full((8, 8, 3), (255, 0, 0), np.uint8)).save(tmp_path / "red.png")
    regional = ("--network_weights", lora, "--mask_path", tmp_path / "red.png", "--network_pre_calc")
    (region,) = drawn(draw(model, out, "--prompt", "cat AND cat --d 1 --l 1", *regional), out)
    assert text_of(region)["regions"] == "red.png" and pixels(region).shape == (64, 64, 3)

    out = tmp_path / "grid"
    compared = ("--network_weights", lora, lora, "--network_mul", 0.8, 0, "--grid", "file", "seed=1,2")
    finished = draw(model, out, "--prompt", "cat", *compared, "--sequential_file_name")
    assert len(drawn(finished, out)) == 5
    assert np.abs(pixels(out / "im_000001.png") - applied).max() <= 1
    assert np.abs(pixels(out / "im_000002.png") - zero).max() <= 1
    sheet = pixels(out / "im_000001_grid.png")
    assert sheet.shape[0] > 128 and sheet.shape[1] > 128

    out = tmp_path / "partly"
    twice = ("--network_module", "networks.lora", "networks.lora", "--network_weights", lora, lora)
    strengths = ("--network_mul", 0.5, 1, "--network_merge_n_models", 1)  # and --am is that of the second
    (partly,) = drawn(draw(model, out, "--prompt", "cat --d 1 --am 0.3", *twice, *strengths), out)
    assert np.abs(pixels(partly) - applied).max() <= 1
    assert text_of(partly)["network"] == "tiny.safetensors:0.5, tiny.safetensors:0.3"


def test_accepted_switches(model: MadeCheckpoint, tmp_path: Path) -> None:
    out = tmp_path / "out"
    switches = "--v1 --bf16 --sdpa --no_half_vae --clip_skip 2 --max_embeddings_multiples 3 --no_preview"
    switches += " --vae_batch_size 0.5 --opt_channels_last --crop_top 8 --ds_depth_1 1 --ds_ratio 0.75"
    save_file({"emb_params": torch.ones(2, 32)}, tmp_path / "newword.safetensors")
    embedding = ("--textual_inversion_embeddings", tmp_path / "newword.safetensors")
    prompt = ("--prompt", "(cat:1.2) dog, newword", "--iter_same_seed", "--shuffle_prompts")
    finished = draw(model, out, *prompt, *embedding, *switches.split())
    assert 'embedding "newword": 2 tokens' in finished.text
    (image,) = drawn(finished, out)
    assert pixels(image).shape == (64, 64, 3)
    assert f"seed: {text_of(image)['seed']}" in finished.text
    assert "crop_top have no effect with this model, which is not conditioned on sizes" in finished.text
    assert text_of(image)["ds_depth_1"] == "1" and text_of(image)["ds_ratio"] == "0.75"


@pytest.mark.parametrize("script", ["sdxl_gen_img.py", "gen_img_diffusers.py"])
def test_old_names(script: str, tmp_path: Path) -> None:
    finished = run_script(script, "--ckpt", tmp_path / "gone.safetensors", "--prompt", "a")
    assert finished.code == 2 and "gone.safetensors" in finished.err and "Traceback" not in finished.text


def test_v2_model_draws_with_zero_terminal_snr(tmp_path: Path) -> None:
    model = make_tiny_sd(tmp_path / "v2.safetensors", v2=True)
    out = tmp_path / "out"
    finished = draw(model, out, "--v2", "--v_parameterization", "--zero_terminal_snr", "--prompt", "cat")
    assert len(drawn(finished, out)) == 1


# ---- from images ----


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images of different sizes, and a mask whose left half is kept."""
    folder = tmp_path_factory.mktemp("sources")
    for name, size in (("a", (64, 96)), ("b", (96, 64))):
        grey = np.random.default_rng(ord(name)).integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
        Image.fromarray(grey).resize(size).save(folder / f"{name}.png")
    white = np.zeros((64, 64), np.uint8)
    white[:, 32:] = 255
    (folder / "masks").mkdir()
    Image.fromarray(white).save(folder / "masks" / "mask.png")
    return folder


def test_images_from_images(model: MadeCheckpoint, sources: Path, tmp_path: Path) -> None:
    """A folder in turn, each at its own size; files named after them; the prompt's own strength and file name."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("cat --d 1\ncat --d 2 --t 0.3\ncat --d 3 --f own.png\n")
    out = tmp_path / "out"
    finished = run_script(
        "gen_img.py",
        *("--ckpt", model.path, "--tokenizer_cache_dir", model.tokenizer_cache_dir, "--outdir", out, "--steps", 4),
        *("--from_file", prompts, "--image_path", sources, "--use_original_file_name", "--strength", 0.75),
    )
    assert [path.name for path in drawn(finished, out)] == ["a.png", "b.png", "own.png"]
    assert [pixels(out / f"{name}.png").shape for name in ("a", "b", "own")] == [(96, 64, 3), (64, 96, 3), (96, 64, 3)]
    texts = [text_of(out / f"{name}.png") for name in ("a", "b", "own")]
    assert [(t["strength"], t["image"]) for t in texts] == [("0.75", "a.png"), ("0.3", "b.png"), ("0.75", "a.png")]


def test_repainting_highres_fix_and_a_prompt_of_an_image(
    model: MadeCheckpoint, sources: Path, lora: Path, tmp_path: Path
) -> None:
    """Masks with a large image in two stages; the prompt is read back from the image to start from."""
    fix = ("--highres_fix_scale", 0.5, "--highres_fix_steps", 2, "--highres_fix_save_1st", "--W", 128, "--H", 128)
    made = draw(model, tmp_path / "out", "--prompt", "the cat --d 4 --n dog --nl 2", *fix, "--sequential_file_name")
    large, small = drawn(made, tmp_path / "out")
    assert (large.name, small.name) == ("im_000001.png", "im_000001_1st.png")
    assert pixels(large).shape == (128, 128, 3) and pixels(small).shape == (64, 64, 3)
    assert text_of(large)["negative_scale"] == "2" and text_of(small)["size"] == "64x64"
    masked = ("--image_path", small, "--mask_path", sources / "masks", "--steps", 6)
    finished = draw(model, tmp_path / "two", *masked, "--images_per_prompt", 2, "--batch_size", 2, "--strength", 0.9)
    one, two = drawn(finished, tmp_path / "two")
    assert text_of(one)["prompt"] == "the cat" and text_of(one)["negative_prompt"] == "dog"
    kept, repainted = (np.abs(pixels(one) - pixels(two))[:, part].mean() for part in (slice(0, 16), slice(48, 64)))
    assert repainted > 4 * kept


def test_a_session(model: MadeCheckpoint, tmp_path: Path) -> None:
    """Mistakes and bytes that are no text cost their line alone."""
    words = ("--ckpt", model.path, "--tokenizer_cache_dir", model.tokenizer_cache_dir, "--outdir", tmp_path / "out")
    more = ("--interactive", "--W", 64, "--H", 64, "--steps", 2, "--prompt", "unused", "--console_log_simple")
    done = subprocess.run(
        [sys.executable, str(ROOT / "gen_img.py"), *map(str, (*words, *more))],
        input=b"cat --d 1\ncaf\xe9\ncat --q 1\ndog --d 2 --s 3\n\nnever\n",
        capture_output=True,
        env=environment(),
        cwd=ROOT,
        check=False,
    )
    said = done.stderr.decode()
    assert done.returncode == 0, said
    assert len(list((tmp_path / "out").iterdir())) == 2
    errors = [line for line in said.splitlines() if line.startswith("ERROR")]
    assert len(errors) == 2 and "not UTF-8 text" in errors[0] and "prompt 2: unknown option --q" in errors[1]
    assert "--prompt has no effect with --interactive" in said


# ---- mistakes ----


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], ["nothing to generate: give --prompt, --from_file, --from_module or --interactive"]),
        (["--from_module", "gone.py"], ["--from_module gone.py: no such Python file"]),
        (["--from_module", "m.py", "--prompt", "a"], ["--prompt and --from_module were both given"]),
        (["--prompt", "a", "--ds_depth_1", "9"], ["--ds_depth_1 9: Deep Shrink: this model has depths 0 to 1"]),
        (["--prompt", "a --dsd2 7"], ['prompt "a": ds_depth_2 7: Deep Shrink']),
        (["--prompt", "a", "--gradual_latent_timesteps", "700"], ["works with --sampler euler_a alone"]),
        (["--prompt", "a --glus 2,1"], ["--prompt: --glus 2,1: an odd size"]),
        (
            ["--prompt", "a", "--clip_guidance_scale", "10", "--sampler", "euler", "--vgg16_guidance_scale", "nan"],
            ["--clip_guidance_scale: works with the samplers ddim", "--vgg16_guidance_scale nan: must be a finite"],
        ),
        (["--prompt", "a", "--clip_image_guidance_scale", "10"], ["there is no image to move towards"]),
        (["--prompt", "a", "--clip_vision_strength", "1"], ["there is no image to see; give --image_path"]),
        (
            ["--prompt", "a", "--noise_offset_prob", "2"],
            ["--noise_offset_prob 2: must be 0 to 1", "--noise_offset_range"],
        ),
        (
            ["--prompt", "a", "--vae_slices", "0", "--control_net_models", "a", "--control_net_preps", "cany"],
            ["--vae_slices 0: must be at least 1", "give --guide_image_path", 'no such preparation "cany"'],
        ),
        (
            ["--prompt", "a", "--mask_path", "m.png", "--strength", "2"],
            ["--strength 2: must"],
        ),
        (["--prompt", "a", "--image_path", "gone.png"], ["--image_path gone.png: no such file or folder"]),
        (["--prompt", "a", "--highres_fix_scale", "1.5"], ["--highres_fix_scale 1.5: must be above 0 and below 1"]),
        (["--prompt", "a", "--fp16", "--bf16", "--batch_size", "0"], ["--fp16 and --bf16", "--batch_size 0"]),
        (["--prompt", "a --q 1"], ["--prompt: unknown option --q"]),
        (["--prompt", "a", "--v2"], ["1.x"]),
        (["--prompt", "a", "--zero_terminal_snr"], ["v-prediction"]),
        (["--prompt", "a", "--scale", "nan", "--network_mul", "inf"], ["--scale nan: must be", "--network_mul inf"]),
        (["--prompt", "a AND b"], ['prompt "a AND b": parts joined with AND need a map of their regions, --mask_path']),
        (["--prompt", "a --am 1"], ["--am has 1 values for 0 networks"]),
        (["--prompt", "a", "--network_module", "networks.lora"], ["--network_weights: 0 files for 1"]),
        (["--prompt", "a", "--network_module", "networks.lora", "--network_weights", "gone.pt"], ["gone.pt: no such"]),
        (["--prompt", "a", "--sampler", "eulr"], ["eulr"]),
        (["--prompt", "a", "--stpes", "3"], ["--stpes"]),
        (["--prompt", "a", "--outdir", str(ROOT / "gen_img.py")], ["--outdir", "is a file"]),
        (["--from_file", "gone.txt"], ["gone.txt: no such prompt file"]),
        (
            ["--prompt", "a", "--network_module", "networks.lora", "--network_weights", "w.pt"]
            + ["--network_args", "part=1,part=2"],
            ["--network_args: part is given as '1' and as '2'; give it once"],
        ),
    ],
)
def test_mistakes_end_with_code_2_and_a_line(
    model: MadeCheckpoint, tmp_path: Path, arguments: list[str], said: list[str]
) -> None:
    finished = draw(model, tmp_path / "out", *arguments)
    assert finished.code == 2
    assert "Traceback" not in finished.text
    for text in said:
        assert text in finished.err
    assert not (tmp_path / "out").exists()


def test_missing_model(tmp_path: Path) -> None:
    finished = run_script("gen_img.py", "--ckpt", tmp_path / "gone.safetensors", "--prompt", "a")
    assert finished.code == 2
    assert "Traceback" not in finished.text
    assert finished.err.startswith(f"error: --ckpt {tmp_path / 'gone.safetensors'}: no such file")
    finished = run_script("gen_img.py", "--prompt", "a")
    assert finished.code == 2
    assert "--ckpt is required" in finished.err


@pytest.mark.skipif(not (ROOT / "examples/quickstart/model").exists(), reason="the example's model is not here")
def test_first_command_of_the_page(tmp_path: Path) -> None:
    page = (ROOT / "docs/gen_img.md").read_text(encoding="utf-8")
    command = re.search(r"```bash\npython (.*?)```", page, re.DOTALL)[1].replace("\\\n", "")
    script, *arguments = shlex.split(command)
    arguments[arguments.index("--outdir") + 1] = str(tmp_path / "out")
    files = drawn(run_script(script, *arguments, fresh=True), tmp_path / "out")
    assert len(files) == 4
    assert {text_of(path)["seed"] for path in files} == {"1", "2", "3", "4"}
    assert len({pixels(path).tobytes() for path in files}) == 4
