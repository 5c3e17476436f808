"""Write images in the format that their name asks for."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from library.errors import UserError
from library.files import atomic


def image_format(path: Path, flag: str) -> str:
    """Return Pillow's name of the format of a file's ending.

    Raises:
        UserError: there is none.
    """
    from PIL import Image

    Image.init()
    kind = Image.EXTENSION.get(path.suffix.lower(), "")
    if kind not in Image.SAVE:
        raise UserError(f"{flag} {path}: must end with the name of an image format, such as .png or .jpg")
    return kind


def save_image(pixels: np.ndarray, path: Path, flag: str = "", *, quality: int | None = None) -> None:
    """Write uint8 (H, W) or (H, W, 3) RGB atomically; the folder is created if it is missing.

    Args:
        flag: the option that named the file, for messages.
        quality: of formats that have one, 1 to 100; Pillow's default if it is not given.

    Raises:
        UserError: an unknown ending; a file that cannot be written.
    """
    from PIL import Image

    data = io.BytesIO()
    settings: dict[str, Any] = {} if quality is None else {"quality": quality}
    try:
        Image.fromarray(pixels).save(data, format=image_format(path, flag), **settings)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be written as an image ({error})") from None
    atomic.make_folder(path.parent)
    atomic.write_bytes(path, data.getvalue())
