"""The base of the caching tools: a run's setup and cache without the run.

A tool declares which options matter to it and which caches it makes; images, checks, processes and the caches
themselves are those of training.
"""

from __future__ import annotations

import argparse
import logging
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import replace
from typing import ClassVar

from library.architectures.base import Architecture
from library.architectures.registry import architecture as registry_architecture
from library.architectures.tool_families import chosen_family
from library.config.console import setup_console
from library.config.core import CORE
from library.config.core.data import trusting_caches
from library.config.core.output import needs_output
from library.config.no_effect import report
from library.config.rules import check as check_rules
from library.data.dataset import TrainingData
from library.data.dataset_config import load_dataset_config
from library.data.unread_captions import unread_captions
from library.errors import exits_on_user_error
from library.interrupt import Interrupt
from library.training.cache_tool_options import CacheToolOptions
from library.training.caching import CacheJob, inspect_model
from library.training.debug_dataset import show_dataset
from library.training.processes import finalizing, make_accelerator, weight_dtype

logger = logging.getLogger(__name__)

#: rules for training and saving do not apply here
_RULES = tuple(rule for rule in CORE.rules if rule is not needs_output)


class CacheTool(ABC):
    """Base of the tools; an entry script names options and ``make``, and calls ``run``."""

    #: options that matter
    relevant: ClassVar[Collection[str]]
    #: the tool's product in messages: "the latent cache"
    product: ClassVar[str]

    @abstractmethod
    def enabled(self, options: CacheToolOptions) -> CacheToolOptions:
        """Return the options with this tool's caches switched on."""

    @abstractmethod
    def make(self, job: CacheJob) -> None:
        """Complete the cache."""

    @exits_on_user_error
    def run(self, args: argparse.Namespace) -> None:
        """Make the cache and exit.

        Raises:
            SystemExit: code 2 after a user's error; 130 or 143 after Ctrl-C or SIGTERM.
        """
        given = CacheToolOptions.from_args(args)
        setup_console(given.console)
        with Interrupt("stopping: what is being encoded is finished and written") as interrupt:
            chosen = chosen_family(given.tool, given.family)
            architecture = registry_architecture(chosen.folder).configured(replace(given, family=chosen.options))
            options, ignored = given.narrowed(self.relevant)
            if ignored:
                logger.info("no effect on %s: %s", self.product, ", ".join(f"--{name}" for name in ignored))
            if options.dataset.debug_dataset:
                return show_dataset(options, architecture, "mask")
            options = self.enabled(options)
            if options.tool.skip_existing:
                options = trusting_caches(options)
            job = self._job(architecture, options, interrupt)
            with finalizing(job.accelerator):
                self.make(job)

    def _job(self, architecture: Architecture, options: CacheToolOptions, interrupt: Interrupt) -> CacheJob:
        for warning in check_rules(options, architecture, rules=_RULES):
            logger.warning(warning)
        dataset_config = load_dataset_config(options.dataset.dataset_config, options.dataset, options.validation)
        report(unread_captions(dataset_config), strict=options.config.strict)
        checkpoint = inspect_model(architecture, options.model)
        architecture = architecture.for_model(checkpoint)
        architecture.check_options(options, checkpoint.info)
        data = TrainingData(dataset_config, seed=options.training.seed or 0, latent=architecture.latent)
        return CacheJob(
            architecture=architecture,
            checkpoint=checkpoint,
            data=data,
            options=options,
            accelerator=make_accelerator(options.training),
            weight_dtype=weight_dtype(options.training),
            interrupt=interrupt,
        )
