"""The memory plan of a run, from its options and its kind."""

from __future__ import annotations

from library.architectures.base import Architecture
from library.architectures.part import DENOISER, VAE, text_encoder_name
from library.config.arguments import TrainingOptions
from library.errors import UserError
from library.memory.block_stream import swapped_counts
from library.memory.forms import FORMS
from library.memory.plan import Home, MemoryPlan, PlannedStorage
from library.training.kinds.base import Kind
from library.training.models import Models
from library.training.precision import vae_dtype
from library.training.run import Run
from library.training.text_caching import caches_texts


def memory_plan(run: Run, kind: Kind) -> MemoryPlan:
    """Return the plan of the run: dtype, storage and place of each part."""
    architecture, options = run.architecture, run.options
    trained = {name: need.dtype for name, need in kind.needs().items()}
    encoders = [text_encoder_name(number) for number in range(1, len(run.cached_encoders) + 1)]
    cached = frozenset(name for name, is_cached in zip(encoders, run.cached_encoders, strict=True) if is_cached)
    vae_home: Home = "device"
    if run.caches_latents and not architecture.takes_images:
        vae_home = "host" if run.checked.prompts else "none"
    return MemoryPlan.of(
        run.device,
        frozen=run.weight_dtype,
        encoders=encoders,
        denoiser=DENOISER,
        vae=VAE,
        trained=trained,
        storage=PlannedStorage(
            forms={
                name: form
                for name, form in _forms(
                    options.training, architecture, encoders, caches=caches_texts(options.dataset)
                ).items()
                if name not in trained
            },
            fp8_matmul=options.training.fp8_matmul,
            sharded=run.sharding is not None,
            blocks_to_swap=architecture.blocks_to_swap,
            cached=cached,
        ),
        vae_dtype=vae_dtype(options.model, run.weight_dtype),
        vae_home=vae_home,
    )


def _forms(
    options: TrainingOptions, architecture: Architecture, encoders: list[str], *, caches: bool
) -> dict[str, str]:
    """Return the form of each frozen part that is not kept in its dtype."""
    found: dict[str, str] = {}
    if options.quantize_base is not None:
        found[DENOISER] = options.quantize_base
    elif options.fp8_scaled:
        found[DENOISER] = "fp8_scaled"
    elif options.fp8_base or options.fp8_base_unet:
        found[DENOISER] = "fp8"
    if options.fp8_te or (options.fp8_base and not options.fp8_base_unet and options.quantize_base is None):
        # beside cached outputs only the encoders that are trained are there, which are the small ones
        found |= {} if caches else dict.fromkeys(encoders, "fp8")
    else:
        found |= {encoders[number]: "fp8" for number in architecture.fp8_encoders if not caches}
    return found


def check_swapping(run: Run, models: Models) -> None:
    """Refuse what ``--blocks_to_swap`` cannot do with the model and the processes at hand.

    Raises:
        UserError: too many blocks, or FSDP.
    """
    count = run.architecture.blocks_to_swap
    if not count:
        return
    if run.sharding is not None:
        asked = run.sharding.asked_as
        raise UserError(
            f"--blocks_to_swap: not with {asked}, which gathers each block when it runs; remove one of them"
        )
    swapped_counts([len(blocks) for blocks in run.architecture.block_lists(models.denoiser)], count)


def frozen_dtype_text(plan: MemoryPlan) -> str:
    """``bfloat16 (denoiser in scaled fp8)``, for the row on precision."""
    frozen = [part for part in plan.parts.values() if not part.trained and part.name != VAE]
    dtypes = dict.fromkeys(str(part.dtype).removeprefix("torch.") for part in frozen) or {"none": None}
    small: dict[str, list[str]] = {}
    for part in frozen:
        if part.form is not None:
            small.setdefault(FORMS[part.form].title, []).append(part.title)
    forms = ", ".join(f"{' and '.join(parts)} in {form}" for form, parts in small.items())
    return " and ".join(dtypes) + (f" ({forms})" if forms else "")
