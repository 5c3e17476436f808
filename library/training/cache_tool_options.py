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

from library.architectures.tool_families import family_options, family_switches
from library.config.arguments import (
    ConfigFileOptions,
    ConsoleOptions,
    DatasetOptions,
    build_parser,
    with_groups,
)
from library.config.fields import option
from library.config.help import split_doc
from library.training.kinds.adapter_options import TrainNetworkOptions

O = TypeVar("O", bound="CacheToolOptions")


ToolOptions = dataclasses.make_dataclass(
    "ToolOptions",
    [
        *family_switches("the model is"),
        (
            "skip_existing",
            bool,
            option(False, "skip images with an existing cache file, without checking it (as --skip_cache_check)"),
        ),
    ],
    namespace={"__doc__": "Caching."},
    frozen=True,
)
FamilyToolOptions = family_options()


@dataclass(frozen=True)
class CacheToolOptions(TrainNetworkOptions):
    """All options of a caching tool, by group."""

    tool: Any  # of ``ToolOptions``
    family: Any  # of ``FamilyToolOptions``

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


#: the options of training adapters, of every family: what a tool takes that checks the data of any training command
AllTrainingOptions = with_groups(TrainNetworkOptions, {"family": FamilyToolOptions})


def names_of(*groups: type) -> frozenset[str]:
    """Return the options of whole groups."""
    return frozenset(field.name for group in groups for field in dataclasses.fields(group))


#: options that every cache depends on or is made with
SHARED_OPTIONS = (
    names_of(DatasetOptions, ConsoleOptions, ConfigFileOptions)
    - {"max_data_loader_n_workers", "persistent_data_loader_workers"}
) | {
    "pretrained_model_name_or_path", "v2", "v_parameterization", "tokenizer_cache_dir", "mixed_precision",
    "disable_mmap_load_safetensors", "ddp_timeout", "highvram",
} | names_of(ToolOptions)  # fmt: skip

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
