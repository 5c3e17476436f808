"""Blend models: write the weighted sum of their tensors, with one tensor in memory at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from library.errors import UserError
from library.files.precisions import cast
from library.files.safetensors_io import TensorInfo
from library.files.streamed import tensor_info, write_streamed
from networks.files.model_file import Model

#: names of text encoders in old files, without a level that other files have
_OLD_TEXT = re.compile(r"(cond_stage_model\.transformer\.)(?=embeddings\.|encoder\.|final_layer_norm\.)")
#: the parts of a single-file checkpoint that are not the U-Net
_OTHER_PARTS = ("first_stage_model", "cond_stage_model", "conditioner.")


@dataclass(frozen=True)
class Source:
    """One model of a blend; ``own`` maps tensors to their names in its file."""

    model: Model
    ratio: float
    own: Mapping[str, str]

    @staticmethod
    def of(model: Model, ratio: float) -> Source:
        return Source(model, ratio, {_OLD_TEXT.sub(r"\1text_model.", name): name for name in model.shapes})

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.model.shapes[self.own[name]])


@dataclass(frozen=True)
class Blend:
    """The model that will be written, and the differences of its sources.

    Attributes:
        first_only: tensors that are copied from the first model.
        missing: (model, tensors that it lacks); the first model's tensors are used instead.
        skipped: (model, tensors that the first model lacks); they are left out.
    """

    sources: Sequence[Source]
    first_only: frozenset[str]
    missing: Sequence[tuple[Path, tuple[str, ...]]]
    skipped: Sequence[tuple[Path, tuple[str, ...]]]


def plan(sources: Sequence[Source], *, unet_only: bool) -> Blend:
    """Compare the models before anything is read.

    Args:
        unet_only: take all other parts from the first model.

    Raises:
        UserError: a tensor has another shape than the first model's.
    """
    first, *others = sources
    kept = {
        name
        for name, own in first.own.items()
        if not first.model.dtypes[own].is_floating_point or (unet_only and any(part in name for part in _OTHER_PARTS))
    }
    missing, skipped = [], []
    for source in others:
        if lacking := tuple(sorted(first.own.keys() - source.own.keys() - kept)):
            missing.append((source.model.path, lacking))
        if extra := tuple(sorted(source.own.keys() - first.own.keys())):
            skipped.append((source.model.path, extra))
        for name in first.own.keys() & source.own.keys() - kept:
            if source.shape(name) != first.shape(name):
                raise UserError(
                    f"{source.model.path}: {name} is {list(source.shape(name))}, in {first.model.path} "
                    f"{list(first.shape(name))}; only models of one kind and size can be blended"
                )
    return Blend(sources, frozenset(kept), missing, skipped)


def write_blend(
    target: Path,
    blend: Blend,
    *,
    device: torch.device,
    precision: torch.dtype,
    save_dtype: torch.dtype,
    metadata: Mapping[str, str],
    progress: Callable[[int, int], None],
) -> None:
    """Write the sum of ratio * tensor, computed in ``precision``; integers are copied from the first model."""
    first = blend.sources[0]
    infos: dict[str, TensorInfo] = {}
    for name, own in first.own.items():
        dtype = first.model.dtypes[own]
        infos[name] = tensor_info(save_dtype if dtype.is_floating_point else dtype, first.shape(name))
    with ExitStack() as stack:
        reads = [stack.enter_context(source.model.opened()) for source in blend.sources]

        def produce(name: str) -> Tensor:
            original = reads[0](first.own[name])
            if name in blend.first_only:
                return cast(original, save_dtype)
            total = original.to(device=device, dtype=precision) * first.ratio
            for source, read in zip(blend.sources[1:], reads[1:], strict=True):
                own = source.own.get(name)
                tensor = original if own is None else read(own)
                total += tensor.to(device=device, dtype=precision) * source.ratio
            return cast(total, save_dtype).cpu()

        write_streamed(target, infos, produce, metadata or None, progress=progress)
