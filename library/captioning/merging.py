"""Merge texts into metadata: the work of the two scripts that do it."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from library.captioning import options
from library.captioning.metadata import Merge, keys_of, merge_texts, read_metadata, write_metadata
from library.config.arguments import ConsoleOptions
from library.config.console import setup_console
from library.errors import UserError

logger = logging.getLogger(__name__)


def run_merge(args: argparse.Namespace, *, field: str) -> None:
    """Merge the texts of a folder into one field of a metadata file.

    Raises:
        UserError: options that do not go together; files that cannot be read.
    """
    setup_console(ConsoleOptions())
    ending = options.ending_of(args)
    if args.recursive and not args.full_path:
        raise UserError("--recursive: needs --full_path, as images of different folders may have the same name")
    images = options.images_of(args)
    target = Path(args.out_json)
    source = Path(args.in_json) if args.in_json else target if target.is_file() else None
    metadata = read_metadata(source, "--in_json" if args.in_json else "out_json") if source else {}
    before = len(metadata)
    count = merge_texts(metadata, keys_of(images, full_path=args.full_path), Merge(field, ending, args.debug))
    outcome = (
        f"{count} {field if field == 'tags' else 'captions'}, {len(metadata) - before} new entries of {len(metadata)}"
    )
    if args.dry_run:
        logger.info("dry run: %s; nothing is written", outcome)
        return
    write_metadata(target, metadata)
    logger.info("%s: %s", target, outcome)
