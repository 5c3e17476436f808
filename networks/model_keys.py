"""Names of adapters and the weights they change, from a model file's tensor names alone: no model is built."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from library.architectures.flux.diffusers_layout import PREFIX
from library.errors import UserError

#: tensors of files that hold fp8 numbers with scales beside them
_SCALES = ("scaled_fp8", ".scale_weight", ".weight_scale", ".scale_input")


@dataclass(frozen=True)
class ModelPart:
    """One of a family's models, as LoRA files see it.

    Attributes:
        prefix: of its adapters' names, without the underscore.
        title: for messages.
        path_of: a tensor's name in a file -> the name that adapters are called after.
    """

    prefix: str
    title: str
    path_of: Callable[[str], str]

    def lora_keys(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
        """Adapter's name -> the weight (out, in) in the file that it changes, for every matrix of the file."""
        found = {}
        for name, shape in shapes.items():
            path = self.path_of(name)
            if path.endswith(".weight") and len(shape) == 2:
                found[f"{self.prefix}_{path.removesuffix('.weight').replace('.', '_')}"] = name
        return found


def _from(level: str, name: str) -> str:
    """``name`` from ``level`` on, or with it in front."""
    at = name.find(level)
    return name[at:] if at >= 0 else level + name


#: FLUX.1 and Chroma in the published layout
TRANSFORMER = ModelPart("lora_unet", "transformer", lambda name: name.removeprefix(PREFIX))
#: with or without the level ``text_model.``, as bundled files and newer transformers have it
CLIP_L = ModelPart("lora_te1", "CLIP-L", lambda name: _from("text_model.", name))
T5XXL = ModelPart("lora_te3", "T5-XXL", lambda name: _from("encoder.", name))
PARTS = (TRANSFORMER, CLIP_L, T5XXL)


def part_of(lora_name: str) -> ModelPart | None:
    """Whose adapter it is, by its name."""
    return next((part for part in PARTS if lora_name.startswith(f"{part.prefix}_")), None)


def refuse_scaled(names: Iterable[str], source: object) -> None:
    """Raise UserError for a file of fp8 numbers with scales, whose weights are not what their numbers say."""
    for name in names:
        if name.endswith(_SCALES):
            raise UserError(
                f"{source}: holds fp8 weights with scales ({name}), which nothing can be merged into or taken from; "
                "use the bf16, fp16 or plain fp8 file"
            )
