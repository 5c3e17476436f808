"""The progress of caching: lines now and then, or a bar on a terminal."""

from __future__ import annotations

import logging

import pytest

from library.config import work_progress
from library.config.work_progress import WorkProgress


def test_lines_now_and_then(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    clock = iter([0.0, 0.0, 4.0, 11.0, 12.0, 13.0])
    monkeypatch.setattr(work_progress.time, "monotonic", lambda: next(clock))
    with caplog.at_level(logging.INFO), WorkProgress("encoding images", "images", simple=True) as progress:
        for done in (4, 22, 24, 26):
            progress.update(done, 26)
    assert [record.getMessage() for record in caplog.records] == [
        "encoding images: 22 of 26, 2.0 images/s",
        "encoding images: 26 of 26, 2.0 images/s",
    ]


def test_quick_work_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), WorkProgress("encoding", "images", simple=True) as progress:
        progress.update(1, 1)
    assert not caplog.records


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with WorkProgress("encoding images", "images", simple=False) as progress:
        progress.update(1, 3)
        progress.update(3, 3)
    shown = capsys.readouterr().err
    assert "encoding images" in shown and "3/3" in shown and "images/s" in shown


def test_other_processes_are_silent(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    with caplog.at_level(logging.INFO), WorkProgress("encoding", "p", simple=False, enabled=False) as progress:
        progress.update(1, 1)
    assert not caplog.records and not capsys.readouterr().err
