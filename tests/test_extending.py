"""docs/extending.md by example: a family, a kind and an option from outside of the library, joined and run.

No file of the library knows any of them; ``Trainer(architecture, kind)`` is all that joins them.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

from library.architectures.common.flow_matching import FlowMatching
from library.config.arguments import RunOptions, script_parser
from library.config.config_file import read_args
from library.config.declaration import Declaration, joined
from library.config.image_settings import ImageSettings
from library.config.prompt_options import PromptOption, number_from_zero
from library.inference.png import read_texts
from library.training.trainer import Trainer
from tests.fixtures.flow_train_network import ToyFlow
from tests.fixtures.killed import train_killed
from tests.fixtures.runs import ROOT, logged, make_images, metadata_of, write_dataset
from tests.fixtures.tiny_sd import MadeCheckpoint, make_tiny_sd
from tests.fixtures.toy_kind import DECLARATION, Biases

TOY = ToyFlow()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> MadeCheckpoint:
    return make_tiny_sd(tmp_path_factory.mktemp("model") / "tiny.safetensors")


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "data.toml", make_images(tmp_path / "images"), dataset="batch_size = 2")


@pytest.fixture(autouse=True)
def own_processes(own_root_logger: None) -> Iterator[None]:
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def train(model: MadeCheckpoint, dataset: Path, output: Path, **more: object) -> None:
    flags: dict[str, object] = {
        **model.flags, "dataset_config": dataset, "output_dir": output, "output_name": "toy", "seed": 1,
        "learning_rate": 1e-3, "max_train_steps": 4, "max_data_loader_n_workers": 0, "console_log_simple": True, **more,
    }  # fmt: skip
    words = [str(w) for n, v in flags.items() if v is not None for w in ([f"--{n}"] if v is True else [f"--{n}", v])]
    parser = script_parser("Train biases.", RunOptions, joined(DECLARATION, TOY.declaration))
    assert {"--bias_part", "--guidance_scale"} <= {flag for action in parser._actions for flag in action.option_strings}
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    Trainer(TOY, Biases).train(read_args(parser, words))


def test_they_train_together(tmp_path: Path, model: MadeCheckpoint, dataset: Path) -> None:
    train(model, dataset, tmp_path / "out", bias_decay=0.01, ema_decay=0.9, mixed_precision="bf16")
    saved, base = load_file(tmp_path / "out" / "toy.safetensors"), load_file(model.path)
    assert saved and all(name.endswith(".bias") for name in saved)
    assert not torch.equal(saved["conv_out.bias"], base["model.diffusion_model.out.2.bias"])
    assert (tmp_path / "out" / "toy-ema.safetensors").exists()
    entries = metadata_of(tmp_path / "out" / "toy.safetensors")
    assert entries["ss_bias_part"] == "all" and entries["modelspec.architecture"] == "stable-diffusion-v1/biases"
    assert entries["modelspec.prediction_type"] == "flow" and entries["ss_guidance_scale"] == "3.5"
    assert len(logged(tmp_path / "out", "norm/biases")) == 4 and len(logged(tmp_path / "out", "lr/biases")) == 4


def test_a_killed_run_is_resumed_exactly(tmp_path: Path, model: MadeCheckpoint, dataset: Path) -> None:
    options = {"save_every_n_steps": 2, "save_state": True, "bias_decay": 0.01, "lr_scheduler": "cosine"}
    train(model, dataset, tmp_path / "alone", **options)
    again = partial(train, model, dataset, tmp_path / "out", **options)
    train_killed(again, tmp_path / "out", steps=[3], name="toy")
    alone, resumed = (load_file(tmp_path / name / "toy.safetensors") for name in ("alone", "out"))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in alone.items())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bias_decay": 1.5}, "--bias_decay 1.5: must be"),
        ({"bias_decay": 0.1, "bias_part": "up"}, "--bias_decay: for all biases; remove it, or --bias_part up"),
        ({"learning_rate": 0, "bias_decay": 0.1, "strict": True}, "--bias_decay has no effect with --learning_rate 0"),
        ({"guidance_scale": -1}, "--guidance_scale -1.0: must be at least 0"),
    ],
)
def test_their_rules_hold(
    tmp_path: Path,
    model: MadeCheckpoint,
    dataset: Path,
    options: dict[str, object],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        train(model, dataset, tmp_path / "out", **options)
    assert words in capsys.readouterr().err


def test_the_plan_names_what_is_trained(
    tmp_path: Path, model: MadeCheckpoint, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(model, dataset, tmp_path / "out", dry_run=True, bias_part="up")
    assert re.search(r"trained: [\d,]+ biases of the denoiser", capsys.readouterr().out)
    logging.getLogger().handlers.clear()


class TonedFlow(ToyFlow):
    """The family with one more option in the prompts of its images."""

    declaration = joined(
        ToyFlow.declaration, Declaration(prompt_options=(PromptOption("tone", "tone", number_from_zero),))
    )
    tones: ClassVar[list[object]] = []

    def for_image(self, settings: ImageSettings) -> FlowMatching:
        self.tones.append(settings.own.get("tone"))
        return super().for_image(settings)


def test_a_prompt_option_of_a_family_is_one_line(
    tmp_path: Path, model: MadeCheckpoint, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompt lines and files read it, the family gets it, and the image's file records it."""
    monkeypatch.setattr(sys.modules[__name__], "TOY", TonedFlow())
    prompts = tmp_path / "prompts.json"
    prompts.write_text('["a cat --tone 0.5 --fs 2", {"prompt": "a dog", "tone": 0.25}, "a cat --ctr 1"]')
    TonedFlow.tones.clear()
    train(model, dataset, tmp_path / "out", max_train_steps=1, sample_prompts=prompts, sample_every_n_steps=1)
    assert TonedFlow.tones == [0.5, 0.25, None]
    texts = [read_texts(path) for path in sorted((tmp_path / "out" / "sample").glob("*.png"))]
    assert [text.get("tone") for text in texts] == ["0.5", "0.25", None]
    assert texts[0]["flow_shift"] == "2" and "cfg_trunc_ratio" not in texts[2]
    prompts.write_text('["a cat --tone loud"]')
    with pytest.raises(SystemExit):
        train(model, dataset, tmp_path / "out", sample_prompts=prompts, sample_every_n_steps=1)


def test_the_library_knows_none_of_them() -> None:
    texts = {path: path.read_text(encoding="utf-8") for path in (ROOT / "library").rglob("*.py")}
    assert not [path for path, text in texts.items() if re.search(r"\b(Biases|bias_part|ToyFlow|toy_flow)\b", text)]


def test_the_page_names_files_that_are_there() -> None:
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:library|tests|docs|tools|networks)/[\w./]+)`", page)
    assert len(named) >= 15
    missing: list[Any] = [name for name in named if not (ROOT / name).exists()]
    assert not missing
