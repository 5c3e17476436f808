"""Read and write adapter files, and match their tensors to a network."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from library.architectures.adapters import AdapterFamily, TablePaths
from library.architectures.common.recognise import recognise_tensors
from library.architectures.lora_target import LoraTarget
from library.errors import UserError
from library.files.hashes import with_hashes
from library.files.safetensors_io import (
    PICKLE_SUFFIXES,
    is_pickle,
    iterate_tensors,
    load_pickle,
    load_tensors,
    read_header,
    save_pickle,
    save_tensors,
)
from networks.bundled_words import is_bundled
from networks.damaged import refuse_damaged
from networks.file_names import with_alphas
from networks.part import NetworkPart
from networks.targets import DoraAxis, RankAlpha

logger = logging.getLogger(__name__)

#: a piece of a tensor's name -> the kind of the file; used only when a file does not fit
_OTHER_KINDS = {
    ".lora_A.": "it is in diffusers/PEFT naming, for another model or for modules that carry no adapters here",
    ".lora.down.": "it is in diffusers naming, for another model or for modules that carry no adapters here",
    ".lora_linear_layer.": "it is in diffusers naming, for another model or for modules that carry no adapters here",
    ".hada_w1": "it is a LoHa; use the network module that made it (lycoris.kohya)",
    ".lokr_": "it is a LoKr; use the network module that made it (lycoris.kohya)",
    ".oft_": "it is an OFT; use the network module that made it (networks.oft, networks.oft_flux or lycoris.kohya)",
}


def check_adapter_file(path: Path) -> None:
    """Refuse what is no adapter, or a damaged one; pickled files are left for later.

    Raises:
        UserError: missing or damaged, or the weights of a model.
    """
    if path.is_file() and is_pickle(path):
        return
    names = read_header(path).tensors
    found = recognise_tensors(names, "")
    if found is not None and not any(word in name for name in names for word in ("lora", "lycoris", "hada_", "lokr_")):
        raise UserError(f"{path} is {found.what}, not an adapter; give the file of a LoRA or another adapter")
    refuse_damaged(iterate_tensors(path), str(path))


def read_weights(file: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a ``.safetensors`` file, or of a pickled one, which is opened without running its code.

    Words that are bundled with the adapter are left out.

    Raises:
        UserError: missing, unreadable or damaged file.
    """
    path = Path(file)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if is_pickle(path):
        weights = load_pickle(path)
    else:
        weights = with_alphas(load_tensors(path), read_header(path).metadata, str(path))
    weights = {name: tensor for name, tensor in weights.items() if not is_bundled(name)}
    refuse_damaged(weights, str(path))
    return weights


def write_weights(
    file: str | Path, state: Mapping[str, Tensor], dtype: torch.dtype | None, metadata: Mapping[str, str] | None
) -> None:
    """Write ``state`` atomically; ``.safetensors`` gets ``metadata`` and the ``sshs_*`` hashes.

    Raises:
        UserError: unknown file extension.
    """
    path = Path(file)
    tensors = {name: t.detach().to(device="cpu", dtype=dtype or t.dtype).contiguous() for name, t in state.items()}
    if path.suffix == ".safetensors":
        save_tensors(path, tensors, with_hashes(tensors, metadata))
    elif path.suffix in PICKLE_SUFFIXES:
        save_pickle(path, tensors)
    else:
        raise UserError(f"{path}: adapters are saved as .safetensors, .pt or .ckpt")


def sizes_of(weights: Mapping[str, Tensor]) -> dict[str, RankAlpha]:
    """Return the size of each module's adapter in a LoRA file; a file without alphas was made with alpha = rank."""
    found = {}
    for name, tensor in weights.items():
        if name.endswith(".lora_down.weight"):
            lora_name = name.removesuffix(".lora_down.weight")
            rank = tensor.shape[0]
            alpha = weights.get(f"{lora_name}.alpha")
            axis: DoraAxis | None = None
            magnitudes = weights.get(f"{lora_name}.dora_scale")
            if magnitudes is not None:
                up = weights.get(f"{lora_name}.lora_up.weight")
                axis = "output" if up is not None and magnitudes.shape[0] == up.shape[0] else "input"
            found[lora_name] = RankAlpha(rank, float(rank if alpha is None else alpha), axis)
    return found


def _metadata(file: str | Path | None) -> Mapping[str, str]:
    path = Path(file or "")
    return {} if not path.is_file() or is_pickle(path) else read_header(path).metadata


def refuse_other_model(file: str | Path | None, target: LoraTarget) -> None:
    """Refuse an adapter file whose metadata name another model, which may have modules of the same names.

    Args:
        target: of the denoiser to adapt.

    Raises:
        UserError: the metadata name another model.
    """
    version = _metadata(file).get("ss_base_model_version", "")
    title = dict(target.namesakes).get(version) or _title_of(version, target.network_modules)
    if title is not None:
        raise UserError(
            f"{file}: it was made for {title} (ss_base_model_version is {version}), which this model is not"
        )


def _title_of(version: str, modules: Collection[str]) -> str | None:
    """Return the title of the family with this ``ss_base_model_version``; None if its module is one of ``modules``."""
    from library.architectures.registry import adapter_families

    if not version or not modules:  # the modules for U-Nets tell their models apart by names and widths
        return None
    families = [f for f in adapter_families() if any(record.base_version == version for record in f.records)]
    return None if any(f.network_module in modules for f in families) or not families else families[0].title


def warn_of_missing_layers(file: str | Path | None, in_file: Collection[str], usual: Collection[str]) -> None:
    """Warn of kinds of layers without adapters in a file whose metadata do not name its model.

    Args:
        in_file: the file's modules.
        usual: the denoiser's modules that adapters usually change.
    """
    if "ss_base_model_version" in _metadata(file) or not set(in_file) & set(usual):
        return
    missing = sorted({_kind(name) for name in usual} - {_kind(name) for name in in_file})
    if missing:
        logger.warning(
            "%s: has no adapters for %d kinds of layers that adapters of this model usually change (%s): it was made "
            "for another model, or for these layers only",
            *(file or "the given weights", len(missing), _some(missing)),
        )


def _kind(name: str) -> str:
    """Return a module's name without the numbers of its blocks."""
    return re.sub(r"\d+", "#", name)


class HasParts(Protocol):
    """The attributes of a network that matching a file's tensors needs; see ``AdapterNetwork``."""

    module_name: str
    parts: list[NetworkPart]

    def state_dict(self) -> Mapping[str, Any]: ...


def select_weights(
    network: HasParts, weights: Mapping[str, Tensor], source: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of ``weights`` that belong to ``network``, with alphas, and notes on skipped ones.

    Raises:
        UserError: tensors are missing, unknown, or of other shapes.
    """
    by_module: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in weights.items():
        lora_name, _, tensor_name = key.partition(".")
        by_module[lora_name][tensor_name] = tensor
    own_tensors = {name.partition(".")[2] for name in network.state_dict()} - {"alpha"}
    if not any(tensors.keys() & own_tensors for tensors in by_module.values()):
        # another kind of adapter, or none
        refuse_misfits((), (), weights, source, network.module_name)

    notes: list[str] = []
    known: set[str] = set()
    selected: dict[str, Tensor] = {}
    for part in network.parts:
        prefix = f"{part.target.prefix}_"
        names = {adapter.lora_name for adapter in part.adapters.values()}
        if not names:  # the part is not trained in this run
            left_out = {name for name in by_module if name.startswith(prefix)}
            known |= left_out
            if left_out:
                notes.append(f"the {part.label} is not trained, its {len(left_out)} modules were left out")
            continue
        known |= names
        present = names & by_module.keys()
        if not present:
            notes.append(f"the file has nothing for the {part.label}, it starts anew")
            continue
        if missing := sorted(names - present):
            raise UserError(
                f"{source}: tensors are missing for {len(missing)} of the {part.label}'s {len(names)} modules "
                f"({_some(missing)}); --dim_from_weights makes a network of just the file's modules"
            )
        for adapter in part.adapters.values():
            selected |= _module_weights(adapter.state_dict(), by_module[adapter.lora_name], adapter.lora_name, source)

    refuse_misfits(by_module.keys(), known, weights, source, network.module_name)
    if not selected:
        raise UserError(f"{source}: holds nothing for this network; {_explain(weights, source, network.module_name)}")
    return selected, notes


def refuse_misfits(
    in_file: Collection[str], available: Collection[str], weights: Mapping[str, Tensor], source: str, module_name: str
) -> None:
    """Raise UserError if a file names no module at all, or modules that are not ``available``."""
    if not in_file:
        raise UserError(f"{source}: holds no tensors of {module_name}; {_explain(weights, source, module_name)}")
    if unknown := sorted(set(in_file) - set(available)):
        raise UserError(
            f"{source}: {len(unknown)} of its {len(in_file)} modules have no place in this network "
            f"({_some(unknown)}); {_explain(weights, source, module_name, available)}"
        )


def _module_weights(
    own: Mapping[str, Tensor], given: Mapping[str, Tensor], lora_name: str, source: str
) -> dict[str, Tensor]:
    """Return one module's tensors, checked against its own, keyed as in the network."""
    given = dict(given)
    down = given.get("lora_down.weight")
    if "alpha" in own and "alpha" not in given and down is not None:
        given["alpha"] = torch.tensor(float(down.shape[0]))
    if given.keys() ^ own.keys() == {"dora_scale"}:
        is_dora, remedy = ("is", "give") if "dora_scale" in given else ("is not", "leave out")
        raise UserError(
            f"{source}: it {is_dora} a DoRA ({lora_name}); {remedy} --network_args dora=True, or take all from the "
            "file with --dim_from_weights"
        )
    if given.keys() != own.keys():
        raise UserError(
            f"{source}: {lora_name} has the tensors {_some(sorted(given))} where {_some(sorted(own))} are expected"
        )
    for name, tensor in given.items():
        if name == "alpha":
            given[name] = tensor.reshape(())  # some writers store one element
        elif tensor.shape != own[name].shape:
            shapes = f"{list(tensor.shape)} in the file and {list(own[name].shape)} in this network"
            rank_differs = name == "lora_down.weight" and tensor.shape[1:] == own[name].shape[1:]
            # (blocks, size, size): together they are the module's features
            rank_differs |= name.startswith("oft_blocks") and tensor.shape[:2].numel() == own[name].shape[:2].numel()
            version = _metadata(source).get("ss_base_model_version")
            other = "it was made for another model" + (f" (ss_base_model_version is {version})" if version else "")
            remedy = "use --dim_from_weights, or the file's rank" if rank_differs else other
            if name == "dora_scale" and tensor.shape == own[name].transpose(0, 1).shape:
                remedy = "its magnitudes are of the other axis, see --network_args dora_on_output"
            raise UserError(f"{source}: {lora_name}.{name} is {shapes}; {remedy}")
    return {f"{lora_name}.{name}": tensor for name, tensor in given.items()}


def _explain(weights: Mapping[str, Tensor], source: str, module_name: str, available: Collection[str] = ()) -> str:
    """Describe a file that does not fit; ``available`` are the names of the network, which show no other model."""
    if module_name.startswith("networks.oft") and any(name.endswith(".lora_down.weight") for name in weights):
        return f"it is a LoRA; use {module_name.replace('oft', 'lora')}"
    if any(name.startswith("lora_te2_") for name in available) and any(name.startswith("lora_te_") for name in weights):
        return "an old DyLoRA of SDXL has these names: use networks.dylora, or networks/extract_lora_from_dylora.py"
    other = _other_family(weights, source, module_name, available)
    if other is not None:
        return other
    for piece, explanation in _OTHER_KINDS.items():
        if any(piece in key for key in weights) and not any(piece in name for name in available):
            return explanation
    misfits = {name: tuple(t.shape) for name, t in weights.items() if name.partition(".")[0] not in available}
    made_for = _family_of(misfits)
    if made_for and made_for != _family_of(dict.fromkeys(available, ())):
        return f"it was made for {made_for.title}"
    return f"was it made for another model, or with other --network_args, than this {module_name}?"


def _other_family(
    weights: Mapping[str, Tensor], source: str, module_name: str, available: Collection[str]
) -> str | None:
    """Return what to do with a whole file of another family's module, or with this family's layers by other names."""
    from networks.files.families import detect_naming, network_modules

    family = _family_of({name: tuple(tensor.shape) for name, tensor in weights.items()}, _metadata(source))
    if family is None or module_name not in network_modules():
        return None
    if family.network_module != module_name:
        return f"it was made for {family.title}"
    if not isinstance(family.parts[0].paths, TablePaths):  # every name of a U-Net's modules is read as it is
        return None
    unread = {name: None for name in weights if name.partition(".")[0] not in available}
    try:
        naming = detect_naming(unread, source)
    except UserError:
        return None
    if naming == "kohya" and not any("transformer_blocks_" in name for name in unread):
        return None
    return (
        f"it has the names of another program ({next(iter(unread))}); python tools/lora.py convert {source} "
        "--to kohya --save_to NEW.safetensors gives it those that are read here"
    )


def _family_of(
    shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str] | None = None
) -> AdapterFamily | None:
    """Return the family that a file was made for, if it is known."""
    from networks.files.families import detect_family  # which imports this module's neighbours

    try:
        return detect_family(shapes, metadata or {}, "") if shapes else None
    except UserError:
        return None


def _some(names: Iterable[str], count: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
