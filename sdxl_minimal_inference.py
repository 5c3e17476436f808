"""Generate images from text with Stable Diffusion XL, with or without LoRA.

    python sdxl_minimal_inference.py --ckpt_path sd_xl_base_1.0.safetensors --bf16 \\
        --lora_weights "my_lora.safetensors;0.8" --prompt "a cat on a mat" --prompt2 "oil painting" \\
        --seed 1 --output_dir outputs

docs/gen_img.md explains every part of it.
"""

from __future__ import annotations

import argparse

from library.architectures.sdxl.inference import INFERENCE
from library.inference.minimal_script import generate_minimal, minimal_parser


def setup_parser() -> argparse.ArgumentParser:
    return minimal_parser(__doc__, INFERENCE)


def main(args: argparse.Namespace) -> None:
    generate_minimal(INFERENCE, args)


if __name__ == "__main__":
    main(setup_parser().parse_args())
