"""Full training: the denoiser itself is trained, and text encoders if asked for; a model is saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from library.architectures.base import Architecture
from library.architectures.common.model_writing import refuse_own_source
from library.architectures.part import DENOISER, text_encoder_name
from library.architectures.whole_models import SavedModel
from library.config import block_swap
from library.config.core.data import trusting_caches
from library.data.batch import Batch
from library.errors import UserError
from library.optim.fused_backward import Part, by_block, in_groups
from library.training.kinds.base import Kind, Need, ParameterGroup
from library.training.kinds.full_options import DECLARATION, FP8_OF_DENOISER, TrainFullOptions, block_rates
from library.training.models import Models
from library.training.precision import trained_dtype


class Full(Kind[Any]):
    """The weights of the model's own parts."""

    declaration = DECLARATION
    options_class = TrainFullOptions
    records_run = False
    tracker_name = "finetuning"

    def __init__(
        self, architecture: Architecture, options: Any, checkpoint: Any, *, seed: int, sharded: bool = False
    ) -> None:
        super().__init__(architecture, options, checkpoint, seed=seed, sharded=sharded)
        self._parts: dict[str, nn.Module] = {}
        self._trained = nn.ModuleDict()
        self._tokenizers: Sequence[Any] = ()
        self._text_stopped = False

    # ---- before anything is loaded ----

    @classmethod
    def normalized(cls, options: Any) -> Any:
        full, training = options.full, options.training
        if full.skip_latents_validity_check:
            options = trusting_caches(options)
        training = replace(training, **dict.fromkeys(FP8_OF_DENOISER, False), quantize_base=None)
        if full.diffusers_xformers:
            training = replace(training, xformers=True)
        options = replace(options, training=training)
        old = (full.double_blocks_to_swap or 0) + (full.single_blocks_to_swap or 0) // 2
        if not old or block_swap.is_given(options):
            return options
        options = replace(options, full=replace(full, double_blocks_to_swap=None, single_blocks_to_swap=None))
        return block_swap.with_count(options, old)

    @classmethod
    def check_options(cls, architecture: Architecture, options: Any) -> None:
        full = options.full
        if not architecture.model_forms:
            raise UserError("whole models of this family cannot be trained yet; train an adapter")
        if full.train_text_encoder and not any(architecture.trainable_encoders):
            raise UserError(
                "--train_text_encoder: the text encoders of this model are files of their own, which are not trained "
                "with it; remove it"
            )
        if architecture.takes_images:
            raise UserError("--controlnet_model_name_or_path: not where whole models are trained; remove it")
        if full.block_lr and not architecture.has_learning_rate_blocks:
            raise UserError("--block_lr: this model's denoiser has no numbered blocks; remove it")
        form = options.output.save_model_as
        if form is not None and form not in architecture.model_forms:
            known = ", ".join(architecture.model_forms)
            raise UserError(f"--save_model_as {form}: this model is saved as {known}; give that, or leave it out")

    @classmethod
    def trained_encoders(cls, architecture: Architecture, options: Any) -> tuple[bool, ...]:
        stop = options.full.stop_text_encoder_training
        trains = options.full.train_text_encoder and (stop is None or stop > 0)
        rates = cls._text_rates(architecture, options)
        return tuple(
            trains and can and rate != 0 for can, rate in zip(architecture.trainable_encoders, rates, strict=True)
        )

    @classmethod
    def _text_rates(cls, architecture: Architecture, options: Any) -> list[float]:
        """Return the learning rate of each text encoder."""
        full, default = options.full, options.optimizer.learning_rate
        count = len(architecture.text_encoder_targets)
        if count < 2:
            return [default if full.learning_rate_te is None else full.learning_rate_te] * count
        numbered = [full.learning_rate_te1, full.learning_rate_te2, *architecture.further_encoder_rates]
        own = [*numbered, *[None] * count][:count]
        is_numbered = any(rate is not None for rate in own)
        shared = default if full.learning_rate_te is None or is_numbered else full.learning_rate_te
        return [shared if rate is None else rate for rate in own]

    @classmethod
    def learning_rate_flags(cls, options: Any) -> list[str]:
        names = ("learning_rate_te", "learning_rate_te1", "learning_rate_te2", "block_lr")
        return [f"--{name}" for name in names if getattr(options.full, name) is not None]

    @classmethod
    def shaping_options(cls, options: Any) -> list[str]:
        return ["train_text_encoder", "block_lr"]

    @classmethod
    def form(cls, architecture: Architecture, options: Any, checkpoint: Any) -> str:
        """Return the form (of ``Architecture.model_forms``) in which the model is saved; by default the base
        model's."""
        full, given = options.full, options.output.save_model_as
        place = Path(checkpoint.path)
        if given is None and len(architecture.model_forms) > 1:
            given = "diffusers" if place.is_dir() else "ckpt" if place.suffix != ".safetensors" else "safetensors"
            if given == "ckpt" and full.use_safetensors:
                given = "safetensors"
        if given is None:
            given = architecture.model_forms[0]
        return "diffusers_safetensors" if given == "diffusers" and full.use_safetensors else given

    @classmethod
    def files_beside(cls, architecture: Architecture, options: Any, path: Path) -> Sequence[Path]:
        trained = cls.trained_encoders(architecture, options)
        names = [text_encoder_name(number) for number, is_trained in enumerate(trained, start=1) if is_trained]
        return list(architecture.files_beside(path, names).values())

    @classmethod
    def check_place(cls, architecture: Architecture, checkpoint: Any, path: Path) -> None:
        refuse_own_source(path, architecture.sources(checkpoint))

    @classmethod
    def extension(cls, architecture: Architecture, options: Any, checkpoint: Any) -> str:
        form = cls.form(architecture, options, checkpoint)
        return "" if form.startswith("diffusers") else form

    # ---- setting up ----

    def needs(self) -> Mapping[str, Need]:
        need = Need(trained_dtype(self.options.training))
        encoders = enumerate(self.trained_encoders(self.architecture, self.options), start=1)
        found = {text_encoder_name(number): need for number, trained in encoders if trained}
        return found | ({DENOISER: need} if self._trains_denoiser else {})

    @property
    def _trains_denoiser(self) -> bool:
        return self.options.optimizer.learning_rate != 0

    def attach(self, models: Models) -> list[ParameterGroup]:
        self._tokenizers = models.tokenizers
        self._parts = {name: models.part(name) for name in self.needs()}
        for name, part in self._parts.items():
            self._make_trainable(name, part)
        self._trained = nn.ModuleDict(self._parts)
        groups = [*self._denoiser_groups(models.denoiser), *self._text_groups()]
        if not groups:
            raise UserError("nothing would be trained: every learning rate is 0")
        return groups

    def _make_trainable(self, name: str, part: nn.Module) -> None:
        clip_skip = self.options.model.clip_skip
        unused = [
            *self.architecture.unused_modules(name, part, clip_skip=clip_skip),
            *self.architecture.frozen_modules(name, part),
        ]
        without = {id(parameter) for module in unused for parameter in module.parameters()}
        for parameter in part.parameters():
            if parameter.device.type == "cpu" and not (self.sharded and name == DENOISER):  # shards are copies
                parameter.data = parameter.data.clone()  # it may be a view of the model's mapped file
            parameter.requires_grad_(id(parameter) not in without)

    def _denoiser_groups(self, denoiser: nn.Module) -> list[ParameterGroup]:
        rate = self.options.optimizer.learning_rate
        if not self._trains_denoiser:
            return []
        if not self.options.full.block_lr:
            return [_group(denoiser.parameters(), rate, "unet")]
        groups = []
        blocks = self.architecture.learning_rate_blocks(denoiser)
        for number, (own, parameters) in enumerate(zip(block_rates(self.options.full.block_lr), blocks, strict=True)):
            for parameter in parameters:
                parameter.requires_grad_(own != 0)  # a frozen block does not count in the norm of the gradients either
            if own != 0 and parameters:
                groups.append(_group(parameters, own, f"block{number}"))
        if any(not p.requires_grad and p.device.type == "cpu" for p in denoiser.parameters()):
            # torch's group norm on the CPU crashes with channels last where its input wants no gradient
            denoiser.to(memory_format=torch.contiguous_format)
        return groups

    def _text_groups(self) -> list[ParameterGroup]:
        groups = []
        for number, rate in enumerate(self._text_rates(self.architecture, self.options), start=1):
            name = text_encoder_name(number)
            if name in self._parts:
                groups.append(_group(self._parts[name].parameters(), rate, f"text_encoder{number}"))
        return groups

    def modules(self) -> Sequence[nn.Module]:
        return [self._trained]

    @classmethod
    def fused_flag(cls, options: Any) -> str | None:
        if options.full.fused_optimizer_groups:
            return "--fused_optimizer_groups"
        return (
            "--blockwise_fused_optimizers" if options.full.blockwise_fused_optimizers else super().fused_flag(options)
        )

    def fused_parts(self, parameters: Sequence[nn.Parameter]) -> list[Part]:
        if count := self.options.full.fused_optimizer_groups:
            return in_groups(parameters, count)
        if self.options.full.blockwise_fused_optimizers:
            return by_block(parameters, self._blocks())
        return super().fused_parts(parameters)

    def _blocks(self) -> list[nn.Module]:
        classes = set(self.architecture.compiled_blocks)
        return [m for part in self._parts.values() for m in part.modules() if type(m).__name__ in classes]

    # ---- the step ----

    @property
    def trains_text(self) -> bool:
        return not self._text_stopped and any(name != DENOISER for name in self._parts)

    def begin_batch(self, batch: Batch, step: int) -> None:
        stop = self.options.full.stop_text_encoder_training
        if stop is None or self._text_stopped or step < stop:
            return
        self._text_stopped = True
        for name, part in self._parts.items():
            if name != DENOISER:
                # without gradients an optimizer skips them, momenta and decay included
                part.requires_grad_(False)
                part.eval()

    # ---- files and records ----

    def save(
        self, path: Path, dtype: torch.dtype | None, metadata: Mapping[str, str], *, step: int, epoch: int
    ) -> None:
        self.architecture.write(
            path,
            self.checkpoint,
            self._parts,
            SavedModel(
                self.form(self.architecture, self.options, self.checkpoint),
                tokenizers=self._tokenizers,
                dtype=dtype,
                metadata=metadata,
                counters={"epoch": epoch, "global_step": step},
            ),
        )

    def rows(self, count: int) -> list[tuple[str, str]]:
        names = [name.replace("_", " ") for name in self.needs()]
        stop = self.options.full.stop_text_encoder_training
        until = f", text encoders up to step {stop}" if stop is not None and len(names) > 1 else ""
        return [("trained", f"{count:,} parameters: {' and '.join(names)}{until}")]


class DreamBooth(Full):
    """DreamBooth, as in ``train_db.py``: the text encoder is trained too, until ``--stop_text_encoder_training``."""

    tracker_name = "dreambooth"

    @classmethod
    def normalized(cls, options: Any) -> Any:
        options = super().normalized(options)
        stop = options.full.stop_text_encoder_training
        return replace(options, full=replace(options.full, train_text_encoder=stop is None or stop > 0))


def _group(parameters: Any, rate: float, name: str) -> ParameterGroup:
    return ParameterGroup({"params": [p for p in parameters if p.requires_grad], "lr": rate}, name)
