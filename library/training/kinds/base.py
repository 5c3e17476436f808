"""The interface of a kind of training: which parts it trains, how a step uses them, and what is saved.

``Trainer(architecture, kind)`` makes a fresh object of the kind for each run, dry run and probe. A kind holds the
modules that it trains, and nothing of the optimizer, the data or the files' names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from library.architectures.base import Architecture
from library.architectures.conditioning import Conditioning, Control
from library.config.arguments import RunOptions
from library.config.declaration import Declaration, Facts, joined
from library.data.batch import Batch
from library.data.dataset import TrainingData
from library.data.dataset_spec import DatasetConfig
from library.optim.fused_backward import Part, one_by_one
from library.optim.update import Metrics
from library.training.models import Models

if TYPE_CHECKING:
    from library.inference.denoise import Feature

O = TypeVar("O", bound=RunOptions)


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share their settings."""

    settings: dict[str, Any]  # the optimizer's group: "params", "lr", ...
    name: str | None = None  # in trackers: "unet"

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.settings["params"])


@dataclass(frozen=True)
class Need:
    """The requirements of a trained part of the model."""

    dtype: torch.dtype  # of its weights


@dataclass(frozen=True)
class RunSubject:
    """A kind of training on a family of models, whose options are checked together."""

    kind: type[Kind]
    architecture: Architecture

    @property
    def declaration(self) -> Declaration:
        return joined(self.kind.declaration, self.architecture.declaration)

    def facts(self, options: Any) -> Facts:
        """Return what rules ask."""
        trained = self.kind.trained_encoders(self.architecture, options)
        return Facts(trained_encoders=trained, live_encoders=self.architecture.live_encoders(trained))


class Kind(ABC, Generic[O]):
    """One kind of training, whose scripts have options of the class ``O``.

    Args:
        architecture: configured, and made for the run's model.
        options: of the run.
        checkpoint: result of the family's ``inspect``.
        seed: of the run, the same on all processes.
        sharded: whether the denoiser is sharded over the processes.
    """

    #: its own option groups with their rules, and the core's options that it refuses or ignores
    declaration: ClassVar[Declaration] = Declaration()
    #: the class of all options of its scripts, except the families'
    options_class: ClassVar[type[RunOptions]] = RunOptions
    #: suffix of the model's id in ``modelspec.architecture``
    modelspec_suffix: ClassVar[str] = ""
    #: whether saved files record the training (``ss_*``)
    records_run: ClassVar[bool] = True
    #: entries that ``--no_metadata`` keeps, so that other programs know how to use the file
    minimum_metadata: ClassVar[tuple[str, ...]] = ()
    #: whether the trained weights are small beside the model, so that the device has memory for copies: the moving
    #: average, and the weights before a step. Otherwise averages are in host memory, and there are no other copies
    keeps_copies: ClassVar[bool] = False
    #: whether the images of ``conditioning_data_dir`` are its input: ``predict`` gets them as ``control["pixels"]``,
    #: (B, 3, H, W) in [-1, 1], and sample prompts need images of their own (``--cn``)
    takes_images: ClassVar[bool] = False
    #: option that starts a new run with the weights of another one
    starts_from: ClassVar[str] = "--pretrained_model_name_or_path"

    #: name of the project in trackers, if not given
    tracker_name: ClassVar[str] = "network_train"

    def __init__(
        self,
        architecture: Architecture,
        options: O,
        checkpoint: Any,
        *,
        seed: int,
        sharded: bool = False,
    ) -> None:
        self.architecture = architecture
        self.options = options
        self.checkpoint = checkpoint
        self.seed = seed
        self.sharded = sharded

    # ---- before anything is loaded ----

    @classmethod
    def for_options(cls, options: O) -> type[Kind]:
        """Return the kind that runs with these options are of; the scripts of a kind may offer others beside it."""
        return cls

    @classmethod
    def normalized(cls, options: O) -> O:
        """Return the options with the consequences of some for others."""
        return options

    @classmethod
    def check_options(cls, architecture: Architecture, options: O) -> None:
        """Refuse options of this kind that cannot work. Raises UserError."""

    @classmethod
    @abstractmethod
    def trained_encoders(cls, architecture: Architecture, options: O) -> tuple[bool, ...]:
        """For each text encoder, return whether it may be trained; outputs of the others may be cached."""

    @classmethod
    def learning_rate_flags(cls, options: O) -> list[str]:
        """Return the given options that set learning rates of parts of the model, as the user wrote them."""
        return []

    @classmethod
    def extension(cls, architecture: Architecture, options: O, checkpoint: Any) -> str:
        """Return the extension of saved files, without the dot; empty for folders."""
        return options.output.save_model_as or "safetensors"

    @classmethod
    def prepared_data(cls, options: Any, config: DatasetConfig) -> DatasetConfig:
        """Return the dataset file with what this kind makes of its captions."""
        return config

    @classmethod
    def check_data(cls, options: Any, data: TrainingData) -> None:
        """Refuse data that this kind cannot train on. Raises UserError."""

    @classmethod
    def files_beside(cls, architecture: Architecture, options: Any, path: Path) -> Sequence[Path]:
        """Return the files that ``save`` writes beside ``path``."""
        return ()

    @classmethod
    def check_checkpoint(cls, architecture: Architecture, options: O, checkpoint: Any) -> None:
        """Refuse further files that do not fit the model, from their headers. Raises UserError."""

    @classmethod
    def check_place(cls, architecture: Architecture, checkpoint: Any, path: Path) -> None:
        """Refuse an impossible path of the final file. Raises UserError."""

    @classmethod
    def fingerprint(cls, options: O) -> dict[str, object]:
        """Return what a resumed run must share beyond its options."""
        return {}

    @classmethod
    def shaping_options(cls, options: O) -> list[str]:
        """Return the options that decide which tensors a state folder holds."""
        return []

    def check_models(self, models: Models) -> None:
        """Check models on the meta device, before hours are spent on caches. Raises UserError."""

    # ---- setting up ----

    def needs(self) -> Mapping[str, Need]:
        """Return the parts of the model whose own weights are trained, by name; the others are frozen."""
        return {}

    def change_models(self, models: Models, *, dtype: torch.dtype, device: torch.device) -> None:
        """Change the loaded weights before they are converted to their final form, such as fp8."""

    @abstractmethod
    def attach(self, models: Models) -> list[ParameterGroup]:
        """Create the trained modules, and connect them to the models.

        Raises:
            UserError: they do not fit the models, or nothing would be trained.
        """

    def attach_on_meta(self, models: Models) -> list[ParameterGroup]:
        """Attach to models without weights, to count parameters and to check that everything fits."""
        return self.attach(models)

    def attach_without_numbers(self, models: Models) -> list[ParameterGroup]:
        """Attach to models that are on the device without numbers, to trace a step; see ``memory_trace.py``."""
        return self.attach(models)

    def try_saving(self, path: Path, dtype: torch.dtype | None) -> None:
        """Check at the start whether the trained weights can be saved; called on the main process only.

        Args:
            path: of the final file, which is not written.
        """

    @abstractmethod
    def modules(self) -> Sequence[nn.Module]:
        """Return the modules with all trained parameters; state folders hold their tensors."""

    @classmethod
    def fused_flag(cls, options: O) -> str | None:
        """Return the given option that asks for updates within the backward pass."""
        return "--fused_backward_pass" if options.optimizer.fused_backward_pass else None

    def fused_parts(self, parameters: Sequence[nn.Parameter]) -> list[Part]:
        """Return the groups of parameters that are updated together, if ``fused_flag`` asks for it."""
        return one_by_one(parameters)

    def before_update(self) -> None:
        """Called when the gradients of a step are complete, before the optimizer uses them."""

    # ---- the step ----

    def begin_epoch(self, epoch: int) -> None:
        """Called before each epoch, counted from 1."""

    def begin_batch(self, batch: Batch, step: int) -> None:
        """Called before each forward pass of training; ``step`` steps are done."""

    def begin_validation_batch(self, batch: Batch) -> None:
        """Called before each batch of a validation."""

    @property
    def trains_text(self) -> bool:
        """Whether encoding captions needs a graph."""
        return any(self.trained_encoders(self.architecture, self.options))

    def predict(
        self,
        denoiser: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        control: Control | None = None,
    ) -> Tensor:
        """Return the model's raw prediction; see ``Architecture.predict``."""
        return self.architecture.predict(denoiser, noisy, timesteps, conditioning, control)

    def features(self) -> Mapping[type[Feature], Any]:
        """Return features that sample images need, with their models, see ``ImageModels.of_features``."""
        return {}

    def after_step(self, step: int, device: torch.device) -> Metrics:
        """Called after each update; may return metrics."""
        return {}

    def set_training(self, training: bool) -> None:
        """Switch the trained modules between training, and sampling or saving."""
        for module in self.modules():
            module.train(training)

    def fault_of(self, error: Exception) -> str:
        """Return one line on an error that code of another project raised in training; empty for any other."""
        return ""

    # ---- files and records ----

    @abstractmethod
    def save(
        self, path: Path, dtype: torch.dtype | None, metadata: Mapping[str, str], *, step: int, epoch: int
    ) -> None:
        """Write the trained weights atomically; called on the main process only.

        Args:
            dtype: cast floating-point tensors; ``None`` keeps their own.
            step: done, as ``epoch`` counted from 1.
        """

    def metadata(self) -> dict[str, object]:
        """Return its own ``ss_*`` entries."""
        return {}

    @abstractmethod
    def rows(self, count: int) -> list[tuple[str, str]]:
        """Return rows on the ``count`` trained parameters, for the table before the first step."""
