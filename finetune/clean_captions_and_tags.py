"""Tidy the tags and captions of a metadata file.

    python finetune/clean_captions_and_tags.py metadata.json clean.json --debug

Of tags: spaces instead of underscores, no ratings, nothing that another tag says better, and of several people no looks
of which it is unclear whose they are. Of captions: words that captioning models overuse. docs/captioning.md lists the
rules.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the suite is one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.config.arguments import ConsoleOptions
from library.config.console import setup_console
from library.config.tool_parser import tool_parser
from library.errors import UserError, exits_on_user_error

logger = logging.getLogger(__name__)

_SHOWN = 3


def setup_parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__)
    add = parser.add_argument
    add("in_json", metavar="IN", help="metadata file to read")
    add("out_json", metavar="OUT", help="metadata file to write")
    add("more", nargs="*", help=argparse.SUPPRESS)  # the old command line had the images' folder first
    add("--debug", action="store_true", help="print what changes")
    add("--dry_run", action="store_true", help="say what would change and write nothing")
    return parser


@exits_on_user_error
def main(args: argparse.Namespace) -> None:
    """Write the tidy metadata.

    Raises:
        SystemExit: with code 2, after one clear line.
    """
    setup_console(ConsoleOptions())
    names = [args.in_json, args.out_json, *args.more]
    if len(names) > 3:
        raise UserError(f"{' '.join(names[3:])}: too many files: give the one to read and the one to write")
    if len(names) == 3:
        logger.warning("%s: the folder of the images is not needed any more and ignored", names[0])
    from library.captioning.clean import clean_caption, clean_tags
    from library.captioning.metadata import read_metadata, write_metadata

    source, target = map(Path, names[-2:])
    metadata = read_metadata(source, "in_json")
    changed = 0
    for field, clean in (("tags", clean_tags), ("caption", clean_caption)):
        without = [name for name, entry in metadata.items() if not isinstance(entry.get(field), str)]
        if without:
            more = f" and {len(without) - _SHOWN} more" if len(without) > _SHOWN else ""
            logger.warning("no %s: %s%s; these stay as they are", field, ", ".join(without[:_SHOWN]), more)
        for name, entry in metadata.items():
            before = entry.get(field)
            if not isinstance(before, str) or (after := clean(before)) == before:
                continue
            entry[field] = after
            changed += 1
            if args.debug:
                print(f"{name}: {field}:\n  {before}\n  {after}")
    outcome = f"{changed} texts of {len(metadata)} images changed"
    if args.dry_run:
        logger.info("dry run: %s; nothing is written", outcome)
        return
    write_metadata(target, metadata)
    logger.info("%s: %s", target, outcome)


if __name__ == "__main__":
    main(setup_parser().parse_args())
