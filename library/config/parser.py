"""The parser of all scripts: one clear line for a mistake; lists that are given twice are joined."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from library.config.mistakes import STRAY_SPACE, WINDOWS_ENDS, explain, has_windows_ends
from library.errors import USER_ERROR_EXIT_CODE
from library.plain_text import one_line


class SuggestingParser(argparse.ArgumentParser):
    """An argparse parser with one clear line for a mistake, and the flag that was probably intended."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        #: values of the command line so far, by option
        self.given: dict[str, Any] = {}
        #: where to read more, for the help
        self.more = ""
        self.register("action", None, StoreOnce)
        self.register("action", "store", StoreOnce)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        if has_windows_ends(sys.argv[1:] if args is None else args):
            self.error(WINDOWS_ENDS)
        return super().parse_args(args, namespace)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.given = {}
        words = list(sys.argv[1:] if args is None else args)
        for flag in ("-h", "--help"):
            if flag in words[:-1]:  # --help --network_dim is about that option
                words = [flag, words[words.index(flag) + 1].lstrip("-")]
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        lines = explain(message, self._actions)
        self.exit(USER_ERROR_EXIT_CODE, "".join(f"error: {one_line(line)}\n" for line in lines))


class StoreOnce(argparse.Action):
    """Stores a value. A list that is given twice is joined; a single value given twice must be the same."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        given = getattr(parser, "given", {})
        is_list = self.nargs in ("*", "+")
        if is_list and any(isinstance(value, str) and value.isspace() for value in values):
            raise argparse.ArgumentError(self, STRAY_SPACE)
        if self.dest in given and is_list:
            values = [*given[self.dest], *values]
        elif self.dest in given and given[self.dest] != values:
            raise argparse.ArgumentError(
                self, f"given twice, as {_shown(given[self.dest])} and as {_shown(values)}; give it once"
            )
        given[self.dest] = values
        setattr(namespace, self.dest, values)


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
