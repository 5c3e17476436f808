"""The interface of a family for its minimal inference script: its options, and how they open a model.

``INFERENCE`` in a family's ``inference.py`` is a ``MinimalInference``. The script reads it for ``--help``, so that file
imports torch and models within functions only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from library.config.arguments import options_of
from library.config.fields import option
from library.config.prompt_options import PromptOption
from library.memory.part_dtypes import PartDtype

if TYPE_CHECKING:
    from torch import nn

    from library.architectures.base import Architecture


@dataclass(frozen=True)
class LoraWeightsOptions:
    """LoRA."""

    lora_weights: list[str] | tuple[str, ...] = option(
        (), "LoRA or OFT files, each with its strength after a semicolon: 'file;0.8'", nargs="*", aliases=("--lora",)
    )
    merge_lora_weights: bool = option(
        False, "merge them into the model first: faster, but strengths cannot be changed by --m"
    )


@dataclass(frozen=True)
class HalfPrecisionOptions:
    """Precision and memory."""

    fp16: bool = option(False, "weights and computation in float16; default is float32")
    bf16: bool = option(False, "the same in bfloat16")
    offload: bool = option(False, "keep only the part in use on the device, and free it afterwards")

    @property
    def dtype(self) -> str:
        return "float16" if self.fp16 else "bfloat16" if self.bf16 else "float32"


def one_half_precision(options: Any) -> Iterator[str]:
    """Yield what is wrong with ``HalfPrecisionOptions``."""
    if options.precision.fp16 and options.precision.bf16:
        yield "--fp16 and --bf16 exclude each other; leave one out"


@dataclass(frozen=True)
class ImageRequest:
    """The images that a command line asks for, in the words of all families.

    Attributes:
        prompt: with ``interactive``, prompts are typed instead.
        settings: by the names of ``ImageSettings`` and of prompt options; None: the model's own.
        lora_weights: ``file;strength``.
        device: None: the GPU, if there is one.
    """

    prompt: str
    interactive: bool
    output_dir: str
    seed: int | None
    settings: Mapping[str, Any]
    lora_weights: Sequence[str] = ()
    merge_lora_weights: bool = False
    offload: bool = False
    device: str | None = None
    prompt_file: str | None = None  # prompts with options, a line each, instead of ``prompt``
    latent_files: Sequence[str] = ()  # decoded instead
    image_file: str | None = None  # of the first image, instead of a name of the session's own; ends with .png
    saves: Collection[str] = ("image",)  # "image", "latent" or both
    with_metadata: bool = True
    blocks_to_swap: int = 0
    lora_patterns: tuple[Sequence[str], Sequence[str]] = ((), ())  # regular expressions: only these names, not these
    merged_file: str | None = None  # the denoiser with its LoRA, saved instead of images


#: settings that every script has
_SETTINGS = ("negative_prompt", "width", "height", "steps", "scale")


def usual_request(options: Any, flags: Mapping[str, str], **more: Any) -> ImageRequest:
    """Return the request of a script whose options are in groups and fields of the usual names.

    Args:
        options: with the groups ``image``, ``networks`` and ``precision``.
        flags: of ``MinimalInference``.
        more: further settings.
    """
    image, networks = options.image, options.networks
    settings = {name: getattr(image, flags.get(name, name)) for name in _SETTINGS}
    return ImageRequest(
        prompt=image.prompt,
        interactive=image.interactive,
        output_dir=image.output_dir,
        seed=image.seed,
        settings={**settings, **more},
        lora_weights=networks.lora_weights,
        merge_lora_weights=networks.merge_lora_weights,
        offload=options.precision.offload,
    )


@dataclass(frozen=True)
class ModelPart:
    """One part of the model: its name in the flags, and how it is kept in memory."""

    name: str
    dtype: PartDtype
    form: str = "fp8"  # of its weights in fp8, see ``library/memory/forms.py``


def _unchanged(part: str, module: nn.Module) -> None:
    """Leave a loaded part as it is."""


@dataclass(frozen=True)
class OpenedModel:
    """A model whose files were found and inspected; no weights are read.

    Attributes:
        family: as used with this checkpoint.
        encoders: text encoders, in the family's order.
        settings: what images get where neither prompt nor request gives it, by the names of ``ImageSettings``.
        encodes_on_host: whether the text encoders stay and compute in host memory.
        prepare: called with the name of each loaded part ("text_encoder_1", "denoiser", "vae") and its module, such as
            to choose its attention or to decode in tiles.
    """

    family: Architecture
    checkpoint: Any
    encoders: Sequence[ModelPart]
    denoiser: ModelPart
    vae: ModelPart
    settings: Mapping[str, Any] = field(default_factory=dict)
    encodes_on_host: bool = False
    prepare: Callable[[str, nn.Module], None] = _unchanged


@dataclass(frozen=True)
class MinimalInference:
    """A family's minimal inference script.

    Attributes:
        groups: of its options.
        request: options -> what they ask for; no file is read.
        open: options -> the model. Raises UserError: files that are missing, or are of other models.
        findings: options -> what is wrong with them, beside what is checked for all families.
        flags: names of settings and of ``output_dir`` in flags, where they differ: ``{"width": "image_width"}``.
        prompt_options: further options within prompts, beside those of the family's declaration.
        size_step: sides of images are multiples of this many pixels.
        model_flag: the flag of the model, for messages.
        lora_flag: the flag of adapter files.
        nan_remedy: advice for an image whose values are not finite.
    """

    groups: Mapping[str, type]
    request: Callable[[Any], ImageRequest]
    open: Callable[[Any], OpenedModel]
    findings: Callable[[Any], Iterator[str]] = lambda options: iter(())
    flags: Mapping[str, str] = field(default_factory=dict)
    prompt_options: tuple[PromptOption, ...] = ()
    size_step: int = 16
    model_flag: str = "--ckpt_path"
    lora_flag: str = "--lora_weights"
    nan_remedy: str = "try --ae_dtype float32, or --dtype bfloat16"

    @functools.cached_property
    def options(self) -> type[Any]:
        """Return the class of all options, a field for each group."""
        return options_of("InferenceOptions", dict(self.groups))
