"""Bring the captions of images, text files beside them, into one metadata file.

    python finetune/merge_captions_to_metadata.py images metadata.json
    python finetune/merge_captions_to_metadata.py images metadata.json --full_path --recursive --dry_run

Entries that are in the metadata keep their other fields. More: docs/captioning.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the suite is one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.captioning import options
from library.config.tool_parser import tool_parser
from library.errors import exits_on_user_error


def setup_parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__)
    options.add_folder(parser)
    options.add_metadata_files(parser)
    options.add_ending(parser, ".caption", misspelt=True)
    return parser


@exits_on_user_error
def main(args: argparse.Namespace) -> None:
    """Write the metadata.

    Raises:
        SystemExit: with code 2, after one clear line.
    """
    from library.captioning.merging import run_merge

    run_merge(args, field="caption")


if __name__ == "__main__":
    main(setup_parser().parse_args())
