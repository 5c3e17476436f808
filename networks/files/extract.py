"""A LoRA from the difference between two models, module by module."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from library.architectures.adapters import AdapterFamily, WeightPlace
from library.errors import UserError
from networks.files.model_file import Model
from networks.files.svd import clamped, decompose

logger = logging.getLogger(__name__)

#: dtypes that models are rounded to when they are saved smaller
_ROUNDED_TO = (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Sizes:
    """Ranks; ``conv_rank`` is for convolutions with a kernel larger than 1, and None leaves them and their blocks
    out."""

    rank: int
    conv_rank: int | None = None
    clamp_quantile: float = 1.0

    def of(self, shape: tuple[int, ...]) -> int:
        is_spatial = len(shape) == 4 and shape[2:] != (1, 1)
        return self.conv_rank or self.rank if is_spatial else self.rank


@dataclass(frozen=True)
class Pair:
    """One module's weight in both models; ``is_text`` for text encoders."""

    name: str
    old: WeightPlace
    new: WeightPlace
    is_text: bool


@dataclass(frozen=True)
class Extracted:
    """The tensors of a LoRA, and what was left out."""

    tensors: dict[str, Tensor]
    rounded: int  # modules whose weights differ by rounding alone
    error: float  # largest share of a module's change that its rank cannot hold
    module: str


def common_modules(
    before: Model, after: Model, family: AdapterFamily, *, convs: bool, text_encoders: bool
) -> list[Pair]:
    """Return the modules that adapters usually change, in both models.

    Raises:
        UserError: the models are not of one kind and size.
    """
    pairs: list[Pair] = []
    for number, part in enumerate(family.parts if text_encoders else family.parts[:1]):
        old, new = (part.usual_places(model.shapes, convs=convs) for model in (before, after))
        if unmatched := sorted(old.keys() ^ new.keys()):
            name = unmatched[0]
            lacking, having = (after, before) if name in old else (before, after)
            raise UserError(
                f"{lacking.path}: has no weight for {name}, which {having.path} has; the models are of different kinds"
            )
        for name, place in old.items():
            if place.shape != new[name].shape:
                raise UserError(
                    f"{after.path}: {new[name].name} is {list(new[name].shape)}, in {before.path} {list(place.shape)}; "
                    "the models are of different sizes"
                )
            pairs.append(Pair(name, place, new[name], is_text=number > 0))
    return pairs


def weight_at(read: Callable[[str], Tensor], place: WeightPlace) -> Tensor:
    """Return the weight of a place (out, in[, kh, kw]) as the file has it; a view."""
    tensor = read(place.name)
    tensor = tensor.T if place.transposed else tensor
    return tensor if place.rows is None else tensor[place.rows]


def was_only_rounded(old: Tensor, new: Tensor) -> bool:
    """Whether one weight is the other rounded to a smaller dtype, whatever dtypes both are stored in."""
    if torch.equal(old.float(), new.float()):
        return True
    return any(
        torch.equal(one.float().to(dtype).float(), other.float())
        for dtype in _ROUNDED_TO
        for one, other in ((old, new), (new, old))
    )


def text_encoders_differ(
    pairs: Sequence[Pair], read_old: Callable[[str], Tensor], read_new: Callable[[str], Tensor], min_diff: float
) -> bool:
    """Whether any weight of the text encoders differs by more than ``min_diff``."""
    return any(
        float((weight_at(read_new, pair.new).float() - weight_at(read_old, pair.old).float()).abs().max()) > min_diff
        for pair in pairs
        if pair.is_text
    )


def extract(
    pairs: Sequence[Pair],
    read_old: Callable[[str], Tensor],
    read_new: Callable[[str], Tensor],
    sizes: Sizes,
    *,
    device: torch.device,
    save_dtype: torch.dtype,
    titles: tuple[object, object],
    progress: Callable[[int, int], None] | None = None,
) -> Extracted:
    """Return a LoRA with the nearest change of its rank for every module; alpha is the rank.

    Modules whose weights were only rounded to a smaller dtype are left out.

    Args:
        titles: of the two models, for messages.

    Raises:
        UserError: nothing has changed, or a change is not finite.
    """
    tensors: dict[str, Tensor] = {}
    rounded, worst, where = 0, 0.0, ""
    for done, pair in enumerate(pairs, start=1):
        old, new = weight_at(read_old, pair.old), weight_at(read_new, pair.new)
        if was_only_rounded(old, new):
            rounded += 1
        else:
            change = new.to(device=device, dtype=torch.float32) - old.to(device=device, dtype=torch.float32)
            if not bool(torch.isfinite(change).all()):
                raise UserError(
                    f"{titles[1]}: {pair.new.name} differs from the other model by values that are not finite"
                )
            found = decompose(change.flatten(1))
            rank = min(sizes.of(pair.old.shape), len(found.values))
            if (lost := found.lost(rank)) > worst:
                worst, where = lost, pair.name
            tensors |= _lora(pair, *clamped(*found.factors(rank), sizes.clamp_quantile), save_dtype)
        if progress is not None:
            progress(done, len(pairs))
    if not tensors:
        raise UserError(
            f"{titles[1]}: its weights are those of {titles[0]}, or were only rounded to a smaller type; nothing to "
            "extract"
        )
    if rounded:
        logger.info("%d of %d modules have not changed, or were only rounded: left out", rounded, len(pairs))
    return Extracted(tensors, rounded, worst, where)


def _lora(pair: Pair, up: Tensor, down: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    shape, rank = pair.old.shape, down.shape[0]
    down, up = down.view(rank, *shape[1:]), up.view(shape[0], rank, *(1,) * (len(shape) - 2))
    return {
        f"{pair.name}.lora_down.weight": down.to(device="cpu", dtype=dtype).contiguous(),
        f"{pair.name}.lora_up.weight": up.to(device="cpu", dtype=dtype).contiguous(),
        f"{pair.name}.alpha": torch.tensor(float(rank), dtype=dtype),
    }


def ranks_of(tensors: Mapping[str, Tensor]) -> Iterator[int]:
    """Return the ranks of the modules of a LoRA."""
    for name, tensor in tensors.items():
        if name.endswith(".lora_down.weight"):
            yield tensor.shape[0]
