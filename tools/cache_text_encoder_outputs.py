"""Encode the captions of a data set once and keep the outputs beside the images, so that training need not.

    accelerate launch tools/cache_text_encoder_outputs.py \\
        --pretrained_model_name_or_path model.safetensors --dataset_config dataset.toml \\
        --text_encoder_batch_size 16 --mixed_precision bf16

Training with the same data set, model and --cache_text_encoder_outputs_to_disk then encodes nothing. Other options of
training are accepted too, so that a --config_file serves both. docs/cache_tools.md explains more.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.architectures.flux import FLUX  # noqa: E402
from library.architectures.sd import SD  # noqa: E402
from library.architectures.sdxl import SDXL  # noqa: E402
from library.config.config_file import read_args  # noqa: E402
from library.training.cache_tool_options import (  # noqa: E402
    FLUX_MODEL_OPTIONS,
    FLUX_TEXT_OPTIONS,
    LATENT_CACHE_OPTIONS,
    SHARED_OPTIONS,
    CacheToolOptions,
)
from library.training.cache_tool import CacheTool  # noqa: E402
from library.training.caching import CacheJob  # noqa: E402
from library.training.text_caching import cache_texts  # noqa: E402


class CacheTextEncoderOutputs(CacheTool):
    """Encode the captions of a data set once and keep the outputs beside the images."""

    families = {"": SD, "sdxl": SDXL, "flux": FLUX}
    relevant = (
        SHARED_OPTIONS - LATENT_CACHE_OPTIONS
        | FLUX_MODEL_OPTIONS
        | FLUX_TEXT_OPTIONS
        | {"max_token_length", "clip_skip", "weighted_captions"}
    )
    product = "the cache of text encoder outputs"

    @classmethod
    def usage(cls) -> str:
        return __doc__ or ""

    def enabled(self, options: CacheToolOptions) -> CacheToolOptions:
        return replace(options, dataset=replace(options.dataset, cache_text_encoder_outputs_to_disk=True))

    def make(self, job: CacheJob) -> None:
        cache_texts(job)


def setup_parser() -> argparse.ArgumentParser:
    return CacheTextEncoderOutputs.parser()


if __name__ == "__main__":
    CacheTextEncoderOutputs().run(read_args(setup_parser()))
