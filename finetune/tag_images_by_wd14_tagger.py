"""Write tags of images with a WD tagger, a text file beside each or one JSON file for all.

    python finetune/tag_images_by_wd14_tagger.py images --onnx --repo_id SmilingWolf/wd-swinv2-tagger-v3 \\
        --batch_size 4 --remove_underscore --character_threshold 0.8
    python finetune/tag_images_by_wd14_tagger.py images --repo_id my_tagger_folder --output_path tags.json

Taggers in ONNX's form need onnxruntime, those in timm's form (v3, safetensors) timm. Tags that exist are kept unless
--overwrite or --append_tags is given, so the same command continues after it was stopped. More: docs/captioning.md.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # run as a script: the suite is one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.captioning import options
from library.config.arguments import ConsoleOptions
from library.config.console import setup_console
from library.config.tool_parser import tool_parser
from library.errors import UserError, exits_on_user_error

if TYPE_CHECKING:
    from library.captioning.tagger.choose import Rules
    from library.captioning.tagger.describer import TagDescriber

logger = logging.getLogger(__name__)

#: categories with a threshold of their own
CATEGORIES = ("general", "character", "meta", "model", "copyright", "artist")


def setup_parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__)
    options.add_folder(parser)
    _add_model(parser)
    options.add_ending(parser, ".txt", misspelt=True)
    _add_choice(parser)
    _add_spelling(parser)
    options.add_work(parser)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--repo_id",
        default="SmilingWolf/wd-v1-4-convnext-tagger-v2",
        metavar="MODEL",
        help="the tagger: a folder, owner/name on the Hub, or owner/name/folder there",
    )
    add("--model_dir", default="wd14_tagger_model", metavar="FOLDER", help="where files from the Hub are kept")
    add("--force_download", action="store_true", help="download them again")
    add("--onnx", action="store_true", help="take ONNX's form, where the tagger also has timm's")
    add("--output_path", metavar="FILE", help="write all tags to one .json or .jsonl file instead")


def _add_choice(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--thresh", type=float, default=0.35, metavar="X", help="least probability of a tag, 0 to 1 (0.35)")
    for category in CATEGORIES:
        add(f"--{category}_threshold", type=float, metavar="X", help=f"the same for {category} tags; 1: none")
    add("--undesired_tags", default="", metavar="TAGS", help="tags to leave out")
    add("--append_tags", action="store_true", help="add to the tags that are there")
    add("--use_rating_tags", action="store_true", help="the likeliest rating as the first tag")
    add("--use_rating_tags_as_last_tag", action="store_true", help="the same as the last tag")
    add("--use_quality_tags", action="store_true", help="the likeliest quality first, of taggers that have them")
    add("--use_quality_tags_as_last_tag", action="store_true", help="the same last")
    add("--character_tags_first", action="store_true", help="characters before the other tags")
    add("--always_first_tags", metavar="TAGS", help="tags to move to the front; the last named becomes the first")


def _add_spelling(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--remove_underscore", action="store_true", help="spaces instead of underscores")
    add("--caption_separator", default=", ", metavar="TEXT", help='between tags (", ")')
    add("--tag_replacement", metavar="PAIRS", help=r'"from,to;from,to"; \, and \; are the characters themselves')
    add("--character_tag_expand", action="store_true", help='"name_(series)" becomes two tags')
    add("--frequency_tags", action="store_true", help="print how often each tag was found")


def rules_of(args: argparse.Namespace, *, is_mapping: bool) -> Rules:
    """Return how tags are chosen.

    Raises:
        UserError: numbers out of range; a separator of blanks alone; broken replacements.
    """
    from library.captioning.tagger.choose import Names, Rules, parse_replacements, parse_tags

    separator = args.caption_separator
    if not separator.strip():
        raise UserError(f'--caption_separator "{separator}": must have more than blanks in it')
    thresholds = {}
    for category in CATEGORIES:
        own = getattr(args, f"{category}_threshold")
        flag = "--thresh" if own is None else f"--{category}_threshold"
        value = args.thresh if own is None else own
        if not value >= 0:
            raise UserError(f"{flag} {value}: must be at least 0")
        thresholds[category] = value
    # published: of both places, WD taggers take the first, those with a mapping the last
    order = ("last", "first") if is_mapping else ("first", "last")
    return Rules(
        names=Names(args.remove_underscore, parse_replacements(args.tag_replacement), args.character_tag_expand),
        thresholds=thresholds,
        undesired=frozenset(parse_tags(args.undesired_tags, separator)),
        always_first=parse_tags(args.always_first_tags, separator),
        characters_first=args.character_tags_first,
        ratings=_place(args.use_rating_tags, args.use_rating_tags_as_last_tag, order),
        quality=_place(args.use_quality_tags, args.use_quality_tags_as_last_tag, order),
        least=min(thresholds.values()) if is_mapping else 0.0,
        by_probability=is_mapping,
    )


def _place(first: bool, last: bool, order: tuple[str, str]) -> str:
    wanted = {"first": first, "last": last}
    return next((place for place in order if wanted[place]), "")


@exits_on_user_error
def main(args: argparse.Namespace) -> None:
    """Write the tags.

    Raises:
        SystemExit: code 2 after a mistake, 130 or 143 after Ctrl-C or SIGTERM.
    """
    setup_console(ConsoleOptions())
    work, ending = options.Work.of(args), options.ending_of(args)
    rules_of(args, is_mapping=False)  # mistakes in it before anything else
    # only now, as numpy and OpenCV take time to load
    from library.captioning.caption_files import without_twins
    from library.captioning.describing import describe_all
    from library.captioning.tagger.tag_files import TagFiles, TagTable

    images = options.images_of(args)
    how = {"overwrite": work.overwrite, "append": args.append_tags}
    separator = args.caption_separator
    counts: Counter[str] = Counter()
    if args.output_path:
        describe_all(images, TagTable(Path(args.output_path), separator, **how), work, lambda: _describer(args, counts))
    else:
        describe_all(
            without_twins(images, ending),
            TagFiles(ending, separator, **how),
            work,
            lambda: _describer(args, counts),
        )
    if args.frequency_tags and not work.dry_run:
        print("Tag frequencies:")
        for tag, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])):
            print(f"{tag}: {count}")


def _describer(args: argparse.Namespace, counts: Counter[str]) -> TagDescriber:
    from library.captioning.tagger.describer import TagDescriber
    from library.captioning.tagger.files import locate
    from library.captioning.tagger.model import open_tagger

    form = locate(args.repo_id, Path(args.model_dir), onnx=args.onnx, download=args.force_download)
    tagger = open_tagger(form, args.device)
    rules = rules_of(args, is_mapping=form.is_mapping)
    if rules.quality and not any(label.category == "quality" for label in tagger.labels):
        logger.warning("--use_quality_tags: this tagger has no quality tags")
    return TagDescriber(tagger, rules, args.caption_separator, counts, by_category=args.debug)


if __name__ == "__main__":
    main(setup_parser().parse_args())
