"""Read TOML: files of any editor, errors with the line and what to do, and the line of each key."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from library.config.mistakes import refuse_escaped_paths, toml_remedy
from library.errors import UserError


def load_toml(path: Path | str) -> dict[str, Any]:
    """Return the content of a TOML file.

    Raises:
        UserError: no such file, or a mistake in its syntax, with the line.
    """
    path = Path(path)
    text = read_text(path)
    try:
        content = tomllib.loads(text)
        refuse_escaped_paths(content, path)
    except ValueError as error:  # it names the line
        raise UserError(f"{path}: not valid TOML: {error}{toml_remedy(text, str(error))}") from None
    except RecursionError:
        raise UserError(f"{path}: tables or lists are nested too deeply") from None
    return content


def read_text(path: Path) -> str:
    """Return the text of a file.

    Raises:
        UserError: no such file, or one that is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")  # some Windows editors put a byte order mark first
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from None


def flattened(content: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return keys and values; tables are headings only."""
    pairs: list[tuple[str, Any]] = []
    for key, value in content.items():
        pairs.extend(flattened(value) if isinstance(value, Mapping) else [(key, value)])
    return pairs


def without_long_strings(text: str) -> str:
    """Return the same lines without the content of multi-line strings, which may look like keys."""
    long_string = r'"""(?:\\.|[^\\])*?"""' + r"|'''.*?'''"
    return re.sub(long_string, lambda found: "\n" * found.group().count("\n"), text, flags=re.DOTALL)


def lines_of(text: str, key: str) -> list[int]:
    """Return lines (from 1) that set ``key``: alone, as the end of ``table.key``, in an inline or an array table."""
    name = rf"[\"']?{re.escape(key)}[\"']?"
    dotted = rf"(?:[^\s=#]+\s*\.\s*)?{name}\s*="
    lines = list(enumerate(text.splitlines(), start=1))
    given = re.compile(rf"\s*{dotted}|\s*\[\[\s*{name}\s*\]\]")
    inline = re.compile(rf"[{{,]\s*{dotted}")
    return [number for number, line in lines if given.match(line)] or [
        number for number, line in lines if inline.search(line)
    ]
