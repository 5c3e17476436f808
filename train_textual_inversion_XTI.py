"""Train a new word with vectors for each layer of the U-Net (XTI), for Stable Diffusion 1.x and 2.x.

    accelerate launch train_textual_inversion_XTI.py \\
        --pretrained_model_name_or_path model.safetensors --dataset_config dataset.toml \\
        --output_dir output --token_string my_cat --init_word cat --num_vectors_per_token 1 \\
        --learning_rate 2e-3 --max_train_steps 1600 --mixed_precision bf16 --sdpa --cache_latents \\
        --use_object_template --save_model_as safetensors

docs/textual_inversion.md explains every part of it.
"""

from __future__ import annotations

import argparse

from library.architectures.sd.options import DECLARATION as FAMILY
from library.config.arguments import script_parser
from library.config.config_file import read_args
from library.config.declaration import joined
from library.lazy_imports import made_by, run_trainer
from library.training.kinds.embedding_options import DECLARATION as KIND
from library.training.kinds.embedding_options import TrainEmbeddingOptions

DECLARATION = joined(KIND, FAMILY)


def setup_parser() -> argparse.ArgumentParser:
    return script_parser(__doc__, TrainEmbeddingOptions, DECLARATION)


def _trainer() -> type:
    # only now: the command line needs neither torch nor models, which take seconds to import
    from library.architectures.sd import SD
    from library.training import embedding_trainer

    class XTITrainer(embedding_trainer.LayeredTextualInversionTrainer):
        """Train a new word with vectors for each layer of the U-Net (XTI), for Stable Diffusion 1.x and 2.x."""

        architecture = SD

    return XTITrainer


#: ``XTITrainer``, for programs that import it from here
__getattr__ = made_by(__name__, XTITrainer=_trainer)

if __name__ == "__main__":
    run_trainer(_trainer, read_args(setup_parser()))
