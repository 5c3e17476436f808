"""Errors that the user can fix: one clear line each, no traceback."""

from __future__ import annotations

import difflib
import errno
import functools
import io
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

from library.plain_text import one_line

P = ParamSpec("P")
R = TypeVar("R")

USER_ERROR_EXIT_CODE = 2
INTERRUPTED_EXIT_CODE = 130  # as shells report Ctrl-C

#: what torch, its allocators and the system say when memory runs out
_NO_MEMORY = ("out of memory", "can't allocate memory", "Cannot allocate memory", "not enough memory",
              "can't start new thread", "Resource temporarily unavailable", "failed to map segment")  # fmt: skip
#: what gloo and NCCL say when another process is gone
_LOST_PROCESS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")


class UserError(Exception):
    """A mistake in what the user gave: the message names the file, key or flag, and what to do.

    Several findings may be reported at once, one per line.
    """


class Doubtful(str):
    """A warning about something that is probably a mistake; ``--strict`` makes it an error."""


class NoEffect(Doubtful):
    """A warning that an option changes nothing in this run; ``--strict`` makes it an error."""


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """Return ``' (did you mean "x"?)'`` for the nearest candidate other than the word, or an empty string."""
    # 0.6 is difflib's own default: only close words, so that no hint is far-fetched
    nearest = difflib.get_close_matches(word, [name for name in candidates if name != word], n=1, cutoff=0.6)
    return f' (did you mean "{nearest[0]}"?)' if nearest else ""


@contextmanager
def naming(flag: str, given: object) -> Iterator[None]:
    """Add the option that named a file to errors raised within the context, unless they name it already.

    Args:
        given: the option's value; messages that begin with it read "--flag value is ...".
    """
    try:
        yield
    except UserError as error:
        text = str(error)
        if flag in text:
            raise
        raise UserError(f"{flag} {text}" if text.startswith(str(given)) else f"{flag}: {text}") from None


def exits_on_user_error(function: Callable[P, R]) -> Callable[P, R]:
    """Let ``function`` end the program with the error's lines instead of a traceback.

    Only the outermost call of a program carries this; code below raises ``UserError``. Memory that runs out and other
    processes that end are no fault of the program either, nor is Ctrl-C.

    Raises:
        SystemExit: with code 2, after printing each line as ``error: ...`` to stderr; with code 130 after Ctrl-C.
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        escape_unknown_characters()
        try:
            return function(*args, **kwargs)
        except UserError as error:
            text = str(error)
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            raise SystemExit(INTERRUPTED_EXIT_CODE) from None
        except Exception as error:
            text = known_ending(error)
            if not text:
                raise
        for line in text.replace("\r\n", "\n").split("\n"):
            print(f"error: {one_line(line)}", file=sys.stderr)
        raise SystemExit(USER_ERROR_EXIT_CODE)

    return wrapper


def escape_unknown_characters() -> None:
    """Let the console show characters that it does not know as escapes, where printing them would end the program.

    Consoles of Windows and the C locale know few; the names of files and the captions of users have all of Unicode.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def known_ending(error: BaseException) -> str:
    """One line on an error that neither the program nor its options made; empty for any other."""
    first = next(iter(str(error).splitlines()), "") or type(error).__name__
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, MemoryError) or "OutOfMemoryError" in kinds:
        return _out_of_memory(first)
    if isinstance(error, OSError) and error.errno in (errno.ENOMEM, errno.EAGAIN):
        return _out_of_memory(first)
    if isinstance(error, UnicodeEncodeError) and "surrogates not allowed" in str(error):
        return (
            f"a name has characters that this locale's encoding ({sys.getfilesystemencoding()}) does not have: set "
            "LC_ALL=C.UTF-8 or PYTHONUTF8=1, or give another name"
        )
    # packages that do not fit raise ImportError, or OSError without a number
    if isinstance(error, (RuntimeError, ImportError, OSError)) and any(words in str(error) for words in _NO_MEMORY):
        return _out_of_memory(first if isinstance(error, RuntimeError) else str(error).splitlines()[-1])
    if isinstance(error, RuntimeError):
        if kinds & {"DistBackendError", "DistNetworkError"} or any(words in str(error) for words in _LOST_PROCESS):
            return (
                "another process of this run has ended or cannot be reached; its own messages say why. Start all of "
                f"them again, with --resume if there is a state ({first[:120]})"
            )
    return ""


def _out_of_memory(first: str) -> str:
    return f"out of memory ({first[:200]}); docs/precision_and_memory.md lists what needs less"
