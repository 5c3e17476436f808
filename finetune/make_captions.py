"""Write captions of images with BLIP, a text file beside each.

    python finetune/make_captions.py images --batch_size 8
    python finetune/make_captions.py images --recursive --beam_search --num_beams 3 --min_length 10

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

#: the published default; the same network comes from the Hub
WEIGHTS = "https://storage.googleapis.com/sfr-vision-language-research/BLIP/models/model_large_caption.pth"


def setup_parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__)
    add = parser.add_argument
    options.add_folder(parser)
    add(
        "--caption_weights",
        default=WEIGHTS,
        metavar="MODEL",
        help="BLIP: a folder or id on the Hub, or a file of the original weights (BLIP large)",
    )
    options.add_ending(parser, ".caption", misspelt=True)
    add("--beam_search", action="store_true", help="the likeliest caption, instead of sampling")
    add("--num_beams", type=int, default=1, metavar="N", help="beams of --beam_search (1)")
    add("--top_p", type=float, default=0.9, metavar="X", help="sample among words of this probability (0.9)")
    add("--max_length", type=int, default=75, metavar="N", help="tokens at most (75)")
    add("--min_length", type=int, default=5, metavar="N", help="tokens at least (5)")
    add("--seed", type=int, default=42, metavar="N", help="of sampling (42)")
    options.add_work(parser)
    return parser


def check(args: argparse.Namespace) -> None:
    """Raise UserError for numbers out of range."""
    if args.num_beams < 1:
        raise UserError(f"--num_beams {args.num_beams}: must be at least 1")
    options.check_top_p(args)
    if not 0 <= args.min_length <= args.max_length or args.max_length < 1:
        raise UserError(f"--min_length {args.min_length}, --max_length {args.max_length}: the first is the larger one")


@exits_on_user_error
def main(args: argparse.Namespace) -> None:
    """Write the captions.

    Raises:
        SystemExit: code 2 after a mistake, 130 or 143 after Ctrl-C or SIGTERM.
    """
    setup_console(ConsoleOptions())
    work, ending = options.Work.of(args), options.ending_of(args)
    check(args)
    # only now, as torch takes seconds to load
    from library.captioning.blip import Blip, Search
    from library.captioning.caption_files import CaptionFiles, without_twins
    from library.captioning.describing import describe_all

    images = options.images_of(args)
    search = Search(args.num_beams if args.beam_search else 0, args.top_p, args.max_length, args.min_length, args.seed)
    describe_all(
        without_twins(images, ending),
        CaptionFiles(ending, overwrite=work.overwrite),
        work,
        lambda: Blip(args.caption_weights, search, args.device),
    )


if __name__ == "__main__":
    main(setup_parser().parse_args())
