"""Train a LoRA or another adapter for Stable Diffusion 1.x and 2.x.

    accelerate launch train_network.py \\
        --pretrained_model_name_or_path model.safetensors --dataset_config dataset.toml \\
        --output_dir output --output_name my_lora \\
        --network_module networks.lora --network_dim 16 --network_alpha 8 \\
        --learning_rate 1e-4 --max_train_epochs 10 --mixed_precision bf16 --sdpa --cache_latents

docs/train_network.md explains every part of it.
"""

from __future__ import annotations

import argparse

from library.architectures.sd import SD
from library.config.config_file import read_args
from library.training import network_trainer


class NetworkTrainer(network_trainer.NetworkTrainer):
    """Train a LoRA or another adapter for Stable Diffusion 1.x and 2.x."""

    architecture = SD

    @classmethod
    def usage(cls) -> str:
        return __doc__ or ""


def setup_parser() -> argparse.ArgumentParser:
    return NetworkTrainer.parser()


if __name__ == "__main__":
    NetworkTrainer().train(read_args(setup_parser()))
