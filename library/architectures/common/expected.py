"""Compare the tensors of a model's file with those that models of its kind have, in both directions.

Sizes are inferred from names and shapes, so a file without its last layers would load as a smaller model. The layers of
published models of the same width show what is missing.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from library.architectures.common.tensor_files import Shapes
from library.errors import UserError

logger = logging.getLogger(__name__)

#: layers of published text encoders, by width; OpenCLIP's ViT-H is used without its last one
CLIP_LAYERS = {768: {12}, 1024: {23, 24}, 1280: {32}}
T5_LAYERS = {1472: {12}, 4096: {24}}

#: endings of tensors in files that no model needs
_HARMLESS = (".position_ids", ".attn_mask", ".num_batches_tracked")


def shape_of(shapes: Shapes, name: str, axes: int = 2) -> tuple[int, ...]:
    """Return the shape of one of a transformer's tensors.

    Raises:
        UserError: it is missing, or has another number of axes; the message does not name the file.
    """
    found = shapes.get(name)
    if found is None or len(found) != axes:
        what = "is missing" if found is None else f"has shape {list(found)}"
        raise UserError(f"the transformer's tensor {name} {what}; the file is incomplete, download it again")
    return found


def block_count(names: Iterable[str], blocks: str) -> int:
    """Return the number of blocks in a list, by names of tensors that begin with ``<blocks>.<number>.``."""
    numbers = (int(found[1]) for name in names if (found := re.match(rf"{re.escape(blocks)}\.(\d+)\.", name)))
    return 1 + max(numbers, default=-1)


def check_layers(title: str, layers: int, width: int, published: Mapping[int, Collection[int]]) -> None:
    """Refuse a model of a published width with another number of layers; the message does not name the file.

    Raises:
        UserError: layers are missing, or there are more than such models have.
    """
    expected = published.get(width)
    if expected and layers not in expected:
        what = "incomplete: download it again" if layers < max(expected) else "of another model, or damaged"
        raise UserError(
            f"the {title} has {layers} layers, and those of its width ({width}) have {max(expected)}; the file is "
            f"{what}"
        )


def check_count(title: str, what: str, found: int, expected: int) -> None:
    """Refuse a model with another number of blocks than expected; the message does not name the file."""
    if found != expected:
        remedy = "incomplete: download it again" if found < expected else "of another model, or damaged"
        raise UserError(f"the {title} has {found} {what} where {expected} are expected; the file is {remedy}")


def warn_of_unused(path: Path, title: str, names: Iterable[str], used: Collection[str], prefix: str) -> None:
    """Warn once of tensors in a model's file that the model does not have.

    Args:
        names: in the file.
        used: the names that the model took.
        prefix: prefix of the model's names in the file, which may hold other models too.
    """
    tops = {name[len(prefix) :].partition(".")[0] for name in used}
    unused = [
        name
        for name in names
        if name.startswith(prefix)
        and name not in used
        and name[len(prefix) :].partition(".")[0] in tops
        and not name.endswith(_HARMLESS)
    ]
    if unused:
        _warn(path, title, len(unused), unused[0])


@functools.cache
def _warn(path: Path, title: str, count: int, first: str) -> None:
    logger.warning(
        "%s: among the tensors of the %s are %d that it does not use, the first is %s; is the file of another kind of "
        "model?",
        *(path, title, count, first),
    )
