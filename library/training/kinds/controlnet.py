"""ControlNets: a trained copy of the denoiser's first half that reads an image beside the noisy latents.

Zhang et al. 2023, "Adding Conditional Control to Text-to-Image Diffusion Models" (arXiv:2302.05543). The denoiser is
frozen; what the ControlNet gives goes through the prediction's ``control``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.architectures.base import Architecture
from library.architectures.conditioning import Conditioning, Control
from library.architectures.controlnets import DIFFUSERS, PUBLISHED, HasControlNets
from library.config.core.data import trusting_caches
from library.errors import UserError
from library.randomness import key
from library.training.kinds.base import Kind, ParameterGroup
from library.training.kinds.controlnet_options import (
    DECLARATION,
    FOR_TRANSFORMERS,
    WITH_RATE,
    TrainControlNetForTransformersOptions,
    TrainControlNetOptions,
    TrainControlNetWithRateOptions,
    is_folder,
)
from library.training.models import Models
from library.training.precision import cast_trained, trained_dtype

_FLAG = "--controlnet_model_name_or_path"


class ControlNet(Kind[Any]):
    """Train a ControlNet for the frozen denoiser."""

    declaration = DECLARATION
    options_class = TrainControlNetOptions
    modelspec_suffix = "/controlnet"
    records_run = False
    takes_images = True
    starts_from = _FLAG
    tracker_name = "controlnet"

    def __init__(self, architecture: Architecture, options: Any, checkpoint: Any, **more: Any) -> None:
        super().__init__(architecture, options, checkpoint, **more)
        self._controlnet: Any = None

    @property
    def _family(self) -> HasControlNets:
        assert isinstance(self.architecture, HasControlNets)
        return self.architecture

    # ---- before anything is loaded ----

    @classmethod
    def normalized(cls, options: Any) -> Any:
        if getattr(options.controlnet, "skip_latents_validity_check", False):
            return trusting_caches(options)
        return options

    @classmethod
    def check_options(cls, architecture: Architecture, options: Any) -> None:
        if not isinstance(architecture, HasControlNets):
            raise UserError("there are no ControlNets of this model; train an adapter")
        layout = options.controlnet.controlnet_layout
        if layout is not None and layout not in architecture.controlnet_layouts:
            known = ", ".join(architecture.controlnet_layouts)
            raise UserError(f"--controlnet_layout {layout}: ControlNets of this model are saved as {known}; give that")

    @classmethod
    def check_checkpoint(cls, architecture: Architecture, options: Any, checkpoint: Any) -> None:
        if given := options.controlnet.controlnet_model_name_or_path:
            assert isinstance(architecture, HasControlNets)
            architecture.controlnet_source(given, checkpoint, flag=_FLAG)

    @classmethod
    def trained_encoders(cls, architecture: Architecture, options: Any) -> tuple[bool, ...]:
        return (False,) * len(architecture.text_encoder_targets)

    @classmethod
    def learning_rate_flags(cls, options: Any) -> list[str]:
        given = getattr(options.controlnet, "control_net_lr", None)
        return ["--control_net_lr"] if given not in (None, 1e-4) else []

    @classmethod
    def extension(cls, architecture: Architecture, options: Any, checkpoint: Any) -> str:
        return "" if is_folder(options) else options.output.save_model_as or "safetensors"

    # ---- setting up ----

    def attach(self, models: Models) -> list[ParameterGroup]:
        torch.manual_seed(key(self.seed, "init"))
        return self._made("cpu")

    def attach_on_meta(self, models: Models) -> list[ParameterGroup]:
        return self._made("meta")

    def attach_without_numbers(self, models: Models) -> list[ParameterGroup]:
        return self._made("meta")  # no file is read; the trace gives it its place

    def _made(self, device: str) -> list[ParameterGroup]:
        training, given = self.options.training, self.options.controlnet.controlnet_model_name_or_path
        if given and not self.options.resume.resume:
            source = self._family.controlnet_source(given, self.checkpoint, flag=_FLAG)
            controlnet = self._family.load_controlnet(source, dtype=torch.float32, device=device)
        else:
            controlnet = self._family.new_controlnet(self.checkpoint, device=device)
        self._family.set_controlnet_attention(
            controlnet, self.architecture.attention(training), split=training.split_attn
        )
        if training.gradient_checkpointing:
            controlnet.enable_gradient_checkpointing()
        if (half := trained_dtype(training)) != torch.float32:
            cast_trained(controlnet, half)
        controlnet.train()
        for parameter in controlnet.parameters():
            if parameter.device.type == "cpu":
                parameter.data = parameter.data.clone()  # it may be a view of a mapped file
            parameter.requires_grad_()
        self._controlnet = controlnet
        return self._groups()

    def _groups(self) -> list[ParameterGroup]:
        """Return one group, or that of the ControlNet's own layers before that of the copied ones."""
        copied_rate = self.options.optimizer.learning_rate
        own_rate = getattr(self.options.controlnet, "control_net_lr", None)
        if own_rate is None:
            return [ParameterGroup({"params": list(self._controlnet.parameters()), "lr": copied_rate}, "controlnet")]
        named = list(self._controlnet.named_parameters())
        own = [p for name, p in named if name.startswith("controlnet_")]
        copied = [p for name, p in named if not name.startswith("controlnet_")]
        groups = [("control_net", own, own_rate), ("unet", copied, copied_rate)]
        for _, parameters, rate in groups:
            for parameter in parameters:
                parameter.requires_grad_(rate != 0)
        return [ParameterGroup({"params": found, "lr": rate}, name) for name, found, rate in groups if rate != 0]

    def modules(self) -> Sequence[nn.Module]:
        return [self._controlnet] if self._controlnet is not None else []

    # ---- the step ----

    def predict(
        self,
        denoiser: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        control: Control | None = None,
    ) -> Tensor:
        assert control is not None
        image = self._family.control_image(control["pixels"]).to(noisy.dtype)
        made = self._family.control(self._controlnet, noisy, timesteps, conditioning, image)
        return super().predict(denoiser, noisy, timesteps, conditioning, made)

    def features(self) -> Mapping[type, Any]:
        from library.inference.control_models import ControlModel
        from library.inference.features.control_net import ControlNets

        return {ControlNets: [ControlModel(self._controlnet)]}

    # ---- files and records ----

    def save(
        self, path: Path, dtype: torch.dtype | None, metadata: Mapping[str, str], *, step: int, epoch: int
    ) -> None:
        layout = DIFFUSERS if is_folder(self.options) else self.options.controlnet.controlnet_layout or PUBLISHED
        self._family.write_controlnet(path, self._controlnet, layout, self.checkpoint, dtype=dtype, metadata=metadata)

    def rows(self, count: int) -> list[tuple[str, str]]:
        start = self.options.controlnet.controlnet_model_name_or_path or "the model's own weights"
        return [("trained", f"{count:,} parameters of a ControlNet, from {start}")]


class ControlNetWithRate(ControlNet):
    """A ControlNet with a learning rate of its own for layers that the denoiser does not have."""

    declaration = WITH_RATE
    options_class = TrainControlNetWithRateOptions


class ControlNetForTransformers(ControlNet):
    """A ControlNet with the published options of the scripts for transformers."""

    declaration = FOR_TRANSFORMERS
    options_class = TrainControlNetForTransformersOptions
