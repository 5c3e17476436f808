"""Generate images from text with Lumina-Image 2.0, with or without LoRA.

    python lumina_minimal_inference.py \\
        --pretrained_model_name_or_path lumina-image-2.safetensors \\
        --gemma2_path gemma_2_2b_fp16.safetensors --ae_path ae.safetensors \\
        --offload --lora_weights "my_lora.safetensors;1.0" \\
        --system_prompt "You are an assistant designed to generate high-quality images based on user prompts." \\
        --prompt "a cat holding a sign that says hello world" --seed 1 --output_dir outputs

docs/lumina.md explains every part of it.
"""

from __future__ import annotations

import argparse

from library.architectures.lumina.inference import INFERENCE
from library.inference.minimal_script import generate_minimal, minimal_parser


def setup_parser() -> argparse.ArgumentParser:
    return minimal_parser(__doc__, INFERENCE)


def main(args: argparse.Namespace) -> None:
    generate_minimal(INFERENCE, args)


if __name__ == "__main__":
    main(setup_parser().parse_args())
