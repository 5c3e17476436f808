"""The ``modelspec.*`` metadata of a saved adapter (ModelSpec 1.0.1)."""

from __future__ import annotations

import base64
import logging
import mimetypes
import time
from datetime import datetime
from pathlib import Path

logger = logging.getLogger(__name__)

VERSION = "1.0.1"


def build_modelspec(
    *,
    architecture_id: str,
    implementation: str,
    title: str | None,
    resolution: str | int | tuple[int, int] | None,
    default_resolution: str,
    prediction_type: str | None,
    timestep_range: tuple[int, int] | None = None,
    encoder_layer: int | None = None,
    source_revision: str | None = None,
    author: str | None = None,
    description: str | None = None,
    license: str | None = None,
    tags: str | None = None,
    usage_hint: str | None = None,
    thumbnail: str | None = None,
    merged_from: str | None = None,
    trigger_phrase: str | None = None,
    preprocessor: str | None = None,
    is_negative_embedding: str | None = None,
    now: float | None = None,
) -> dict[str, str]:
    """Return all entries as text.

    Args:
        architecture_id: such as ``stable-diffusion-v1/lora``.
        title: ``None``: ``LoRA@<unix time>``.
        resolution: ``n`` or ``w,h`` in pixels, as the command line takes it; ``None``: ``default_resolution``.
        default_resolution: ``<W>x<H>``.
        prediction_type: ``epsilon`` or ``v``; ``None`` where the family writes none.
        timestep_range: lowest and highest trained timestep, 0 to 1000.
        encoder_layer: the clip skip.
        source_revision: the commit of this checkout.
        thumbnail: a data URL or an image file; a file that is missing is left out with a warning.
        now: unix time of the save.
    """
    now = time.time() if now is None else now
    entries: dict[str, object] = {
        "sai_model_spec": VERSION,
        "architecture": architecture_id,
        "implementation": implementation,
        "title": title or f"LoRA@{int(now)}",
        "resolution": _resolution(resolution) or default_resolution,
        # local time without a zone, to the second
        "date": datetime.fromtimestamp(int(now)).isoformat(),
        "description": description,
        "author": author,
        "license": license,
        "tags": tags,
        "prediction_type": prediction_type,
        "timestep_range": f"{timestep_range[0]},{timestep_range[1]}" if timestep_range else None,
        "encoder_layer": encoder_layer,
        "implementation_version": f"sd-scripts/{source_revision or 'unknown'}",
        "usage_hint": usage_hint,
        "merged_from": merged_from,
        "trigger_phrase": trigger_phrase,
        "preprocessor": preprocessor,
        "is_negative_embedding": is_negative_embedding,
        "thumbnail": _thumbnail(thumbnail),
    }
    return {f"modelspec.{name}": str(value) for name, value in entries.items() if value is not None}


def _resolution(given: str | int | tuple[int, int] | None) -> str | None:
    if given is None:
        return None
    numbers = [int(n) for n in given.split(",")] if isinstance(given, str) else given
    if isinstance(numbers, int):
        numbers = [numbers]
    width, height = (numbers[0], numbers[0]) if len(numbers) == 1 else (numbers[0], numbers[1])
    return f"{width}x{height}"


def _thumbnail(given: str | None) -> str | None:
    if given is None or given.startswith("data:"):
        return given
    try:
        data = Path(given).read_bytes()
    except OSError as error:
        logger.warning(
            "--metadata_thumbnail %s: cannot be read (%s); the file is saved without it", given, error.strerror
        )
        return None
    kind = mimetypes.guess_type(given)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
