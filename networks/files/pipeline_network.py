"""A LoRA network for the models of a diffusers pipeline, which no family of ours has loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.architectures.common.latent_diffusion import LatentDiffusion
from library.architectures.lora_target import LORA_TARGET
from library.architectures.registry import architectures, by_tool_flag
from library.errors import UserError
from library.files.atomic import atomic_path
from networks.base import as_list
from networks.lora import LoraNetwork, create_network_from_weights
from networks.weights import read_weights


class PipelineNetwork:
    """The published library interface over a network of ``networks.lora``.

    Args:
        text_encoder: one, or SDXL's two in a list.
        weights: a file's tensors.

    Raises:
        UserError: a module of the file has no place in the models.
    """

    def __init__(
        self,
        text_encoder: nn.Module | Sequence[nn.Module],
        unet: nn.Module,
        weights: Mapping[str, Tensor],
        multiplier: float = 1.0,
    ) -> None:
        self._encoders, self._unet = as_list(text_encoder), unet
        mark_targets(self._encoders, unet)
        self.network: LoraNetwork
        self.network, self._weights = create_network_from_weights(
            multiplier, None, None, self._encoders, unet, weights_sd=dict(weights), for_inference=True
        )
        self.network._bind(self._encoders, unet)

    def load_state_dict(self, weights: Mapping[str, Tensor], strict: bool = True) -> None:
        """Load a file's tensors."""
        self.network.load_weights_from(weights, "the given weights")
        device = next(self._unet.parameters()).device
        self.network.to(device)

    def to(self, *args: Any, **kwargs: Any) -> PipelineNetwork:
        """Move and cast the network, as a module does; returns the network itself."""
        self.network.to(*args, **kwargs)
        return self

    def apply_to(self, multiplier: float | None = None) -> None:
        """Let the LoRA act on the models from now on, at this strength or at the last one."""
        if multiplier is not None:
            self.network.set_multiplier(multiplier)
        if not self._is_applied:
            self.network.apply_to(self._encoders, self._unet)
        self.network.to(next(self._unet.parameters()).device)

    @property
    def _is_applied(self) -> bool:
        return any(adapter.is_applied for adapter in self.network.adapters)

    def unapply_to(self) -> None:
        """Take it off again."""
        if self._is_applied:
            self.network.remove()

    def merge_to(self, multiplier: float = 1.0) -> None:
        """Add it to the models' weights at this strength, until ``restore_from``."""
        self.network.set_multiplier(multiplier)
        self.network.restore_weights()
        self.network.merge()

    def restore_from(self, multiplier: float = 1.0) -> None:
        """Bring the weights back bit by bit, whatever the strength was."""
        self.network.restore_weights()


def families() -> Iterator[LatentDiffusion]:
    """Yield the families with a U-Net of diffusers."""
    return (family for family in architectures() if isinstance(family, LatentDiffusion))


def mark_targets(text_encoders: Sequence[nn.Module], unet: nn.Module) -> None:
    """Say which family the models are of, as its own loaders do; the U-Net's configuration tells."""
    if getattr(unet, LORA_TARGET, None) is not None:
        return
    kind = getattr(unet.config, "addition_embed_type", None)
    family = next(family for family in families() if family.addition_embed_type == kind)
    if len(text_encoders) not in (0, len(family.text_encoder_targets)):
        needed = len(family.text_encoder_targets)
        raise UserError(f"{len(text_encoders)} text encoders are given where the model has {needed}")
    setattr(unet, LORA_TARGET, family.denoiser_target_of(unet))
    for encoder, target in zip(text_encoders, family.text_encoder_targets, strict=False):
        setattr(encoder, LORA_TARGET, target)


# ---- the demonstration ----


def demonstrate(
    model_id: str, lora: Path, *, flag: str, prompt: str, negative_prompt: str, seed: int, **settings: Any
) -> Iterator[Path]:
    """Generate an image for each state of the LoRA; files are in the working folder.

    Args:
        flag: of the family, as tools know it.
        settings: of the pipeline's call, such as ``num_inference_steps``.

    Raises:
        UserError: the LoRA does not fit, or a file is missing.
    """
    import diffusers

    weights = read_weights(lora)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    family = by_tool_flag()[flag]
    assert isinstance(family, LatentDiffusion)
    kind = getattr(diffusers, family.pipeline_class)
    try:
        pipe = kind.from_pretrained(model_id, torch_dtype=dtype).to(device)
    except (OSError, ValueError) as error:
        raise UserError(f"--model_id {model_id}: {' '.join(str(error).split())[:200]}") from None
    pipe.set_progress_bar_config(disable=True)

    def image(state: str) -> Path:
        generator = torch.Generator().manual_seed(seed)
        made = pipe(prompt, negative_prompt=negative_prompt, generator=generator, **settings).images[0]
        path = Path(f"{model_id.replace('/', '_')}_{state}.png")
        with atomic_path(path) as temporary:
            made.save(temporary, format="PNG")
        return path

    yield image("original")
    names = ("text_encoder", "text_encoder_2")[: len(family.text_encoder_targets)]
    encoders = [getattr(pipe, name) for name in names]
    network = PipelineNetwork(encoders, pipe.unet, weights)
    network.load_state_dict(weights)
    network.to(device, dtype)
    network.apply_to(1.0)
    yield image("applied_lora")
    network.unapply_to()
    yield image("unapplied_lora")
    network.merge_to(1.0)
    yield image("merged_lora")
    network.restore_from(1.0)
    yield image("unmerged_lora")
    network.apply_to(0.0)
    yield image("restore_original")
    network.unapply_to()
    network.merge_to(1.0)
    yield image("convenience_merged_lora")
