"""Explain usual mistakes on the command line and in TOML files, and what to do."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from library.config.foreign_keys import is_of_other_scripts
from library.errors import UserError, did_you_mean

#: dashes into which word processors and web pages turn two hyphens
_LONG_DASHES = "\N{HYPHEN}\N{NON-BREAKING HYPHEN}\N{EN DASH}\N{EM DASH}\N{MINUS SIGN}"
_NUMBERS = {"int": "a whole number, such as 100", "float": "a number, such as 0.0001 or 1e-4"}


# ---- the command line ----


WINDOWS_ENDS = (
    "the command line has a carriage return in it, so its script has Windows line endings; save it "
    r"with Unix ones, for instance by: sed -i 's/\r$//' train.sh"
)


STRAY_SPACE = (
    "the command line has a word of nothing but spaces: most likely one of its lines ends in a backslash and a space; "
    "let nothing follow the backslash"
)


def has_windows_ends(words: Sequence[str]) -> bool:
    """Whether the shell script of the command line has Windows line endings."""
    return any(word.endswith("\r") for word in words)


def explain(message: str, actions: Iterable[argparse.Action]) -> list[str]:
    """Translate argparse's ``message`` for users: one line or more, without ``error:``."""
    flags = {flag: action for action in actions for flag in action.option_strings}
    if found := re.match(r"unrecognized arguments: (.*)", message, re.DOTALL):
        return _unrecognized(found[1].split(), flags)
    found = re.match(r"argument ([^\s:]+): (.+)", message, re.DOTALL)
    if found is None:
        return [message]
    flag, why = found[1].split("/")[0], found[2]
    return [f"{flag}{_value_mistake(flag, why, flags.get(flag))}"]


def _unrecognized(words: Sequence[str], flags: Mapping[str, argparse.Action]) -> list[str]:
    if not words:
        return [STRAY_SPACE]
    # what follows an unknown flag is most likely its value, so flags are named alone if there are any
    unknown = [word.partition("=")[0] for word in words if re.match("--?[A-Za-z]", word)]
    if unknown:
        return [f"unknown option {flag}{_hint(flag, flags)}" for flag in unknown]
    word = words[0]
    if word[0] in _LONG_DASHES:
        return [f"{word!r} begins with a long dash; write two plain hyphens: --{word.lstrip(_LONG_DASHES + '-')}"]
    if word.lower() in ("true", "false"):
        return [f"{word!r} belongs to no option; switches take no value; leave a switch out for false"]
    return [f"{word!r} belongs to no option; quote values with spaces"]


def _hint(flag: str, flags: Iterable[str]) -> str:
    if is_of_other_scripts(flag.lstrip("-")):
        return ", which other training scripts have; remove it"
    return did_you_mean(flag, flags)


def _value_mistake(flag: str, why: str, action: argparse.Action | None) -> str:
    """Return the text after the flag's name in the message."""
    if found := re.fullmatch(r"invalid (int|float) value: '(.*)'", why, re.DOTALL):
        return f" {found[2]}: write {_NUMBERS[found[1]]}"
    if action is not None and (found := re.match(r"invalid choice: '?(.*?)'? \(choose from", why, re.DOTALL)):
        choices = [str(choice) for choice in action.choices or () if choice is not None]
        lower = found[1].lower()
        hint = f' (did you mean "{lower}"?)' if lower in choices else did_you_mean(lower, choices)
        return f" {found[1]}: write one of {', '.join(choices)}{hint}"
    if re.match("expected (one|at least one) argument", why):
        return f": a value is missing (one that begins with a hyphen is written {flag}=-1)"
    if found := re.match("ignored explicit argument '?(.*?)'?$", why, re.DOTALL):
        return f"={found[1]}: a switch takes no value; write {flag} alone, or leave it out for false"
    return f": {why}"


# ---- TOML ----


def toml_remedy(text: str, message: str) -> str:
    """Return ``"; ..."`` for a usual mistake in the TOML line that ``message`` names, else an empty string."""
    line = _line_of(text, message)
    value = re.match(r"\s*[\w.\-\"']+\s*=\s*(.*?)\s*$", line)
    if value is None:
        return ""
    if re.match(r'"[^"]*\\', value[1]):
        return r"; write paths with \ in single quotes: 'C:\images'"
    if re.match(r"(true|false)\b", value[1], re.IGNORECASE):
        return "; write true or false, in small letters"
    if re.match(r"[A-Za-z/\\~]", value[1]):
        return r"; texts are quoted: 'C:\images'"
    if re.match(r"[\d.eE+-]+,", value[1]):
        return "; numbers have a decimal point, and no comma behind them"
    return ""


def _line_of(text: str, message: str) -> str:
    found = re.search(r"\bline (\d+)", message)
    lines = text.splitlines()
    return lines[int(found[1]) - 1] if found and 0 < int(found[1]) <= len(lines) else ""


def refuse_escaped_paths(content: Any, path: Path) -> None:
    """Raise UserError for ``"C:\\new"`` in double quotes, where ``\\n`` has become the end of a line."""
    values = content.values() if isinstance(content, Mapping) else content if isinstance(content, list) else ()
    for value in values:
        if isinstance(value, str) and re.match(r"[A-Za-z]:[\b\t\n\f\r\x1b]", value):
            raise UserError(
                rf"{path}: {json.dumps(value, ensure_ascii=False)}: \ begins an escape in double quotes; write paths "
                r"in single quotes: 'C:\new'"
            )
        refuse_escaped_paths(value, path)


# ---- paths ----


def home_hint(path: str | Path) -> str:
    """Return ``"; ..."`` for a path that begins with ``~``, which only shells expand."""
    if not str(path).startswith("~"):
        return ""
    return f"; only shells replace ~, so write {Path(path).expanduser()}"
