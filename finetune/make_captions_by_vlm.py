"""Write captions of images with a vision-language model, a text file beside each.

    python finetune/make_captions_by_vlm.py images --model_id Qwen/Qwen3-VL-4B-Instruct --review review.html
    python finetune/make_captions_by_vlm.py images --model_id fancyfeast/llama-joycaption-beta-one-hf-llava \\
        --prompt_file prompt.txt --system_prompt "You are a helpful image captioner." --batch_size 4
    python finetune/make_captions_by_vlm.py images --model_id florence-community/Florence-2-large \\
        --prompt "<MORE_DETAILED_CAPTION>"

The model is any that transformers' AutoModelForImageTextToText loads: a folder, or an id on the Hub. Captions that
exist are kept unless --overwrite is given, so the same command continues after it was stopped. More:
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
    options.add_ending(parser, ".txt", misspelt=False)
    add("--model_id", required=True, metavar="MODEL", help="the model: a folder, or id on the Hub")
    add("--prompt", metavar="TEXT", help="the question about each image (default: for one detailed paragraph)")
    add(
        "--prompt_file",
        metavar="FILE",
        help="a file with it; {name}, {folder} and {text} in it are the image's name, its folder's, and its "
        "--text_extension file",
    )
    add("--text_extension", default=".tags", metavar="ENDING", help="of the files of {text} in a prompt (.tags)")
    add("--system_prompt", metavar="TEXT", help="what the conversation begins with")
    add("--max_new_tokens", type=int, default=256, metavar="N", help="tokens of an answer at most (256)")
    add("--temperature", type=float, default=0.0, metavar="X", help="of sampling; 0: the likeliest words (0)")
    add("--top_p", type=float, default=0.9, metavar="X", help="sample among words of this probability (0.9)")
    add("--seed", type=int, default=42, metavar="N", help="of sampling (42)")
    add(
        "--precision",
        choices=["auto", "float", "fp16", "bf16"],
        default="auto",
        help="of the model's numbers; auto: bf16 on a GPU, float on a CPU",
    )
    add("--review", metavar="FILE", help="write a page of all images with their captions, .html")
    options.add_work(parser)
    return parser


def check(args: argparse.Namespace) -> None:
    """Raise UserError for values out of range."""
    if args.max_new_tokens < 1:
        raise UserError(f"--max_new_tokens {args.max_new_tokens}: must be at least 1")
    if args.temperature < 0:
        raise UserError(f"--temperature {args.temperature}: must be at least 0")
    options.check_top_p(args)
    if args.review and not args.review.endswith((".html", ".htm")):
        raise UserError(f"--review {args.review}: must end with .html")


@exits_on_user_error
def main(args: argparse.Namespace) -> None:
    """Write the captions, and the page of --review even after an interruption.

    Raises:
        SystemExit: code 2 after a mistake, 130 or 143 after Ctrl-C or SIGTERM.
    """
    setup_console(ConsoleOptions())
    work, ending = options.Work.of(args), options.ending_of(args)
    check(args)
    # only now, as torch takes seconds to load
    from library.captioning.caption_files import CaptionFiles, without_twins
    from library.captioning.describing import describe_all
    from library.captioning.prompts import read_prompt
    from library.captioning.review import review_page
    from library.captioning.vlm import Answer, VisionLanguageModel
    from library.files.atomic import write_text

    prompt = read_prompt(args.prompt, args.prompt_file, args.text_extension)
    answer = Answer(args.max_new_tokens, args.temperature, args.top_p, args.seed)
    images = options.images_of(args)
    images = list(without_twins(images, ending))
    target = CaptionFiles(ending, overwrite=work.overwrite)

    def load() -> VisionLanguageModel:
        system, precision, device = args.system_prompt, args.precision, args.device
        return VisionLanguageModel(args.model_id, prompt, answer, system=system, precision=precision, device=device)

    try:
        describe_all(images, target, work, load)
    finally:
        if args.review and not work.dry_run:
            write_text(
                args.review, review_page({image: target.read(image) for image in images}, str(args.train_data_dir))
            )
            print(f"to look through: {args.review}")


if __name__ == "__main__":
    main(setup_parser().parse_args())
