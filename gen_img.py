"""Generate images from text with a Stable Diffusion 1.x, 2.x or XL model, with or without LoRA.

    python gen_img.py --ckpt model.safetensors --outdir outputs --bf16 \\
        --network_module networks.lora --network_weights my_lora.safetensors \\
        --prompt "a cat on a mat --n blurry --w 512 --h 768 --s 28 --d 1"
"""

from __future__ import annotations

import argparse

from library.config.arguments import build_parser
from library.config.help import split_doc
from library.errors import exits_on_user_error
from library.inference.options import check_options, image_groups, image_options
from library.lazy_imports import without_collection


def setup_parser() -> argparse.ArgumentParser:
    summary, example, more = split_doc(__doc__)
    return build_parser(image_groups(), description=summary, epilog=example, more=more)


@exits_on_user_error
def main(args: argparse.Namespace) -> None:
    options = image_options(args)
    check_options(options)
    with without_collection(freeze=True):
        # only now, as torch takes seconds to load
        from library.inference.families import family_of
        from library.inference.gen_img import generate_all

    generate_all(options, family_of(options.model))


if __name__ == "__main__":
    main(setup_parser().parse_args())
