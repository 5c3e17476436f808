"""Sort the images of a metadata file into buckets, and write their latents beside them.

    python finetune/prepare_buckets_latents.py images metadata.json prepared.json model.safetensors \\
        --max_resolution 768,768 --batch_size 4 --mixed_precision bf16

Training with the prepared metadata, the same resolution, buckets and VAE, and --cache_latents_to_disk then encodes
nothing. The model is a checkpoint, or a VAE in a file, a folder or on the Hub. More: docs/captioning.md.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the suite is one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.architectures.registry import tool_flags
from library.captioning import options
from library.config.arguments import ConsoleOptions
from library.config.console import setup_console
from library.config.tool_parser import tool_parser
from library.errors import UserError, exits_on_user_error

logger = logging.getLogger(__name__)


def setup_parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__)
    add = parser.add_argument
    options.add_folder(parser)
    add("in_json", metavar="IN", help="metadata file to read")
    add("out_json", metavar="OUT", help="metadata file to write")
    add("model_name_or_path", metavar="MODEL", help="checkpoint or VAE")
    add("--v2", action="store_true", help="of old command lines; the VAE is the same")
    for flag in tool_flags():
        add(
            f"--{flag}", action="store_true", help=f"the model's family is {flag}; without, Stable Diffusion 1.x or 2.x"
        )
    add("--batch_size", type=int, default=1, metavar="N", help="images encoded at a time (1)")
    add("--max_data_loader_n_workers", type=int, metavar="N", help="of old command lines; images are read in threads")
    add("--max_resolution", default="512,512", metavar="W,H", help="resolution of training (512,512)")
    add("--min_bucket_reso", type=int, default=256, metavar="N", help="shortest side of a bucket, pixels (256)")
    add("--max_bucket_reso", type=int, default=1024, metavar="N", help="longest side of a bucket, pixels (1024)")
    add("--bucket_reso_steps", type=int, default=64, metavar="N", help="sides are multiples of this, pixels (64)")
    add("--bucket_no_upscale", action="store_true", help="make buckets of the images' own sizes, enlarging none")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], default="no", help="of the VAE's computation (no)")
    add("--full_path", action="store_true", help="the metadata names images by their paths")
    add("--flip_aug", action="store_true", help="latents of the mirrored images too")
    add("--alpha_mask", nargs="?", default="", const="true", metavar="true", help="the images' opacity too, as masks")
    add("--skip_existing", action="store_true", help="use latents that exist without checking them")
    add("--on_bad_image", choices=["skip", "stop"], default="stop", help="unreadable images: skip them, or stop (stop)")
    add("--dry_run", action="store_true", help="say what would be done; no model is loaded and nothing written")
    add("--device", metavar="DEVICE", help="where to compute (cuda if there is one, else cpu)")
    return parser


def resolution_of(text: str) -> tuple[int, int]:
    """Return (W, H) of ``512,512`` or ``512``. Raises UserError for anything else."""
    try:
        sides = [int(part) for part in text.split(",")]
        width, height = sides if len(sides) == 2 else (sides[0], sides[0] // (len(sides) == 1))
    except (ValueError, ZeroDivisionError):
        raise UserError(f"--max_resolution {text}: write it as 512,512") from None
    if min(width, height) < 1:
        raise UserError(f"--max_resolution {text}: must be at least 1")
    return width, height


def is_on(text: str | None) -> bool:
    """Whether the text of ``--alpha_mask`` switches it on; old command lines give it any text."""
    return (text or "").strip().lower() not in ("", "0", "false", "no", "off")


@exits_on_user_error
def main(args: argparse.Namespace) -> None:
    """Write the latents, then the metadata.

    Raises:
        SystemExit: code 2 after clear lines, 130 or 143 after Ctrl-C or SIGTERM.
    """
    setup_console(ConsoleOptions())
    if args.batch_size < 1:
        raise UserError(f"--batch_size {args.batch_size}: must be at least 1")
    if args.recursive and not args.full_path:
        raise UserError("--recursive: needs --full_path, as images of different folders may have the same name")
    unused = [name for name in ("v2", "max_data_loader_n_workers") if getattr(args, name)]
    if unused:
        logger.info("no effect here: %s", ", ".join(f"--{name}" for name in unused))
    resolution = resolution_of(args.max_resolution)
    chosen = [flag for flag in tool_flags() if getattr(args, flag)]
    if len(chosen) > 1:
        raise UserError(f"{' and '.join(f'--{flag}' for flag in chosen)} exclude each other: give the model's one")
    # only now, as torch takes seconds to load
    import torch

    from library.architectures.registry import by_tool_flag
    from library.captioning import prepare
    from library.captioning.metadata import keys_of, read_metadata, write_metadata
    from library.data.buckets import BucketRules

    flag = chosen[0] if chosen else ""
    architecture = by_tool_flag()[flag]
    rules = BucketRules(
        resolution,
        enabled=True,
        min_side=args.min_bucket_reso,
        max_side=args.max_bucket_reso,
        step=args.bucket_reso_steps,
        no_upscale=args.bucket_no_upscale,
    )
    prepare.check_rules(rules, architecture.latent.bucket_step)
    images = options.images_of(args)
    metadata = read_metadata(Path(args.in_json), "in_json")
    vae = prepare.open_vae(architecture, args.model_name_or_path, f"--{flag}")
    found = prepare.assign_buckets(
        keys_of(images, full_path=args.full_path), rules, skip_bad=args.on_bad_image == "skip"
    )
    for line in prepare.report(found):
        logger.info(line)
    if args.dry_run:
        logger.info("dry run: %d images; nothing is written", len(found))
        return
    how = prepare.Encoding(
        batch_size=args.batch_size,
        dtype={"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[args.mixed_precision],
        device=args.device,
        flip=args.flip_aug,
        alpha_mask=is_on(args.alpha_mask),
        trust=args.skip_existing,
    )
    made = prepare.make_latents(found, architecture, vae, how)
    prepare.add_buckets(metadata, found)
    write_metadata(Path(args.out_json), metadata)
    logger.info("%s: %d images, %d latents encoded, %d were there", args.out_json, len(found), made, len(found) - made)


if __name__ == "__main__":
    main(setup_parser().parse_args())
