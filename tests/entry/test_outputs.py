"""The output folder of a run: nothing is lost, nothing of others is removed, and messages come beforehand."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library.training.checkpoints import OutputNames
from library.training.outputs import only_run
from tests.fixtures.families import Tiny
from tests.fixtures.runs import make_images, write_dataset

pytestmark = pytest.mark.usefixtures("own_root_logger")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    return write_dataset(folder / "data.toml", make_images(folder / "images", [(64, 64)]))


def train(sd: Tiny, dataset: Path, output: Path, **more: object) -> None:
    sd.train(dataset, output, network_train_unet_only=True, **more)


def refused(capsys: pytest.CaptureFixture[str], sd: Tiny, dataset: Path, output: Path, **more: object) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        train(sd, dataset, output, **more)
    text = capsys.readouterr().err
    assert ended.value.code == 2 and "Traceback" not in text, text
    return text


SAVES = {"max_train_steps": 2, "save_every_n_steps": 1, "save_state": True}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, sd: Tiny, dataset: Path) -> Path:
    output = tmp_path_factory.mktemp("whole")
    train(sd, dataset, output, **SAVES)
    return output


def test_killed_before_the_final_files(tmp_path: Path, sd: Tiny, dataset: Path, whole: Path) -> None:
    output = shutil.copytree(whole, tmp_path / "out")
    expected = load_file(output / "tiny.safetensors")
    (output / "tiny.safetensors").unlink()
    shutil.rmtree(output / "tiny-state")
    train(sd, dataset, output, **SAVES, resume=output / "tiny-step00000002-state")
    found = load_file(output / "tiny.safetensors")
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert json.loads((output / "tiny-state" / "train_state.json").read_text())["current_step"] == 2


def test_two_runs_of_one_name(tmp_path: Path, sd: Tiny, dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with only_run(OutputNames(tmp_path, "tiny", "safetensors")):
        assert "another run (this process) is writing 'tiny' there" in refused(capsys, sd, dataset, tmp_path)
        train(sd, dataset, tmp_path, output_name="other", max_train_steps=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["logs", "other.safetensors"]


def test_what_will_be_replaced_is_said(
    tmp_path: Path, sd: Tiny, dataset: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = shutil.copytree(whole, tmp_path / "out")
    capsys.readouterr()
    train(sd, dataset, output, max_train_steps=1)
    assert "this run will replace tiny.safetensors, which is there" in capsys.readouterr().err
    train(sd, dataset, output, **SAVES, resume=output / "tiny-step00000001-state")
    assert "will replace tiny-step00000002.safetensors, tiny-step00000002-state" in capsys.readouterr().err


@pytest.mark.parametrize("dry_run", [False, True])
def test_what_lies_in_the_way_is_found_before_caching(
    tmp_path: Path, sd: Tiny, capsys: pytest.CaptureFixture[str], dry_run: bool
) -> None:
    images = make_images(tmp_path / "images", [(64, 64)])
    data = write_dataset(tmp_path / "data.toml", images)
    before = sorted(images.iterdir())
    (tmp_path / "out" / "tiny-state").mkdir(parents=True)
    (tmp_path / "out" / "tiny-state" / "holiday.png").touch()
    given = {"cache_latents_to_disk": True, "dry_run": dry_run}
    text = refused(capsys, sd, data, tmp_path / "out", save_state=True, **given)
    assert "tiny-state: this folder holds no state of training, and a state would replace it" in text
    (tmp_path / "out" / "tiny-ema.safetensors").mkdir()
    text = refused(capsys, sd, data, tmp_path / "out", ema_decay=0.9, **given)
    assert "tiny-ema.safetensors: is a folder, but a file of weights must be written there" in text
    text = refused(capsys, sd, data, tmp_path / "out", output_name="n" * 250, **given)
    assert "cannot be written (File name too long)" in text
    (tmp_path / "file").touch()
    assert "file" in refused(capsys, sd, data, tmp_path / "file", **given)
    assert sorted(images.iterdir()) == before and (tmp_path / "out" / "tiny-state" / "holiday.png").exists()


def test_too_little_space(
    tmp_path: Path, sd: Tiny, dataset: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    assert "MB are free, and one file of the trained weights takes" in refused(capsys, sd, dataset, tmp_path)


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_output_folder_goes_away(tmp_path: Path, sd: Tiny, dataset: Path) -> None:
    """Someone tidies up in mid-run: what is saved later is there."""
    output = tmp_path / "out"

    def remove() -> None:
        while not (output / "tiny-step00000001-state").exists():
            time.sleep(0.01)
        shutil.rmtree(output, ignore_errors=True)

    thread = threading.Thread(target=remove)
    thread.start()
    train(sd, dataset, output, max_train_steps=8, save_every_n_steps=1, save_state=True)
    thread.join()
    assert (output / "tiny.safetensors").exists() and (output / "tiny-state" / "manifest.json").exists()
    assert not (output / "tiny-step00000001-state").exists()
    assert list((output / "logs").rglob("events.out.tfevents.*"))


def test_retention_leaves_what_other_runs_wrote(tmp_path: Path, sd: Tiny, dataset: Path, whole: Path) -> None:
    """A run that goes on in another folder counts the steps of files there that are not its own."""
    theirs = ["tiny-step00000001.safetensors", "tiny-step00000002.safetensors"]
    for name in theirs:
        (tmp_path / name).write_bytes(b"of someone else")
    settings = {"max_train_steps": 5, "save_every_n_steps": 1, "save_last_n_steps": 1}
    train(sd, dataset, tmp_path, resume=whole / "tiny-step00000002-state", **settings)
    assert all((tmp_path / name).read_bytes() == b"of someone else" for name in theirs)
    own = {p.name for p in tmp_path.glob("tiny-step*")} - set(theirs)
    assert own == {"tiny-step00000004.safetensors", "tiny-step00000005.safetensors"}
