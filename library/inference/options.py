"""The command line of ``gen_img.py``: one field per published flag."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from library.config.arguments import ConsoleOptions, Options, flat, with_groups
from library.config.attention import missing_package
from library.config.declaration import Facts, message
from library.config.fields import option
from library.config.prompt_options import MAX_SEED
from library.diffusion.samplers import SAMPLER_NAMES, check_sampler
from library.errors import UserError
from library.inference import feature_options
from library.inference.prompt_line import MAX_STEPS

T = TypeVar("T")


@dataclass(frozen=True)
class ImageModelOptions:
    """Model."""

    ckpt: str | None = option(None, "checkpoint file, Diffusers folder or Hub id")
    v1: bool = option(False, "the model is Stable Diffusion 1.x, as it is without --v2")
    v2: bool = option(False, "the model is Stable Diffusion 2.x")
    sdxl: bool = option(False, "the model is Stable Diffusion XL, if the file does not show it")
    v_parameterization: bool = option(False, "the model predicts v, as SD 2.x at 768 pixels does")
    zero_terminal_snr: bool = option(False, "the model was trained with zero terminal SNR; needs --v_parameterization")
    vae: str | None = option(None, "VAE file or folder to use instead of the model's own")
    no_half_vae: bool = option(False, "decode in float32 with --fp16 or --bf16")
    tokenizer_cache_dir: str | None = option(None, "folder that holds the tokenizer, for use without network")
    clip_skip: int | None = option(None, "text encoder layer to use, counted from the last, 1", type=int)
    max_embeddings_multiples: int | None = option(None, "text window in units of 75 tokens, 1 to 3", type=int)
    emb_normalize_mode: str = option(
        "original", "what emphasis keeps of a text's encoding: its mean, nothing, or its mean size",
        choices=["original", "none", "abs"],
    )  # fmt: skip
    textual_inversion_embeddings: list[str] | None = option(
        None, "embedding files; each is used by its name without the ending as a word of a prompt", nargs="*"
    )
    XTI_embeddings: list[str] | None = option(
        None,
        "embedding files with vectors for each layer, of train_textual_inversion_XTI.py (SD 1.x and 2.x)",
        nargs="*",
    )


@dataclass(frozen=True)
class PromptOptions:
    """Prompts and seeds."""

    prompt: str | None = option(None, "prompt, with options such as --n and --w in the same text")
    from_file: str | None = option(None, "text file with one prompt per line; # begins a comment")
    from_module: str | None = option(None, "Python file whose get_prompter(args, models, networks) makes the prompts")
    prompter_module_args: str | None = option(None, "text for that file, which reads it from args")
    interactive: bool = option(False, "read prompts with options from the keyboard, one per line, until an empty line")
    no_preview: bool = option(False, "do not show images on the screen; this version never does")
    shuffle_prompts: bool = option(False, "shuffle the prompts of each iteration")
    images_per_prompt: int = option(1, "images of each prompt, with seeds that count up by one", type=int)
    n_iter: int = option(1, "how often to go through all prompts, each time with other seeds", type=int)
    seed: int | None = option(None, "seed of the run; random if not given, and shown", type=int)
    grid: list[str] | None = option(
        None, "an image for each combination on one sheet: axes such as scale=3,5,7 seed=1,2 file", nargs="*"
    )
    iter_same_seed: bool = option(False, "use the same seeds for all prompts of an iteration")


@dataclass(frozen=True)
class ImageOutputOptions:
    """Images."""

    outdir: str = option("outputs", "folder for the images")
    sequential_file_name: bool = option(False, "name images im_000001.png, im_000002.png, ...")
    use_original_file_name: bool = option(False, "name images after their source images of --image_path")
    W: int | None = option(None, "width in pixels; default is the model's own resolution", type=int)
    H: int | None = option(None, "height in pixels; default is the model's own resolution", type=int)
    steps: int = option(50, "sampling steps", type=int)
    scale: float = option(7.5, "classifier-free guidance scale; 1 for none", type=float)
    sampler: str = option("ddim", "sampler", choices=list(SAMPLER_NAMES))
    negative_scale: float | None = option(
        None, "guidance scale of the negative prompt alone; --scale is then that of the prompt", type=float
    )
    force_scheduler_zero_steps_offset: bool = option(
        False, "timesteps without the offset of 1 that the models were released with (ddim, pndm)"
    )
    image_path: str | None = option(
        None, "image to start from (img2img), or a folder of images used in turn", aliases=("--img_path",)
    )
    mask_path: str | None = option(
        None,
        "mask for --image_path: white is repainted, black is kept; or, with networks or without --image_path, a map "
        "of the regions of the prompt's parts; or a folder of masks",
        aliases=("--mask_image",),
    )
    strength: float | None = option(
        None, "how much --image_path is changed: the share of the steps that are run, 0 to 1 (default 0.8)", type=float
    )
    original_height: int | None = option(
        None, "original height of the image as a condition of the model, pixels (SDXL)", type=int
    )
    original_width: int | None = option(None, "the same of its width", type=int)
    original_height_negative: int | None = option(
        None, "--original_height beside the negative prompt; as beside the prompt, if not given", type=int
    )
    original_width_negative: int | None = option(None, "the same of its width", type=int)
    crop_top: int | None = option(None, "pixels cropped off at the top as a condition of the model (SDXL)", type=int)
    crop_left: int | None = option(None, "the same at the left", type=int)
    pyramid_noise_prob: float | None = option(
        None, "share of the images that start from noise of several sizes, for models trained with it", type=float
    )
    pyramid_noise_discount_range: list[float] | None = option(
        None, "range of the factor from size to size, two numbers; 0.4 if not given", nargs=2, type=float
    )
    noise_offset_prob: float | None = option(
        None, "share of the images whose noise gets an offset, for models trained with one", type=float
    )
    noise_offset_range: list[float] | None = option(None, "range of the offset, two numbers", nargs=2, type=float)


@dataclass(frozen=True)
class SpeedOptions:
    """Memory and speed."""

    batch_size: int = option(1, "how many images are generated at once, if their settings agree", type=int)
    fp16: bool = option(False, "compute in float16")
    bf16: bool = option(False, "compute in bfloat16")
    attn_mode: str | None = option(
        None,
        "implementation of attention, instead of --sdpa and --xformers; sdpa is another name for torch",
        choices=["torch", "xformers", "flash", "sageattn", "sdpa", "flex"],
    )
    split_attn: bool = option(False, "compute attention image by image, which takes less memory")
    xformers: bool = option(False, "attention by xformers")
    sdpa: bool = option(False, "attention by PyTorch's scaled_dot_product_attention, which is the default")
    diffusers_xformers: bool = option(False, "the same as --xformers")
    torch_compile: bool = option(False, "compile the U-Net's blocks: the first image of each size waits for it")
    dynamo_backend: str = option("inductor", "compiler of --torch_compile")
    vae_tiling: bool = option(False, "decode large images in tiles, which blend: less memory, slightly other images")
    opt_channels_last: bool = option(False, "keep the U-Net's weights in the memory format channels_last")
    vae_batch_size: float | None = option(
        None, "images decoded at once, or below 1 their share of --batch_size; default is 1", type=float
    )
    vae_slices: int | None = option(
        None, "strips of rows in which the VAE works, such as 16: less memory, the same images", type=int
    )


def attention_of(options: SpeedOptions) -> str:
    """Return the implementation of attention, for ``Architecture.set_attention``."""
    if options.attn_mode is not None:
        return "torch" if options.attn_mode == "sdpa" else options.attn_mode
    return "xformers" if options.xformers or options.diffusers_xformers else "torch"


@dataclass(frozen=True)
class ImageNetworkOptions:
    """Additional networks."""

    network_module: list[str] | None = option(None, "module of each network, such as networks.lora", nargs="*")
    network_weights: list[str] | None = option(None, "weight file of each network", nargs="*")
    network_mul: list[float] | None = option(None, "strength of each network, 1 if not given", type=float, nargs="*")
    network_args: list[str] | None = option(None, "arguments of each network as key=value,key=value", nargs="*")
    network_merge: bool = option(False, "merge the networks into the model first: faster, but --am cannot be used")
    network_merge_n_models: int | None = option(
        None, "merge the first n networks alone, and apply the others", type=int
    )
    network_show_meta: bool = option(False, "show the metadata of the networks' files")
    network_pre_calc: bool = option(
        False, "merge the networks before each batch and restore the model after: faster steps, and --am can be used"
    )
    network_regional_mask_max_color_codes: int | None = option(
        None,
        "number of regions that pure colors of --mask_path tell, 1 to 8; default is one for each channel",
        type=int,
    )


@dataclass(frozen=True)
class HighresFixOptions:
    """Highres fix: a small image first, then a large one from it."""

    highres_fix_scale: float | None = option(
        None, "sides of the small image as a share of --W and --H, such as 0.5; turns highres fix on", type=float
    )
    highres_fix_steps: int = option(28, "sampling steps of the small image", type=int)
    highres_fix_strength: float | None = option(
        None, "--strength of the small image, if --image_path is given (default: as --strength)", type=float
    )
    highres_fix_save_1st: bool = option(False, "save the small images too")
    highres_fix_latents_upscaling: bool = option(False, "enlarge the latents instead of the decoded image")
    highres_fix_upscaler: str | None = option(None, "module that enlarges instead of Lanczos: tools.latent_upscaler")
    highres_fix_upscaler_args: str | None = option(None, "its arguments, such as weights=upscaler.safetensors")


#: options and settings of the sizes that condition the model
SIZE_NAMES = (
    *("original_height", "original_width", "original_height_negative", "original_width_negative"),
    *("crop_top", "crop_left"),
)


@dataclass(frozen=True)
class ImageOptions(Options):
    """The options of ``gen_img.py``, by group; features of generation have further ones, see ``feature_options``."""

    console: ConsoleOptions
    model: ImageModelOptions
    prompts: PromptOptions
    image: ImageOutputOptions
    speed: SpeedOptions
    networks: ImageNetworkOptions
    highres: HighresFixOptions

    def of(self, group: type[T]) -> T:
        """Return the options of a feature: the group of this class."""
        return next(value for value in vars(self).values() if isinstance(value, group))


def image_groups() -> dict[str, type]:
    """Return all groups of options, those of features last."""
    return {**ImageOptions.groups(), **feature_options.declared().groups}


def image_options(args: argparse.Namespace) -> ImageOptions:
    """Read the options from a namespace; missing attributes have their defaults."""
    return with_groups(ImageOptions, feature_options.declared().groups).from_args(args)


def check_options(options: ImageOptions) -> None:
    """Refuse what cannot work, all findings at once, before anything is loaded.

    Raises:
        UserError: one line per finding.
    """
    findings = [finding for rule in _RULES for finding in rule(options)]
    findings += [finding.text for rule in feature_options.declared().rules for finding in rule(options, Facts())]
    if findings:
        raise UserError("\n".join(findings))


def _prompts_given(options: ImageOptions) -> Iterator[str]:
    given = options.prompts
    if given.interactive:
        return
    sources = {"prompt": given.prompt, "from_file": given.from_file, "from_module": given.from_module}
    named = [f"--{name}" for name, value in sources.items() if value is not None]
    if not named and not options.image.image_path:
        yield "nothing to generate: give --prompt, --from_file, --from_module or --interactive"
    elif len(named) > 1:
        yield f"{' and '.join(named)} were both given; give one of them"


def _model_given(options: ImageOptions) -> Iterator[str]:
    if not options.model.ckpt:
        yield "--ckpt is required: a checkpoint file, a Diffusers folder or a Hub id"
    if options.model.v1 and options.model.v2:
        yield "--v1 and --v2 contradict each other"
    if options.model.sdxl and (options.model.v1 or options.model.v2):
        yield "--sdxl contradicts --v1 and --v2"


def _one_precision(options: ImageOptions) -> Iterator[str]:
    if options.speed.fp16 and options.speed.bf16:
        yield "--fp16 and --bf16 were both given; give one of them"


def _one_attention(options: ImageOptions) -> Iterator[str]:
    if (options.speed.xformers or options.speed.diffusers_xformers) and options.speed.sdpa:
        yield "--xformers and --sdpa were both given; give one of them"
    mode, named = attention_of(options.speed), options.speed.attn_mode is not None
    older = "diffusers_xformers" if options.speed.diffusers_xformers else mode
    if missing := missing_package(mode, f"--attn_mode {mode}" if named else f"--{older}"):
        yield missing
    elif mode in ("flash", "sageattn") and not (options.speed.fp16 or options.speed.bf16):
        yield f"--attn_mode {mode}: works in half precision only; add --bf16 or --fp16, or use --sdpa"


def _ranges(options: ImageOptions) -> Iterator[str]:
    at_least_one = {
        "images_per_prompt": options.prompts.images_per_prompt,
        "n_iter": options.prompts.n_iter,
        "batch_size": options.speed.batch_size,
        "clip_skip": options.model.clip_skip,
        "W": options.image.W,
        "H": options.image.H,
        "vae_slices": options.speed.vae_slices,
        "network_merge_n_models": options.networks.network_merge_n_models,
        **{name: getattr(options.image, name) for name in SIZE_NAMES[:4]},
    }
    for name, value in at_least_one.items():
        if value is not None and value < 1:
            yield f"--{name} {value}: must be at least 1"
    if not 1 <= options.image.steps <= MAX_STEPS:
        yield f"--steps {options.image.steps}: must be 1 to {MAX_STEPS}"
    multiples = options.model.max_embeddings_multiples
    if multiples is not None and not 1 <= multiples <= 3:
        yield f"--max_embeddings_multiples {multiples}: must be 1, 2 or 3"
    seed = options.prompts.seed
    if seed is not None and not 0 <= seed <= MAX_SEED:
        yield f"--seed {seed}: must be 0 to {MAX_SEED}"


def _vae_batch(options: ImageOptions) -> Iterator[str]:
    size = options.speed.vae_batch_size
    if size is not None and not 0 < size < float("inf"):
        yield f"--vae_batch_size {size:g}: must be above 0"


def _numbers_are_finite(options: ImageOptions) -> Iterator[str]:
    image = options.image
    given = {
        "scale": [image.scale],
        "negative_scale": [] if image.negative_scale is None else [image.negative_scale],
        "network_mul": options.networks.network_mul or [],
    }
    for name, values in given.items():
        for value in values:
            if not abs(value) < float("inf"):
                yield f"--{name} {value}: must be a finite number"


def _sources(options: ImageOptions) -> Iterator[str]:
    image = options.image
    codes = options.networks.network_regional_mask_max_color_codes
    if codes is not None and not 1 <= codes <= 8:
        yield f"--network_regional_mask_max_color_codes {codes}: must be 1 to 8"
    if image.strength is not None and not 0 <= image.strength <= 1:
        yield f"--strength {image.strength:g}: must be 0 to 1"
    for name in ("pyramid_noise_prob", "noise_offset_prob"):
        share = getattr(image, name)
        if share is not None and not 0 <= share <= 1:
            yield f"--{name} {share:g}: must be 0 to 1"
    if image.noise_offset_prob and image.noise_offset_range is None:
        yield "--noise_offset_prob: give the range of the offset with --noise_offset_range"


def _highres_fix(options: ImageOptions) -> Iterator[str]:
    fix = options.highres
    if fix.highres_fix_scale is not None and not 0 < fix.highres_fix_scale < 1:
        yield f"--highres_fix_scale {fix.highres_fix_scale:g}: must be above 0 and below 1, such as 0.5"
    if not 1 <= fix.highres_fix_steps <= MAX_STEPS:
        yield f"--highres_fix_steps {fix.highres_fix_steps}: must be 1 to {MAX_STEPS}"
    if fix.highres_fix_strength is not None and not 0 <= fix.highres_fix_strength <= 1:
        yield f"--highres_fix_strength {fix.highres_fix_strength:g}: must be 0 to 1"


def _folder_fits(options: ImageOptions) -> Iterator[str]:
    if Path(options.image.outdir).exists() and not Path(options.image.outdir).is_dir():
        yield f"--outdir {options.image.outdir}: is a file; give a folder"


def _sampler_fits(options: ImageOptions) -> Iterator[str]:
    try:
        check_sampler(
            options.image.sampler,
            v_prediction=options.model.v_parameterization,
            zero_terminal_snr=options.model.zero_terminal_snr,
        )
    except UserError as error:
        yield str(error)


_RULES: tuple[Callable[[ImageOptions], Iterator[str]], ...] = (
    _prompts_given,
    _model_given,
    _one_precision,
    _one_attention,
    _ranges,
    _vae_batch,
    _numbers_are_finite,
    _sources,
    _highres_fix,
    _folder_fits,
    _sampler_fits,
)


def idle_options(options: ImageOptions) -> list[str]:
    """Return a warning for each option that has no effect with the others."""
    image, fix = options.image, options.highres
    found = []
    if options.prompts.interactive:
        for name in ("prompt", "from_file", "from_module"):
            if getattr(options.prompts, name) is not None:
                found.append(f"--{name} has no effect with --interactive, which reads prompts from the keyboard")
    if not image.image_path:
        if image.strength is not None and fix.highres_fix_scale is None:
            found.append("--strength has no effect without --image_path or --highres_fix_scale")
        if image.use_original_file_name:
            found.append("--use_original_file_name has no effect without --image_path")
        if fix.highres_fix_strength is not None:
            found.append("--highres_fix_strength has no effect without --image_path")
    for share, name in (
        ("pyramid_noise_prob", "pyramid_noise_discount_range"),
        ("noise_offset_prob", "noise_offset_range"),
    ):
        if getattr(image, name) is not None and not getattr(image, share):
            found.append(f"--{name} has no effect without --{share}")
    if image.force_scheduler_zero_steps_offset and image.sampler not in ("ddim", "pndm"):
        found.append(f"--force_scheduler_zero_steps_offset has no effect with --sampler {image.sampler}")
    if options.speed.dynamo_backend != SpeedOptions.dynamo_backend and not options.speed.torch_compile:
        found.append("--dynamo_backend has no effect without --torch_compile")
    if options.speed.attn_mode is not None:
        given = [name for name in ("xformers", "diffusers_xformers", "sdpa") if getattr(options.speed, name)]
        found += [f"--{name} has no effect beside --attn_mode, which wins" for name in given]
    if options.prompts.prompter_module_args is not None and options.prompts.from_module is None:
        found.append("--prompter_module_args has no effect without --from_module")
    if fix.highres_fix_upscaler_args is not None and fix.highres_fix_upscaler is None:
        found.append("--highres_fix_upscaler_args has no effect without --highres_fix_upscaler")
    if fix.highres_fix_upscaler is not None and fix.highres_fix_latents_upscaling:
        found.append("--highres_fix_latents_upscaling has no effect with --highres_fix_upscaler")
    if fix.highres_fix_scale is None:
        names = ("highres_fix_steps", "highres_fix_save_1st", "highres_fix_latents_upscaling", "highres_fix_upscaler")
        given = [f"--{name}" for name in names if getattr(fix, name) != getattr(HighresFixOptions, name)]
        found += [f"{flag} has no effect without --highres_fix_scale" for flag in given]
    for rule in feature_options.declared().idle:
        if rule.applies(options):
            changed = [f.name for f, value in flat(options) if f.name in rule.names and value != f.default]
            found += [message([name], rule.reason) for name in changed]
    if options.networks.network_regional_mask_max_color_codes is not None and not image.mask_path:
        found.append("--network_regional_mask_max_color_codes has no effect without --mask_path")
    if options.networks.network_pre_calc and options.networks.network_merge:
        found.append("--network_pre_calc has no effect with --network_merge")
    if image.negative_scale is not None and image.scale == 1.0:
        found.append("--negative_scale has no effect with --scale 1")
    return found
