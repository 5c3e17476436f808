"""Read adapter files as modules with tensors, under any program's names."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from library.architectures.adapters import AdapterFamily, AdapterNaming, Naming, Place, Space
from library.errors import UserError, did_you_mean
from library.files.safetensors_io import is_pickle, load_pickle, load_tensors, read_header
from networks.damaged import refuse_damaged
from networks.file_names import ADAPTER_METADATA, PEFT_ROOT, TENSOR_NAMES, with_alphas
from networks.files.families import detect_family, detect_naming, namings
from networks.files.oft import as_diag_oft, is_own_layout

DOWN, UP, ALPHA, DORA = "lora_down.weight", "lora_up.weight", "alpha", "dora_scale"
#: full changes of a weight and of its bias, as ComfyUI and LyCORIS extract them from models
WEIGHT_CHANGE, BIAS_CHANGE = "diff", "diff_b"
#: tensors that can be split, joined and scaled; other tensors can only be renamed
LORA_TENSORS = frozenset({DOWN, UP, ALPHA, DORA})

PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"

#: magnitudes of PEFT and diffusers, of shape (out,), or (1, out, 1, 1) for convolutions
_MAGNITUDES = ("lora_magnitude_vector", "lora_magnitude_vector.weight", "lora_magnitude_vector.default.weight")
#: tensors of LyCORIS and of decomposed convolutions, with the same names in all programs
_RENAMED_ONLY = (
    "lora_mid.weight", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "lokr_w1", "lokr_w1_a",
    "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "oft_blocks", "oft_diag", "rescale", "on_input",
    WEIGHT_CHANGE, BIAS_CHANGE, "a1.weight", "a2.weight", "b1.weight", "b2.weight",
)  # fmt: skip
_TENSORS = {**TENSOR_NAMES, **dict.fromkeys(_MAGNITUDES, DORA), **{name: name for name in _RENAMED_ONLY}}
_KEY = re.compile(rf"(.+?)\.({'|'.join(map(re.escape, sorted(_TENSORS, key=len, reverse=True)))})")
#: names of diffusers before 0.20
_OLD_PROJECTION = re.compile(r"(?:\.processor)?\.to_(q|k|v|out)_lora\.(down|up)\.")


@dataclass(frozen=True)
class Module:
    """One adapted module of a file.

    Attributes:
        path: of the module, in ``space``; in ``"original"`` one of the part's ``ModulePaths``.
        tensors: by published name (``lora_down.weight``, ``alpha``, ...); ``dora_scale`` is (out, 1)
            or (1, in), with more ones for convolutions.
        name: the module's name in the file, for messages.
    """

    part: AdapterNaming
    space: Space
    path: str
    tensors: dict[str, Tensor]
    name: str

    @property
    def places(self) -> list[Place]:
        """Return the module's places in the original checkpoint; a joint module has those of all its parts."""
        paths = self.part.paths
        if self.space == "original":
            return [Place(self.path, index) for index in range(len(paths.to_diffusers(self.path)))]
        place = paths.to_original(self.path)
        assert place is not None, self.path
        return [place]

    @property
    def is_lora(self) -> bool:
        return {DOWN, UP} <= self.tensors.keys() <= LORA_TENSORS | {BIAS_CHANGE}

    @property
    def rank(self) -> int:
        return self.tensors[DOWN].shape[0]

    @property
    def strength(self) -> float:
        """Return alpha / rank; without alphas, alpha = rank."""
        alpha = self.tensors.get(ALPHA)
        return 1.0 if alpha is None else float(alpha) / self.rank


@dataclass(frozen=True)
class AdapterFile:
    path: Path
    naming: Naming
    family: AdapterFamily
    metadata: dict[str, str]
    modules: list[Module]
    is_own_oft: bool = False  # the file has this project's own layout of OFT


def check_readable(path: Path) -> None:
    """Refuse files that are clearly not adapters, before anything is loaded.

    Raises:
        UserError: no such file or folder, not a LoRA, names of no known program.
    """
    if path.is_dir():
        names: list[str] = [f"{root}.{name}" for root, file in _peft_files(path) for name in read_header(file).tensors]
    elif not path.exists():
        raise UserError(f"{path}: no such file")
    elif is_pickle(path):
        return  # its names cannot be read alone
    else:
        names = list(read_header(path).tensors)
    if is_own_layout(dict.fromkeys(names)):
        return
    if not any(_KEY.fullmatch(_modern(name)) for name in names):
        some = ", ".join(names[:2])
        found = f"({some}{', ...' if len(names) > 2 else ''})" if names else "or any others"
        raise UserError(f"{path}: holds no tensors of an adapter {found}; not a LoRA")


def read_adapter(path: Path, family: AdapterFamily | None = None) -> AdapterFile:
    """Read an adapter file, or a folder that PEFT wrote. fp8, in which torch can hardly compute, becomes bf16 without
    loss.

    Args:
        family: None detects it.

    Raises:
        UserError: missing or unreadable, not a LoRA, names of another family or of several programs, unknown tensors.
    """
    check_readable(path)
    naming, weights, metadata = _load(path)
    refuse_damaged(weights, str(path))
    is_own_oft = is_own_layout(weights)
    if is_own_oft:
        weights = as_diag_oft(weights, str(path))
    if family is None:
        shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        family = detect_family(shapes, metadata, str(path))
    grouped: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in weights.items():
        found = _KEY.fullmatch(_modern(key))
        if found is None:
            raise UserError(f"{path}: {key}: unknown kind of tensor; those of LoRA, DoRA and LyCORIS are known")
        kind = _TENSORS[found[2]]
        if kind in grouped[found[1]]:
            raise UserError(f"{path}: {key}: the module {found[1]} has two tensors of this kind")
        if tensor.element_size() == 1 and tensor.is_floating_point():
            tensor = tensor.bfloat16()
        grouped[found[1]][kind] = _column(tensor) if found[2] in _MAGNITUDES else tensor
    modules = [_module(family, naming, name, tensors, str(path)) for name, tensors in grouped.items()]
    _refuse_twice(modules, str(path))
    return AdapterFile(path, naming, family, metadata, modules, is_own_oft)


def _refuse_twice(modules: list[Module], title: str) -> None:
    found: dict[tuple[str, Place], str] = {}
    for module in modules:
        for place in module.places:
            other = found.setdefault((module.part.diffusers, place), module.name)
            if other != module.name:
                raise UserError(f"{title}: {other} and {module.name} are the same module; the file mixes two namings")


def _modern(key: str) -> str:
    if "_lora." not in key:
        return key
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}
    is_text = ".self_attn." in key

    def replace(found: re.Match[str]) -> str:
        module = names[found[1]] if is_text else f"to_{found[1]}" + (".0" if found[1] == "out" else "")
        return f".{module}.lora.{found[2]}."

    return _OLD_PROJECTION.sub(replace, key)


def _column(magnitudes: Tensor) -> Tensor:
    """Return (out,) as (out, 1), and (1, out, 1, 1) as (out, 1, 1, 1)."""
    return magnitudes.unsqueeze(1) if magnitudes.dim() == 1 else magnitudes.transpose(0, 1)


def _peft_files(folder: Path) -> list[tuple[str, Path]]:
    """Yield (diffusers' name of the model, file) of a folder that PEFT wrote, or of its subfolders; "" is unknown."""
    if (folder / PEFT_FILE).is_file():
        return [("", folder / PEFT_FILE)]
    found = sorted(folder.glob(f"*/{PEFT_FILE}"))
    if not found:
        raise UserError(f"{folder}: a folder without {PEFT_FILE}, which PEFT's have")
    for file in found:
        if (name := file.parent.name) not in (models := _models()):
            raise UserError(f"{file.parent}: not the name of a model{did_you_mean(name, models)}: {', '.join(models)}")
    return [(file.parent.name, file) for file in found]


def _load(path: Path) -> tuple[Naming, dict[str, Tensor], dict[str, str]]:
    """Load naming, tensors with alphas, and metadata; PEFT's tensors get diffusers' names."""
    if not path.is_dir() and is_pickle(path):
        weights = load_pickle(path)
        return detect_naming(weights, str(path)), weights, {}
    files = _peft_files(path) if path.is_dir() else [("", path)]
    metadata: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    for root, file in files:
        own = load_tensors(file)
        metadata |= read_header(file).metadata
        naming = detect_naming(own, str(file))
        if naming == "peft":
            root = root or _root(own)
            own = {_below(root, name.removeprefix(PEFT_ROOT)): tensor for name, tensor in own.items()}
            config = file.with_name(PEFT_CONFIG)
            if config.is_file():
                own = with_alphas(own, {ADAPTER_METADATA: json.dumps(_config(config, root))}, str(config))
        tensors |= own
    return naming, with_alphas(tensors, metadata, str(path)), metadata


def _below(root: str, name: str) -> str:
    """Return a name with its model's name before it; files of a whole pipeline have it already."""
    return name if name.startswith(tuple(f"{model}." for model in _models())) else f"{root}.{name}"


def _models() -> tuple[str, ...]:
    """Return the names that diffusers' pipelines give to models with adapters."""
    return tuple(dict.fromkeys(part.diffusers for part in namings()))


def _config(file: Path, root: str) -> dict[str, object]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return {f"{root}.{key}": value for key, value in content.items()}
    except (OSError, ValueError, AttributeError):
        raise UserError(f"{file}: cannot be read as PEFT's configuration") from None


def _root(weights: Mapping[str, Tensor]) -> str:
    """Return the model of a pipeline that an adapter from PEFT is for."""
    text = "\n".join(weights)
    if ".self_attn." in text:
        return "text_encoder"
    return "unet" if re.search("(down|mid|up)_blocks?", text) else "transformer"


def _module(family: AdapterFamily, naming: Naming, name: str, tensors: dict[str, Tensor], title: str) -> Module:
    """Return the module that a file calls ``name``.

    Raises:
        UserError: the family has no such module, or the halves of its LoRA do not fit.
    """
    down, up, alpha = tensors.get(DOWN), tensors.get(UP), tensors.get(ALPHA)
    if (down is None) != (up is None):
        raise UserError(f"{title}: {name}.{UP if up is None else DOWN} is missing")
    if down is not None and up is not None and (min(down.dim(), up.dim()) < 2 or not up.shape[1] == down.shape[0] > 0):
        raise UserError(f"{title}: {name}: lora_down {list(down.shape)} and lora_up {list(up.shape)} do not fit")
    if alpha is not None and alpha.numel() != 1:
        raise UserError(f"{title}: {name}.alpha: holds {alpha.numel()} numbers where one is expected")
    for part in family.parts:
        for prefix in part.prefixes(naming):
            if not name.startswith(prefix):
                continue
            given = name.removeprefix(prefix)
            path = part.paths.dotted(given) if naming == "kohya" else given
            is_text = part.paths is not family.parts[0].paths
            if naming != "kohya" and is_text and given.startswith("encoder.layers."):
                path = f"text_model.{given}"  # transformers 5 dropped the level
            space = None if path is None else _space(part, naming, path)
            if path is None or space is None:
                raise UserError(f"{title}: {name}: no module of {family.title} that adapters are known for")
            return Module(part, space, path, tensors, name)
    # some programs leave out the name of the denoiser
    space = _space(family.parts[0], naming, name)
    if space is not None:
        return Module(family.parts[0], space, name, tensors, name)
    old = (remedy for begin, remedy in family.old_names.items() if name.startswith(begin))
    remedy = next(old, "was it made for another model?")
    raise UserError(f"{title}: {name}: no model of {family.title} has this name; {remedy}")


def _space(part: AdapterNaming, naming: Naming, path: str) -> Space | None:
    """Return which kind of path it is: the one that the naming has, or the other."""
    usual = part.space(naming)
    others: dict[Space, Space] = {"original": "diffusers", "diffusers": "original"}
    for space in (usual, others[usual]):
        if part.paths.to_diffusers(path) if space == "original" else part.paths.to_original(path):
            return space
    return None
