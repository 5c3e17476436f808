"""Command lines of tools with a few options."""

from __future__ import annotations

import argparse


def tool_parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser whose ``--help`` is the script's docstring: its first paragraph, the options, and then the
    rest."""
    summary, _, details = (doc or "").strip().partition("\n\n")
    return argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_mapped_option(parser: argparse.ArgumentParser, flag: str) -> None:
    parser.add_argument(
        flag,
        action="store_true",
        help="map the files instead of reading tensors into memory; slower on some network drives",
    )
