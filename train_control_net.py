"""Train a ControlNet for Stable Diffusion 1.x and 2.x.

    accelerate launch train_control_net.py \\
        --pretrained_model_name_or_path model.safetensors --dataset_config dataset.toml \\
        --output_dir output --output_name my_controlnet \\
        --learning_rate 1e-5 --max_train_epochs 10 --mixed_precision bf16 --sdpa --cache_latents

docs/controlnet.md explains every part of it.
"""

from __future__ import annotations

import argparse

from library.architectures.sd.options import DECLARATION as FAMILY
from library.config.arguments import script_parser
from library.config.config_file import read_args
from library.config.declaration import joined
from library.lazy_imports import made_by, run_trainer
from library.training.kinds.controlnet_options import DECLARATION as KIND
from library.training.kinds.controlnet_options import TrainControlNetOptions

DECLARATION = joined(KIND, FAMILY)


def setup_parser() -> argparse.ArgumentParser:
    return script_parser(__doc__, TrainControlNetOptions, DECLARATION)


def _trainer() -> type:
    # only now: the command line needs neither torch nor models, which take seconds to import
    from library.architectures.sd import SD
    from library.training import controlnet_trainer

    class ControlNetTrainer(controlnet_trainer.ControlNetTrainer):
        """Train a ControlNet for Stable Diffusion 1.x and 2.x."""

        architecture = SD

    return ControlNetTrainer


#: ``ControlNetTrainer``, for programs that import it from here
__getattr__ = made_by(__name__, ControlNetTrainer=_trainer)

if __name__ == "__main__":
    run_trainer(_trainer, read_args(setup_parser()))
