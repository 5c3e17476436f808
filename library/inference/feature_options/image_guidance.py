"""Options of guidance by CLIP and VGG16, and of CLIP vision conditioning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from library.config import prompt_options as read
from library.config.declaration import Declaration, Facts, Finding, error, idle
from library.config.fields import option
from library.config.prompt_options import PromptOption

#: samplers whose noise or latents can be moved
SAMPLERS = ("ddim", "pndm", "lms", "k_lms")
SCALES = ("clip_guidance_scale", "clip_image_guidance_scale", "vgg16_guidance_scale")
#: layers of VGG16's convolutional part
VGG16_LAYERS = 31


@dataclass(frozen=True)
class ImageGuidanceOptions:
    """Guidance by models that see the image, and CLIP vision conditioning."""

    clip_guidance_scale: float = option(
        0.0, "move the image towards the prompt, or --c in it, as a larger CLIP sees both; 100 is usual", type=float
    )
    clip_image_guidance_scale: float = option(
        0.0, "move the image towards --guide_image_path as that CLIP sees both; 100 is usual", type=float
    )
    vgg16_guidance_scale: float = option(
        0.0, "move the image towards --guide_image_path as VGG16 sees both; 100 is usual", type=float
    )
    vgg16_guidance_layer: int = option(
        20, "layer of VGG16 whose features are compared; later ones see content, earlier ones style", type=int,
        aliases=("--vgg16_guidance_layerP",),
    )  # fmt: skip
    clip_vision_strength: float | None = option(
        None, "put what CLIP sees in --image_path, times this, in the place of the pooled text (SDXL)", type=float
    )


PROMPT_OPTIONS = (PromptOption("c", "clip_prompt", read.text),)


def _cannot_work(options: Any, facts: Facts) -> Iterator[Finding]:
    given: ImageGuidanceOptions = options.image_guidance
    for name in (*SCALES, "clip_vision_strength"):
        value = getattr(given, name)
        if value is not None and not abs(value) < float("inf"):
            yield error(f"--{name} {value}: must be a finite number")
    wanted = [name for name in SCALES if getattr(given, name)]
    if wanted and options.image.sampler not in SAMPLERS:
        yield error(f"--{wanted[0]}: works with the samplers {', '.join(SAMPLERS)}, not with {options.image.sampler}")
    for name in SCALES[1:]:
        if getattr(given, name) and not options.control.guide_image_path:
            yield error(f"--{name}: there is no image to move towards; give --guide_image_path")
    if any(getattr(given, name) for name in SCALES[1:]) and (
        options.control.control_net_models or options.control.control_net_lllite_models
    ):
        yield error(
            "--guide_image_path: is read by ControlNets, and cannot be for CLIP or VGG16 guidance in the same run"
        )
    if not 0 <= given.vgg16_guidance_layer < VGG16_LAYERS:
        yield error(f"--vgg16_guidance_layer {given.vgg16_guidance_layer}: must be 0 to {VGG16_LAYERS - 1}")
    if given.clip_vision_strength is not None and not options.image.image_path:
        yield error("--clip_vision_strength: there is no image to see; give --image_path")


@idle("vgg16_guidance_layer", reason="without --vgg16_guidance_scale")
def _no_vgg16(options: Any) -> object:
    return not options.image_guidance.vgg16_guidance_scale


@idle("guide_image_path", reason="without a ControlNet, or CLIP-image or VGG16 guidance")
def _nothing_reads_guides(options: Any) -> object:
    control, guidance = options.control, options.image_guidance
    models = control.control_net_models or control.control_net_lllite_models
    return not models and not any(getattr(guidance, name) for name in SCALES[1:])


DECLARATION = Declaration(
    groups={"image_guidance": ImageGuidanceOptions}, rules=(_cannot_work,), idle=(_no_vgg16, _nothing_reads_guides)
)
