"""Train a ControlNet for FLUX.1 dev and schnell.

    accelerate launch flux_train_control_net.py \\
        --pretrained_model_name_or_path flux1-dev.safetensors --clip_l clip_l.safetensors \\
        --t5xxl t5xxl_fp16.safetensors --ae ae.safetensors --dataset_config dataset.toml \\
        --output_dir output --output_name my_controlnet \\
        --learning_rate 1e-5 --guidance_scale 1 --timestep_sampling shift --discrete_flow_shift 3.1582 \\
        --max_train_epochs 10 --mixed_precision bf16 --sdpa \\
        --cache_latents --cache_text_encoder_outputs --gradient_checkpointing

docs/controlnet.md explains every part of it.
"""

from __future__ import annotations

import argparse

from library.architectures.flux.options import TRAINS_CONTROLNETS as FAMILY
from library.config.arguments import script_parser
from library.config.config_file import read_args
from library.config.declaration import joined
from library.lazy_imports import made_by, run_trainer
from library.training.kinds.controlnet_options import FOR_TRANSFORMERS as KIND
from library.training.kinds.controlnet_options import TrainControlNetForTransformersOptions

DECLARATION = joined(KIND, FAMILY)


def setup_parser() -> argparse.ArgumentParser:
    return script_parser(__doc__, TrainControlNetForTransformersOptions, DECLARATION)


def _trainer() -> type:
    # only now: the command line needs neither torch nor models, which take seconds to import
    from library.architectures.flux import FLUX_FOR_CONTROLNETS
    from library.training import controlnet_trainer

    class FluxControlNetTrainer(controlnet_trainer.ControlNetForTransformersTrainer):
        """Train a ControlNet for FLUX.1 dev and schnell."""

        architecture = FLUX_FOR_CONTROLNETS

    return FluxControlNetTrainer


#: ``FluxControlNetTrainer``, for programs that import it from here
__getattr__ = made_by(__name__, FluxControlNetTrainer=_trainer)

if __name__ == "__main__":
    run_trainer(_trainer, read_args(setup_parser()))
