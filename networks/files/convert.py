"""Write an adapter file under another program's names, and verify that nothing else changed."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.architectures.adapters import NAMINGS, Naming
from library.errors import UserError
from library.files.atomic import atomic_directory, atomic_path, write_text
from library.files.hashes import SSHS_KEYS, with_hashes
from library.files.precisions import cast
from library.files.safetensors_io import save_tensors
from library.files.streamed import check_folder_of, check_target
from networks.file_names import ADAPTER_METADATA
from networks.files.adapter_file import (
    DORA,
    DOWN,
    LORA_TENSORS,
    PEFT_CONFIG,
    PEFT_FILE,
    UP,
    AdapterFile,
    Module,
    check_readable,
    read_adapter,
)
from networks.files.families import family_named
from networks.files.proof import Difference, compare
from networks.files.reshape import (
    RECORD,
    fold_strength,
    magnitudes_on_output,
    read_record,
    restore_strength,
    to_diffusers,
    to_original,
    write_record,
)

#: largest |difference| / |delta| of a module: rounding of float32 sums, and the error of a cast
_TOLERANCE = {None: 1e-5, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
_TITLES: dict[Naming, str] = {
    "kohya": "kohya's (published) names",
    "diffusers": "diffusers' names",
    "peft": "PEFT's names",
    "comfyui": "ComfyUI's names",
}


@dataclass(frozen=True)
class Report:
    """The result of a conversion; ``widened`` counts tensors that became float32 to keep their values."""

    family: str
    source: Naming
    target: Naming
    tensors: int
    difference: Difference
    widened: int
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        d = self.difference
        where = f" in {d.module}" if d.absolute else ""
        lines = [
            f"{self.family}: {_TITLES[self.source]} -> {_TITLES[self.target]}, {self.tensors} tensors",
            f"largest difference of the weight deltas of {d.modules} modules: {d.absolute:.3g}"
            f" ({d.relative:.3g} of the module's largest value){where}",
        ]
        if self.widened:
            lines.append(
                f"{self.widened} up weights are float32, because their dtype cannot hold them times alpha / rank; "
                "--save_precision decides otherwise"
            )
        return [*lines, *self.notes]


class AlreadyConverted(Exception):
    """The file already has the requested names."""


def check_paths(source: Path, save_to: Path, to: Naming, flag: str = "--save_to") -> None:
    """Refuse impossible conversions before anything is loaded.

    Args:
        flag: the option that named ``save_to``, for messages.

    Raises:
        UserError: the input is missing or no adapter; the output is the input, has no folder, or a wrong name.
    """
    check_readable(source)
    if to != "peft":
        check_target(save_to, flag, sources=[source])
        return
    check_folder_of(save_to, flag)
    if save_to.suffix or (save_to.exists() and (not save_to.is_dir() or any(save_to.iterdir()))):
        raise UserError(f"{flag} {save_to}: PEFT's adapters are folders; name a new one")


def convert(
    source: Path,
    save_to: Path,
    to: Naming,
    *,
    dtype: torch.dtype | None = None,
    family: str | None = None,
    expected: Naming | None = None,
    flag: str = "--save_to",
) -> Report:
    """Write ``source`` to ``save_to`` with the names of ``to``.

    The new file is read again and its weight deltas are compared with the source's, in float32, before it appears.

    Args:
        dtype: of all tensors; None keeps each one's.
        family: as ``--family`` takes it, where the file does not tell.
        expected: the naming that the source must have.
        flag: the option that named ``save_to``, for messages.

    Raises:
        UserError: see ``check_paths`` and ``read_adapter``; a tensor that the target cannot hold; the written deltas
            differ.
        AlreadyConverted: nothing to do.
    """
    assert to in NAMINGS
    check_paths(source, save_to, to, flag)
    file = read_adapter(source, family_named(family) if family else None)
    _check_target(file, to, dtype, expected)
    modules, records, widened = _converted(file, to)
    metadata = _metadata_of(file, records)
    if to == "peft":
        with atomic_directory(save_to) as folder:
            count = _write_peft(folder, modules, metadata, dtype)
            difference = _prove(file, folder, save_to, dtype)
    else:
        tensors = _cast(_named(modules, to), dtype)
        count = len(tensors)
        if to == "kohya" or any(name in file.metadata for name in SSHS_KEYS):
            metadata = with_hashes(tensors, metadata)
        with atomic_path(save_to) as temporary:
            save_tensors(temporary, tensors, metadata)
            difference = _prove(file, temporary, save_to, dtype)
    widened = 0 if dtype else widened
    return Report(file.family.title, file.naming, to, count, difference, widened, _notes(modules, to))


def _check_target(file: AdapterFile, to: Naming, dtype: torch.dtype | None, expected: Naming | None) -> None:
    """Refuse names and a dtype that the adapter cannot have, or has already."""
    if expected is not None and file.naming != expected:
        raise UserError(f"{file.path}: has {_TITLES[file.naming]}, not {_TITLES[expected]}")
    if to in file.family.unwritten:
        raise UserError(f"{file.path}: {file.family.title} cannot have {_TITLES[to]} here: {file.family.unwritten[to]}")
    has_paths = all(module.space == module.part.space(to) for module in file.modules)
    if file.naming == to and not file.is_own_oft and has_paths:
        raise AlreadyConverted(f"{file.path}: already has {_TITLES[to]}; nothing to do")
    if file.is_own_oft and dtype not in (None, torch.float32):
        raise UserError("--save_precision: rotations of an OFT are kept in float; leave it out")


def _metadata_of(file: AdapterFile, records: Mapping[str, dict[str, Any]]) -> dict[str, str]:
    """Return the metadata of the new file, without hashes.

    Args:
        records: by module, the changes that a conversion back undoes.
    """
    metadata = {k: v for k, v in file.metadata.items() if k not in (ADAPTER_METADATA, RECORD, *SSHS_KEYS)}
    if file.is_own_oft:  # it has the layout of LyCORIS now
        metadata |= {"ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps({"algo": "diag-oft"})}
    return metadata | ({RECORD: write_record(records)} if records else {})


def _converted(file: AdapterFile, to: Naming) -> tuple[list[Module], dict[str, dict[str, Any]], int]:
    """Return modules with the paths of ``to``, the records of modules without alpha, and how many tensors became
    float32."""
    title = str(file.path)
    if to in ("diffusers", "peft"):
        for module in file.modules:
            _check_for_diffusers(module, title)
    converted: list[Module] = []
    records: dict[str, dict[str, Any]] = {}
    widened = 0
    for module in to_original(file.modules, title):
        published = _published_name(module)
        module = restore_strength(module, read_record(file.metadata, published))
        if to in ("diffusers", "peft"):
            folded = fold_strength(module)
            records[published] = folded.record if to == "diffusers" else {**folded.record, "folded": None}
            widened += to == "diffusers" and folded.widened
            module = folded.module if to == "diffusers" else module
        in_original = module.part.space(to) == "original"
        converted += [module] if in_original else to_diffusers(module, title)
    return converted, records, widened


def _published_name(module: Module) -> str:
    """Return the published name of a module with an original path."""
    path = module.path if module.part.published == "original" else module.part.paths.to_diffusers(module.path)[0]
    return module.part.name("kohya", path)


def _check_for_diffusers(module: Module, title: str) -> None:
    if module.tensors.keys() - LORA_TENSORS:
        other = sorted(module.tensors.keys() - LORA_TENSORS)[0]
        raise UserError(f"{title}: {module.name}.{other}: diffusers' and PEFT's names are for plain LoRA and DoRA only")
    if missing := sorted({DOWN, UP} - module.tensors.keys()):
        raise UserError(f"{title}: {module.name}.{missing[0]} is missing")
    if DORA in module.tensors and not magnitudes_on_output(module):
        raise UserError(
            f"{title}: {module.name}.{DORA}: one magnitude for each input feature, where diffusers and PEFT have "
            "one for each output feature; train with dora_on_output=True for them"
        )


# ---- tensors under their names ----


def _named(modules: list[Module], to: Naming) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for module in modules:
        name = module.part.name(to, module.path)
        for kind, tensor in module.tensors.items():
            spelled = kind if to in ("kohya", "comfyui") else _PEFT_KINDS.get(kind)
            if spelled is None:
                continue  # alpha, which _converted has moved
            key = f"{name}.{spelled}"
            assert key not in tensors, key
            tensors[key] = _vector(tensor) if spelled == _PEFT_KINDS[DORA] else tensor
    return tensors


_PEFT_KINDS = {DOWN: "lora_A.weight", UP: "lora_B.weight", DORA: "lora_magnitude_vector.weight"}


def _vector(magnitudes: Tensor) -> Tensor:
    """Return (out, 1) as (out,), and (out, 1, 1, 1) as (1, out, 1, 1)."""
    return magnitudes.squeeze(1) if magnitudes.dim() == 2 else magnitudes.transpose(0, 1)


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    return {name: tensor if dtype is None else cast(tensor, dtype) for name, tensor in tensors.items()}


def _write_peft(folder: Path, modules: list[Module], metadata: dict[str, str], dtype: torch.dtype | None) -> int:
    """Write one folder for each model, with tensors and configuration."""
    by_model: dict[str, list[Module]] = defaultdict(list)
    for module in modules:
        by_model[module.part.diffusers].append(module)
    count = 0
    for model, own in by_model.items():
        tensors = _cast(_named(own, "peft"), dtype)
        (folder / model).mkdir()
        save_tensors(folder / model / PEFT_FILE, tensors, metadata)
        write_text(folder / model / PEFT_CONFIG, json.dumps(_peft_config(own), indent=2) + "\n")
        count += len(tensors)
    return count


def _peft_config(modules: list[Module]) -> dict[str, object]:
    ranks = {module.path: module.rank for module in modules}
    alphas = {module.path: module.strength * module.rank for module in modules}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    paths = sorted(ranks)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        # "^" so that it does not match the end of another module's path
        "rank_pattern": {f"^{path}": r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{path}": a for path, a in alphas.items() if a != alpha},
        # a list would also match modules whose paths end like this
        "target_modules": "|".join(path.replace(".", r"\.") for path in paths),
        "use_dora": any(DORA in module.tensors for module in modules),
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
    }


# ---- proof ----


def _prove(file: AdapterFile, written: Path, title: Path, dtype: torch.dtype | None) -> Difference:
    """Read the written file and compare it with the source.

    Raises:
        UserError: the deltas differ by more than rounding.
    """
    again = replace(read_adapter(written, file.family), path=title)
    difference = compare(file.modules, again.modules, str(title), exact_tensors=dtype is None)
    if not difference.relative <= _TOLERANCE[dtype]:
        remedy = "; --save_precision loses too much here, use float or bf16" if dtype else ""
        raise UserError(
            f"{title}: not written: the weight deltas of {difference.module} differ by {difference.absolute:.3g} "
            f"({difference.relative:.3g} of the largest){remedy}"
        )
    return difference


def _notes(modules: list[Module], to: Naming) -> tuple[str, ...]:
    t5 = any(".SelfAttention." in module.path or ".DenseReluDense." in module.path for module in modules)
    return ("diffusers' pipelines read no adapters of T5: text_encoder_2.* is for other programs",) * (
        t5 and to == "diffusers"
    )
