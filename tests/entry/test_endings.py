"""Runs that end early without any fault of the program: one line, no traceback."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.fixtures.families import Tiny
from tests.fixtures.runs import PATIENCE, launch_script, make_images, start_processes, write_dataset

pytestmark = pytest.mark.usefixtures("own_root_logger")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    return write_dataset(folder / "data.toml", make_images(folder / "images", [(64, 64)]))


def test_processes_that_do_not_join_are_refused(tmp_path: Path, sd: Tiny, dataset: Path) -> None:
    """``torchrun`` on a CPU: every process would train alone, and write the same files."""
    done = launch_script(
        sd.file,
        2,
        *sd.words(dataset, tmp_path / "out"),
        env={"ACCELERATE_USE_CPU": "false", "CUDA_VISIBLE_DEVICES": ""},
    )
    for process in done:
        assert process.code == 2 and "Traceback" not in process.err
        assert "2 processes were started (WORLD_SIZE=2), and this one knows of 1" in process.err
    assert not (tmp_path / "out").exists()


def test_an_environment_of_processes_that_nobody_started(
    tmp_path: Path, sd: Tiny, dataset: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(SystemExit) as ended:
        sd.train(dataset, tmp_path / "out")
    assert ended.value.code == 2
    assert "the processes of this run cannot join" in capsys.readouterr().err


@pytest.mark.slow
def test_a_process_that_dies_takes_the_others_along(tmp_path: Path, sd: Tiny, dataset: Path) -> None:
    words = sd.words(dataset, tmp_path, max_train_steps=100_000, network_train_unet_only=True)
    first, second = start_processes(sd.file, 2, *words)
    while "first step" not in first.stderr.readline():
        assert first.poll() is None
    second.send_signal(signal.SIGKILL)
    _, text = first.communicate(timeout=PATIENCE)
    second.communicate()
    assert first.returncode == 2 and "Traceback" not in text, text
    assert text.count("error: another process of this run has ended") == 1
