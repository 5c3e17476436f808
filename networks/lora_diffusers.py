"""LoRA files in diffusers' pipelines: a library for your own programs, and a demonstration.

    python networks/lora_diffusers.py --model_id runwayml/stable-diffusion-v1-5 --lora_weights lora.safetensors
    python networks/lora_diffusers.py --sdxl --model_id stabilityai/stable-diffusion-xl-base-1.0 \\
        --lora_weights lora.safetensors --prompt "a photo of a cat" --seed 1

In your own program:

    from networks.lora_diffusers import create_network_from_weights, merge_lora_weights
    network = create_network_from_weights(pipe.text_encoder, pipe.unet, weights, multiplier=1.0)
    network.load_state_dict(weights)
    network.apply_to(0.8)  # and unapply_to(); merge_to(0.8), and restore_from()
    merge_lora_weights(pipe, weights, multiplier=1.0)  # in one call

weights are the tensors of a file with the names of kohya, diffusers or PEFT, for SDXL too. As a script, it generates
one image without the LoRA and one for each way of applying and removing it.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):  # run as a script: the repository is one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.config.tool_parser import tool_parser
from library.errors import exits_on_user_error

if TYPE_CHECKING:
    from torch import Tensor, nn

    from networks.files.pipeline_network import PipelineNetwork

logger = logging.getLogger(__name__)


def create_network_from_weights(
    text_encoder: nn.Module | Sequence[nn.Module],
    unet: nn.Module,
    weights: Mapping[str, Tensor],
    multiplier: float = 1.0,
) -> PipelineNetwork:
    """Return a network for the models of a pipeline, not yet applied; ``load_state_dict`` loads its weights.

    Args:
        text_encoder: one, or SDXL's two in a list.

    Raises:
        UserError: the models lack a module of the file.
    """
    from networks.files.pipeline_network import PipelineNetwork

    return PipelineNetwork(text_encoder, unet, weights, multiplier)


def merge_lora_weights(pipe: Any, weights: Mapping[str, Tensor], multiplier: float = 1.0) -> None:
    """Add a LoRA to a pipeline's weights for good."""
    encoders = [pipe.text_encoder, *([pipe.text_encoder_2] if getattr(pipe, "text_encoder_2", None) else [])]
    network = create_network_from_weights(encoders, pipe.unet, weights, multiplier)
    network.load_state_dict(weights)
    network.merge_to(multiplier)


def setup_parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__)
    add = parser.add_argument
    add("--model_id", metavar="MODEL", help="diffusers folder or Hub id")
    add("--lora_weights", metavar="FILE", help="LoRA file")
    add("--sdxl", action="store_true", help="the model is Stable Diffusion XL")
    add("--prompt", default="A photo of cat", metavar="TEXT", help="what the images show")
    add("--negative_prompt", default="", metavar="TEXT", help="what they do not show")
    add("--seed", type=int, default=0, metavar="N", help="of every image")
    return parser


@exits_on_user_error
def main(args: argparse.Namespace) -> None:
    """Generate the images of the demonstration.

    Raises:
        SystemExit: with code 2, after one clear line.
    """
    from networks.files.options import required
    from networks.files.pipeline_network import demonstrate

    required("model_id", args.model_id, "name a diffusers folder or a Hub id")
    weights = required("lora_weights", args.lora_weights, "name the LoRA file")
    for file in demonstrate(
        args.model_id,
        weights,
        flag="sdxl" if args.sdxl else "",
        prompt=args.prompt,
        negative_prompt=args.negative_prompt,
        seed=args.seed,
    ):
        print(f"saved: {file}")


if __name__ == "__main__":
    main(setup_parser().parse_args())
