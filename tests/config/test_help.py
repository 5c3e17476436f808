"""``--help``: short, with a working example first; by topic; marked where an option is not for the script."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import flux_train_network
import sdxl_train_network
import train_network
from library.config.help import split_doc
from library.config.parser import SuggestingParser

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = (
    "train_network", "sdxl_train_network", "flux_train_network", "fine_tune", "train_db", "sdxl_train", "flux_train",
    "gen_img", "tools.cache_latents", "tools.cache_text_encoder_outputs", "tools.check_dataset",
)  # fmt: skip


def helped(parser: SuggestingParser, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--help", *words])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("module", [train_network, sdxl_train_network, flux_train_network])
def test_the_front_page_is_short_and_begins_with_an_example(module: object, capsys: pytest.CaptureFixture[str]) -> None:
    text = helped(module.setup_parser(), capsys)
    lines = text.splitlines()
    assert len(lines) < 45 and max(map(len, lines)) <= 120
    assert lines[0].startswith("usage: ") and lines[2].startswith("Train a LoRA")
    assert text.count(lines[2]) == 1
    name = module.__name__
    assert 0 < text.index(f"accelerate launch {name}.py") < text.index("options, by topic")
    assert text.rstrip().endswith(f"docs/{name}.md explains every part of it.")
    topics = [line.split()[0] for line in lines if line.startswith("    ") and line.split()[1].isdigit()]
    assert {"model", "dataset", "network", "optimizer", "config"} <= set(topics)
    assert ("flow" in topics) == (module is flux_train_network)


def test_topics_options_and_all(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    parser = train_network.setup_parser()
    noise = helped(parser, capsys, "noise")
    assert noise.startswith("Noise and timesteps:") and "--noise_offset" in noise and "--seed" not in noise
    assert helped(parser, capsys, "--network_dim").split()[:2] == ["--network_dim", "N"]
    everything = helped(parser, capsys, "all")
    assert all(
        f"--{action.dest} " in everything or f"--{action.dest}\n" in everything for action in parser._actions[1:]
    )


def test_what_is_not_for_a_family_is_marked_in_its_words(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert "[refused: that is for Stable Diffusion 2.x" in helped(sdxl_train_network.setup_parser(), capsys, "v2")
    assert "refused" not in helped(train_network.setup_parser(), capsys, "v2")
    flux = flux_train_network.setup_parser()
    assert "[no effect with flow matching" in helped(flux, capsys, "min_snr_gamma")
    network = helped(flux, capsys, "network")
    assert "networks.lora_flux" in network and "networks.lora " not in network and "U-Net" not in network
    assert "[refused: weights and states are kept in" in helped(flux, capsys, "offload_param_nvme_path")


def test_an_unknown_topic_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        train_network.setup_parser().parse_args(["--help", "optimiser"])
    assert ended.value.code == 2
    assert '--help optimiser: no such topic or option (did you mean "optimizer"?)' in capsys.readouterr().err


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_shows_an_example(script: str) -> None:
    parser = importlib.import_module(script).setup_parser()
    assert parser.epilog.strip().startswith(("accelerate launch ", "python "))
    assert script.replace(".", "/") + ".py" in parser.epilog and "\n" not in parser.description


def test_the_command_line_needs_no_torch() -> None:
    """It takes seconds to import; the trainer is made when a program asks for it."""
    for script in SCRIPTS:
        program = f"import sys, {script} as s; s.setup_parser().parse_args([]); sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0, script


def test_programs_find_the_trainer() -> None:
    from train_network import NetworkTrainer

    assert NetworkTrainer is train_network.NetworkTrainer
    assert (NetworkTrainer.__module__, NetworkTrainer.__qualname__) == ("train_network", "NetworkTrainer")
    assert callable(NetworkTrainer().train)
    assert sdxl_train_network.SdxlNetworkTrainer.architecture.name == "sdxl"
    assert flux_train_network.FluxNetworkTrainer.architecture.name == "flux"
    with pytest.raises(AttributeError, match="has no attribute 'Trainer'"):
        train_network.Trainer  # noqa: B018


def test_it_is_there_at_once() -> None:
    took = []
    for _ in range(3):  # CPU time, as the machine may have other work
        before = os.times()
        done = subprocess.run(
            [sys.executable, "train_network.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        after = os.times()
        took.append(after.children_user + after.children_system - before.children_user - before.children_system)
        assert done.stdout.startswith("usage: train_network.py")
    assert min(took) < 1.0, took


@pytest.mark.parametrize("indent", ["", "    "])
def test_docstrings_are_read_alike_with_and_without_indentation(indent: str) -> None:
    """Python 3.13 takes the indentation away where the whole rest of a docstring is the example."""
    doc = f"What it\ndoes.\n\n{indent}python a.py \\\\\n{indent}    --flag\n"
    assert split_doc(doc) == ("What it does.", "    python a.py \\\\\n        --flag", "")
    assert split_doc(f"{doc}\nMore.\n") == ("What it does.", "    python a.py \\\\\n        --flag", "More.")
