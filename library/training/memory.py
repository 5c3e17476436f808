"""The memory plan of a run, from its options and its kind."""

from __future__ import annotations

from library.config.arguments import TrainingOptions
from library.errors import UserError
from library.memory.block_stream import swapped_counts
from library.memory.plan import Home, MemoryPlan, PlannedStorage
from library.training.kinds.base import Kind
from library.training.models import DENOISER, VAE, Models, text_encoder_name
from library.training.precision import vae_dtype
from library.training.run import Run
from library.training.text_caching import caches_texts


def memory_plan(run: Run, kind: Kind) -> MemoryPlan:
    """How each part of the run's model is kept."""
    architecture, options = run.architecture, run.options
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
        trained={name: need.dtype for name, need in kind.needs().items()},
        storage=PlannedStorage(
            fp8=_parts_in_fp8(options.training, encoders, caches=caches_texts(options.dataset)),
            sharded=run.sharding is not None,
            blocks_to_swap=architecture.blocks_to_swap,
            cached=cached,
        ),
        vae_dtype=vae_dtype(options.model, run.weight_dtype),
        vae_home=vae_home,
    )


def _parts_in_fp8(options: TrainingOptions, encoders: list[str], *, caches: bool) -> frozenset[str]:
    denoiser = {DENOISER} if options.fp8_base or options.fp8_base_unet else set()
    # beside cached outputs only the encoders that are trained are there, which are the small ones
    both = options.fp8_base and not options.fp8_base_unet and not caches
    return frozenset(denoiser | (set(encoders) if both else set()))


def check_swapping(run: Run, models: Models) -> None:
    """Refuse what ``--blocks_to_swap`` cannot do with the model and the processes at hand.

    Raises:
        UserError: too many blocks, or FSDP.
    """
    count = run.architecture.blocks_to_swap
    if not count:
        return
    if run.sharding is not None:
        raise UserError("--blocks_to_swap: not with FSDP, which gathers each block when it runs; remove one of them")
    swapped_counts([len(blocks) for blocks in run.architecture.block_lists(models.denoiser)], count)


def frozen_dtype_text(plan: MemoryPlan) -> str:
    """``bfloat16 (denoiser in scaled fp8)``, for the row on precision."""
    frozen = [part for part in plan.parts.values() if not part.trained and part.name != VAE]
    dtypes = dict.fromkeys(str(part.dtype).removeprefix("torch.") for part in frozen) or {"none": None}
    in_fp8 = [part.title for part in frozen if part.in_fp8]
    return " and ".join(dtypes) + (f" ({' and '.join(in_fp8)} in scaled fp8)" if in_fp8 else "")
