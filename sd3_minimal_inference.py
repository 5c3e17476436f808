"""Generate images from text with Stable Diffusion 3 or 3.5, with or without LoRA.

    python sd3_minimal_inference.py --ckpt_path sd3.5_medium.safetensors \\
        --clip_l clip_l.safetensors --clip_g clip_g.safetensors --t5xxl t5xxl_fp16.safetensors \\
        --bf16 --offload --lora_weights "my_lora.safetensors;1.0" \\
        --prompt "a cat holding a sign that says hello world" --seed 1 --output_dir outputs

docs/sd3.md explains every part of it.
"""

from __future__ import annotations

import argparse

from library.config.arguments import build_parser
from library.config.help import split_doc
from library.errors import exits_on_user_error
from library.inference.sd3_options import GROUPS, SD3InferenceOptions, check_options


def setup_parser() -> argparse.ArgumentParser:
    summary, example, more = split_doc(__doc__)
    return build_parser(GROUPS, description=summary, epilog=example, more=more)


@exits_on_user_error
def main(args: argparse.Namespace) -> None:
    options = SD3InferenceOptions.from_args(args)
    check_options(options)
    # only now, as torch takes seconds to load
    from library.inference.sd3_minimal import generate_images

    generate_images(options)


if __name__ == "__main__":
    main(setup_parser().parse_args())
