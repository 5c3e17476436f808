"""Uploads to the Hub and folders from it, by real calls of huggingface_hub to a server in this process."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from library.errors import UserError
from library.files.hub import HubTarget, RemoteFolder, Uploads, check_target, download_folder, reason
from tests.fixtures.fake_hub import TOKEN, FakeHub, Repository, fake_hub

COMMIT = "POST /api/models/me/lora/commit/main"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with fake_hub() as running:
        running.use_here(monkeypatch, tmp_path / "cache")
        yield running


def target(**more: object) -> HubTarget:
    return HubTarget(**{"repo_id": "me/lora", "token": TOKEN, **more})  # type: ignore[arg-type]


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "cat.safetensors"
    path.write_bytes(b"weights")
    return path


# ---- before a run ----


def test_the_repository_is_made(hub: FakeHub) -> None:
    assert check_target(target(repo_id="lora"), create=True).repo_id == "me/lora"
    assert hub.repositories["models/me/lora"].private
    check_target(target(repo_id="me/open", visibility="public", repo_type="dataset"), create=True)
    assert not hub.repositories["datasets/me/open"].private
    check_target(target(), create=True)  # it is there already


def test_a_dry_run_makes_nothing(hub: FakeHub) -> None:
    assert check_target(target(repo_id="lora"), create=False).repo_id == "me/lora"
    assert not hub.repositories


@pytest.mark.parametrize(
    ("given", "role", "words"),
    [
        ({"token": "hf_wrong"}, "write", ["--huggingface_repo_id me/lora", "--huggingface_token"]),
        ({"token": None}, "write", ["--huggingface_token", "hf auth login"]),
        ({}, "read", ["may only read"]),
        ({"repo_id": "others/lora"}, "write", ["others/lora", "may not write"]),
        ({"repo_id": "a/b/c"}, "write", ["a/b/c"]),
        ({"repo_id": "me/open", "visibility": "private"}, "write", ["--huggingface_repo_visibility private", "public"]),
    ],
)
def test_what_cannot_work_is_one_line(hub: FakeHub, given: dict[str, object], role: str, words: list[str]) -> None:
    hub.role = role
    hub.repositories["models/me/open"] = Repository(private=False)
    with pytest.raises(UserError) as caught:
        check_target(target(**given), create=True)
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert "\n" not in text and "hf_wrong" not in text and TOKEN not in text


def test_no_connection(monkeypatch: pytest.MonkeyPatch, hub: FakeHub) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="cannot be uploaded to") as caught:
        check_target(target(), create=True)
    assert "\n" not in str(caught.value)


# ---- uploads ----


def test_files_and_folders_arrive(hub: FakeHub, weights: Path, tmp_path: Path) -> None:
    (tmp_path / "cat-state" / "inner").mkdir(parents=True)
    (tmp_path / "cat-state" / "train_state.json").write_text("{}")
    (tmp_path / "cat-state" / "inner" / "optimizer.bin").write_bytes(b"moments")
    uploads = Uploads(check_target(target(folder="runs/1"), create=True))
    uploads.add(weights)
    assert hub.files("me/lora") == {"runs/1/cat.safetensors": b"weights"}, "without --async_upload it is there at once"
    uploads.add(tmp_path / "cat-state")
    uploads.close()
    found = hub.files("me/lora")
    assert found["runs/1/cat-state/train_state.json"] == b"{}"
    assert found["runs/1/cat-state/inner/optimizer.bin"] == b"moments"


def test_uploads_in_the_background_wait_for_nobody(hub: FakeHub, weights: Path) -> None:
    hub.commits_wait_for_gate = True
    uploads = Uploads(check_target(target(in_background=True), create=True))
    uploads.add(weights)
    removed: list[Path] = []
    uploads.when_free(weights, removed.append)
    assert not hub.files("me/lora") and not removed, "still on its way, so retention waits"
    threading.Timer(0.2, hub.gate.set).start()
    uploads.close()
    assert hub.files("me/lora") == {"cat.safetensors": b"weights"}
    assert removed == [weights]
    uploads.when_free(Path("other"), removed.append)
    assert removed == [weights, Path("other")]


def test_a_failed_upload_is_named_and_tried_again(
    hub: FakeHub, weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    uploads = Uploads(check_target(target(), create=True))
    hub.failures[COMMIT] = 1
    uploads.add(weights)
    (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and r.name.startswith("library")]
    assert "bad mood" in line and f"hf upload me/lora {weights} cat.safetensors --repo-type model" in line
    assert "tried again" in line and "\n" not in line and TOKEN not in caplog.text
    second = tmp_path / "second.safetensors"
    second.write_bytes(b"more")
    uploads.add(second)
    assert set(hub.files("me/lora")) == {"cat.safetensors", "second.safetensors"}
    uploads.close()
    assert hub.repositories["models/me/lora"].commits == ["Upload second.safetensors", "Upload cat.safetensors"]


def test_the_end_is_one_more_chance_and_then_says_what_is_left(
    hub: FakeHub, weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uploads = Uploads(check_target(target(in_background=True), create=True))
    hub.failures[COMMIT] = 99
    uploads.add(weights)
    removed: list[Path] = []
    uploads.when_free(weights, removed.append)
    uploads.close()
    last = caplog.records[-1].getMessage()
    assert "do it by hand: hf upload me/lora" in last and "tried again" not in last
    assert not removed, "what is to be uploaded by hand stays"
    assert hub.requests.count(COMMIT) == 2


def test_attempts_are_bounded(hub: FakeHub, weights: Path, tmp_path: Path) -> None:
    uploads = Uploads(check_target(target(), create=True))
    hub.failures["/lfs/"] = 99
    uploads.add(weights)
    batches = "POST /me/lora.git/info/lfs/objects/batch"
    for number in range(5):  # these need no LFS, so they arrive, and each is an occasion
        note = tmp_path / f"{number}.txt"
        note.write_text("x")
        uploads.add(note)
    uploads.close()
    assert hub.requests.count(batches) == 3
    assert len(hub.files("me/lora")) == 5


def test_the_end_does_not_wait_for_ever(hub: FakeHub, weights: Path, caplog: pytest.LogCaptureFixture) -> None:
    hub.commits_wait_for_gate = True
    uploads = Uploads(check_target(target(in_background=True), create=True), patience=0.3)
    uploads.add(weights)
    started = time.monotonic()
    uploads.close()
    assert time.monotonic() - started < 5
    assert "is not done" in caplog.text and "hf upload me/lora" in caplog.text


def test_a_file_that_is_gone_and_no_target(hub: FakeHub, weights: Path, caplog: pytest.LogCaptureFixture) -> None:
    uploads = Uploads(check_target(target(), create=True))
    weights.unlink()
    uploads.add(weights)
    assert "no longer there" in caplog.text
    nothing = Uploads(None)
    nothing.add(weights)
    nothing.close()


def test_reasons_never_hold_the_token() -> None:
    try:
        try:
            raise ValueError(f"refused\n\nfor {TOKEN} at https://s3/x?Signature=ab1 (no)")
        except ValueError as cause:
            raise RuntimeError("Error while uploading 'x'") from cause
    except RuntimeError as error:
        assert reason(error, TOKEN) == "Error while uploading 'x' refused for *** at https://s3/x (no)"
    assert TOKEN not in repr(target())


# ---- folders from the Hub ----


def test_a_folder_comes_back(hub: FakeHub) -> None:
    hub.repositories["models/me/lora"] = Repository(True, {"runs/a-state/x.json": b"1", "runs/b-state/x.json": b"2"})
    remote = RemoteFolder.parse("me/lora/runs/a-state:main:model")
    folder = download_folder(remote, TOKEN)
    assert (folder.name, (folder / "x.json").read_bytes()) == ("a-state", b"1")
    assert not (folder.parent / "b-state").exists(), "only what is asked for"
    assert RemoteFolder.parse("me/lora/a-state") == RemoteFolder("me/lora", "a-state", "main", "model")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("me/lora/runs/c-state", "it holds runs/a-state"),
        ("me/lora/runs/a-state:v2", "v2"),
        ("me/none/a-state", "me/none"),
    ],
)
def test_folders_that_are_not_there(hub: FakeHub, text: str, words: str) -> None:
    hub.repositories["models/me/lora"] = Repository(True, {"runs/a-state/x.json": b"1"})
    with pytest.raises(UserError) as caught:
        download_folder(RemoteFolder.parse(text), TOKEN)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["lora", "me/lora", "me/lora/s:main:model:x", "me/lora/s:main:space"])
def test_names_of_states_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="--resume"):
        RemoteFolder.parse(text)
