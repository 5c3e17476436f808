"""Train all weights of the transformer of FLUX.1 or Chroma.

    accelerate launch flux_train.py \\
        --pretrained_model_name_or_path flux1-dev.safetensors \\
        --clip_l clip_l.safetensors --t5xxl t5xxl_fp16.safetensors --ae ae.safetensors \\
        --dataset_config dataset.toml --output_dir output --output_name my_model --save_precision bf16 \\
        --learning_rate 5e-5 --max_train_steps 5000 --mixed_precision bf16 --full_bf16 --sdpa \\
        --cache_latents --cache_text_encoder_outputs --gradient_checkpointing --max_grad_norm 0 \\
        --timestep_sampling flux_shift --model_prediction_type raw --guidance_scale 1 \\
        --blockwise_fused_optimizers --optimizer_type Adafactor \\
        --optimizer_args relative_step=False scale_parameter=False

docs/flux_train.md explains every part of it.
"""

from __future__ import annotations

import argparse

from library.architectures.flux.options import DECLARATION as FAMILY
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
    from library.architectures.flux import FLUX
    from library.training import full_trainer

    class FluxTrainer(full_trainer.FullTrainer):
        """Train all weights of the transformer of FLUX.1 or Chroma."""

        architecture = FLUX

    return FluxTrainer


#: ``FluxTrainer``, for programs that import it from here
__getattr__ = made_by(__name__, FluxTrainer=_trainer)

if __name__ == "__main__":
    run_trainer(_trainer, read_args(setup_parser()))
