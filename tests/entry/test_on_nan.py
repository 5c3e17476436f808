"""Steps that are not finite, in real runs: one dataset's adapter strength overflows (``network_multiplier``)."""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from library.training import kept_state, nonfinite
from tests.fixtures.families import Tiny
from tests.fixtures.runs import (
    make_images,
    metadata_of,
    run_script,
    train_here,
)

STEPS = 8


@pytest.fixture
def poisoned(tmp_path: Path) -> Path:
    """Six good images and one with which every pass through the adapter is infinite or NaN."""
    make_images(tmp_path / "good", [(64, 64)] * 6)
    make_images(tmp_path / "bad", [(64, 64)])
    (tmp_path / "bad" / "0.txt").write_text("a poisoned cat", encoding="utf-8")
    table = "[[datasets]]\nresolution = 64\nbatch_size = 1\n{extra}[[datasets.subsets]]\nimage_dir = '{folder}'\n"
    path = tmp_path / "data.toml"
    path.write_text(
        "[general]\ncaption_extension = '.txt'\n"
        + table.format(extra="", folder=tmp_path / "good")
        + table.format(extra="network_multiplier = 3e38\n", folder=tmp_path / "bad"),
        encoding="utf-8",
    )
    return path


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    caplog.set_level(logging.INFO)
    logging.getLogger("library").addHandler(caplog.handler)
    yield caplog
    logging.getLogger("library").removeHandler(caplog.handler)


def all_finite(path: Path) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in load_file(path).values())


def options(**more: object) -> dict[str, object]:
    usual = {"max_train_steps": STEPS, "network_train_unet_only": True, "save_every_n_steps": 1}
    return {**usual, **more}


def test_stop_and_replay(tmp_path: Path, tiny: Tiny, poisoned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    secret = {"wandb_api_key": "secret-key-1234", "ema_decay": 0.9, "save_state": True}
    with pytest.raises(SystemExit) as ended:
        tiny.train(poisoned, output, **options(**secret))
    error = capsys.readouterr().err
    assert ended.value.code == 2
    (line,) = [line for line in error.splitlines() if line.startswith("error:")]
    assert "(seed 1)" in line and "bad/0.png 'a poisoned cat'" in line and "good/" not in line
    step = int(re.search(r"step (\d+) \(seed", line).group(1))
    # nothing of the bad step is saved, although every step saves; what was saved is finite
    assert len(list(output.glob("tiny-step*-state"))) == step - 1
    saved = [*output.glob("*.safetensors"), *output.glob("*-state/*.safetensors")]
    assert len(saved) == 4 * (step - 1) and all(map(all_finite, saved))
    (recording,) = output.glob("*.replay")
    assert str(recording) in line
    assert b"secret-key-1234" not in recording.read_bytes()
    # the very weights that the step began with
    before = load_file(recording) if step > 1 else {}
    state = load_file(output / f"tiny-step{step - 1:08d}-state" / "model.safetensors") if step > 1 else {}
    kept = {(tuple(t.shape), float(t.double().sum())) for t in state.values()}
    assert all((tuple(t.shape), float(t.double().sum())) in kept for t in before.values())

    train_here("--replay", recording, script=tiny.family.script)
    shown = capsys.readouterr().out
    assert f"step {step}, seed 1" in shown
    assert "bad/0.png 'a poisoned cat': loss nan" in shown or "bad/0.png 'a poisoned cat': loss inf" in shown
    assert re.search(r"first not finite: \S+\.\S+ \(\w+\), \d+ of \d+ values", shown), shown
    assert "the step is not finite again" in shown
    # what is given beside it wins: without the poison the step is well
    mended = tmp_path / "mended.toml"
    mended.write_text(poisoned.read_text(encoding="utf-8").replace("3e38", "1.0"), encoding="utf-8")
    train_here("--replay", recording, "--dataset_config", mended, script=tiny.family.script)
    assert "this time everything is finite" in capsys.readouterr().out


#: by the usual module of a family, one whose networks draw something in every step
DRAWING_NETWORKS: dict[str, tuple[str, str, dict[str, object]]] = {
    "networks.lora_sd3": ("networks.lora_sd3", "LoraSD3Network", {"network_args": ["rank_dropout=0.5"]}),
    "networks.lora_lumina": ("networks.lora_lumina", "LoraLuminaNetwork", {"network_args": ["rank_dropout=0.5"]}),
    "networks.lora_hunyuan_image": (
        "networks.lora_hunyuan_image",
        "LoraHunyuanImageNetwork",
        {"network_args": ["rank_dropout=0.5"]},
    ),
    "networks.lora": ("networks.dylora", "DyLoraNetwork", {"network_dim": 8}),
    "networks.lora_flux": (
        "networks.lora_flux",
        "LoraFluxNetwork",
        {"network_args": ["ggpo_sigma=0.03", "ggpo_beta=0.01"]},
    ),
}


@pytest.mark.slow
def test_what_a_network_draws_for_a_step_is_drawn_again(
    tmp_path: Path,
    tiny: Tiny,
    poisoned: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, name, settings = DRAWING_NETWORKS[tiny.family.network_module]
    network = getattr(importlib.import_module(module), name)
    recorded: list[tuple[int, int]] = []
    begin_step = network.begin_step

    def spy(self: Any, seed: int, step: int) -> None:
        recorded.append((seed, step))
        begin_step(self, seed, step)

    monkeypatch.setattr(network, "begin_step", spy)
    with pytest.raises(SystemExit):
        tiny.train(poisoned, tmp_path, **options(network_module=module, **settings))
    step = int(re.search(r"step (\d+) \(seed", capsys.readouterr().err).group(1))
    assert (1, step - 1) in recorded
    recorded.clear()
    train_here("--replay", next(tmp_path.glob("*.replay")), script=tiny.family.script)
    assert set(recorded) == {(1, step - 1)}
    assert "the step is not finite again" in capsys.readouterr().out


def test_a_file_that_is_no_recording(tmp_path: Path, tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    for path, words in ((tmp_path / "none.replay", "no such file"), (tiny.model.path, "no replay file")):
        with pytest.raises(SystemExit):
            train_here("--replay", path, script=tiny.family.script)
        assert words in capsys.readouterr().err


def test_skip_leaves_the_update_out(tmp_path: Path, tiny: Tiny, poisoned: Path, said: pytest.LogCaptureFixture) -> None:
    output = tmp_path / "out"
    tiny.train(poisoned, output, **options(on_nan="skip", max_train_steps=2 * STEPS, max_grad_norm=0))
    warned = [r.getMessage() for r in said.records if "its update was left out" in r.getMessage()]
    steps = [int(re.search(r"step (\d+) ", text).group(1)) for text in warned]
    assert len(steps) in (2, 3) and all("bad/0.png" in text for text in warned)
    for path in output.glob("*.safetensors"):
        assert all_finite(path), path
    step = next(step for step in steps if step > 1)
    weights = [load_file(output / f"tiny-step{s:08d}.safetensors") for s in (step - 1, step, step + 1)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[1][name], weights[2][name]) for name in weights[0])
    assert metadata_of(output / "tiny.safetensors")["ss_steps"] == str(2 * STEPS)


def test_rollback_goes_back_to_a_kept_state(
    tmp_path: Path,
    tiny: Tiny,
    poisoned: Path,
    said: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kept_state, "KEPT_EVERY", 2)
    output = tmp_path / "out"
    tiny.train(poisoned, output, **options(on_nan="rollback", max_train_steps=2 * STEPS, save_state=True))
    warned = [r.getMessage() for r in said.records if "went back to those after step" in r.getMessage()]
    found = [tuple(map(int, re.search(r"step (\d+) \(.* after step (\d+) ", text).groups())) for text in warned]
    assert found and all(back == (step - 1) // 2 * 2 for step, back in found)
    for step, back in found:
        if back:
            one, other = (load_file(output / f"tiny-step{s:08d}-state" / "model.safetensors") for s in (step, back))
            assert all(torch.equal(one[name], other[name]) for name in one)
    assert all(map(all_finite, output.glob("*.safetensors")))


def test_too_many_in_a_row(tmp_path: Path, tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    """A rate of 1e30 ruins the weights at once; neither mode goes on for ever."""
    images = make_images(tmp_path / "images", [(64, 64)])
    dataset = tmp_path / "data.toml"
    dataset.write_text(
        "[[datasets]]\nresolution = 64\nnetwork_multiplier = 3e38\n[[datasets.subsets]]\n"
        f"image_dir = '{images}'\ncaption_extension = '.txt'\n",
        encoding="utf-8",
    )
    for mode in ("skip", "rollback"):
        with pytest.raises(SystemExit) as ended:
            tiny.train(dataset, tmp_path / mode, **options(on_nan=mode, max_train_steps=40))
        error = capsys.readouterr().err
        assert ended.value.code == 2
        assert f"after {nonfinite.MOST_IN_A_ROW} in a row" in error
        assert len(list((tmp_path / mode).glob("*.replay"))) == 3
        assert all(map(all_finite, (tmp_path / mode).glob("*.safetensors")))


@pytest.mark.slow
def test_processes_decide_alike(tmp_path: Path, tiny: Tiny, poisoned: Path) -> None:
    """Only one of two processes has the poisoned image; both leave the step out, and its recording is of that one."""
    output = tmp_path / "out"
    settings = options(on_nan="skip", max_train_steps=STEPS, save_every_n_steps=None)
    ended = tiny.launch(2, poisoned, output, **settings)
    assert [run.code for run in ended] == [0, 0], "\n".join(run.text for run in ended)
    warned = [line for line in ended[0].text.splitlines() if "its update was left out" in line]
    assert warned and all("bad/0.png" in line and "good/" not in line for line in warned)
    assert all_finite(output / "tiny.safetensors")
    recording = sorted(output.glob("*.replay"))[0]
    again = run_script(tiny.file, "--replay", recording)
    assert again.code == 0 and " of 2" in again.out, again.text
    assert "the step is not finite again" in again.out
