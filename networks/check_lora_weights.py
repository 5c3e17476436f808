"""Show the tensors of an adapter file: shape, mean and smallest absolute value of each.

    python networks/check_lora_weights.py lora.safetensors
    python networks/check_lora_weights.py --show_all_keys lora.safetensors

A mean of 0 for an up half means that its module has not been trained. tools/lora.py show sums up a whole file.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the repository is one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.config.tool_parser import tool_parser
from library.errors import exits_on_user_error

#: pieces of the names of tensors that are trained
_TRAINED = ("lora_up", "lora_down", "lora_A", "lora_B", "oft_")


def setup_parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__)
    parser.add_argument("file", metavar="FILE", help="adapter file")
    parser.add_argument("-s", "--show_all_keys", action="store_true", help="show all tensors, alphas too")
    return parser


@exits_on_user_error
def main(args: argparse.Namespace) -> None:
    """Print one line for each tensor.

    Raises:
        SystemExit: with code 2, after one clear line.
    """
    from networks.weights import read_weights  # only now, as torch takes seconds to load

    weights = read_weights(args.file)
    shown = {
        name: tensor
        for name, tensor in weights.items()
        if args.show_all_keys or any(piece in name for piece in _TRAINED)
    }
    print(f"number of LoRA modules: {len(shown)}")
    for name, tensor in shown.items():
        size = "-".join(map(str, tensor.shape))
        values = tensor.float().abs()
        mean, least = (float(values.mean()), float(values.min())) if values.numel() else (0.0, 0.0)
        print(f"{name},({size}),{mean},{least}")


if __name__ == "__main__":
    main(setup_parser().parse_args())
