"""Draw images from text with FLUX.1 or Chroma, with or without LoRA.

    python flux_minimal_inference.py --ckpt_path flux1-dev.safetensors \\
        --clip_l clip_l.safetensors --t5xxl t5xxl_fp16.safetensors --ae ae.safetensors \\
        --dtype bf16 --flux_dtype fp8 --offload --lora_weights "my_lora.safetensors;1.0" \\
        --prompt "a cat holding a sign that says hello world" --seed 1 --output_dir outputs

docs/flux_minimal_inference.md explains every part of it.
"""

from __future__ import annotations

import argparse

from library.config.arguments import build_parser
from library.config.help import split_doc
from library.errors import exits_on_user_error
from library.inference.flux_options import GROUPS, FluxInferenceOptions, check_options


def setup_parser() -> argparse.ArgumentParser:
    summary, example, more = split_doc(__doc__)
    return build_parser(GROUPS, description=summary, epilog=example, more=more)


@exits_on_user_error
def main(args: argparse.Namespace) -> None:
    options = FluxInferenceOptions.from_args(args)
    check_options(options)
    # only now, as torch takes seconds to load
    from library.inference.flux_minimal import draw_images

    draw_images(options)


if __name__ == "__main__":
    main(setup_parser().parse_args())
