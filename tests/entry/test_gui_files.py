"""Configuration files that a graphical program writes start and train, without a word that its users cannot help."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from library.config.config_file import _toml_value, read_args
from library.config.toml_file import flattened
from tests.fixtures.families import FLUX, HUNYUAN_IMAGE, LUMINA, SD, SD3, SDXL
from tests.fixtures.runs import ROOT, Made, environment, make_images, train_here

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILES = tomllib.loads((Path(__file__).parent / "data" / "gui_files.toml").read_text("utf-8"))
COMMON = FILES.pop("common")
#: script -> the family of its models
FAMILIES = {family.script: family for family in (SD, SDXL, FLUX, SD3, LUMINA, HUNYUAN_IMAGE)}
FAMILIES |= {"train_db": SD, "fine_tune": SD, "sdxl_train": SDXL, "flux_train": FLUX, "sd3_train": SD3}
FAMILIES |= {"lumina_train": LUMINA, "train_textual_inversion": SD, "sdxl_train_textual_inversion": SDXL}
FAMILIES |= {"train_control_net": SD, "sdxl_train_control_net_lllite": SDXL}
#: what the file has of networks, which whole models have not
OF_NETWORKS = ("network_module", "network_dim")
#: what this machine has not, and its replacement
ON_CPU = {"fp16": "bf16", "xformers": "sdpa"}
#: so that a tiny model needs seconds: the command line wins over the file
SMALL = {"resolution": "64,64", "min_bucket_reso": 32, "bucket_reso_steps": 32, "max_train_steps": 2, "network_dim": 2}
SLOW = ("full_flux", "full_sdxl_standard", "SDXL_LoRA_adafactor_v1.0", "whole_sd3", "whole_lumina", "lllite_sdxl")
SLOW += ("hunyuan_image_lora", "lumina_lora", "textual_inversion_sdxl", "control_net_sd15")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    families = {family.name: family for family in FAMILIES.values()}
    made = {name: family.make(tmp_path_factory.mktemp(name)) for name, family in families.items()}
    return {script: made[family.name] for script, family in FAMILIES.items()}


def file_of(name: str, model: Made, folder: Path) -> tuple[str, Path]:
    """The script, and the file as the program would write it for these places."""
    keys = {**COMMON, **FILES[name]}
    script = keys.pop("script")
    places = {
        "@OUT@": folder / "out",
        "@IMAGES@": folder / "images",
        "@REG@": folder / "reg",
        "@COND@": folder / "cond",
    }
    lines: list[str] = []

    def write(table: dict[str, Any]) -> None:
        for key, value in sorted(table.items(), key=lambda item: isinstance(item[1], dict)):
            if isinstance(value, dict):
                lines.append(f"[{key}]\n")
                write(value)
                continue
            if isinstance(value, str):
                if re.match("@(MODEL|SDXL|FLUX|SD3|LUMINA|HUNYUAN)@", value):
                    value = str(model.flags[key]) if key in model.flags else ""
                for placeholder, place in places.items():
                    value = value.replace(placeholder, place.as_posix())
                value = ON_CPU.get(value, value)
            lines.append(f"{ON_CPU.get(key, key)} = {_toml_value(value)}\n")

    write(keys)
    prompts = folder / "out" / "sample" / "prompt.txt"  # which the program always makes
    prompts.parent.mkdir(parents=True)
    prompts.write_text("a cat --w 64 --h 64 --s 2 --d 1 --l 3 --ss euler_a\n")
    make_images(folder / "images" / "2_cat", sizes=[(64, 64), (96, 64)])
    make_images(folder / "cond", sizes=[(64, 64), (96, 64)])
    make_images(folder / "reg" / "1_animal", sizes=[(64, 64)])
    entries = {str(folder / "images" / "2_cat" / f"{i}.png"): {"caption": "a cat", "tags": "dog"} for i in range(2)}
    (folder / "images" / "meta_lat.json").write_text(json.dumps(entries))
    path = folder / "run.toml"
    path.write_text("".join(lines), encoding="utf-8")
    return script, path


@pytest.mark.parametrize("name", FILES)
def test_every_key_is_understood(name: str, models: dict[str, Made], tmp_path: Path) -> None:
    script, path = file_of(name, models[FILES[name]["script"]], tmp_path)
    args = read_args(importlib.import_module(script).setup_parser(), ["--config_file", str(path), "--strict"])
    flat = flattened(FILES[name])
    for key, value in flat:
        if key in ("network_module", "learning_rate", "max_train_steps"):
            assert getattr(args, key) == value


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in FILES])
def test_it_trains(
    name: str,
    models: dict[str, Made],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # as its launcher sets it: accelerate launch --dynamo_backend no --dynamo_mode default
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    monkeypatch.setenv("ACCELERATE_DYNAMO_MODE", "default")
    script, path = file_of(name, models[FILES[name]["script"]], tmp_path)
    model = models[script]
    small = {**SMALL, **{key: value for key, value in model.flags.items() if key.startswith("tok") or "length" in key}}
    keys = [key for key, _ in flattened(FILES[name])]
    has_network = "network_dim" in keys
    if not has_network:
        small = {key: value for key, value in small.items() if key not in OF_NETWORKS}
    if "max_train_epochs" in keys:
        small["max_train_epochs"] = 1
    words = [word for key, value in small.items() for word in (f"--{key}", value)]
    train_here("--config_file", path, "--console_log_simple", *words, script=script)
    said = capsys.readouterr().err
    saved = load_file(tmp_path / "out" / "last.safetensors")
    assert all(tensor.isfinite().all() for tensor in saved.values())
    trained = [tensor for key, tensor in saved.items() if "lora_up" in key or "hada_w2_a" in key or ".up." in key]
    assert not has_network or any(tensor.any() for tensor in trained)
    ignored = [line for line in said.splitlines() if "ignored, as they are for other programs" in line]
    assert len(ignored) == 1 and "epoch" in ignored[0]


def test_defaults_written_out_are_no_news(
    models: dict[str, Made], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever uses the program sees no warnings but those of his own settings."""
    script, path = file_of("defaults", models["train_network"], tmp_path)
    folder = models[script].flags["tokenizer_cache_dir"]
    train_here(
        "--config_file", path, "--console_log_simple", "--dry_run", "--tokenizer_cache_dir", folder, script=script
    )
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("WARNING")] == []


@pytest.mark.slow
def test_as_the_program_starts_it(models: dict[str, Made], tmp_path: Path) -> None:
    script, path = file_of("defaults", models["train_network"], tmp_path)
    launcher = "-m accelerate.commands.launch --cpu --dynamo_backend no --dynamo_mode default --mixed_precision bf16"
    numbers = "--num_processes 1 --num_machines 1 --num_cpu_threads_per_process 2"
    words = ["--config_file", path, "--tokenizer_cache_dir", models[script].flags["tokenizer_cache_dir"]]
    small = ["--resolution", "64,64", "--max_train_steps", "1", "--network_dim", "2"]
    done = subprocess.run(
        [sys.executable, *launcher.split(), *numbers.split(), f"{script}.py", *map(str, words), *small],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "last.safetensors").is_file() and "compiler" not in done.stderr
