"""Describe the content of an adapter file in a few lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from networks.files.adapter_file import ALPHA, DOWN, AdapterFile, Module, read_adapter
from networks.files.deltas import kind_of

#: metadata that people look for first
_SHOWN = (
    "ss_base_model_version", "ss_sd_model_name", "ss_network_module", "ss_network_dim", "ss_network_alpha",
    "ss_network_args", "ss_steps", "ss_num_epochs", "ss_learning_rate", "ss_training_comment",
    "modelspec.title", "modelspec.architecture", "modelspec.merged_from",
)  # fmt: skip


def summary(path: Path) -> list[str]:
    """Lines on a file: family, naming, kinds, ranks, alphas, dtypes, modules of each model, metadata.

    Raises:
        UserError: no adapter, or one of an unknown family.
    """
    file = read_adapter(path)
    size = sum(t.numel() * t.element_size() for module in file.modules for t in module.tensors.values())
    return [
        f"{path}: {file.family.title}, {file.naming} names, {len(file.modules)} modules, {size / 1e6:.1f} MB",
        *_by_model(file),
        f"  kinds: {_counted(kind_of(module).partition(' ')[2] for module in file.modules)}",
        f"  ranks: {_counted(_rank(module) for module in file.modules)}",
        f"  alphas: {_counted(_alpha(module) for module in file.modules)}",
        f"  dtypes: {_counted(str(t.dtype)[6:] for module in file.modules for t in module.tensors.values())}",
        *(f"  {key}: {file.metadata[key]}" for key in _SHOWN if file.metadata.get(key) not in (None, "", "None")),
    ]


def _by_model(file: AdapterFile) -> Iterator[str]:
    for part in file.family.parts:
        own = [module for module in file.modules if module.part.kohya == part.kohya]
        if own:
            yield f"  {part.title}: {len(own)} modules"


def _counted(values: Iterator[str]) -> str:
    counted = Counter(values).most_common()
    if len(counted) == 1:
        return counted[0][0]
    shown = ", ".join(f"{value} ({count})" for value, count in counted[:8])
    return shown + (", ..." if len(counted) > 8 else "")


def _rank(module: Module) -> str:
    tensors = module.tensors
    if DOWN in tensors:
        return str(tensors[DOWN].shape[0])
    if "hada_w1_b" in tensors:
        return str(tensors["hada_w1_b"].shape[0])
    if "oft_blocks" in tensors:
        return f"{tensors['oft_blocks'].shape[0]} blocks"
    return "none"


def _alpha(module: Module) -> str:
    alpha = module.tensors.get(ALPHA)
    return "none" if alpha is None else f"{float(alpha):g}"
