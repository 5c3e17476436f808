"""Generate images from text with FLUX.1 or Chroma, with or without LoRA.

    python flux_minimal_inference.py --ckpt_path flux1-dev.safetensors \\
        --clip_l clip_l.safetensors --t5xxl t5xxl_fp16.safetensors --ae ae.safetensors \\
        --dtype bf16 --flux_dtype fp8 --offload --lora_weights "my_lora.safetensors;1.0" \\
        --prompt "a cat holding a sign that says hello world" --seed 1 --output_dir outputs

docs/flux_minimal_inference.md explains every part of it.
"""

from __future__ import annotations

import argparse

from library.architectures.flux.inference import INFERENCE
from library.inference.minimal_script import generate_minimal, minimal_parser


def setup_parser() -> argparse.ArgumentParser:
    return minimal_parser(__doc__, INFERENCE)


def main(args: argparse.Namespace) -> None:
    generate_minimal(INFERENCE, args)


if __name__ == "__main__":
    main(setup_parser().parse_args())
