"""Train all weights of Stable Diffusion 1.x or 2.x, the text encoder's too, on a few images (DreamBooth).

    accelerate launch train_db.py \\
        --pretrained_model_name_or_path model.safetensors --train_data_dir images --reg_data_dir regularization \\
        --output_dir output --output_name my_model --save_precision fp16 \\
        --learning_rate 2e-6 --max_train_steps 800 --mixed_precision bf16 --sdpa --cache_latents \\
        --gradient_checkpointing --stop_text_encoder_training 400

docs/train_db.md explains every part of it.
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

    class DreamBoothTrainer(full_trainer.DreamBoothTrainer):
        """Train all weights of Stable Diffusion 1.x or 2.x, the text encoder's too, on a few images (DreamBooth)."""

        architecture = SD

    return DreamBoothTrainer


#: ``DreamBoothTrainer``, for programs that import it from here
__getattr__ = made_by(__name__, DreamBoothTrainer=_trainer)

if __name__ == "__main__":
    run_trainer(_trainer, read_args(setup_parser()))
