"""Exact resume: a run that was killed or stopped and resumed ends bit-equal to the uninterrupted one."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.fixtures.families import Tiny
from tests.fixtures.runs import PATIENCE, run_script, write_dataset

#: everything that varies at once: buckets, flip, captions shuffled, dropped and warmed up, LoRA dropout, schedule
GENERAL = (
    "shuffle_caption = true\nkeep_tokens = 1\nflip_aug = true\ncaption_tag_dropout_rate = 0.2\ntoken_warmup_step = 0.6"
)
HARD = {
    "max_train_steps": 12,
    "max_data_loader_n_workers": 2,
    "gradient_accumulation_steps": 2,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 3,
    "network_dropout": 0.3,
    "noise_offset": 0.05,
    "cache_latents": True,
    "save_state": True,
    "save_every_n_steps": 2,
}


def hard(tiny: Tiny, **more: object) -> dict[str, object]:
    """The hardest options for a family's runs."""
    return {**HARD, "network_args": ["rank_dropout=0.2", "module_dropout=0.1", *tiny.family.network_args], **more}


def assert_same_weights(one: Path, other: Path) -> None:
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"{len(different)} of {len(a)} tensors differ, e.g. {different[:3]}"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    return write_dataset(
        folder / "data.toml", images, general=GENERAL, dataset="batch_size = 2", subset="num_repeats = 3"
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny, dataset: Path) -> Path:
    output = tmp_path_factory.mktemp("whole")
    done = tiny.run(dataset, output, **hard(tiny))
    assert done.code == 0, done.text
    return output / "tiny.safetensors"


def newest_state(output: Path) -> Path | None:
    states = sorted(output.glob("tiny-step*-state"))
    return states[-1] if states else None


@pytest.mark.parametrize("attempt", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_an_arbitrary_moment(
    tmp_path: Path, tiny: Tiny, dataset: Path, uninterrupted: Path, attempt: int
) -> None:
    process = tiny.start(dataset, tmp_path, **hard(tiny))
    deadline = time.monotonic() + 120
    while newest_state(tmp_path) is None and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(random.uniform(0.0, 0.6))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    state = newest_state(tmp_path)
    assert state is not None
    if (tmp_path / "tiny.safetensors").exists():
        (tmp_path / "tiny.safetensors").unlink()  # too fast: it had ended; resume redoes the end
        state = sorted(tmp_path.glob("tiny-step*-state"))[0]
    done = tiny.run(dataset, tmp_path, resume=state, **hard(tiny))
    assert done.code == 0, done.text
    assert_same_weights(tmp_path / "tiny.safetensors", uninterrupted)


@pytest.mark.parametrize(
    ("number", "code"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143)]
)
def test_stopped_by_a_signal(
    tmp_path: Path, tiny: Tiny, dataset: Path, uninterrupted: Path, number: int, code: int
) -> None:
    process = tiny.start(dataset, tmp_path, **hard(tiny))
    seen = []
    for line in process.stdout:
        seen.append(line)
        if "first step" in line:
            break
    process.send_signal(number)
    rest, _ = process.communicate(timeout=PATIENCE)
    text = "".join(seen) + rest
    assert process.returncode == code, text
    assert "Traceback" not in text
    state = newest_state(tmp_path)
    assert state is not None and str(state) in text, text
    assert state.with_name(state.name.removesuffix("-state") + ".safetensors").exists()
    stopped_at = json.loads((state / "train_state.json").read_text())["current_step"]
    assert 0 < stopped_at < 12
    done = tiny.run(dataset, tmp_path, resume=state, **hard(tiny))
    assert done.code == 0, done.text
    assert_same_weights(tmp_path / "tiny.safetensors", uninterrupted)


def test_the_number_of_workers_does_not_matter(tmp_path: Path, tiny: Tiny, dataset: Path, uninterrupted: Path) -> None:
    arguments = tiny.words(dataset, tmp_path, **hard(tiny, max_data_loader_n_workers=0))
    done = run_script(tiny.file, *arguments)
    assert done.code == 0, done.text
    assert_same_weights(tmp_path / "tiny.safetensors", uninterrupted)


def test_a_torn_state_is_refused(tmp_path: Path, tiny: Tiny, dataset: Path) -> None:
    settings = hard(tiny, max_train_steps=2)
    assert tiny.run(dataset, tmp_path, **settings).code == 0
    state = newest_state(tmp_path)
    torn = next(state.glob("model*.safetensors"))
    torn.write_bytes(torn.read_bytes()[:-10])
    done = tiny.run(dataset, tmp_path, resume=state, **hard(tiny))
    assert done.code == 2
    assert torn.name in done.err and "Traceback" not in done.err


def test_resuming_the_output_folder_names_the_state(tmp_path: Path, tiny: Tiny, dataset: Path) -> None:
    (tmp_path / "tiny-step00000002-state").mkdir()
    done = tiny.run(dataset, tmp_path, resume=tmp_path, **hard(tiny))
    assert done.code == 2
    assert "tiny-step00000002-state" in done.err
