"""Train a ControlNet for Stable Diffusion 1.x and 2.x: the old name of ``train_control_net.py``.

    accelerate launch train_controlnet.py \\
        --pretrained_model_name_or_path model.safetensors --dataset_config dataset.toml \\
        --output_dir output --output_name my_controlnet \\
        --learning_rate 1e-5 --max_train_epochs 10 --mixed_precision bf16 --sdpa --cache_latents

docs/controlnet.md explains every part of it.
"""

from __future__ import annotations

from library.config.config_file import read_args
from library.lazy_imports import made_by, run_trainer
from train_control_net import DECLARATION, FAMILY, KIND, _trainer, setup_parser

__all__ = ["DECLARATION", "FAMILY", "KIND", "setup_parser"]

#: ``ControlNetTrainer``, for programs that import it from here
__getattr__ = made_by(__name__, ControlNetTrainer=_trainer)

if __name__ == "__main__":
    run_trainer(_trainer, read_args(setup_parser()))
