"""Print the metadata of a safetensors file as JSON.

    python tools/show_metadata.py --model lora.safetensors

Only the file's header is read. Exit codes: 0 printed, or there is no metadata (a line says so); 2 no such file, or none
of
safetensors.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the suite is one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.config.tool_parser import tool_parser
from library.errors import exits_on_user_error


def setup_parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__)
    parser.add_argument("--model", required=True, metavar="FILE", help="safetensors file")
    return parser


@exits_on_user_error
def main(args: argparse.Namespace) -> None:
    """Print the metadata, keys in order.

    Raises:
        SystemExit: with code 2, after one clear line.
    """
    from library.files.safetensors_io import read_header  # only now, as torch takes seconds to load

    metadata = read_header(Path(args.model)).metadata
    if not metadata:
        print(f"{args.model}: holds no metadata", file=sys.stderr)
        return
    print(json.dumps(dict(metadata), indent=4, sort_keys=True))


if __name__ == "__main__":
    main(setup_parser().parse_args())
