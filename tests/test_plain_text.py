"""Names of files cannot hide or fake what a terminal shows."""

from __future__ import annotations

import logging

import pytest

from library.config.arguments import ConsoleOptions
from library.config.console import setup_console
from library.errors import UserError, exits_on_user_error
from library.plain_text import printable, visible

NAME = "a\x1b[2K\rb\x07\u202ec\x9b31m.png"
SHOWN = r"a\x1b[2K\rb\x07\u202ec\x9b31m.png"


def test_control_characters_are_written_out() -> None:
    assert visible(NAME) == SHOWN
    assert visible("tab\tand\nnew line, é 日本 \udce9") == "tab\tand\nnew line, é 日本 ?"
    assert printable("\udce9") == "?"


def test_in_log_lines(capsys: pytest.CaptureFixture[str]) -> None:
    setup_console(ConsoleOptions())
    logging.getLogger("library").warning("%s: left out", NAME)
    assert capsys.readouterr().err == f"WARNING {SHOWN}: left out\n"


def test_in_errors(capsys: pytest.CaptureFixture[str]) -> None:
    @exits_on_user_error
    def program() -> None:
        raise UserError(f"{NAME}: wrong\nand more")

    with pytest.raises(SystemExit):
        program()
    assert capsys.readouterr().err == f"error: {SHOWN}: wrong\nerror: and more\n"
