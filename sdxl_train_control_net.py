"""Train a ControlNet for SDXL.

    accelerate launch sdxl_train_control_net.py \\
        --pretrained_model_name_or_path sd_xl_base_1.0.safetensors --dataset_config dataset.toml \\
        --output_dir output --output_name my_controlnet \\
        --learning_rate 1e-5 --control_net_lr 1e-4 --max_train_epochs 10 --mixed_precision bf16 --sdpa \\
        --cache_latents --gradient_checkpointing

docs/controlnet.md explains every part of it.
"""

from __future__ import annotations

import argparse

from library.architectures.sdxl.options import DECLARATION as FAMILY
from library.config.arguments import script_parser
from library.config.config_file import read_args
from library.config.declaration import joined
from library.lazy_imports import made_by, run_trainer
from library.training.kinds.controlnet_options import WITH_RATE as KIND
from library.training.kinds.controlnet_options import TrainControlNetWithRateOptions

DECLARATION = joined(KIND, FAMILY)


def setup_parser() -> argparse.ArgumentParser:
    return script_parser(__doc__, TrainControlNetWithRateOptions, DECLARATION)


def _trainer() -> type:
    # only now: the command line needs neither torch nor models, which take seconds to import
    from library.architectures.sdxl import SDXL
    from library.training import controlnet_trainer

    class SdxlControlNetTrainer(controlnet_trainer.ControlNetWithRateTrainer):
        """Train a ControlNet for SDXL."""

        architecture = SDXL

    return SdxlControlNetTrainer


#: ``SdxlControlNetTrainer``, for programs that import it from here
__getattr__ = made_by(__name__, SdxlControlNetTrainer=_trainer)

if __name__ == "__main__":
    run_trainer(_trainer, read_args(setup_parser()))
