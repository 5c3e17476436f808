"""The data of a training run, stage by stage: checked, set up, cached."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from library.architectures.base import Architecture
from library.architectures.conditioning import Conditioning
from library.architectures.model_info import ModelInfo
from library.config.arguments import RunOptions
from library.data.dataset import TrainingData
from library.data.dataset_spec import DatasetConfig
from library.data.run_plan import RunPlan
from library.diffusion.objective import Objective
from library.files.hub import HubTarget, Uploads
from library.inference.prompt_line import SamplePrompt
from library.optim.optimizers import OptimizerChoice
from library.optim.schedulers import ScheduleSettings
from library.training.checkpoints import OutputNames, SavePolicy
from library.training.fingerprint import fingerprint
from library.training.kinds.base import Kind
from library.training.logs import TrackerSettings
from library.training.resume import TrainState
from library.training.sharding import Sharding

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Checked:
    """Everything that is checked before anything heavy is loaded."""

    options: RunOptions
    architecture: Architecture  # configured, and made for the checkpoint
    dataset_config: DatasetConfig
    checkpoint: Any  # the family's own, for its loaders
    info: ModelInfo
    optimizer: OptimizerChoice
    learning_rate_schedule: ScheduleSettings
    prompts: tuple[SamplePrompt, ...]
    state_folder: Path | None  # the state to resume from, and its record
    resumed: TrainState | None
    trackers: TrackerSettings
    hub: HubTarget | None
    seed: int


@dataclass(frozen=True)
class Run:
    """A run after its setup: everything checked and counted, nothing loaded."""

    checked: Checked
    kind: type[Kind]
    accelerator: Accelerator
    data: TrainingData
    plan: RunPlan
    names: OutputNames
    policy: SavePolicy
    objective: Objective
    weight_dtype: torch.dtype  # of frozen weights
    started_at: float
    start_step: int  # steps done before
    uploads: Uploads
    cached_encoders: tuple[bool, ...]  # for each text encoder, whether its outputs come from a cache
    sharding: Sharding | None = None  # of the denoiser over the processes

    @cached_property
    def fingerprint(self) -> dict[str, object]:
        """Return what a resumed run must share; read from files and records once, not for every state."""
        return fingerprint(
            self.options,
            self.data,
            seed=self.checked.seed,
            batches_per_epoch=self.plan.batches_per_epoch,
            total_steps=self.plan.total_steps,
            processes=self.accelerator.num_processes,
            device=self.device,
            optimizer=self.checked.optimizer.metadata_name,
            kind=self.kind.fingerprint(self.options),
        )

    @property
    def options(self) -> RunOptions:
        return self.checked.options

    @property
    def architecture(self) -> Architecture:
        return self.checked.architecture

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def caches_latents(self) -> bool:
        return self.options.dataset.cache_latents or self.options.dataset.cache_latents_to_disk


@dataclass(frozen=True)
class Cached:
    """The results of the caching stage."""

    vae: nn.Module | None  # where it is still needed
    prompts: Mapping[str, Conditioning] = field(default_factory=dict)  # of sample images, by text, if texts are cached
