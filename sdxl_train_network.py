"""Train a LoRA or another adapter for Stable Diffusion XL.

    accelerate launch sdxl_train_network.py \\
        --pretrained_model_name_or_path sd_xl_base_1.0.safetensors --dataset_config dataset.toml \\
        --output_dir output --output_name my_lora \\
        --network_module networks.lora --network_dim 32 --network_alpha 16 --network_train_unet_only \\
        --learning_rate 1e-4 --max_train_epochs 10 --mixed_precision bf16 --sdpa --gradient_checkpointing \\
        --cache_latents --cache_text_encoder_outputs

docs/sdxl_train_network.md explains every part of it.
"""

from __future__ import annotations

import argparse

from library.architectures.sdxl import SDXL
from library.config.config_file import read_args
from library.training import network_trainer


class SdxlNetworkTrainer(network_trainer.NetworkTrainer):
    """Train a LoRA or another adapter for Stable Diffusion XL."""

    architecture = SDXL

    @classmethod
    def usage(cls) -> str:
        return __doc__ or ""


def setup_parser() -> argparse.ArgumentParser:
    return SdxlNetworkTrainer.parser()


if __name__ == "__main__":
    SdxlNetworkTrainer().train(read_args(setup_parser()))
