"""ControlNet-LLLites: small networks that read an image and change the inputs of the U-Net's attention layers.

The networks are those of ``networks/lllite.py``, which generating uses too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.architectures.base import Architecture
from library.architectures.conditioning import Conditioning, Control
from library.files.atomic import make_folder
from library.randomness import key
from library.training.kinds.base import Kind, ParameterGroup
from library.training.kinds.lllite_options import DECLARATION, TrainLLLiteOptions
from library.training.models import Models
from library.training.precision import cast_trained, trained_dtype
from networks.lllite import LLLiteNetwork

_FLAG = "--network_weights"
_EMBEDDING, _INNER = 32, 64  # usual numbers of features


class LLLite(Kind[Any]):
    """Train a ControlNet-LLLite for the frozen U-Net."""

    declaration = DECLARATION
    options_class = TrainLLLiteOptions
    modelspec_suffix = "/control-net-lllite"
    records_run = False
    keeps_copies = True
    takes_images = True
    starts_from = _FLAG
    tracker_name = "lllite_control_net_train"

    def __init__(self, architecture: Architecture, options: Any, checkpoint: Any, **more: Any) -> None:
        super().__init__(architecture, options, checkpoint, **more)
        self._network: LLLiteNetwork | None = None

    # ---- before anything is loaded ----

    @classmethod
    def check_checkpoint(cls, architecture: Architecture, options: Any, checkpoint: Any) -> None:
        denoiser = architecture.load_denoiser(checkpoint, dtype=torch.float32, device="meta")
        _network(options, denoiser)

    @classmethod
    def trained_encoders(cls, architecture: Architecture, options: Any) -> tuple[bool, ...]:
        return (False,) * len(architecture.text_encoder_targets)

    @classmethod
    def extension(cls, architecture: Architecture, options: Any, checkpoint: Any) -> str:
        return options.output.save_model_as or "safetensors"

    @classmethod
    def shaping_options(cls, options: Any) -> list[str]:
        return [] if options.lllite.network_weights else ["cond_emb_dim", "network_dim"]

    # ---- setting up ----

    def attach(self, models: Models) -> list[ParameterGroup]:
        torch.manual_seed(key(self.seed, "init"))
        network = _network(self.options, models.denoiser)
        if (half := trained_dtype(self.options.training)) != torch.float32:
            cast_trained(network, half)
        network.apply_to_denoiser()
        network.train()
        self._network = network
        rate = self.options.optimizer.learning_rate
        return [ParameterGroup({"params": list(network.parameters()), "lr": rate}, "lllite")]

    def modules(self) -> Sequence[nn.Module]:
        return [self._network] if self._network is not None else []

    # ---- the step ----

    def predict(
        self,
        denoiser: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        control: Control | None = None,
    ) -> Tensor:
        assert self._network is not None and control is not None
        parameter = next(self._network.parameters())
        self._network.set_images(control["pixels"].to(parameter.dtype))
        return super().predict(denoiser, noisy, timesteps, conditioning)

    def features(self) -> Mapping[type, Any]:
        from library.inference.control_models import ControlModel
        from library.inference.features.lllite import LLLites

        assert self._network is not None
        return {LLLites: [ControlModel(self._network)]}

    # ---- files and records ----

    def save(
        self, path: Path, dtype: torch.dtype | None, metadata: Mapping[str, str], *, step: int, epoch: int
    ) -> None:
        assert self._network is not None
        make_folder(path.parent)
        self._network.save_weights(path, dtype, metadata)

    def rows(self, count: int) -> list[tuple[str, str]]:
        own, layers = self.options.lllite, len(self.modules()[0].parts) if self.modules() else 0
        start = f", from {own.network_weights}" if own.network_weights else ""
        return [("trained", f"{count:,} parameters of a ControlNet-LLLite at {layers} layers{start}")]


def _network(options: Any, denoiser: nn.Module) -> LLLiteNetwork:
    own = options.lllite
    dropout = own.network_dropout or 0.0
    if own.network_weights:
        return LLLiteNetwork.from_file(own.network_weights, denoiser, flag=_FLAG, dropout=dropout)
    return LLLiteNetwork(
        denoiser, cond_emb_dim=own.cond_emb_dim or _EMBEDDING, mlp_dim=own.network_dim or _INNER, dropout=dropout
    )
