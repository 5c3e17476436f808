"""A training run: what was found out before it began, and what it consists of while it goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from library.architectures.base import Conditioning, ModelInfo
from library.config.arguments import TrainNetworkOptions
from library.data.dataset import TrainingData
from library.data.dataset_config import DatasetConfig
from library.diffusion.objective import Objective
from library.files.hub import HubTarget, Uploads
from library.inference.prompt_line import SamplePrompt
from library.optim.optimizers import OptimizerChoice
from library.optim.schedulers import ScheduleSettings
from library.optim.update import Update
from library.training.checkpoints import OutputNames, SavePolicy
from library.training.fingerprint import fingerprint
from library.training.logs import TrackerSettings
from library.training.plan import RunPlan
from library.training.resume import TrainState
from library.training.sharding import Sharding
from library.training.validation import Validation

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Checked:
    """All that could be found out and refused before anything heavy is loaded."""

    options: TrainNetworkOptions
    dataset_config: DatasetConfig
    checkpoint: Any  # the family's own, for its loaders
    info: ModelInfo
    optimizer: OptimizerChoice
    learning_rate_schedule: ScheduleSettings
    prompts: tuple[SamplePrompt, ...]
    state_folder: Path | None  # to go on from, and what its record says
    resumed: TrainState | None
    trackers: TrackerSettings
    hub: HubTarget | None
    seed: int


@dataclass
class Run:
    """A run in progress."""

    checked: Checked
    accelerator: Accelerator
    data: TrainingData
    plan: RunPlan
    names: OutputNames
    policy: SavePolicy
    objective: Objective
    weight_dtype: torch.dtype
    started_at: float
    start_step: int  # steps done before
    uploads: Uploads
    sharding: Sharding | None = None  # of the denoiser over the processes
    tokenizers: list[Any] = field(default_factory=list)
    text_encoders: list[nn.Module] = field(default_factory=list)  # on the meta device beside a cache of their outputs
    prompts: dict[str, Conditioning] = field(default_factory=dict)  # of sample images, by text, where texts are cached
    denoiser: nn.Module | None = None
    vae: nn.Module | None = None
    parameters: Sequence[nn.Parameter] = ()  # that are trained
    update: Update | None = None
    record: Any = None  # metadata of what is saved
    done_steps: int = 0  # when training has ended
    validation: Validation | None = None

    @cached_property
    def fingerprint(self) -> dict[str, object]:
        """What a resumed run must share; read from files and records once, not at every state."""
        return fingerprint(self)

    @property
    def options(self) -> TrainNetworkOptions:
        return self.checked.options

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def caches_latents(self) -> bool:
        return self.options.dataset.cache_latents or self.options.dataset.cache_latents_to_disk
