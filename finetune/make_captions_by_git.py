"""Write captions of images with GIT, a text file beside each.

    python finetune/make_captions_by_git.py images --batch_size 8 --remove_words

Captions that exist are kept unless --overwrite is given, so the same command continues after it was stopped. More:
docs/captioning.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the suite is one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.captioning import options
from library.config.arguments import ConsoleOptions
from library.config.console import setup_console
from library.config.tool_parser import tool_parser
from library.errors import UserError, exits_on_user_error


def setup_parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__)
    add = parser.add_argument
    options.add_folder(parser)
    options.add_ending(parser, ".caption", misspelt=False)
    add("--model_id", default="microsoft/git-large-textcaps", metavar="MODEL", help="GIT: a folder, or id on the Hub")
    add("--max_length", type=int, default=50, metavar="N", help="tokens at most (50)")
    add("--remove_words", action="store_true", help="take out what captions say of words in the image")
    options.add_work(parser)
    return parser


@exits_on_user_error
def main(args: argparse.Namespace) -> None:
    """Write the captions.

    Raises:
        SystemExit: code 2 after a mistake, 130 or 143 after Ctrl-C or SIGTERM.
    """
    setup_console(ConsoleOptions())
    work, ending = options.Work.of(args), options.ending_of(args)
    if args.max_length < 1:
        raise UserError(f"--max_length {args.max_length}: must be at least 1")
    # only now, as torch takes seconds to load
    from library.captioning.caption_files import CaptionFiles, without_twins
    from library.captioning.describing import describe_all
    from library.captioning.git import Git

    images = options.images_of(args)
    describe_all(
        without_twins(images, ending),
        CaptionFiles(ending, overwrite=work.overwrite),
        work,
        lambda: Git(args.model_id, args.max_length, remove_words=args.remove_words, device=args.device),
    )


if __name__ == "__main__":
    main(setup_parser().parse_args())
