"""Train the transformer of Stable Diffusion 3 or 3.5, and its text encoders if asked for.

    accelerate launch sd3_train.py \\
        --pretrained_model_name_or_path sd3_medium_incl_clips_t5xxlfp16.safetensors \\
        --dataset_config dataset.toml --output_dir output --output_name my_model --save_precision bf16 \\
        --learning_rate 1e-5 --max_train_steps 5000 --mixed_precision bf16 --full_bf16 --sdpa \\
        --cache_latents --cache_text_encoder_outputs --gradient_checkpointing --max_grad_norm 0 \\
        --blockwise_fused_optimizers --optimizer_type Adafactor \\
        --optimizer_args relative_step=False scale_parameter=False

docs/sd3.md explains every part of it.
"""

from __future__ import annotations

import argparse

from library.architectures.sd3.options import FULL_DECLARATION as FAMILY
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
    from library.architectures.sd3.whole import SD3_WHOLE
    from library.training import full_trainer

    class Sd3Trainer(full_trainer.FullTrainer):
        """Train the transformer of Stable Diffusion 3 or 3.5, and its text encoders if asked for."""

        architecture = SD3_WHOLE

    return Sd3Trainer


#: ``Sd3Trainer``, for programs that import it from here
__getattr__ = made_by(__name__, Sd3Trainer=_trainer)

if __name__ == "__main__":
    run_trainer(_trainer, read_args(setup_parser()))
