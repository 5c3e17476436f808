"""The wandb tracker in a real run, with a stand-in for its package that writes down its calls."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.fixtures.runs import lora_arguments, make_images, run_script, write_dataset
from tests.fixtures.tiny_sd import make_tiny_sd

STAND_IN = """
import json, os, sys

def _note(*what):
    with open(os.environ["WANDB_STAND_IN"], "a") as file:
        file.write(json.dumps(what) + "\\n")

def login(key=None, **more):
    _note("login", key)
    return True

class _Config(dict):
    def update(self, values, allow_val_change=False):
        _note("config", sorted(values))

class Run:
    def log(self, values, step=None, **more):
        _note("log", sorted(values), step)
    def finish(self):
        _note("finish")

config = _Config()
run = Run()

def init(**settings):
    _note("init", settings["project"], settings.get("name"), sys.argv)
    return run
"""


@pytest.fixture
def wandb(tmp_path: Path) -> tuple[dict[str, str], Path]:
    """The environment that holds the stand-in, and the file it writes."""
    site, notes = tmp_path / "site", tmp_path / "notes.jsonl"
    (site / "wandb").mkdir(parents=True)
    (site / "wandb" / "__init__.py").write_text(STAND_IN)
    (site / "wandb-1.0.dist-info").mkdir()
    (site / "wandb-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: wandb\nVersion: 1.0\n")
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")]))
    return {"PYTHONPATH": path, "WANDB_STAND_IN": str(notes)}, notes


def test_run_is_told_to_wandb_and_the_key_stays_secret(wandb: tuple[dict[str, str], Path], tmp_path: Path) -> None:
    environment, notes = wandb
    output = tmp_path / "out"
    done = run_script(
        "train_network.py",
        *lora_arguments(
            make_tiny_sd(tmp_path / "model.safetensors"),
            write_dataset(tmp_path / "data.toml", make_images(tmp_path / "images")),
            output,
            log_with="wandb",
            log_config=True,
            wandb_api_key="k3y-of-mine",
            wandb_run_name="first",
            log_tracker_name="cats",
        ),
        env=environment,
    )
    assert done.code == 0, done.text
    calls = [json.loads(line) for line in notes.read_text().splitlines()]
    assert calls[0] == ["login", "k3y-of-mine"]
    assert calls[1][:3] == ["init", "cats", "first"]
    assert "***" in calls[1][3] and not any("k3y" in word for word in calls[1][3]), "wandb records the command line"
    assert [entry[2] for entry in calls if entry[0] == "log" and "loss/current" in entry[1]] == [1, 2]
    assert calls[-1] == ["finish"]
    assert "k3y-of-mine" not in done.text
    written = [file for file in output.rglob("*") if file.is_file()]
    assert written and not any(b"k3y-of-mine" in file.read_bytes() for file in written)


def test_missing_wandb_is_told_before_anything_loads(tmp_path: Path) -> None:
    try:
        import wandb  # noqa: F401
    except ImportError:
        pass
    else:
        pytest.skip("wandb is installed")
    dataset = write_dataset(tmp_path / "data.toml", make_images(tmp_path / "images"))
    done = run_script(
        "train_network.py",
        *lora_arguments(make_tiny_sd(tmp_path / "model.safetensors"), dataset, tmp_path / "out", log_with="wandb"),
    )
    assert done.code == 2
    assert "pip install wandb" in done.err and "Traceback" not in done.err
