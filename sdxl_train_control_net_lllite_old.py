"""Train a ControlNet-LLLite for SDXL: the old variant of ``sdxl_train_control_net_lllite.py``, which does the same.

    accelerate launch sdxl_train_control_net_lllite_old.py \\
        --pretrained_model_name_or_path sd_xl_base_1.0.safetensors --dataset_config dataset.toml \\
        --output_dir output --output_name my_lllite --cond_emb_dim 32 --network_dim 64 \\
        --learning_rate 2e-4 --max_train_epochs 10 --mixed_precision bf16 --sdpa --cache_latents

docs/controlnet.md explains every part of it.
"""

from __future__ import annotations

from library.config.config_file import read_args
from library.lazy_imports import made_by, run_trainer
from sdxl_train_control_net_lllite import DECLARATION, FAMILY, KIND, _trainer, setup_parser

__all__ = ["DECLARATION", "FAMILY", "KIND", "setup_parser"]

#: ``SdxlLLLiteTrainer``, for programs that import it from here
__getattr__ = made_by(__name__, SdxlLLLiteTrainer=_trainer)

if __name__ == "__main__":
    run_trainer(_trainer, read_args(setup_parser()))
