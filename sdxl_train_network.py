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

from library.architectures.sdxl.options import DECLARATION as FAMILY
from library.config.arguments import script_parser
from library.config.config_file import read_args
from library.config.declaration import joined
from library.lazy_imports import made_by, run_trainer
from library.training.kinds.adapter_options import DECLARATION as KIND
from library.training.kinds.adapter_options import TrainNetworkOptions

DECLARATION = joined(KIND, FAMILY)


def setup_parser() -> argparse.ArgumentParser:
    return script_parser(__doc__, TrainNetworkOptions, DECLARATION)


def _trainer() -> type:
    # only now: the command line needs neither torch nor models, which take seconds to import
    from library.architectures.sdxl import SDXL
    from library.training import network_trainer

    class SdxlNetworkTrainer(network_trainer.NetworkTrainer):
        """Train a LoRA or another adapter for Stable Diffusion XL."""

        architecture = SDXL

    return SdxlNetworkTrainer


#: ``SdxlNetworkTrainer``, for programs that import it from here
__getattr__ = made_by(__name__, SdxlNetworkTrainer=_trainer)

if __name__ == "__main__":
    run_trainer(_trainer, read_args(setup_parser()))
