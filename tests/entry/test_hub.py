"""Whole runs against a Hub in this process: uploads, states from there, and tokens that stay secret."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import train_network
from library.config.config_file import read_args
from tests.entry.test_resume import assert_same_weights
from tests.fixtures.fake_hub import TOKEN, FakeHub, fake_hub
from tests.fixtures.runs import lora_arguments, metadata_of, run_script, train_here, write_dataset
from tests.fixtures.tiny_sd import MadeCheckpoint

KEY = "k3y-of-wandb"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with fake_hub() as running:
        running.use_here(monkeypatch, tmp_path / "cache")
        yield running


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset") / "data.toml", images, dataset="batch_size = 2")


def test_up_and_back_again(
    tmp_path: Path, tiny_sd: MadeCheckpoint, dataset: Path, hub: FakeHub, capfd: pytest.CaptureFixture[str]
) -> None:
    """Saves arrive whatever fails on the way, retention waits for them, and a state from there goes on exactly."""
    output = tmp_path / "out"
    settings = {
        "max_train_steps": 6,
        "network_train_unet_only": True,
        "save_every_n_steps": 2,
        "save_last_n_steps": 1,
        "save_state": True,
        "ema_decay": 0.9,
        "huggingface_repo_id": "lora",  # of the token's owner
        "huggingface_path_in_repo": "runs/1",
        "huggingface_token": TOKEN,
        "wandb_api_key": KEY,
        "save_state_to_huggingface": True,
        "async_upload": True,
        "log_config": True,
        "training_comment": "a comment",
    }
    hub.failures["POST /me/lora.git/info/lfs"] = 2
    train_here(*lora_arguments(tiny_sd, dataset, output, **settings))

    files = hub.files("me/lora")
    names = {name.removeprefix("runs/1/").split("/")[0] for name in files}
    steps = [f"tiny-step{step:08d}" for step in (2, 4, 6)]
    weights = {f"{name}{part}.safetensors" for name in (*steps, "tiny") for part in ("", "-ema")}
    assert names == weights | {f"{name}-state" for name in (*steps, "tiny")}
    assert files["runs/1/tiny.safetensors"] == (output / "tiny.safetensors").read_bytes()
    assert sorted(p.name for p in output.glob("tiny-step*")) == [
        "tiny-step00000006-ema.safetensors", "tiny-step00000006-state", "tiny-step00000006.safetensors"
    ]  # fmt: skip
    said = capfd.readouterr()
    assert "the Hub is in a bad mood" in said.err and "hf upload me/lora" in said.err

    # secrets are in nothing that was written, said or sent as a file
    config = tmp_path / "run.toml"
    with pytest.raises(SystemExit) as ended:
        words = [*lora_arguments(tiny_sd, dataset, output, **settings), "--output_config", "--config_file", config]
        read_args(train_network.setup_parser(), [str(word) for word in words])
    assert not ended.value.code and "huggingface_path_in_repo" in config.read_text()
    captured = capfd.readouterr()
    written = [config, *(file for file in output.rglob("*") if file.is_file())]
    texts = [*(file.read_bytes() for file in written), *files.values()]
    texts += [part.encode() for part in (said.out, said.err, captured.out, captured.err)]
    assert list(output.glob("logs/**/events.out*")) and any(b"a comment" in text for text in texts)
    assert not any(secret.encode() in text for text in texts for secret in (TOKEN, KEY))

    # a state comes back and goes on to the same weights
    again = tmp_path / "again"
    resumed = {
        "resume": "me/lora/runs/1/tiny-step00000002-state:main:model",
        "resume_from_huggingface": True,
        "huggingface_repo_id": None,
        "save_state_to_huggingface": None,
        "async_upload": None,
        "huggingface_path_in_repo": None,
    }
    train_here(*lora_arguments(tiny_sd, dataset, again, **(settings | resumed)))
    assert_same_weights(again / "tiny.safetensors", output / "tiny.safetensors")
    assert "not exactly" not in capfd.readouterr().err

    # one that was damaged there is refused by name
    del hub.files("me/lora")["runs/1/tiny-step00000004-state/ema.safetensors"]
    hub.repositories["models/me/lora"].commits.append("somebody deletes a file")
    resumed["resume"] = "me/lora/runs/1/tiny-step00000004-state"
    with pytest.raises(SystemExit) as refused:
        train_here(*lora_arguments(tiny_sd, dataset, again, **(settings | resumed)))
    assert refused.value.code == 2 and "ema.safetensors is missing" in capfd.readouterr().err


def test_a_wrong_token_is_told_before_training(
    tmp_path: Path, tiny_sd: MadeCheckpoint, dataset: Path, hub: FakeHub, capfd: pytest.CaptureFixture[str]
) -> None:
    given = {"huggingface_repo_id": "me/lora", "huggingface_token": "hf_wrong"}
    with pytest.raises(SystemExit) as refused:
        train_here(*lora_arguments(tiny_sd, dataset, tmp_path / "out", **given))
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert refused.value.code == 2 and len(errors) == 1 and "--huggingface_token" in errors[0]
    assert "hf_wrong" not in errors[0] and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_hub_that_fails_for_good(tmp_path: Path, tiny_sd: MadeCheckpoint, dataset: Path, hub: FakeHub) -> None:
    """In a process of its own, with uploads that training waits for."""
    hub.failures["/commit/"] = 99
    done = run_script(
        "train_network.py",
        *lora_arguments(
            tiny_sd,
            dataset,
            tmp_path / "out",
            huggingface_repo_id="me/lora",
            huggingface_token=TOKEN,
            save_every_n_steps=1,
        ),
        env=hub.environment(tmp_path / "home"),
    )
    assert done.code == 0, done.text
    assert not hub.files("me/lora") and "Traceback" not in done.text and TOKEN not in done.text
    assert "do it by hand: hf upload me/lora" in done.err
    assert metadata_of(tmp_path / "out" / "tiny.safetensors")["ss_steps"] == "2"
