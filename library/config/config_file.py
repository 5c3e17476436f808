"""``--config_file``: the command line's options from TOML, checked as strictly as the command line."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from library.config.mistakes import WINDOWS_ENDS, explain, has_windows_ends, refuse_escaped_paths, toml_remedy
from library.errors import USER_ERROR_EXIT_CODE, UserError, did_you_mean, exits_on_user_error

#: about this one start of the script, so that they have no place in a file
_OWN_FLAGS = ("config_file", "output_config", "explain", "dry_run", "replay")
_UNSET = object()


class ReadArgs(argparse.Namespace):
    """Parsed options; ``origins`` tells where each given one comes from: ``"command line"`` or ``"run.toml:3"``.

    The origins are no option: they stand in a slot, so that ``vars`` does not hold them.
    """

    __slots__ = ("origins",)

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        self.origins: dict[str, str] = {}


def origins_of(args: argparse.Namespace) -> dict[str, str]:
    """Where the given options come from; empty for a namespace that ``read_args`` did not make."""
    return args.origins if isinstance(args, ReadArgs) else {}


class SuggestingParser(argparse.ArgumentParser):
    """argparse with one clear line for a mistake, and the flag that was probably meant."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        if has_windows_ends(sys.argv[1:] if args is None else args):
            self.error(WINDOWS_ENDS)
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        lines = explain(message, self._actions)
        self.exit(USER_ERROR_EXIT_CODE, "".join(f"error: {line}\n" for line in lines))


@exits_on_user_error
def read_args(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> ReadArgs:
    """Parse the command line over the configuration file it names.

    Raises:
        SystemExit: 2 for a user's mistake; 0 after ``--output_config``.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(words, ReadArgs())
    args.origins = dict.fromkeys(_given_names(parser, words), "command line")
    if not args.config_file:
        if args.output_config:
            raise UserError("--output_config: needs --config_file, the file to write")
        return args
    path = Path(args.config_file)
    path = path if path.suffix == ".toml" else path.with_name(path.name + ".toml")
    if args.output_config:
        secrets = [action.dest for action in parser._actions if getattr(action, "secret", False)]
        _write_config(path, args, leave_out=(*_OWN_FLAGS, *secrets))
        raise SystemExit(0)
    if not path.is_file():
        raise UserError(f"--config_file {path}: no such file")
    values, places = _values_from_file(path, parser)
    # argparse fills only what a namespace lacks, so that whatever the command line says wins; the parser itself
    # stays as it was, for callers that parse more than once
    merged = parser.parse_args(words, ReadArgs(**values))
    merged.origins = places | args.origins
    return merged


def _given_names(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """Options that the command line gives, be it at their default."""
    unset = argparse.Namespace(**{action.dest: _UNSET for action in parser._actions})
    return [name for name, value in vars(parser.parse_args(words, unset)).items() if value is not _UNSET]


def load_toml(path: Path | str) -> dict[str, Any]:
    """A TOML file's content.

    Raises:
        UserError: no such file, or a mistake in its syntax, with the line.
    """
    path = Path(path)
    try:
        text = _text_of(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    try:
        content = tomllib.loads(text)
        refuse_escaped_paths(content, path)
    except ValueError as error:  # it names the line
        raise UserError(f"{path}: not valid TOML: {error}{toml_remedy(text, str(error))}") from None
    except RecursionError:
        raise UserError(f"{path}: tables or lists are nested too deeply") from None
    return content


def _text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8-sig")  # some Windows editors put a byte order mark first


def _values_from_file(path: Path, parser: argparse.ArgumentParser) -> tuple[dict[str, Any], dict[str, str]]:
    """Values by option, and the place of each.

    Raises:
        UserError: every mistake of the file, one line each.
    """
    actions = {action.dest: action for action in parser._actions if action.option_strings and action.dest != "help"}
    given: dict[str, list[Any]] = {}
    for key, value in _flattened(load_toml(path)):
        given.setdefault(key, []).append(value)
    text = _without_long_strings(_text_of(path))
    problems: list[str] = []
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    for key, found in given.items():
        lines = _lines_of(text, key)
        places[key] = f"{path}{f':{lines[0]}' if lines else ''}"
        where = f"{places[key]}: {key}"
        action = actions.get(key)
        if key in _OWN_FLAGS:
            problems.append(f"{where}: belongs on the command line only: --{key}")
        elif action is None:
            problems.append(f"{where}: unknown option{did_you_mean(key, [a for a in actions if a not in _OWN_FLAGS])}")
        elif len(found) > 1:
            again = f" (lines {', '.join(map(str, lines))})" if len(lines) > 1 else ""
            problems.append(f"{where}: given {len(found)} times{again}, as tables are only headings; give it once")
        else:
            try:
                values[key] = _converted(action, found[0])
            except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
                problems.append(f"{where}: {error}")
    if problems:
        raise UserError("\n".join(problems))
    return values, places


def _flattened(content: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Keys and values; tables are headings only."""
    pairs: list[tuple[str, Any]] = []
    for key, value in content.items():
        pairs.extend(_flattened(value) if isinstance(value, Mapping) else [(key, value)])
    return pairs


def _without_long_strings(text: str) -> str:
    """The same lines without what stands in strings of several lines, which may look like keys."""
    long_string = r'"""(?:\\.|[^\\])*?"""' + r"|'''.*?'''"
    return re.sub(long_string, lambda found: "\n" * found.group().count("\n"), text, flags=re.DOTALL)


def _lines_of(text: str, key: str) -> list[int]:
    """Lines (from 1) that give ``key``: alone, as the end of ``table.key``, in an inline or an array table."""
    name = rf"[\"']?{re.escape(key)}[\"']?"
    dotted = rf"(?:[^\s=#]+\s*\.\s*)?{name}\s*="
    lines = list(enumerate(text.splitlines(), start=1))
    given = re.compile(rf"\s*{dotted}|\s*\[\[\s*{name}\s*\]\]")
    inline = re.compile(rf"[{{,]\s*{dotted}")
    return [number for number, line in lines if given.match(line)] or [
        number for number, line in lines if inline.search(line)
    ]


def _converted(action: argparse.Action, value: Any) -> Any:
    """A TOML value as the flag's own type; an empty text for a number without a default is none.

    Raises:
        ValueError: of another type, or not among the choices.
    """
    if value == "" and action.default is None and action.type in (int, float):
        return None
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
    if isinstance(value, (list, Mapping)):
        raise ValueError(f"expects {_type_name(kind)}, not {value!r}")
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
        raise ValueError(
            f"{converted!r} is not one of: {shown}{did_you_mean(str(converted), map(str, action.choices))}"
        )
    return converted


def _type_name(kind: Any) -> str:
    return {int: "a whole number", float: "a number"}.get(kind, "text")


def _write_config(path: Path, args: argparse.Namespace, *, leave_out: Sequence[str]) -> None:
    from library.files.atomic import write_text

    if path.exists():
        raise UserError(f"--output_config: {path} exists and is not overwritten; name another --config_file")
    lines = [
        f"{name} = {_toml_value(value)}\n"
        for name, value in vars(args).items()
        if value is not None and name not in leave_out
    ]
    try:
        write_text(path, "".join(lines))
    except OSError as error:
        raise UserError(f"--output_config: {path} cannot be written ({error.strerror})") from None
    print(f"options written to {path}")


def _toml_value(value: Any) -> str:
    # not toml.dumps, which damages texts with a backslash before an x, such as paths on Windows
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    # JSON's strings are TOML's, except that TOML also escapes DEL
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
