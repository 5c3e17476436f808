"""ControlNets of U-Nets: read, complete, name for files, and apply.

Zhang et al. 2023, "Adding Conditional Control to Text-to-Image Diffusion Models" (arXiv:2302.05543): a copy of the
U-Net's way down reads an image beside the noisy latents, and its outputs are added to the skip connections. The class
is diffusers' ``ControlNetModel``. Files have the original names, with or without ``control_model.``, or diffusers'.

Shape legend: B images, R rows of a batch, C latent channels, (h, w) latent size, (H, W) pixels.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.architectures.common.checkpoint import locate
from library.architectures.common.diffusers_folder import read_json, weight_file
from library.architectures.common.key_map import KeyMap, TensorLayout
from library.architectures.common.ldm_unet import OUTER, encoder_pairs
from library.architectures.common.loading import ModelSource, load_frozen
from library.architectures.common.tensor_files import Shapes, TensorFile, WeightFile
from library.architectures.conditioning import Control
from library.errors import UserError

if TYPE_CHECKING:
    from diffusers.models.controlnets.controlnet import ControlNetModel

PUBLISHED_PREFIX = "control_model."
#: a tensor that marks files of differences to the weights of Stable Diffusion 1.5
DIFFERENCE = "difference"

_OWN = ("controlnet_cond_embedding", "controlnet_down_blocks", "controlnet_mid_block")
SHARED = ("conv_in", "time_embedding", "add_embedding", "class_embedding", "down_blocks", "mid_block")
_HINT = ("conv_in", *(f"blocks.{n}" for n in range(6)), "conv_out")


# ---- names ----


def diffusers_layout() -> TensorLayout:
    """Return the layout of files with diffusers' names."""
    return TensorLayout(KeyMap((name, name) for name in (*_OWN, *SHARED)))


def original_layout(config: Mapping[str, Any], *, prefix: str = "") -> TensorLayout:
    """Return the layout of files with the original names for a ControlNet of this configuration.

    Args:
        prefix: ``PUBLISHED_PREFIX`` in published files, nothing in those of training scripts.
    """
    levels, layers = len(config["down_block_types"]), int(config["layers_per_block"])
    pairs = [*OUTER[:3], *encoder_pairs(config)]
    pairs += [(f"input_hint_block.{2 * n}", f"controlnet_cond_embedding.{part}") for n, part in enumerate(_HINT)]
    outputs = levels * (layers + 1)  # behind the first convolution, each layer and each downsampling
    pairs += [(f"zero_convs.{n}.0", f"controlnet_down_blocks.{n}") for n in range(outputs)]
    return TensorLayout(KeyMap([*pairs, ("middle_block_out.0", "controlnet_mid_block")]), prefix)


# ---- reading ----


def controlnet_source(path_or_id: str, unet: ModelSource, *, flag: str) -> ModelSource:
    """Return the ControlNet in a file, a Diffusers folder or a Hub repository.

    Args:
        unet: of the model that it controls; parts that a file lacks come from it.
        flag: the option that named it, for messages.

    Raises:
        UserError: nothing there, something else, or a ControlNet of another model.
    """
    path = locate(path_or_id, flag=flag, components=("",))
    try:
        source = _in_folder(path) if path.is_dir() else _in_file(path, unet)
        _check_fits(source, unet)
    except UserError as error:
        raise UserError(f"{flag} {path_or_id}: {error}") from None
    return source


def _in_folder(path: Path) -> ModelSource:
    folder = path / "controlnet" if (path / "controlnet").is_dir() else path
    config = {k: v for k, v in read_json(folder / "config.json").items() if not k.startswith("_")}
    return ModelSource("ControlNet", TensorFile.open(weight_file(folder)), diffusers_layout(), config)


def _in_file(path: Path, unet: ModelSource) -> ModelSource:
    file = TensorFile.open(path)
    hint = "input_hint_block.0.weight"
    prefix = next((p for p in (PUBLISHED_PREFIX, "") if p + hint in file.shapes), None)
    if prefix is None and "controlnet_cond_embedding.conv_in.weight" not in file.shapes:
        what = "a ControlNet-LLLite" if any(name.startswith("lllite_") for name in file.shapes) else "no ControlNet"
        remedy = "; gen_img.py reads it with --control_net_lllite_models" if "LLLite" in what else ""
        raise UserError(f"the file holds {what} (its first tensor is {next(iter(file.shapes), 'none')}){remedy}")
    layout = diffusers_layout() if prefix is None else original_layout(unet.config, prefix=prefix)
    source = ModelSource("ControlNet", file, layout, {})
    shapes = {name: file.shapes[at] for name, at in _places(source).items()}
    config = _infer_config(shapes, unet.config, inner=prefix is None)
    missing = [name for name in _places(unet) if name.startswith(SHARED) and name not in shapes]
    if DIFFERENCE not in file.shapes and not missing:
        return ModelSource("ControlNet", file, layout, config)
    return ModelSource("ControlNet", OverUnet.of(source, unet), diffusers_layout(), config)


def _places(source: ModelSource) -> dict[str, str]:
    """Return the model's name -> the file's name."""
    return {name: at for at in source.file.shapes for name in source.layout.model_names(at)}


def unet_settings(unet: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a U-Net that its ControlNets share."""
    from diffusers.models.controlnets.controlnet import ControlNetModel

    known = inspect.signature(ControlNetModel.__init__).parameters
    return {name: value for name, value in unet.items() if name in known}


def _infer_config(shapes: Shapes, unet: Mapping[str, Any], *, inner: bool) -> dict[str, Any]:
    """Return the configuration of a ControlNet from its shapes by diffusers' names and its U-Net's configuration.

    Args:
        inner: whether the shapes have their own numbers of blocks; those of the original names follow the U-Net's.
    """
    hint = [shapes.get(f"controlnet_cond_embedding.{part}.weight", ()) for part in _HINT]
    if not all(hint) or "controlnet_mid_block.weight" not in shapes:
        raise UserError("lacks layers of a U-Net's ControlNet: it is for another kind of model, or incomplete")
    config = unet_settings(unet)
    config["conditioning_channels"] = hint[0][1]
    config["conditioning_embedding_out_channels"] = (hint[0][0], hint[2][0], hint[4][0], hint[6][0])
    if "conv_in.weight" in shapes:
        config["in_channels"] = shapes["conv_in.weight"][1]
    if inner and any(name.startswith("down_blocks.") for name in shapes):
        # small ControlNets of SDXL have fewer transformer blocks than the U-Net
        depths = [_depth(shapes, f"down_blocks.{level}") for level in range(len(config["down_block_types"]))]
        config["down_block_types"] = tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths)
        middle = _depth(shapes, "mid_block")
        config["mid_block_type"] = "UNetMidBlock2DCrossAttn" if middle else "UNetMidBlock2D"
        config["transformer_layers_per_block"] = tuple(depth or 1 for depth in depths)
    return config


def _depth(shapes: Shapes, block: str) -> int:
    pattern = re.compile(rf"{block}\.attentions\.0\.transformer_blocks\.(\d+)\.")
    return max((int(found[1]) + 1 for name in shapes if (found := pattern.match(name))), default=0)


def _check_fits(source: ModelSource, unet: ModelSource) -> None:
    """Refuse a ControlNet whose widths are not the U-Net's."""
    shapes = {name: source.file.shapes[at] for name, at in _places(source).items()}
    context = {shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")}
    width = unet.config["cross_attention_dim"]
    if context and context != {width}:
        raise UserError(f"it reads text of width {max(context)}, and the model's is {width}; it is for another model")
    channels = list(unet.config["block_out_channels"])
    levels = len(channels)
    last = shapes.get("controlnet_mid_block.weight", (0,))[0]
    if last != channels[-1] or len(source.config.get("block_out_channels", channels)) != levels:
        raise UserError(f"it has {last} channels in the middle, and the model {channels[-1]}; it is for another model")


@dataclass(frozen=True)
class OverUnet(WeightFile):
    """The tensors of a ControlNet by diffusers' names, completed from its U-Net, and added to it in files of
    differences."""

    path: Path
    shapes: Shapes
    control: ModelSource
    unet: ModelSource
    mapped: bool = False
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict, repr=False)

    @staticmethod
    def of(control: ModelSource, unet: ModelSource) -> OverUnet:
        own, theirs = _places(control), _places(unet)
        shapes = {name: unet.file.shapes[at] for name, at in theirs.items() if name.startswith(SHARED)}
        shapes |= {name: control.file.shapes[at] for name, at in own.items()}
        return OverUnet(control.file.path, shapes, control, unet)

    @contextmanager
    def opened(self) -> Iterator[Callable[[str], Tensor]]:
        own, theirs = _places(self.control), _places(self.unet)
        is_difference = DIFFERENCE in self.control.file.shapes
        with self.control.file.opened() as read_own, self.unet.file.opened() as read_theirs:

            def read(name: str) -> Tensor:
                if name not in own:
                    return read_theirs(theirs[name])
                tensor = read_own(own[name])
                if is_difference and name in theirs:
                    return tensor.float() + read_theirs(theirs[name]).float()
                return tensor

            yield read


def load_controlnet(source: ModelSource, *, dtype: torch.dtype, device: str) -> ControlNetModel:
    """Load a ControlNet, frozen, in eval mode."""
    return load_frozen(source, partial(build_controlnet, source.config), dtype=dtype, device=device)


def build_controlnet(config: Mapping[str, Any]) -> ControlNetModel:
    from diffusers.models.controlnets.controlnet import ControlNetModel

    return ControlNetModel.from_config(dict(config))


def controlnet_of(unet: nn.Module) -> ControlNetModel:
    """Return a new ControlNet that starts from a U-Net's weights and changes nothing yet, for training."""
    from diffusers.models.controlnets.controlnet import ControlNetModel

    return ControlNetModel.from_unet(unet)


# ---- applying ----


def residuals(
    controlnet: nn.Module,
    noisy: Tensor,
    timesteps: Tensor,
    inputs: Mapping[str, Any],
    image: Tensor,
    *,
    weight: float = 1.0,
) -> Control:
    """Return what a ControlNet adds to the U-Net: ``down``, one tensor for each skip connection, and ``mid``.

    Args:
        noisy: (R, C, h, w).
        inputs: further arguments of the U-Net, see ``LatentDiffusion.unet_inputs``.
        image: (B, 3, H, W) in [0, 1]; R is a multiple of B, whose images repeat.
        weight: factor of all outputs.
    """
    image = image.repeat(len(noisy) // len(image), 1, 1, 1)
    down, mid = controlnet(
        noisy, timesteps, controlnet_cond=image, conditioning_scale=weight, return_dict=False, **inputs
    )
    return {"down": [as_features(part) for part in down], "mid": as_features(mid)}


def as_features(made: Tensor) -> Tensor:
    """Return an output of a ControlNet in the dtype of the denoiser's features.

    A ControlNet that is trained gives float32, as its forward was wrapped for mixed precision. Added to half-precision
    features it would make all later ones float32.
    """
    kind = made.device.type
    return made.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else made


def mean_of(controls: list[Control]) -> Control:
    """Return the mean of several ControlNets' outputs."""
    if len(controls) == 1:
        return controls[0]
    count = len(controls)
    down = [sum(parts) / count for parts in zip(*(control["down"] for control in controls), strict=True)]
    return {"down": down, "mid": sum(control["mid"] for control in controls) / count}
