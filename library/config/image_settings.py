"""All that defines one image, besides the models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from library.config.prompt_options import TextRole

#: marks what may differ between the images of one batch
_VARIES = MappingProxyType({"varies": True})


@dataclass(frozen=True)
class ImageSettings:
    """Everything that defines one image, besides the models."""

    prompt: str = field(metadata=_VARIES)
    negative_prompt: str = field(metadata=_VARIES)
    width: int  # pixels
    height: int  # pixels
    steps: int
    scale: float  # classifier-free guidance; 1: none
    sampler: str
    seed: int = field(metadata=_VARIES)
    guidance_scale: float | None = None  # embedded guidance, for families that know it; None: the family's own
    # of features; None: without it
    negative_scale: float | None = None  # guidance scale of the negative prompt alone
    image: Path | None = field(default=None, metadata=_VARIES)  # to start from
    mask: Path | None = field(default=None, metadata=_VARIES)  # what of it is repainted, white
    strength: float | None = None  # share of the steps that are run on the image, 0 to 1
    regions: Path | None = None  # image of the regions of the prompt's parts
    region_count: int | None = None  # parts of the prompt
    control: tuple[Path, ...] | None = field(default=None, metadata=_VARIES)  # an image for each ControlNet
    guide: Path | None = field(default=None, metadata=_VARIES)  # image that CLIP or VGG16 guidance moves towards
    # the conditions of families with size conditioning, pixels; None: those of the image, without a crop
    original_height: int | None = None
    original_width: int | None = None
    original_height_negative: int | None = None  # beside the negative prompt; None: as beside the prompt
    original_width_negative: int | None = None
    crop_top: int | None = None
    crop_left: int | None = None
    #: what features and families read under the names of their own prompt options
    own: Mapping[str, Any] = field(default_factory=dict)

    def changed(self, values: Mapping[str, Any]) -> ImageSettings:
        """Return settings with other values; names that are no fields are those of own prompt options."""
        known = {f.name for f in fields(self)}
        further = {name: value for name, value in values.items() if name not in known}
        own = {**self.own, **values.get("own", {}), **further}
        return replace(self, **{**{name: value for name, value in values.items() if name in known}, "own": own})

    def record(self, *, model: str, network: str = "") -> dict[str, str]:
        """Return text for ``save_png``; ``model`` and ``network`` are names for people."""
        record = {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "seed": str(self.seed),
            "steps": str(self.steps),
            "scale": f"{self.scale:g}",
            "sampler": self.sampler,
            "size": f"{self.width}x{self.height}",
            "model": model,
        }
        for name in OPTIONAL:
            if (value := getattr(self, name)) is not None:
                record[name] = _shown(value)
        record |= {name: _shown(value) for name, value in self.own.items() if value is not None}
        return {**record, "network": network} if network else record

    def texts(self, worded: Callable[[str, TextRole], str]) -> tuple[str, ...]:
        """Return the texts to encode.

        Args:
            worded: of the architecture for this image, see ``for_image``.
        """
        prompt = worded(self.prompt, "prompt")
        if self.scale == 1.0:
            return (prompt,)
        empty = (worded("", "prompt"),) if self.negative_scale is not None else ()
        return (prompt, worded(self.negative_prompt, "negative"), *empty)

    def shares_batch_with(self, other: ImageSettings) -> bool:
        """Whether both images may share a batch: everything is equal but text, seed and source images."""
        for f in fields(self):
            one, two = getattr(self, f.name), getattr(other, f.name)
            if one != two and (not f.metadata.get("varies") or (one is None) != (two is None)):
                return False
        return True


#: settings that may be None
OPTIONAL = tuple(f.name for f in fields(ImageSettings) if f.default is None)


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_shown, value))
    if isinstance(value, Path):
        return value.name
    return value if isinstance(value, str) else f"{value:g}"
