"""The destinations of log lines."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from library.config.arguments import ConsoleOptions
from library.config.console import setup_console
from library.errors import UserError

pytestmark = pytest.mark.usefixtures("own_root_logger")


def test_plain_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    setup_console(ConsoleOptions())
    logging.getLogger("library.somewhere").info("a line of [bold]text[/bold]")
    logging.getLogger("library.somewhere").debug("details")
    assert capsys.readouterr().err == "INFO a line of [bold]text[/bold]\n"


def test_level(capsys: pytest.CaptureFixture[str]) -> None:
    setup_console(ConsoleOptions(console_log_level="ERROR"))
    logging.getLogger("library.somewhere").warning("unseen")
    logging.getLogger("library.somewhere").error("seen")
    assert capsys.readouterr().err == "ERROR seen\n"


def test_other_packages_only_warn(capsys: pytest.CaptureFixture[str]) -> None:
    setup_console(ConsoleOptions(console_log_level="DEBUG"))
    logging.getLogger("accelerate").info("unseen")
    logging.getLogger("accelerate").warning("seen")
    assert capsys.readouterr().err == "WARNING seen\n"


def test_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.log"
    setup_console(ConsoleOptions(console_log_file=str(file)))
    logging.getLogger("library.somewhere").info("漢字")
    assert file.read_text(encoding="utf-8").endswith("INFO 漢字\n")
    assert capsys.readouterr().err == ""


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--console_log_file .*run.log: cannot be written"):
        setup_console(ConsoleOptions(console_log_file=str(tmp_path / "no" / "run.log")))
