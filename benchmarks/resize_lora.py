"""Time of resizing a LoRA: by its halves, as networks/resize_lora.py does it, and by the weights' products.

    python benchmarks/resize_lora.py --rank 128 --new_rank 32 --every 40

Modules are those of a LoRA of Stable Diffusion XL, of the published shapes and with random numbers; every 40th is
taken.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from networks.files.svd import decompose, decompose_product
from tests.fixtures.layouts import table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=128, help="of the LoRA")
    parser.add_argument("--new_rank", type=int, default=32, help="to resize it to")
    parser.add_argument("--every", type=int, default=40, help="take every n-th module")
    args = parser.parse_args()
    shapes = table("lora_sdxl")
    names = [name.removesuffix(".lora_up.weight") for name in shapes if name.endswith(".lora_up.weight")]
    chosen = names[:: args.every]
    seconds = {"halves": 0.0, "products": 0.0}
    worst = 0.0
    for seed, name in enumerate(chosen):
        generator = torch.Generator().manual_seed(seed)
        rows, columns = shapes[f"{name}.lora_up.weight"][0], shapes[f"{name}.lora_down.weight"][1]
        up = torch.randn(rows, args.rank, generator=generator)
        down = torch.randn(args.rank, columns, generator=generator)
        start = time.perf_counter()
        up_1, down_1 = decompose_product(up, down).factors(args.new_rank)
        middle = time.perf_counter()
        up_2, down_2 = decompose(up @ down).factors(args.new_rank)
        seconds["halves"] += middle - start
        seconds["products"] += time.perf_counter() - middle
        product = up @ down
        errors = [float((product - u @ d).norm() / product.norm()) for u, d in ((up_1, down_1), (up_2, down_2))]
        worst = max(worst, abs(errors[0] - errors[1]))
    for name, value in seconds.items():
        print(
            f"{name}: {value / len(chosen):.4f} s a module, {value / len(chosen) * len(names):.0f} s for {len(names)}"
        )
    print(f"{seconds['products'] / seconds['halves']:.1f} times as fast; errors differ by {worst:.1e} at most")


if __name__ == "__main__":
    main()
