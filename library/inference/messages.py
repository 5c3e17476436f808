"""Messages of the families, which name flags and scripts of training, as programs that generate images show them."""

from __future__ import annotations

from library.architectures.common.checkpoint import MODEL_FLAG
from library.architectures.registry import abouts


def for_images(message: str, flag: str) -> str:
    """Return a message of ``inspect``, which names training's flag and scripts, for a program that generates images.

    Args:
        flag: the program's flag of the model.
    """
    for about in abouts():
        message = message.replace(about.training, about.images)
    return message.replace(MODEL_FLAG, flag)
