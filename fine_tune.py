"""Train all weights of Stable Diffusion 1.x or 2.x on captioned images.

    accelerate launch fine_tune.py \\
        --pretrained_model_name_or_path model.safetensors --dataset_config dataset.toml \\
        --output_dir output --output_name my_model --save_precision fp16 \\
        --learning_rate 5e-6 --max_train_steps 5000 --mixed_precision bf16 --sdpa --cache_latents \\
        --gradient_checkpointing --optimizer_type Adafactor --optimizer_args relative_step=False scale_parameter=False

docs/fine_tune.md explains every part of it.
"""

from __future__ import annotations

import argparse

from library.architectures.sd.options import DECLARATION as FAMILY
from library.config.arguments import script_parser
from library.config.config_file import read_args
from library.config.declaration import joined
from library.lazy_imports import made_by, run_trainer
from library.training.kinds.full_options import DECLARATION as KIND
from library.training.kinds.full_options import TrainFullOptions

DECLARATION = joined(KIND, FAMILY)


def setup_parser() -> argparse.ArgumentParser:
    return script_parser(__doc__, TrainFullOptions, DECLARATION)


def _trainer() -> type:
    # only now: the command line needs neither torch nor models, which take seconds to import
    from library.architectures.sd import SD
    from library.training import full_trainer

    class FineTuneTrainer(full_trainer.FullTrainer):
        """Train all weights of Stable Diffusion 1.x or 2.x on captioned images."""

        architecture = SD

    return FineTuneTrainer


#: ``FineTuneTrainer``, for programs that import it from here
__getattr__ = made_by(__name__, FineTuneTrainer=_trainer)

if __name__ == "__main__":
    run_trainer(_trainer, read_args(setup_parser()))
