"""``flux_minimal_inference.py`` on tiny files: once as a user starts it, otherwise in this process."""

from __future__ import annotations

import io
import json
import logging
import re
import shlex
import subprocess
import sys
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import flux_minimal_inference
import gen_img
from library.architectures.flux import Flux
from library.architectures.flux.inference import INFERENCE
from library.errors import UserError
from library.inference.minimal import ImageSession
from library.inference.minimal_script import check_options, generate_with
from tests.fixtures.drawn import pixels, text_of
from tests.fixtures.loaded_flux import make_adapter
from tests.fixtures.runs import ROOT, environment, lora_arguments, run_script, train_here, write_dataset
from tests.fixtures.tiny_flux import FluxFileSizes, MadeFlux, make_tiny_flux
from tests.fixtures.tiny_sd import make_tiny_sd

PUBLISHED = json.loads((ROOT / "tests/compat/data/cli/flux_minimal_inference.json").read_text())["options"]
OURS = {"tokenizer_cache_dir"}
PROMPT = "a photo of the cat"

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, MadeFlux]:
    return {kind: make_tiny_flux(tmp_path_factory.mktemp(kind), model=kind) for kind in ("dev", "schnell", "chroma")}


@pytest.fixture(scope="module")
def adapters(models: Mapping[str, MadeFlux], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, dev = tmp_path_factory.mktemp("adapters"), models["dev"]
    return {
        "lora": make_adapter("dev", dev, folder / "lora.safetensors", train_t5xxl="True"),
        "oft": make_adapter("dev", dev, folder / "oft.safetensors", module="networks.oft_flux"),
    }


def words(made: MadeFlux, out: Path, *more: object, **changed: object) -> list[str]:
    """A small image in float32; ``changed`` replaces values, or with None drops them."""
    values = {
        "ckpt_path": made.path,
        "model_type": "flux" if made.clip_l else "chroma",
        "clip_l": made.clip_l,
        "t5xxl": made.t5xxl,
        "ae": made.ae,
        "tokenizer_cache_dir": made.tokenizer_cache_dir,
        "output_dir": out,
        "prompt": PROMPT,
        "width": 64,
        "height": 64,
        "steps": 2,
        "seed": 1,
        "dtype": "float32",
        **changed,
    }
    given = [word for name, value in values.items() if value is not None for word in (f"--{name}", value)]
    return [str(word) for word in (*given, *more)]


def draw(made: MadeFlux, out: Path, *more: object, lines: str | io.TextIOBase = "", **changed: object) -> list[Path]:
    """A run in this process.

    Args:
        lines: what is typed, or comes through a pipe.
    """
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers = []  # so that setting up the console does not close pytest's
    try:
        parsed = flux_minimal_inference.setup_parser().parse_args(words(made, out, *more, **changed))
        options = INFERENCE.options.from_args(parsed)
        return generate_with(INFERENCE, options, io.StringIO(lines) if isinstance(lines, str) else lines)
    finally:
        root.handlers[:], root.level = handlers, level


def said(err: str, *levels: str) -> list[str]:
    """The lines of these levels that were shown."""
    return [line.partition(" ")[2] for line in err.splitlines() if line.startswith(levels)]


def difference(first: Path, second: Path) -> int:
    return int(np.abs(pixels(first) - pixels(second)).max())


# ---- the command line ----


def test_flags_are_the_published_ones() -> None:
    actions = {
        action.dest: action for action in flux_minimal_inference.setup_parser()._actions if action.dest != "help"
    }
    assert actions.keys() - OURS == {option["dest"] for option in PUBLISHED}
    for option in PUBLISHED:
        action = actions[option["dest"]]
        assert set(option["flags"]) <= set(action.option_strings), option["dest"]
        default = list(action.default) if isinstance(action.default, tuple) else action.default
        assert (default, action.required) == (option["default"], option["required"]), option["dest"]
        assert action.nargs == (0 if option["action"] == "store_true" else option["nargs"]), option["dest"]
        assert (list(action.choices) if action.choices else None) == option["choices"], option["dest"]
        converter = "bool" if action.nargs == 0 else getattr(action.type, "__name__", "str")
        assert converter == option["type"], option["dest"]
        assert action.help, option["dest"]


def test_published_command_in_a_process_of_its_own(
    models: Mapping[str, MadeFlux], adapters: dict[str, Path], tmp_path: Path
) -> None:
    made, out = models["dev"], tmp_path / "out"
    published = f"--dtype bf16 --flux_dtype fp8 --offload --lora {adapters['lora']};0.5 --seed 1 --steps 2"
    finished = run_script(
        "flux_minimal_inference.py",
        *("--ckpt", made.path, "--clip_l", made.clip_l, "--t5xxl", made.t5xxl, "--ae", made.ae, "--out", out),
        *("--tokenizer_cache_dir", made.tokenizer_cache_dir, "--width", 80, "--height", 64),
        *("--prompt", "a cat holding a sign that says hello world"),
        *published.split(),
        fresh=True,
    )
    assert finished.code == 0, finished.text
    (image,) = out.iterdir()
    assert re.fullmatch(r"im_\d{14}_000001_1\.png", image.name)
    assert pixels(image).shape == (64, 80, 3)
    assert text_of(image) == {
        "parameters": "a cat holding a sign that says hello world\nSteps: 2, Sampler: euler, CFG scale: 1, "
        "Distilled CFG Scale: 3.5, Seed: 1, Size: 80x64, Model: dev.safetensors, Network: lora.safetensors:0.5",
        "prompt": "a cat holding a sign that says hello world",
        "negative_prompt": "",
        "seed": "1",
        "steps": "2",
        "scale": "1",
        "sampler": "euler",
        "size": "80x64",
        "model": "dev.safetensors",
        "guidance_scale": "3.5",
        "network": "lora.safetensors:0.5",
    }
    assert "FLUX.1 dev" in finished.err and "flux fp8 (bfloat16)" in finished.err


# ---- generating ----


def count_loading(
    monkeypatch: pytest.MonkeyPatch, *, one_at_a_time: bool = False
) -> tuple[list[str], list[weakref.ref]]:
    """Record which models are loaded, in their order.

    Args:
        one_at_a_time: check that nothing that was loaded before is still there.
    """
    order: list[str] = []
    models: list[weakref.ref] = []

    def count(name: str, method: str) -> None:
        load = getattr(ImageSession, method)

        def loading(self: ImageSession) -> Any:
            if one_at_a_time:
                assert [model for model in models if model() is not None] == []
            order.append(name)
            loaded = load(self)
            found = loaded[0] if isinstance(loaded, tuple) else loaded
            models.extend(weakref.ref(model) for model in (found if isinstance(found, list) else [found]))
            return loaded

        monkeypatch.setattr(ImageSession, method, loading)

    for name, method in {"text": "_load_text_encoders", "denoiser": "_load_denoiser", "vae": "_load_vae"}.items():
        count(name, method)
    return order, models


@pytest.mark.parametrize("kind", ["dev", pytest.param("schnell", marks=slow), pytest.param("chroma", marks=slow)])
def test_offload_draws_the_same_with_one_part_alive(
    models: Mapping[str, MadeFlux], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    made, more = models[kind], ("--cfg_scale", 2, "--negative_prompt", "red dog")
    (plain,) = draw(made, tmp_path / "plain", *more)
    order, loaded = count_loading(monkeypatch, one_at_a_time=True)
    (offloaded,) = draw(made, tmp_path / "offload", "--offload", *more)
    assert difference(plain, offloaded) == 0
    assert order == ["text", "denoiser", "vae"] and len(loaded) == (3 if kind == "chroma" else 4)
    assert text_of(plain) == text_of(offloaded)
    assert text_of(plain).get("guidance_scale") == ("3.5" if kind == "dev" else None)


@slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from there")
def test_offload_takes_less_memory(tmp_path: Path) -> None:
    sizes = FluxFileSizes(
        hidden=512, head=64, double_blocks=4, single_blocks=6, t5_width=768, t5_heads=12, t5_head=64, t5_inner=2048,
        t5_layers=8,
    )  # fmt: skip
    made = make_tiny_flux(tmp_path, sizes=sizes)
    smaller = min(path.stat().st_size for path in (made.path, made.t5xxl))
    assert smaller > 200e6
    # what the system reports of a child's peak counts its parent's, from which it was made
    run = "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    report = "print(open('/proc/self/status').read())"
    script = [sys.executable, "-c", f"{run}; {report}", str(ROOT / "flux_minimal_inference.py")]
    peaks = []
    for more in ((), ("--offload",)):
        command = [*script, *words(made, tmp_path, *more)]
        done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, check=True)
        peaks.append(1024 * int(re.search(r"VmHWM:\s+(\d+) kB", done.stdout)[1]))
    assert peaks[0] - peaks[1] > 0.8 * smaller


@slow
def test_dtypes_of_parts(models: Mapping[str, MadeFlux], tmp_path: Path) -> None:
    (exact,) = draw(models["dev"], tmp_path)
    for changed in (
        {"dtype": "bf16"},
        {"flux_dtype": "fp8"},
        {"t5xxl_dtype": "fp8_e4m3fn", "clip_l_dtype": "fp8"},
        {"t5xxl_dtype": "float16", "clip_l_dtype": "bfloat16", "ae_dtype": "bf16", "flux_dtype": "fp16"},
    ):
        (image,) = draw(models["dev"], tmp_path, **changed)
        assert 0 < difference(exact, image) < 40, changed


@slow
def test_defaults(models: Mapping[str, MadeFlux], tmp_path: Path) -> None:
    steps = {}
    for kind in ("dev", "schnell", "chroma"):
        (image,) = draw(models[kind], tmp_path, steps=None, seed=None)
        steps[kind] = text_of(image)["steps"]
        assert image.name.endswith(f"_{text_of(image)['seed']}.png")
    assert steps == {"dev": "50", "schnell": "4", "chroma": "50"}


def test_adapters(models: Mapping[str, MadeFlux], adapters: dict[str, Path], tmp_path: Path) -> None:
    made, both = models["dev"], ("--lora_weights", f"{adapters['lora']};0.5", f"{adapters['oft']};0.3")
    (plain,) = draw(made, tmp_path)
    (applied,) = draw(made, tmp_path, *both)
    (merged,) = draw(made, tmp_path, "--merge_lora_weights", "--offload", *both)
    (off,) = draw(made, tmp_path, "--lora_weights", f"{adapters['lora']};0")
    assert difference(plain, applied) > 3
    assert difference(applied, merged) <= 1
    assert difference(plain, off) == 0
    assert text_of(merged)["network"] == "lora.safetensors:0.5, oft.safetensors:0.3"


@slow
def test_adapters_with_fp8(models: Mapping[str, MadeFlux], adapters: dict[str, Path], tmp_path: Path) -> None:
    # fp8 is made after merging, and before adapters are applied
    made, both = models["dev"], ("--lora_weights", f"{adapters['lora']};0.5", f"{adapters['oft']};0.3")
    (applied,) = draw(made, tmp_path, *both)
    (fp8,) = draw(made, tmp_path, *both, flux_dtype="fp8", t5xxl_dtype="fp8")
    (fp8_merged,) = draw(made, tmp_path, "--merge_lora_weights", *both, flux_dtype="fp8", t5xxl_dtype="fp8")
    assert 0 < difference(applied, fp8) < 40
    assert difference(fp8, fp8_merged) < 40


@slow
@pytest.mark.parametrize("kind", ["dev", "schnell", "chroma"])
def test_draws_what_previews_show(models: Mapping[str, MadeFlux], images: Path, tmp_path: Path, kind: str) -> None:
    made = models[kind]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{PROMPT} --w 80 --h 64 --d 7 --s 3 --g 2 --l 2 --n red dog\n", encoding="utf-8")
    dataset = write_dataset(tmp_path / "dataset.toml", images)
    options: dict[str, object] = {"network_module": "networks.lora_flux", "learning_rate": 0.1}
    options["t5xxl_max_token_length"] = None  # as long as the model's prompts are
    if kind == "dev":  # with its text encoders, the others with cached captions
        options |= {"apply_t5_attn_mask": True, "network_args": ["train_t5xxl=True"]}
    else:
        options |= {"network_train_unet_only": True, "cache_text_encoder_outputs": True}
    prompts.write_text(prompts.read_text().replace(" --g 2", "" if kind == "chroma" else " --g 2"))
    sampling = {"sample_prompts": prompts, "sample_every_n_steps": 2, "sample_at_first": True}
    out = tmp_path / "trained"
    train_here(*lora_arguments(made, dataset, out, **options, **sampling), script="flux_train_network")
    before, after = sorted((out / "sample").glob("*.png"))
    assert difference(before, after) > 3

    image = {"width": 80, "height": 64, "seed": 7, "steps": 3, "guidance": 2, "cfg_scale": 2}
    more = ("--negative_prompt", "red dog", *(("--apply_t5_attn_mask",) if kind == "dev" else ()))
    (drawn,) = draw(made, tmp_path / "drawn", *more, "--lora_weights", out / "tiny.safetensors", **image)
    (plain,) = draw(made, tmp_path / "drawn", *more, **image)
    assert difference(before, plain) <= 1
    assert difference(after, drawn) <= 1


# ---- interactive ----


def test_session(
    models: Mapping[str, MadeFlux], adapters: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, lora = models["dev"], adapters["lora"]
    lines = [
        f"{PROMPT}",
        f"{PROMPT} --w 80 --h 96 --d 7 --s 3 --g 1.5 --c 2 --n red dog",
        f"{PROMPT} --m 0",
        "the cat --w 70",
        "the cat --m 1,1",
        "the cat --q 1",
        f"{PROMPT} --m 0.5",
        f"{PROMPT} --c 2 --n -",
        f"{PROMPT} --n red dog",
        "",
        "never drawn",
    ]
    out = tmp_path / "session"
    drawn = draw(
            made, out, "--interactive", "--lora_weights", f"{lora};0.5", "--negative_prompt", "dog",
            lines="\n".join(lines),
        )  # fmt: skip
    first, changed, off, half, no_negative, idle = drawn
    err = capsys.readouterr().err
    assert said(err, "ERROR") == [
        "prompt 4: width 70: must be a multiple of 16, such as 64 or 80",
        "--m: 2 strengths for 1 files of --lora_weights",
        "prompt 6: unknown option --q; options are --w, --h, --s, --d, --g, --m, --n, --c, --fs",
    ]
    assert "the negative prompt has no effect at CFG scale 1" in err
    expected = {"size": "80x96", "seed": "7", "steps": "3", "guidance_scale": "1.5", "scale": "2"}
    assert expected.items() <= text_of(changed).items()
    assert text_of(changed)["negative_prompt"] == "red dog"
    assert text_of(no_negative)["negative_prompt"] == "" and text_of(idle)["negative_prompt"] == "red dog"
    assert difference(first, half) == 0 and difference(first, idle) == 0 and difference(first, off) > 3
    assert text_of(off)["network"] == "lora.safetensors:0"
    (alone,) = draw(made, tmp_path / "alone")
    assert difference(alone, off) == 0


@slow
def test_session_with_offload_encodes_once_and_reloads(
    models: Mapping[str, MadeFlux], adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (alone,) = draw(models["dev"], tmp_path / "alone", "--lora_weights", f"{adapters['lora']};0.5")
    order, _ = count_loading(monkeypatch, one_at_a_time=True)
    lora = ("--lora_weights", f"{adapters['lora']};1", "--interactive", "--offload")
    lines = f"{PROMPT} --m 0.5\n{PROMPT} --m 0.5 --d 3\n{PROMPT}\n"
    first, seed, strength = draw(models["dev"], tmp_path, *lora, lines=lines)
    assert " ".join(order) == "text denoiser vae denoiser vae text denoiser vae"
    assert difference(first, alone) == 0
    assert difference(first, seed) > 3 and difference(first, strength) > 3


@slow
def test_a_size_too_large_ends_no_session(
    models: Mapping[str, MadeFlux], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    predict = Flux.predict

    def limited(self: Flux, denoiser: Any, noisy: torch.Tensor, *more: Any) -> torch.Tensor:
        if noisy.shape[-1] > 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")
        return predict(self, denoiser, noisy, *more)

    monkeypatch.setattr(Flux, "predict", limited)
    drawn = draw(models["dev"], tmp_path, "--interactive", lines=f"{PROMPT} --w 128\n{PROMPT}\n")
    assert len(drawn) == 1
    (error,) = said(capsys.readouterr().err, "ERROR")
    assert error == "prompt 1: not enough memory for this size; try a smaller one, or --offload"


def test_a_wrong_byte_costs_one_line(
    models: Mapping[str, MadeFlux], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where prompts come through a pipe, of which a text stream would have read more at once."""
    sent = io.BytesIO(f"{PROMPT}\n".encode() + b"caf\xe9\n" + PROMPT.encode())
    piped = io.TextIOWrapper(sent, encoding="utf-8")
    drawn = draw(models["dev"], tmp_path, "--interactive", lines=piped)
    assert len(drawn) == 2
    assert said(capsys.readouterr().err, "ERROR") == ["the line is not UTF-8 text"]


def test_the_output_folder_is_tried_before_anything_is_loaded(
    models: Mapping[str, MadeFlux], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(ImageSession, "_load_denoiser", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(UserError, match="file/out: cannot be"):
        draw(models["dev"], tmp_path / "file" / "out")


# ---- mistakes ----


@pytest.mark.parametrize(
    ("changed", "more", "message"),
    [
        ({"width": 1000}, [], "--width 1000: must be a multiple of 16, such as 992 or 1008"),
        ({"height": 32}, [], "--height 32: must be at least 64"),
        ({"steps": 0, "seed": -1}, [], "--steps 0: must be 1 to 1000\n--seed -1: must be 0 to"),
        ({"guidance": -1}, [], "--guidance -1: must be at least 0"),
        ({"dtype": "fp8"}, [], "--dtype fp8: nothing is computed in fp8"),
        ({"dtype": "bf61"}, [], "--dtype bf61: unknown; choose from float, fp32, fp16, bf16"),
        ({"ae_dtype": "fp8"}, [], "--ae_dtype fp8: unknown"),
        ({}, ["--merge_lora_weights"], "--merge_lora_weights: there is nothing to merge"),
        ({"output_dir": ROOT / "README.md"}, [], "README.md: is a file; give a folder"),
        ({"clip_l": None}, [], "--clip_l: name the CLIP-L text encoder"),
        ({"t5xxl": None, "ae": None}, [], "--t5xxl: name the T5-XXL text encoder"),
        ({"ckpt_path": "gone.safetensors"}, [], "--ckpt_path gone.safetensors: no such file or folder"),
        ({"t5xxl": "gone.safetensors"}, [], "--t5xxl gone.safetensors: no such file"),
        ({"model_type": "chroma"}, [], "is FLUX.1 dev, which contradicts --model_type chroma; use --model_type flux"),
        ({}, ["--lora_weights", "gone.safetensors;1"], "--lora_weights gone.safetensors: no such file"),
    ],
)
def test_mistakes(
    models: Mapping[str, MadeFlux], tmp_path: Path, changed: dict[str, object], more: list[str], message: str
) -> None:
    with pytest.raises(UserError) as raised:
        draw(models["dev"], tmp_path / "out", *more, **changed)
    assert message in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_files_of_other_models(models: Mapping[str, MadeFlux], adapters: dict[str, Path], tmp_path: Path) -> None:
    made, chroma = models["dev"], models["chroma"]
    sd = make_tiny_sd(tmp_path / "sd.safetensors").path
    cases: list[tuple[MadeFlux, dict[str, object], str]] = [
        (made, {"ckpt_path": sd}, "Stable Diffusion 1.x or 2.x checkpoint; use gen_img.py"),
        (made, {"ckpt_path": made.t5xxl}, "is a T5 text encoder; give the transformer here and this file with --t5xxl"),
        (made, {"ckpt_path": adapters["lora"]}, "a LoRA file, not a base model; give the base model here and this file "
         "with --lora_weights"),
        (made, {"ckpt_path": chroma.path}, "is Chroma, which contradicts --model_type flux; use --model_type chroma"),
        (made, {"t5xxl": made.clip_l}, "not a T5 encoder (it is a bare CLIP text encoder)"),
        (made, {"clip_l": made.t5xxl}, "not a CLIP text encoder (it is a T5 text encoder)"),
        (made, {"ae": made.t5xxl}, "not an autoencoder (it is a T5 text encoder)"),
        (chroma, {"lora_weights": adapters["lora"]}, "have no place in this network"),
    ]  # fmt: skip
    for model, changed, message in cases:
        with pytest.raises(UserError) as raised:
            draw(model, tmp_path / "out", **changed)
        assert message in str(raised.value)
        assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_gen_img_names_this_script(
    models: Mapping[str, MadeFlux], capsys: pytest.CaptureFixture[str], own_root_logger: None
) -> None:
    with pytest.raises(SystemExit):
        gen_img.main(gen_img.setup_parser().parse_args(["--ckpt", str(models["dev"].path), "--prompt", PROMPT]))
    assert "is a FLUX.1 model; use flux_minimal_inference.py" in capsys.readouterr().err


def test_what_has_no_effect_is_said(
    models: Mapping[str, MadeFlux], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = models["chroma"]
    more = ("--interactive", "--guidance", 2, "--clip_l", models["dev"].clip_l, "--clip_l_dtype", "fp16")
    first, guided = draw(made, tmp_path, *more, lines=f"{PROMPT}\n{PROMPT} --g 4\n")
    draw(models["schnell"], tmp_path, "--negative_prompt", "dog", prompt="cat --w 512")
    assert difference(first, guided) == 0
    assert said(capsys.readouterr().err, "WARNING") == [
        "--clip_l has no effect with Chroma",
        "--clip_l_dtype has no effect with Chroma",
        "--guidance 2 has no effect with Chroma",
        "--prompt has no effect with --interactive, which reads prompts from the keyboard",
        "--g has no effect with Chroma",
        "--prompt is taken as it is; options within a prompt are read with --interactive only",
        "the negative prompt has no effect at CFG scale 1; set --cfg_scale (--c in a prompt)",
    ]


# ---- the page ----


def test_the_documented_commands_are_taken() -> None:
    page = (ROOT / "docs" / "flux_minimal_inference.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    commands = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    assert len(commands) >= 3
    for command in commands:
        program, script, *arguments = shlex.split(command)
        assert (program, script) == ("python", "flux_minimal_inference.py")
        options = flux_minimal_inference.setup_parser().parse_args(arguments)
        check_options(INFERENCE, INFERENCE.options.from_args(options))
