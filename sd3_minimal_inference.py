"""Generate images from text with Stable Diffusion 3 or 3.5, with or without LoRA.

    python sd3_minimal_inference.py --ckpt_path sd3.5_medium.safetensors \\
        --clip_l clip_l.safetensors --clip_g clip_g.safetensors --t5xxl t5xxl_fp16.safetensors \\
        --bf16 --offload --lora_weights "my_lora.safetensors;1.0" \\
        --prompt "a cat holding a sign that says hello world" --seed 1 --output_dir outputs

docs/sd3.md explains every part of it.
"""

from __future__ import annotations

import argparse

from library.architectures.sd3.inference import INFERENCE
from library.inference.minimal_script import generate_minimal, minimal_parser


def setup_parser() -> argparse.ArgumentParser:
    return minimal_parser(__doc__, INFERENCE)


def main(args: argparse.Namespace) -> None:
    generate_minimal(INFERENCE, args)


if __name__ == "__main__":
    main(setup_parser().parse_args())
