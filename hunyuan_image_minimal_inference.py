"""Generate images from text with HunyuanImage-2.1, with or without LoRA.

    python hunyuan_image_minimal_inference.py --dit hunyuanimage2.1.safetensors \\
        --text_encoder qwen_2.5_vl_7b.safetensors --byt5 byt5_small_glyphxl_fp16.safetensors \\
        --vae hunyuan_image_2.1_vae_fp16.safetensors --fp8_scaled --offload --lora_weight my_lora.safetensors \\
        --prompt "A cute cartoon penguin in a snowy landscape" --seed 542017 --save_path outputs

docs/hunyuan_image.md explains every part of it.
"""

from __future__ import annotations

import argparse

from library.architectures.hunyuan_image.inference import INFERENCE
from library.inference.minimal_script import generate_minimal, minimal_parser


def setup_parser() -> argparse.ArgumentParser:
    return minimal_parser(__doc__, INFERENCE)


def main(args: argparse.Namespace) -> None:
    generate_minimal(INFERENCE, args)


if __name__ == "__main__":
    main(setup_parser().parse_args())
