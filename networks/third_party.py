"""Adapt our models to network modules of other projects, such as LyCORIS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os.path import commonprefix
from typing import Any

from torch import Tensor, nn

from library.architectures.lora_target import LORA_TARGET, LoraTarget
from library.errors import UserError


class PublishedClip(nn.Module):
    """A ``CLIPTextModel`` of transformers 5 with the level ``text_model`` that transformers dropped.

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
    """Return text encoders for a network: one alone, several in a list; with the paths of published files."""
    views = [
        PublishedClip(model)
        if type(model).__name__.startswith("CLIPTextModel") and not hasattr(model, "text_model")
        else model
        for model in text_encoders
    ]
    return views[0] if len(views) == 1 else views


#: a preset of LyCORIS that adapts every part of a U-Net
FULL_PRESET = "examples/lycoris/full.toml"


def is_ours(module_name: str) -> bool:
    """Whether a network module belongs to this project, by its ``--network_module`` name."""
    return module_name.startswith("networks.")


def other_arguments(module_name: str, what: str, given: Mapping[str, object]) -> dict[str, str] | None:
    """Return network args that avoid the error with the message ``what``; None if none are known.

    Files among them are relative to the root of this project. LyCORIS 4.1's default preset, "full", names the time
    embedding of Stable Diffusion 1.x and 2.x twice; programs write it out.
    """
    is_default = given.get("preset") in (None, "full")
    if module_name.startswith("lycoris.") and "duplicated lora name" in what and is_default:
        return {"preset": FULL_PRESET}
    return None


class PublishedDenoiser(nn.Module):
    """A denoiser with the module paths of published files, where they differ: SDXL's ``input_blocks.4.1...``.

    Its modules are the denoiser's own. Containers that are no module there (of ResNet blocks, whose layers have other
    names) are empty ones with the class names that networks look for.
    """

    def __init__(self, denoiser: nn.Module, target: LoraTarget) -> None:
        super().__init__()
        self._denoiser = (denoiser,)  # in a tuple, so that its paths are not part of ours
        places: dict[str, str] = {}
        above = ""
        for path, _ in denoiser.named_modules():
            # modules within a module that is placed as a whole have their paths already
            if not path or (above and path.startswith(above)):
                continue
            place = target.file_path(path) if target.file_path is not None else None
            if place is not None:
                places[path], above = place, f"{path}."
        classes = {}
        for path, module in denoiser.named_modules():
            if type(module).__name__ not in target.conv_classes or path in places:
                continue
            inner = [places[at].split(".") for at, _ in module.named_modules(prefix=path) if at in places]
            classes[".".join(commonprefix(inner if len(inner) > 1 else [inner[0][:-1]]))] = type(module).__name__
        for path, place in places.items():
            self._put(place, denoiser.get_submodule(path), classes)

    def _put(self, place: str, module: nn.Module, classes: Mapping[str, str]) -> None:
        *above, name = place.split(".")
        owner: nn.Module = self
        for depth, step in enumerate(above, start=1):
            if step not in owner._modules:
                container = classes.get(".".join(above[:depth]), "Module")
                owner.add_module(step, type(container, (nn.Module,), {})())
            owner = owner._modules[step]
        owner.add_module(name, module)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_denoiser"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._denoiser[0](*args, **kwargs)


def denoiser_argument(module_name: str, denoiser: nn.Module) -> nn.Module:
    """Return the denoiser for a network module.

    Modules of other projects name their tensors by the paths that they find, so they get those of published files;
    ours know both.

    Args:
        module_name: as ``--network_module`` has it.
    """
    target: LoraTarget | None = getattr(denoiser, LORA_TARGET, None)
    if is_ours(module_name) or target is None or target.file_path is None:
        return denoiser
    return PublishedDenoiser(denoiser, target)


def refuse_wrong_merge(module_name: str, network: Any, weights: Mapping[str, Tensor], multiplier: float) -> None:
    """Raise UserError where LyCORIS (at least up to 4.1) does not merge what it trained.

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
            f"--network_module {module_name}: LyCORIS merges LoHa and LoKr correctly only where alpha is the rank; do "
            "not merge this file"
        )
