"""Train a LoRA or another adapter for HunyuanImage-2.1.

    accelerate launch hunyuan_image_train_network.py \\
        --pretrained_model_name_or_path hunyuanimage2.1.safetensors --text_encoder qwen_2.5_vl_7b.safetensors \\
        --byt5 byt5_small_glyphxl_fp16.safetensors --vae hunyuan_image_2.1_vae_fp16.safetensors \\
        --dataset_config dataset.toml --output_dir output --output_name my_lora \\
        --network_module networks.lora_hunyuan_image --network_dim 16 --network_alpha 8 --network_train_unet_only \\
        --learning_rate 1e-4 --max_train_epochs 10 --mixed_precision bf16 --gradient_checkpointing \\
        --cache_latents --cache_text_encoder_outputs

docs/hunyuan_image.md explains every part of it.
"""

from __future__ import annotations

import argparse

from library.architectures.hunyuan_image.options import DECLARATION as FAMILY
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
    from library.architectures.hunyuan_image import HUNYUAN_IMAGE
    from library.training import network_trainer

    class HunyuanImageNetworkTrainer(network_trainer.NetworkTrainer):
        """Train a LoRA or another adapter for HunyuanImage-2.1."""

        architecture = HUNYUAN_IMAGE

    return HunyuanImageNetworkTrainer


#: ``HunyuanImageNetworkTrainer``, for programs that import it from here
__getattr__ = made_by(__name__, HunyuanImageNetworkTrainer=_trainer)

if __name__ == "__main__":
    arguments = read_args(setup_parser())
    _trainer()().train(arguments)
