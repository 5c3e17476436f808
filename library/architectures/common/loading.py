"""Build models without memory and fill them from a stream of tensors: at most one copy of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from library.architectures.common.expected import warn_of_unused
from library.architectures.common.key_map import TensorLayout
from library.architectures.common.tensor_files import WeightFile
from library.errors import UserError
from library.files.finite import FiniteCheck, not_finite, some_of
from library.memory.stored_layers import PUBLISHED_SCALE

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Checkpoint = TypeVar("Checkpoint", bound="DataclassInstance")


@dataclass(frozen=True)
class ModelSource:
    """The file of one model's weights and the configuration that they fit."""

    title: str  # for messages: "U-Net"
    file: WeightFile
    layout: TensorLayout
    config: dict[str, Any]
    #: what names begin with that published files hold among the model's, and that the model does not need
    spare: tuple[str, ...] = ()

    def file_names(self) -> list[str]:
        """Return the file's tensors that the model uses, in the file's order."""
        return [name for name in self.file.shapes if self.layout.model_names(name)]


def without_mapping(checkpoint: Checkpoint) -> Checkpoint:
    """Return a family's checkpoint whose models are read into memory instead of mapped (--disable_mmap...)."""

    def unmapped(value: Any) -> Any:
        if isinstance(value, ModelSource):
            return replace(value, file=replace(value.file, mapped=False))
        return tuple(map(unmapped, value)) if isinstance(value, tuple) else value

    changed = {field.name: unmapped(getattr(checkpoint, field.name)) for field in fields(checkpoint)}
    return replace(checkpoint, **changed)


def load_frozen(
    source: ModelSource,
    build: Callable[[], nn.Module],
    *,
    dtype: torch.dtype,
    device: str,
    computed: Mapping[str, Tensor] = MappingProxyType({}),
) -> nn.Module:
    """Build a model on the meta device and fill it, tensor by tensor, on its target device and in its target dtype.

    On the host and in the file's own dtype nothing is copied at all: parameters are views of the mapped file. On the
    meta device nothing is read either: names and shapes are checked, and the model has no weights.

    Args:
        computed: buffers that files do not hold, such as frequencies of positions; they keep their dtype.

    Returns:
        The model in eval mode, without gradients.

    Raises:
        UserError: the file lacks tensors of the model, holds them in other shapes or as integers, or holds NaN or
            infinity.
    """
    with torch.device("meta"):
        model = build()
    read = source.file.on_meta if device == "meta" else source.file.read
    names = source.file_names()
    own = model.state_dict().keys()
    used = {name for name in names if own & set(source.layout.model_names(name))}
    _fill(model, source.layout.read(read(names)), source, dtype=dtype, device=device)
    _fill_buffers(model, computed, device)
    kept = (name for name in source.file.shapes if not name.startswith(source.spare))
    warn_of_unused(source.file.path, source.title, kept, used, source.layout.prefix)
    return model.eval()


def _fill(
    model: nn.Module, tensors: Iterable[tuple[str, Tensor]], source: ModelSource, *, dtype: torch.dtype, device: str
) -> None:
    state = model.state_dict(keep_vars=True)
    stored = {name: buffer for name, buffer in model.named_buffers() if name in state}  # such as tables of positions
    expected = {**dict(model.named_parameters()), **stored}
    check = FiniteCheck()
    for name, tensor in tensors:
        parameter = expected.pop(name, None)
        if parameter is None:
            continue  # e.g. the discriminator in a VAE's training checkpoint
        if tensor.shape != parameter.shape:
            raise UserError(
                f"{source.file.path}: {source.title} tensor {name} has shape {list(tensor.shape)} "
                f"where {list(parameter.shape)} is expected; the file or its config.json is damaged or of another model"
            )
        if not tensor.is_floating_point():
            raise UserError(
                f"{source.file.path}: the {source.title}'s tensor {_in_file(source, name)} holds "
                f"{str(tensor.dtype).removeprefix('torch.')} numbers, which are not weights; the file is damaged or "
                "quantised: give one in float32, float16, bfloat16 or plain fp8"
            )
        owner, _, leaf = name.rpartition(".")
        # moved first and cast there, because accelerators cast faster than the host
        moved = tensor.to(device).to(dtype)
        check.add(name, moved)
        module = model.get_submodule(owner)
        if name in stored:
            module._buffers[leaf] = moved
        else:
            filled = nn.Parameter(moved, requires_grad=False)
            if (scale := getattr(tensor, PUBLISHED_SCALE, None)) is not None:
                setattr(filled, PUBLISHED_SCALE, scale)
            module._parameters[leaf] = filled
    if expected:
        first = next(iter(expected))
        raise UserError(
            f"{source.file.path}: {len(expected)} of the {source.title}'s tensors are missing, the first is {first}; "
            "the file is incomplete, download it again"
        )
    if bad := check.bad():
        raise UserError(_not_finite(source, bad, dtype))


def _fill_buffers(model: nn.Module, computed: Mapping[str, Tensor], device: str) -> None:
    """Set the buffers that are not in files."""
    state = model.state_dict(keep_vars=True)
    for name, buffer in model.named_buffers():
        owner, _, leaf = name.rpartition(".")
        if name in state:
            continue
        if name in computed:
            made = computed[name].to(device)
        elif leaf == "position_ids":  # CLIP's, computed and never stored
            made = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape)
        else:
            raise AssertionError(f"{type(model).__name__} has a buffer that loading does not fill: {name}")
        model.get_submodule(owner)._buffers[leaf] = made


def _in_file(source: ModelSource, name: str) -> str:
    """Return the file's name of one of the model's tensors."""
    return next((n for n in source.file.shapes if name in source.layout.model_names(n)), name)


def _not_finite(source: ModelSource, bad: list[str], dtype: torch.dtype) -> str:
    """Return the message on weights that are not finite after loading."""
    names = list(dict.fromkeys(_in_file(source, name) for name in bad))
    if not_finite(source.file.read(names[:1])):
        return (
            f"{source.file.path}: {some_of(names)} of the {source.title} holds NaN or infinity; the file is damaged, "
            "or comes from a run that failed: download it again, or use another"
        )
    return (
        f"{source.file.path}: {some_of(names)} of the {source.title} does not fit in {str(dtype)[6:]}, whose largest "
        f"number is {torch.finfo(dtype).max:.0f}; use --mixed_precision bf16 or no"
    )
