"""Train a LoRA or another adapter for FLUX.1 or Chroma.

    accelerate launch flux_train_network.py \\
        --pretrained_model_name_or_path flux1-dev.safetensors \\
        --clip_l clip_l.safetensors --t5xxl t5xxl_fp16.safetensors --ae ae.safetensors \\
        --dataset_config dataset.toml --output_dir output --output_name my_lora \\
        --network_module networks.lora_flux --network_dim 16 --network_alpha 16 --network_train_unet_only \\
        --learning_rate 1e-4 --max_train_epochs 10 --mixed_precision bf16 --sdpa --gradient_checkpointing \\
        --timestep_sampling flux_shift --model_prediction_type raw --guidance_scale 1 \\
        --cache_latents --cache_text_encoder_outputs

docs/flux_train_network.md explains every part of it.
"""

from __future__ import annotations

import argparse

from library.architectures.flux import FLUX
from library.config.config_file import read_args
from library.training import network_trainer


class FluxNetworkTrainer(network_trainer.NetworkTrainer):
    """Train a LoRA or another adapter for FLUX.1 or Chroma."""

    architecture = FLUX

    @classmethod
    def usage(cls) -> str:
        return __doc__ or ""


def setup_parser() -> argparse.ArgumentParser:
    return FluxNetworkTrainer.parser()


if __name__ == "__main__":
    FluxNetworkTrainer().train(read_args(setup_parser()))
