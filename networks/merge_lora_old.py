"""The older name of networks/merge_lora.py, with the options that it had.

    python networks/merge_lora_old.py --sd_model model.safetensors --save_to merged.safetensors --models a.safetensors

It does the same, without --concat, and writes no modelspec.* entries.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the repository is one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.config.tool_parser import tool_parser
from library.errors import exits_on_user_error
from networks.files.options import add_merge_options
from networks.merge_lora import FAMILIES


def setup_parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__)
    parser.add_argument(
        "--v2", action="store_true", help="accepted for old command lines, without effect: the files tell"
    )
    parser.add_argument(
        "--sd_model", metavar="FILE", help="checkpoint to merge into; without it, the files are merged with each other"
    )
    parser.add_argument("--save_to", metavar="FILE", help="the .safetensors file to write")
    add_merge_options(parser, concat=False, metadata=False)
    return parser


@exits_on_user_error
def main(args: argparse.Namespace) -> None:
    """Run ``merge_lora``."""
    from networks.files.merge_script import run  # only now, as torch takes seconds to load

    run(args, FAMILIES, modelspec=False)


if __name__ == "__main__":
    main(setup_parser().parse_args())
