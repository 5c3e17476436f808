"""Write PNG files with their prompt and settings as text chunks."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import UserError
from library.files import atomic

if TYPE_CHECKING:
    from PIL.Image import Image


def save_png(image: Image, path: Path | str, settings: Mapping[str, str]) -> None:
    """Write a PNG atomically, with one text chunk per entry of ``settings`` and one of all, ``parameters``.

    Args:
        image: what to save.
        path: its folder is created if it is missing.
        settings: as ``ImageSettings.record`` returns them; ``prompt``, ``negative_prompt``, ``seed``, ...

    Raises:
        UserError: the folder cannot be made or the file not be written.
    """
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if settings:
        info.add_text("parameters", _parameters(settings))
    for name, value in settings.items():
        info.add_text(name, value)  # tEXt, or iTXt where Latin-1 does not suffice
    data = io.BytesIO()
    image.save(data, format="PNG", pnginfo=info)
    path = Path(path)
    atomic.make_folder(path.parent)
    atomic.write_bytes(path, data.getvalue())


#: names of settings in web UIs, in their order
_SHOWN = {
    "steps": "Steps",
    "sampler": "Sampler",
    "scale": "CFG scale",
    "guidance_scale": "Distilled CFG Scale",
    "seed": "Seed",
    "size": "Size",
    "model": "Model",
    "network": "Network",
}


def _parameters(settings: Mapping[str, str]) -> str:
    """Return the three-part text that web UIs read: prompt, negative prompt, settings."""
    lines = [settings.get("prompt", "")]
    if settings.get("negative_prompt"):
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    lines.append(", ".join(f"{shown}: {settings[name]}" for name, shown in _SHOWN.items() if settings.get(name)))
    return "\n".join(lines)


def read_texts(path: Path) -> dict[str, str]:
    """Return the text chunks of a PNG; none of another kind of file.

    Raises:
        UserError: the file cannot be read.
    """
    from PIL import Image as images
    from PIL import UnidentifiedImageError

    try:
        with images.open(path) as image:
            return {name: text for name, text in getattr(image, "text", {}).items() if isinstance(text, str)}
    except (OSError, ValueError, UnidentifiedImageError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
