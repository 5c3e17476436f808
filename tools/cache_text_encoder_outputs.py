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
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.architectures.tool_families import cache_options
from library.config.config_file import read_args
from library.lazy_imports import made_by
from library.training.cache_tool_options import (
    LATENT_CACHE_OPTIONS,
    SHARED_OPTIONS,
    CacheToolOptions,
    build_tool_parser,
)

if TYPE_CHECKING:
    from library.training.caching import CacheJob

#: options that matter
RELEVANT = (
    SHARED_OPTIONS - LATENT_CACHE_OPTIONS
    | cache_options(text=True)
    | {"max_token_length", "clip_skip", "weighted_captions"}
)


def setup_parser() -> argparse.ArgumentParser:
    return build_tool_parser(RELEVANT, doc=__doc__)


def _tool() -> type:
    # only now: the command line needs neither torch nor models, which take seconds to import
    from library.training.cache_tool import CacheTool
    from library.training.text_caching import cache_texts

    class CacheTextEncoderOutputs(CacheTool):
        """Encode the captions of a data set once and keep the outputs beside the images."""

        relevant = RELEVANT
        product = "the cache of text encoder outputs"

        def enabled(self, options: CacheToolOptions) -> CacheToolOptions:
            return replace(options, dataset=replace(options.dataset, cache_text_encoder_outputs_to_disk=True))

        def make(self, job: CacheJob) -> None:
            cache_texts(job)

    return CacheTextEncoderOutputs


__getattr__ = made_by(__name__, CacheTextEncoderOutputs=_tool)

if __name__ == "__main__":
    arguments = read_args(setup_parser())
    _tool()().run(arguments)
