"""Command lines of tools that have a few options of their own."""

from __future__ import annotations

import argparse


def tool_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose ``--help`` is the script's docstring: its first paragraph, the options, and then the rest."""
    summary, _, details = (doc or "").strip().partition("\n\n")
    return argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_mapped_option(parser: argparse.ArgumentParser, flag: str) -> None:
    parser.add_argument(
        flag,
        action="store_true",
        help="tensors are taken from the mapped files instead of being read into memory; slower on some network drives",
    )
