"""Two adapter files compared layer by layer: how strong each is, how far apart they are, and whether they agree."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw
from torch import Tensor

from library.errors import UserError
from library.files.atomic import atomic_path, write_text
from networks.files.adapter_file import DOWN, UP, Module
from networks.files.deltas import change_of, kind_of, needs_weight
from networks.files.lora_file import LoraFile, is_plain


@dataclass(frozen=True)
class Layer:
    """One module.

    Attributes:
        first, second: Frobenius norms of its change in both files; 0 where a file has none.
        apart: norm of the difference of the changes.
        cosine: of the angle between them; None where one is 0.
    """

    name: str
    first: float
    second: float
    apart: float
    cosine: float | None


#: the weight that an adapter changes, by the published name of its module
WeightOf = Callable[[str], Tensor]


def compare(one: LoraFile, other: LoraFile, weight_of: WeightOf | None = None) -> list[Layer]:
    """Compare every module of either file, in the first one's order, at the files' ratios.

    Args:
        weight_of: for kinds whose change depends on the weight.

    Raises:
        UserError: a module changes weights of different shapes, or needs ``weight_of``, which is None.
    """
    layers = []
    for name in dict.fromkeys([*one.modules, *other.modules]):
        pair = [(file, file.modules.get(name)) for file in (one, other)]
        squares, product = _products(name, pair, weight_of)
        first, second = (max(0.0, square) ** 0.5 for square in squares)
        apart = max(0.0, squares[0] + squares[1] - 2 * product) ** 0.5
        layers.append(Layer(name, first, second, apart, product / (first * second) if first * second else None))
    return layers


def _products(
    name: str, pair: Sequence[tuple[LoraFile, Module | None]], weight_of: WeightOf | None
) -> tuple[list[float], float]:
    """(square of each change's norm, their inner product)."""
    modules = [module for _, module in pair]
    if all(module is None or is_plain(module) for module in modules):
        halves = [None if module is None else _halves(file, name, module) for file, module in pair]
        squares = [0.0 if half is None else _inner(half, half, name) for half in halves]
        one, other = halves
        return squares, 0.0 if one is None or other is None else _inner(one, other, name)
    changes = [None if module is None else _change(file, name, module, weight_of) for file, module in pair]
    squares = [0.0 if change is None else float(change.square().sum()) for change in changes]
    first, second = changes
    if first is None or second is None:
        return squares, 0.0
    if first.numel() != second.numel():
        raise _unequal(name)
    return squares, float((first.flatten() * second.flatten()).sum())


def _halves(file: LoraFile, name: str, module: Module) -> tuple[Tensor, Tensor]:
    up = module.tensors[UP].double().flatten(1) * module.strength * file.strength(name)
    return up, module.tensors[DOWN].double().flatten(1)


def _inner(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], name: str) -> float:
    """<U1 D1, U2 D2> = sum of (U1^T U2) * (D1 D2^T), two small products instead of two weights."""
    (up, down), (up_2, down_2) = one, other
    if up.shape[0] != up_2.shape[0] or down.shape[1] != down_2.shape[1]:
        raise _unequal(name)
    return float(((up.T @ up_2) * (down @ down_2.T)).sum())


def _change(file: LoraFile, name: str, module: Module, weight_of: WeightOf | None) -> Tensor:
    if needs_weight(module) and weight_of is None:
        raise UserError(
            f"{file.path}: {name} is {kind_of(module)}, whose change depends on the model; name it with --model"
        )
    weight = weight_of(name) if weight_of is not None and needs_weight(module) else None
    change = change_of(module, weight)
    assert change is not None
    return change.double() * file.strength(name)


def _unequal(name: str) -> UserError:
    return UserError(
        f"{name} changes weights of different shapes in the two files; they were made for different models"
    )


# ---- showing ----

_HEADER = ("module", "first", "second", "apart", "cosine")


def table(layers: Sequence[Layer], rows: int) -> list[str]:
    """The layers that are farthest apart, and the files as a whole."""
    shown = sorted(layers, key=lambda layer: -layer.apart)[:rows]
    width = max(len(layer.name) for layer in shown)
    lines = [f"{_HEADER[0]:<{width}}  " + "  ".join(f"{word:>9}" for word in _HEADER[1:])]
    lines += [f"{layer.name:<{width}}  " + "  ".join(f"{text:>9}" for text in _texts(layer)) for layer in shown]
    if len(layers) > len(shown):
        lines.append(f"... and {len(layers) - len(shown)} more")
    return [*lines, total(layers)]


def total(layers: Sequence[Layer]) -> str:
    """One line on both files as a whole."""
    first, second, apart = (sum(getattr(layer, key) ** 2 for layer in layers) ** 0.5 for key in _HEADER[1:4])
    product = (first**2 + second**2 - apart**2) / 2
    cosine = f"{product / (first * second):.4f}" if first * second else "-"
    return f"all {len(layers)} modules: {first:.4g} and {second:.4g}, {apart:.4g} apart, cosine {cosine}"


def _texts(layer: Layer) -> tuple[str, ...]:
    numbers = tuple(f"{getattr(layer, key):.4g}" for key in _HEADER[1:4])
    return (*numbers, "-" if layer.cosine is None else f"{layer.cosine:.4f}")


def write_csv(path: Path, layers: Sequence[Layer]) -> None:
    """Write all layers, in order."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(_HEADER)
    for layer in layers:
        writer.writerow((layer.name, *(repr(getattr(layer, key)) for key in _HEADER[1:4]), layer.cosine))
    write_text(path, text.getvalue())


_WIDTH, _HEIGHT, _MARGIN = 1200, 640, 50
_COLORS = ((52, 101, 164), (204, 120, 0), (78, 154, 6))


def plot(path: Path, layers: Sequence[Layer], names: tuple[str, str]) -> None:
    """A PNG: above, norms of both files and of their difference by layer; below, the cosines."""
    image = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    middle = _HEIGHT * 2 // 3
    largest = max(max(layer.first, layer.second, layer.apart) for layer in layers) or 1.0
    top, bottom = (_MARGIN, middle - 20), (middle + 20, _HEIGHT - _MARGIN)
    for (low, high), texts in ((top, (f"{largest:.3g}", "0")), (bottom, ("1", "-1"))):
        draw.rectangle((_MARGIN, low, _WIDTH - _MARGIN, high), outline=(160, 160, 160))
        draw.text((6, low), texts[0], fill="black")
        draw.text((6, high - 12), texts[1], fill="black")
    for key, color in zip(("first", "second", "apart"), _COLORS, strict=True):
        heights = [1 - getattr(layer, key) / largest for layer in layers]
        draw.line(_points(heights, *top), fill=color, width=2)
    cosines = [0.5 if layer.cosine is None else (1 - layer.cosine) / 2 for layer in layers]
    draw.line(_points(cosines, *bottom), fill=(120, 120, 120), width=2)
    legend = (*names, "difference", "cosine (below)")
    for place, (text, color) in enumerate(zip(legend, (*_COLORS, (120, 120, 120)), strict=True)):
        draw.text((_MARGIN + place * 260, 16), text[:40], fill=color)
    draw.text((_MARGIN, _HEIGHT - 30), f"{len(layers)} layers, in the first file's order", fill="black")
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")


def _points(heights: Sequence[float], low: int, high: int) -> list[tuple[float, float]]:
    """Points of a line over the whole width; 0 is ``low``, the upper edge."""
    step = (_WIDTH - 2 * _MARGIN) / max(1, len(heights) - 1)
    points = [(_MARGIN + place * step, low + height * (high - low)) for place, height in enumerate(heights)]
    return points if len(points) > 1 else [*points, (points[0][0] + 1, points[0][1])]
