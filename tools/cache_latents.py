"""Encode the images of a data set once and keep the latents beside them, so that training need not. accelerate launch
tools/cache_latents.py \\
        --pretrained_model_name_or_path model.safetensors --dataset_config dataset.toml \\
        --vae_batch_size 4 --mixed_precision bf16

Training with the same data set, model and --cache_latents_to_disk then encodes nothing. Other options of training are
accepted too, so that a --config_file serves both. docs/cache_tools.md explains more.
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
from library.training.cache_tool import CacheTool  # noqa: E402
from library.training.cache_tool_options import (  # noqa: E402
    CAPTION_AND_BATCH_OPTIONS,
    FLUX_MODEL_OPTIONS,
    SHARED_OPTIONS,
    TEXT_CACHE_OPTIONS,
    CacheToolOptions,
)
from library.training.caching import CacheJob, cache_latents  # noqa: E402


class CacheLatents(CacheTool):
    """Encode the images of a data set once and keep the latents beside them."""

    families = {"": SD, "sdxl": SDXL, "flux": FLUX}
    relevant = (
        SHARED_OPTIONS - CAPTION_AND_BATCH_OPTIONS - TEXT_CACHE_OPTIONS | FLUX_MODEL_OPTIONS | {"vae", "no_half_vae"}
    )
    product = "the latent cache"

    @classmethod
    def usage(cls) -> str:
        return __doc__ or ""

    def enabled(self, options: CacheToolOptions) -> CacheToolOptions:
        return replace(options, dataset=replace(options.dataset, cache_latents=True, cache_latents_to_disk=True))

    def make(self, job: CacheJob) -> None:
        cache_latents(job)


def setup_parser() -> argparse.ArgumentParser:
    return CacheLatents.parser()


if __name__ == "__main__":
    CacheLatents().run(read_args(setup_parser()))
