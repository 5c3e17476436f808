"""``--config_file``: read the options of the command line from TOML; kind to programs, strict with typing mistakes."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.config.foreign_keys import is_known, options_meant, typing_mistake_of
from library.config.toml_file import flattened, lines_of, load_toml, read_text, without_long_strings
from library.config.toml_values import UNSET, converted
from library.errors import UserError, did_you_mean, exits_on_user_error
from library.launched import is_first_process

#: options about one start of the script, which do not belong into a file
_OWN_FLAGS = ("config_file", "output_config", "explain", "dry_run", "replay")
_UNSET = object()


class ReadArgs(argparse.Namespace):
    """Parsed options; ``origins`` has the origin of each given one: ``"command line"`` or ``"run.toml:3"``.

    The origins are no option: they are in a slot, so that ``vars`` does not include them.
    """

    __slots__ = ("origins",)

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        self.origins: dict[str, str] = {}


def origins_of(args: argparse.Namespace) -> dict[str, str]:
    """Return the origins of the given options; empty for a namespace that ``read_args`` did not make."""
    return args.origins if isinstance(args, ReadArgs) else {}


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
    file = _values_from_file(path, parser)
    # argparse fills only missing attributes of a namespace, so the command line wins; the parser itself is unchanged,
    # for callers that parse more than once
    merged = parser.parse_args(words, ReadArgs(**file.values))
    merged.origins = {**file.places, **args.origins}
    if file.unknown and getattr(merged, "strict", False):
        raise UserError("\n".join(f"{line} (an error by --strict)" for line in file.unknown))
    if is_first_process():
        for note in file.notes(path):
            print(note, file=sys.stderr)
    return merged


@dataclass(frozen=True)
class FileValues:
    """The content of a configuration file."""

    values: Mapping[str, Any]  # by option
    places: Mapping[str, str]  # by option: "run.toml:3"
    foreign: Sequence[str]  # keys of other programs and scripts
    unknown: Sequence[str]  # a message for each key that no one knows

    def notes(self, path: Path) -> list[str]:
        """Return one short line for all keys of other programs, and a warning for each unknown key."""
        passed_over = [f"{path}: ignored, as they are for other programs or scripts: {', '.join(self.foreign)}"]
        return [*passed_over[: len(self.foreign)], *(f"warning: {line}; it is ignored" for line in self.unknown)]


def _given_names(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """Return the options on the command line, even at their default."""
    unset = argparse.Namespace(**{action.dest: _UNSET for action in parser._actions})
    return [name for name, value in vars(parser.parse_args(words, unset)).items() if value is not _UNSET]


def _values_from_file(path: Path, parser: argparse.ArgumentParser) -> FileValues:
    """Read the file; raises UserError with every mistake, one line each."""
    read = _Reading(path, {a.dest: a for a in parser._actions if a.option_strings and a.dest != "help"})
    for key, found in _by_key(load_toml(path)).items():
        read.take(key, found)
    for key, found in read.foreign.items():
        read.take_meaning(key, found)
    if read.problems:
        raise UserError("\n".join(read.problems))
    return FileValues(read.values, read.places, list(read.foreign), read.unknown)


def _by_key(content: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the values of each key, which several tables may have."""
    given: dict[str, list[Any]] = {}
    for key, value in flattened(content):
        given.setdefault(key, []).append(value)
    return given


class _Reading:
    """Turns a configuration file into options."""

    def __init__(self, path: Path, actions: Mapping[str, argparse.Action]) -> None:
        self.path, self.actions = path, actions
        self.names = [name for name in actions if name not in _OWN_FLAGS]
        self.text = without_long_strings(read_text(path))
        self.values: dict[str, Any] = {}
        self.places: dict[str, str] = {}
        self.foreign: dict[str, Any] = {}
        self.unknown: list[str] = []
        self.problems: list[str] = []

    def take(self, key: str, found: list[Any]) -> None:
        """Take one key with its values in the file's tables."""
        lines = lines_of(self.text, key)
        place = f"{self.path}{f':{lines[0]}' if lines else ''}"
        where = f"{place}: {key}"
        action = self.actions.get(key)
        if key in _OWN_FLAGS:
            self.problems.append(f"{where}: belongs on the command line only: --{key}")
        elif action is not None:
            self._take_option(action, found, where, place, lines)
        elif is_known(key):
            self.foreign[key] = found[-1]
        elif (option := typing_mistake_of(key, self.names)) is not None:
            self.problems.append(f'{where}: unknown option (did you mean "{option}"?)')
        else:
            self.unknown.append(f"{where}: unknown option{did_you_mean(key, self.names)}")

    def _take_option(
        self, action: argparse.Action, found: list[Any], where: str, place: str, lines: Sequence[int]
    ) -> None:
        try:
            values = [value for v in found if (value := converted(action, v)) is not UNSET]
        except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
            self.problems.append(f"{where}: {error}")
            return
        if not values:
            return
        if action.nargs in ("*", "+"):
            values = [[word for words in values for word in words]]
        elif any(value != values[0] for value in values):
            again = f" (lines {', '.join(map(str, lines))})" if len(lines) > 1 else ""
            shown = " and ".join(map(str, values))
            self.problems.append(
                f"{where}: given {len(values)} times{again}, as {shown}; tables are only headings, give it once"
            )
            return
        self.values[action.dest] = values[0]
        self.places[action.dest] = place

    def take_meaning(self, key: str, value: Any) -> None:
        """Take the options that a key of another program stands for."""
        for name, option_value in options_meant(key, value, self.values).items():
            if name in self.actions:
                self._take_option(self.actions[name], [option_value], f"{self.path}: {key}", f"{self.path}: {key}", ())


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
