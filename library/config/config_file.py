"""``--config_file``: the command line's options from TOML, checked as strictly as the command line."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from library.errors import USER_ERROR_EXIT_CODE, UserError, did_you_mean, exits_on_user_error

#: handled by ``read_args`` itself
_OWN_FLAGS = ("config_file", "output_config")


class SuggestingParser(argparse.ArgumentParser):
    """argparse with one clear line for a mistake, and the flag that was probably meant."""

    def error(self, message: str) -> NoReturn:
        flags = [flag for action in self._actions for flag in action.option_strings]
        found = re.match(r"unrecognized arguments: (\S+)", message)
        if found:
            word = found.group(1).partition("=")[0]
            message = (
                f"unknown option {word}{did_you_mean(word, flags)}"
                if word.startswith("-")
                else f"{word!r} belongs to no option; quote values with spaces"
            )
        self.exit(USER_ERROR_EXIT_CODE, f"error: {message}\n")


@exits_on_user_error
def read_args(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line over the configuration file it names.

    Raises:
        SystemExit: 2 for a user's mistake; 0 after ``--output_config``.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(words)
    if not args.config_file:
        if args.output_config:
            raise UserError("--output_config: needs --config_file, the file to write")
        return args
    path = Path(args.config_file)
    path = path if path.suffix == ".toml" else path.with_name(path.name + ".toml")
    if args.output_config:
        _write_config(path, args)
        raise SystemExit(0)
    if not path.is_file():
        raise UserError(f"--config_file {path}: no such file")
    # the file's values become defaults, so that whatever the command line says wins
    defaults = _values_from_file(path, parser)
    parser.set_defaults(**defaults)
    return parser.parse_args(words)


def load_toml(path: Path | str) -> dict[str, Any]:
    """A TOML file's content.

    Raises:
        UserError: no such file, or a mistake in its syntax, with the line.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    try:
        if sys.version_info >= (3, 11):
            import tomllib

            return tomllib.loads(text)
        import toml

        return toml.loads(text)
    except ValueError as error:  # both packages' errors are ValueErrors that name the line
        raise UserError(f"{path}: not valid TOML: {error}") from None


def _values_from_file(path: Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    actions = {action.dest: action for action in parser._actions if action.option_strings and action.dest != "help"}
    text = path.read_text(encoding="utf-8")
    problems, values = [], {}
    for key, value in _flattened(load_toml(path)):
        where = f"{path}{_line_of(text, key)}: {key}"
        action = actions.get(key)
        if action is None or key in _OWN_FLAGS:
            problems.append(f"{where}: unknown option{did_you_mean(key, [a for a in actions if a not in _OWN_FLAGS])}")
            continue
        try:
            values[key] = _converted(action, value)
        except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
            problems.append(f"{where}: {error}")
    if problems:
        raise UserError("\n".join(problems))
    return values


def _flattened(content: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Keys and values; tables are headings only."""
    pairs: list[tuple[str, Any]] = []
    for key, value in content.items():
        pairs.extend(_flattened(value) if isinstance(value, Mapping) else [(key, value)])
    return pairs


def _line_of(text: str, key: str) -> str:
    for number, line in enumerate(text.splitlines(), start=1):
        if re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*=", line):
            return f":{number}"
    return ""


def _converted(action: argparse.Action, value: Any) -> Any:
    """A TOML value as the flag's own type.

    Raises:
        ValueError: of another type, or not among the choices.
    """
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"expects true or false, not {value!r}")
        return value
    if action.nargs in ("*", "+"):
        values = value if isinstance(value, list) else [value]
        return [_one(action, v) for v in values]
    if isinstance(value, list):
        if action.type is None or action.type is str:
            return ",".join(str(v) for v in value)  # resolution = [512, 768]
        raise ValueError(f"expects one value, not {value!r}")
    return _one(action, value)


def _one(action: argparse.Action, value: Any) -> Any:
    kind = action.type
    if isinstance(value, bool):
        raise ValueError(f"expects {_type_name(kind)}, not {str(value).lower()}")
    if kind is int:
        if not isinstance(value, int):
            raise ValueError(f"expects a whole number, not {value!r}")
        converted: Any = value
    elif kind is float:
        if not isinstance(value, (int, float)):
            raise ValueError(f"expects a number, not {value!r}")
        converted = float(value)
    else:
        converted = kind(str(value)) if kind is not None else str(value)  # type: ignore[operator]
    if action.choices is not None and converted not in action.choices:
        shown = ", ".join(str(c) for c in action.choices if c is not None)
        raise ValueError(f"{converted!r} is not one of: {shown}{did_you_mean(str(converted), map(str, action.choices))}")
    return converted


def _type_name(kind: Any) -> str:
    return {int: "a whole number", float: "a number"}.get(kind, "text")


def _write_config(path: Path, args: argparse.Namespace) -> None:
    import toml

    from library.files.atomic import write_text

    if path.exists():
        raise UserError(f"--output_config: {path} exists and is not overwritten; name another --config_file")
    values = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(args).items()
        if value is not None and name not in _OWN_FLAGS
    }
    write_text(path, toml.dumps(values))
    print(f"options written to {path}")
