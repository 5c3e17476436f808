"""Names of files cannot hide or fake what a terminal shows."""

from __future__ import annotations

import logging

import pytest

from library.config.arguments import ConsoleOptions
from library.config.console import setup_console
from library.config.parser import SuggestingParser
from library.errors import UserError, exits_on_user_error
from library.plain_text import one_line, printable, visible

NAME = "a\x1b[2K\rb\x07\u202ec\x9b31m.png"
SHOWN = r"a\x1b[2K\rb\x07\u202ec\x9b31m.png"


def test_control_characters_are_written_out() -> None:
    assert visible(NAME) == SHOWN
    assert visible("tab\tand\nnew line, é 日本 \udce9") == "tab\tand\nnew line, é 日本 ?"
    assert printable("\udce9") == "?"


def test_messages_are_single_lines_of_bounded_words() -> None:
    assert one_line("a\nb " + "9" * 5000 + " c") == f"a\\nb {'9' * 200}...{'9' * 50} c"
    assert one_line("n" * 300) == "n" * 300


def test_a_flag_with_control_characters_and_endless_values(capsys: pytest.CaptureFixture[str]) -> None:
    parser = SuggestingParser(prog="x.py")
    parser.add_argument("--seed", type=int)
    with pytest.raises(SystemExit):
        parser.parse_args(["--seed", "1\x1b[2K\n" + "9" * 5000])
    said = capsys.readouterr().err
    assert said.startswith(r"error: --seed 1\x1b[2K\n999") and said.endswith("999: write a whole number, such as 100\n")
    assert len(said) < 400 and said.count("\n") == 1


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
