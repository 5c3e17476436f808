"""Train all weights of the transformer of Lumina-Image 2.0.

    accelerate launch lumina_train.py \\
        --pretrained_model_name_or_path lumina-image-2.safetensors --gemma2 gemma_2_2b_fp16.safetensors \\
        --ae ae.safetensors --dataset_config dataset.toml --output_dir output --output_name my_model \\
        --learning_rate 1e-5 --max_train_steps 5000 --mixed_precision bf16 --full_bf16 --save_precision bf16 --sdpa \\
        --timestep_sampling nextdit_shift --cache_latents --cache_text_encoder_outputs --gradient_checkpointing \\
        --max_grad_norm 0 --blockwise_fused_optimizers \\
        --optimizer_type Adafactor --optimizer_args relative_step=False scale_parameter=False

docs/lumina.md explains every part of it.
"""

from __future__ import annotations

import argparse

from library.architectures.lumina.options import DECLARATION as FAMILY
from library.config.arguments import script_parser
from library.config.config_file import read_args
from library.config.declaration import joined
from library.lazy_imports import made_by
from library.training.kinds.full_options import DECLARATION as KIND
from library.training.kinds.full_options import TrainFullOptions

DECLARATION = joined(KIND, FAMILY)


def setup_parser() -> argparse.ArgumentParser:
    return script_parser(__doc__, TrainFullOptions, DECLARATION)


def _trainer() -> type:
    # only now: the command line needs neither torch nor models, which take seconds to import
    from library.architectures.lumina import LUMINA
    from library.training import full_trainer

    class LuminaTrainer(full_trainer.FullTrainer):
        """Train all weights of the transformer of Lumina-Image 2.0."""

        architecture = LUMINA

    return LuminaTrainer


#: ``LuminaTrainer``, for programs that import it from here
__getattr__ = made_by(__name__, LuminaTrainer=_trainer)

if __name__ == "__main__":
    arguments = read_args(setup_parser())
    _trainer()().train(arguments)
