"""Train a ControlNet-LLLite for Stable Diffusion 1.x and 2.x.

    accelerate launch train_control_net_lllite.py \\
        --pretrained_model_name_or_path model.safetensors --dataset_config dataset.toml \\
        --output_dir output --output_name my_lllite --cond_emb_dim 32 --network_dim 64 \\
        --learning_rate 2e-4 --max_train_epochs 10 --mixed_precision bf16 --sdpa \\
        --cache_latents --cache_text_encoder_outputs --gradient_checkpointing

docs/controlnet.md explains every part of it.
"""

from __future__ import annotations

import argparse

from library.architectures.sd.options import DECLARATION as FAMILY
from library.config.arguments import script_parser
from library.config.config_file import read_args
from library.config.declaration import joined
from library.lazy_imports import made_by, run_trainer
from library.training.kinds.lllite_options import DECLARATION as KIND
from library.training.kinds.lllite_options import TrainLLLiteOptions

DECLARATION = joined(KIND, FAMILY)


def setup_parser() -> argparse.ArgumentParser:
    return script_parser(__doc__, TrainLLLiteOptions, DECLARATION)


def _trainer() -> type:
    # only now: the command line needs neither torch nor models, which take seconds to import
    from library.architectures.sd import SD
    from library.training import lllite_trainer

    class LLLiteTrainer(lllite_trainer.LLLiteTrainer):
        """Train a ControlNet-LLLite for Stable Diffusion 1.x and 2.x."""

        architecture = SD

    return LLLiteTrainer


#: ``LLLiteTrainer``, for programs that import it from here
__getattr__ = made_by(__name__, LLLiteTrainer=_trainer)

if __name__ == "__main__":
    run_trainer(_trainer, read_args(setup_parser()))
