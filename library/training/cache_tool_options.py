"""Options of the caching tools: those of training, so that one configuration file serves both, and a few more.

A tool names the options that matter to it. The others are accepted, reported in one line, and reset to their defaults,
so that rules of training do not stop a tool.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, TypeVar

from library.config.arguments import (
    ConfigFileOptions,
    ConsoleOptions,
    DatasetOptions,
    build_parser,
    with_groups,
)
from library.config.fields import option
from library.config.flow import FlowOptions, WeightingOptions
from library.config.help import split_doc
from library.training.kinds.adapter_options import TrainNetworkOptions

O = TypeVar("O", bound="CacheToolOptions")  # noqa: E741


@dataclass(frozen=True)
class ToolOptions:
    """Caching."""

    sdxl: bool = option(False, "the model is Stable Diffusion XL")
    flux: bool = option(False, "the model is FLUX.1")
    skip_existing: bool = option(
        False, "skip images with an existing cache file, without checking it (as --skip_cache_check)"
    )


@dataclass(frozen=True)
class FamilyToolOptions(FlowOptions, WeightingOptions):
    """Options of FLUX.1 and Stable Diffusion 3 alone."""

    blocks_to_swap: int | None = option(None, "blocks kept in host memory", type=int)
    clip_l: str | None = option(None, "CLIP-L file")
    t5xxl: str | None = option(None, "T5-XXL file")
    t5xxl_dtype: str | None = option(None, "precision of T5-XXL")
    ae: str | None = option(None, "autoencoder file")
    controlnet_model_name_or_path: str | None = option(None, "ControlNet file")
    t5xxl_max_token_length: int | None = option(None, "tokens of a caption for T5-XXL", type=int)
    apply_t5_attn_mask: bool = option(False, "mask the padding tokens of T5-XXL")
    guidance_scale: float = option(3.5, "guidance of FLUX.1 dev", type=float)
    model_type: str = option("flux", "kind of FLUX model", choices=["flux", "chroma"])


@dataclass(frozen=True)
class CacheToolOptions(TrainNetworkOptions):
    """All options of a caching tool, by group."""

    tool: ToolOptions
    family: FamilyToolOptions

    @classmethod
    def groups(cls) -> dict[str, type]:
        return {**TrainNetworkOptions.groups(), "tool": ToolOptions, "family": FamilyToolOptions}

    def narrowed(self: O, relevant: Collection[str]) -> tuple[O, list[str]]:
        """Return the same with all but the ``relevant`` options at their defaults, and the names of the reset ones."""
        changed: dict[str, Any] = {}
        dropped: list[str] = []
        for name in self.groups():
            group = getattr(self, name)
            given = [f for f in dataclasses.fields(group) if getattr(group, f.name) != f.default]
            without = {f.name: f.default for f in given if f.name not in relevant}
            if without:
                changed[name] = dataclasses.replace(group, **without)
                dropped += without
        return dataclasses.replace(self, **changed), dropped


@dataclass(frozen=True)
class AllFamilyOptions(FamilyToolOptions):
    """Options of FLUX.1 alone."""

    split_mode: bool = option(False, "an old way of saving memory")


#: the options of training adapters, of every family: what a tool takes that checks the data of any training command
AllTrainingOptions = with_groups(TrainNetworkOptions, {"family": AllFamilyOptions})


def names_of(*groups: type) -> frozenset[str]:
    """Return the options of whole groups."""
    return frozenset(field.name for group in groups for field in dataclasses.fields(group))


#: options that every cache depends on or is made with
SHARED_OPTIONS = (
    names_of(DatasetOptions, ConsoleOptions, ConfigFileOptions)
    - {"max_data_loader_n_workers", "persistent_data_loader_workers"}
) | {
    "pretrained_model_name_or_path", "v2", "v_parameterization", "tokenizer_cache_dir", "mixed_precision",
    "disable_mmap_load_safetensors", "ddp_timeout", "highvram", "sdxl", "flux", "skip_existing",
}  # fmt: skip

#: options that name the files of a FLUX.1 or Chroma model
FLUX_MODEL_OPTIONS = frozenset({"model_type", "clip_l", "t5xxl", "ae"})
#: options of encoding its captions
FLUX_TEXT_OPTIONS = frozenset({"t5xxl_max_token_length", "apply_t5_attn_mask"})

#: data options of caching latents
LATENT_CACHE_OPTIONS = frozenset({"cache_latents", "cache_latents_to_disk", "vae_batch_size"})
#: the same for captions
TEXT_CACHE_OPTIONS = frozenset(
    {
        "cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk", "text_encoder_batch_size",
        "text_encoder_cache_variants",
    }
)  # fmt: skip

#: data options of captions and batches, which do not change images and sizes
CAPTION_AND_BATCH_OPTIONS = frozenset(
    {
        "caption_separator", "caption_prefix", "caption_suffix", "shuffle_caption", "keep_tokens",
        "keep_tokens_separator", "secondary_separator", "enable_wildcard", "caption_dropout_rate",
        "caption_dropout_every_n_epochs", "caption_tag_dropout_rate", "token_warmup_min", "token_warmup_step",
        "dataset_repeats", "train_batch_size", "conditioning_data_dir",
    }
)  # fmt: skip


def build_tool_parser(relevant: Collection[str], *, doc: str | None) -> argparse.ArgumentParser:
    """Return a parser that accepts every option of training but shows only the ``relevant`` ones.

    Args:
        doc: the tool's docstring: what it does, an example command, more.
    """
    groups = CacheToolOptions.groups()
    summary, example, more = split_doc(doc)
    parser = build_parser({"tool": groups["tool"], **groups}, description=summary, epilog=example, more=more)
    for action in parser._actions:
        if action.dest not in relevant and action.dest != "help":
            action.help = argparse.SUPPRESS
    return parser
