"""Enlarge images to twice their size by a VAE and a network that refines latents, or train the network.

    python tools/latent_upscaler.py --vae_path model --weights upscaler.safetensors --image_pattern "small/*.png" \\
        --output_dir large
    python tools/latent_upscaler.py train --vae_path model --train_data_dir images --output_file upscaler.safetensors

``gen_img.py --highres_fix_upscaler tools.latent_upscaler`` enlarges with the same network.
"""

from __future__ import annotations

import argparse
import glob
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.config.arguments import ConsoleOptions
from library.config.console import setup_console
from library.config.fields import add_flags
from library.errors import UserError, exits_on_user_error
from library.training.upscaler.options import UpscalerOptions, read_options


def create_upscaler(weights: str) -> Any:
    """Return the network of a file, for ``--highres_fix_upscaler``."""
    from library.inference.latent_upscaler import load_latent_upscaler

    return load_latent_upscaler(Path(weights))


#: options of enlarging alone
_OF_ENLARGING = ("image_pattern", "output_dir", "debug")


def setup_parser() -> argparse.ArgumentParser:
    summary, _, more = str(__doc__).partition("\n\n")
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=summary, epilog=more, formatter_class=kind, allow_abbrev=False)
    parser.add_argument("--vae_path", help="VAE file, its folder, or the folder of a model")
    parser.add_argument("--weights", help="file of the network")
    parser.add_argument("--image_pattern", help='images to enlarge, such as "small/*.png"')
    parser.add_argument("--output_dir", default=".", help="folder for the images (default: .)")
    parser.add_argument("--batch_size", type=int, default=4, help="images at once (default: 4)")
    parser.add_argument("--vae_batch_size", type=int, default=1, help="images at once in the VAE (default: 1)")
    parser.add_argument("--debug", action="store_true", help="also write the images as Lanczos enlarges them")
    commands = parser.add_subparsers(dest="command", metavar="train")
    train = commands.add_parser(
        "train",
        help="train the network; train --help lists the options",
        description="Train a latent upscaler on crops of images.",
        formatter_class=kind,
        allow_abbrev=False,
    )
    shared = {action.dest for action in parser._actions}
    for group in UpscalerOptions.groups().values():
        add_flags(train, group)
    for action in train._actions:
        if action.dest in shared and action.dest != "help":
            action.default = argparse.SUPPRESS  # given before the command, or its default there
    return parser


@exits_on_user_error
def main(args: argparse.Namespace) -> int:
    """Enlarge images, or train; returns the exit code.

    Raises:
        SystemExit: with code 2, after clear lines.
    """
    if args.command == "train":
        return _train(args)
    for name in ("vae_path", "weights", "image_pattern"):
        if not getattr(args, name):
            raise UserError(f"--{name} is required")
    for name in ("batch_size", "vae_batch_size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least 1")
    paths = [Path(path) for path in sorted(glob.glob(args.image_pattern))]
    if not paths:
        raise UserError(f"--image_pattern {args.image_pattern}: no such image")
    setup_console(ConsoleOptions())
    # only now, as torch takes seconds to load
    from library.inference.upscale_files import upscale_files

    upscale_files(
        paths,
        Path(args.output_dir),
        vae=args.vae_path,
        weights=Path(args.weights),
        batch_size=args.batch_size,
        vae_batch_size=args.vae_batch_size,
        with_lanczos=args.debug,
    )
    return 0


def _train(args: argparse.Namespace) -> int:
    options = read_options(args)
    for name in _OF_ENLARGING:
        if getattr(args, name) not in (None, False, "."):
            raise UserError(f"--{name} is for enlarging images; leave it out with train")
    setup_console(ConsoleOptions())
    from library.training.upscaler.training import train_upscaler

    return train_upscaler(options)


if __name__ == "__main__":
    sys.exit(main(setup_parser().parse_args()))
