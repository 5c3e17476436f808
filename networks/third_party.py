"""What lies between our models and network modules of other projects, such as LyCORIS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from library.errors import UserError


class PublishedClip(nn.Module):
    """A ``CLIPTextModel`` of transformers 5 with the level ``text_model`` that it lost; otherwise itself.

    Modules of other projects name their tensors by the paths that they find, and files in use have the level
    (``lora_te_text_model_encoder_layers_0_...``): without it no other program would find the text encoder's part.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.text_model = model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("text_model"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.text_model(*args, **kwargs)


def text_argument(text_encoders: Sequence[nn.Module]) -> nn.Module | list[nn.Module]:
    """Text encoders as the protocol takes them: one as itself, several in a list; paths as in published files."""
    views = [
        PublishedClip(model)
        if type(model).__name__.startswith("CLIPTextModel") and not hasattr(model, "text_model")
        else model
        for model in text_encoders
    ]
    return views[0] if len(views) == 1 else views


def remedy(module_name: str, what: str) -> str:
    """What to do about an error of a network that is made, as far as it is known."""
    if module_name.startswith("lycoris.") and "duplicated lora name" in what:
        return (
            'its default preset, "full", fails with U-Nets; give --network_args preset=attn-mlp, or '
            "preset=examples/lycoris/full.toml"
        )
    return "see its own documentation on --network_args"


def refuse_wrong_merge(module_name: str, network: Any, weights: Mapping[str, Tensor], multiplier: float) -> None:
    """Raise UserError where LyCORIS (up to 4.1, at least) is known to merge something else than what was trained.

    It ignores the strength, and takes alpha / rank of LoHa and LoKr twice.
    """
    if not module_name.startswith("lycoris."):
        return
    if multiplier != 1:
        raise UserError(
            f"--network_module {module_name}: LyCORIS merges at strength 1 only, not at {multiplier:g}; give 1, or do "
            "not merge"
        )
    if not any(piece in name for name in weights for piece in (".hada_", ".lokr_")):
        return
    if any(getattr(adapter, "scale", 1.0) != 1.0 for adapter in getattr(network, "loras", ())):
        raise UserError(
            f"--network_module {module_name}: LyCORIS merges LoHa and LoKr rightly only where alpha is the rank; do "
            "not merge this file"
        )
