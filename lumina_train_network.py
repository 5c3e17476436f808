"""Train a LoRA or another adapter for Lumina-Image 2.0.

    accelerate launch lumina_train_network.py \\
        --pretrained_model_name_or_path lumina-image-2.safetensors --gemma2 gemma_2_2b_fp16.safetensors \\
        --ae ae.safetensors --dataset_config dataset.toml --output_dir output --output_name my_lora \\
        --network_module networks.lora_lumina --network_dim 8 --network_alpha 8 --network_train_unet_only \\
        --learning_rate 1e-4 --max_train_epochs 10 --mixed_precision bf16 --sdpa --gradient_checkpointing \\
        --timestep_sampling nextdit_shift --cache_latents --cache_text_encoder_outputs

docs/lumina.md explains every part of it.
"""

from __future__ import annotations

import argparse

from library.architectures.lumina.options import DECLARATION as FAMILY
from library.config.arguments import script_parser
from library.config.config_file import read_args
from library.config.declaration import joined
from library.lazy_imports import made_by
from library.training.kinds.adapter_options import DECLARATION as KIND
from library.training.kinds.adapter_options import TrainNetworkOptions

DECLARATION = joined(KIND, FAMILY)


def setup_parser() -> argparse.ArgumentParser:
    return script_parser(__doc__, TrainNetworkOptions, DECLARATION)


def _trainer() -> type:
    # only now: the command line needs neither torch nor models, which take seconds to import
    from library.architectures.lumina import LUMINA
    from library.training import network_trainer

    class LuminaNetworkTrainer(network_trainer.NetworkTrainer):
        """Train a LoRA or another adapter for Lumina-Image 2.0."""

        architecture = LUMINA

    return LuminaNetworkTrainer


#: ``LuminaNetworkTrainer``, for programs that import it from here
__getattr__ = made_by(__name__, LuminaNetworkTrainer=_trainer)

if __name__ == "__main__":
    arguments = read_args(setup_parser())
    _trainer()().train(arguments)
