"""Buckets and latents of the images of a metadata file, through the code of training's own cache."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.architectures.common import kl_vae
from library.architectures.common.checkpoint import LATENT_CHANNELS, vae_at, vae_identity
from library.architectures.common.latent_diffusion import LatentDiffusion
from library.architectures.common.loading import ModelSource
from library.architectures.part import VAE, Part, built_by
from library.captioning.hub_models import device_for
from library.captioning.metadata import Metadata
from library.config.work_progress import WorkProgress
from library.data.buckets import BucketRules, Buckets, mean_aspect_error
from library.data.image_io import read_size
from library.data.latent_cache import Wanted, fill
from library.errors import UserError
from library.interrupt import Interrupt

if TYPE_CHECKING:
    import torch

    from library.architectures.base import Architecture

logger = logging.getLogger(__name__)

Size = tuple[int, int]


@dataclass(frozen=True)
class Prepared:
    """An image with its size and bucket, (W, H) pixels."""

    name: str  # in the metadata
    path: Path
    size: Size
    bucket: Size


def check_rules(rules: BucketRules, step: int) -> None:
    """Refuse settings of buckets that training would refuse.

    Args:
        step: the family's latents need sides that are multiples of it.

    Raises:
        UserError: such settings.
    """
    if min(rules.min_side, rules.max_side, rules.step) < 1:
        raise UserError("--min_bucket_reso, --max_bucket_reso, --bucket_reso_steps: must be at least 1")
    if rules.step % step:
        raise UserError(f"--bucket_reso_steps {rules.step}: must be a multiple of {step}")
    if min(rules.resolution) < rules.min_side:
        raise UserError(f"--min_bucket_reso {rules.min_side}: is larger than --max_resolution {rules.resolution}")
    if max(rules.resolution) > rules.max_side:
        raise UserError(f"--max_bucket_reso {rules.max_side}: is smaller than --max_resolution {rules.resolution}")


def assign_buckets(images: dict[str, Path], rules: BucketRules, *, skip_bad: bool) -> list[Prepared]:
    """Return each image with its bucket.

    Raises:
        UserError: images that cannot be read, all at once.
    """
    buckets = Buckets(rules)
    found, problems = [], []
    for name, path in images.items():
        try:
            size = read_size(path)
        except UserError as error:
            problems.append(str(error))
            continue
        found.append(Prepared(name, path, size, buckets.assign(size)))
    if problems and not skip_bad:
        raise UserError("\n".join(problems))
    for problem in problems:
        logger.warning("%s; left out (--on_bad_image skip)", problem)
    if not found:
        raise UserError("none of the images can be read")
    return found


def report(prepared: Sequence[Prepared]) -> list[str]:
    """Return lines on how many images each bucket has, and how well they fit."""
    counts = Counter(image.bucket for image in prepared)
    lines = [f"bucket {width}x{height}: {count} images" for (width, height), count in sorted(counts.items())]
    error = mean_aspect_error([(image.size, image.bucket) for image in prepared])
    return [*lines, f"mean difference of aspect ratios: {error:.4f}"]


def add_buckets(metadata: Metadata, prepared: Sequence[Prepared]) -> None:
    """Write ``train_resolution`` into each image's entry; images without an entry get one with an empty caption."""
    new = [image.name for image in prepared if image.name not in metadata]
    if new:
        more = f" and {len(new) - 3} more" if len(new) > 3 else ""
        logger.warning("not in the metadata, added with an empty caption: %s%s", ", ".join(new[:3]), more)
    for image in prepared:
        entry = metadata.setdefault(image.name, {"caption": ""})
        entry["train_resolution"] = list(image.bucket)


@dataclass(frozen=True)
class Encoding:
    """The settings of encoding latents."""

    batch_size: int
    dtype: torch.dtype
    device: str | None
    flip: bool
    alpha_mask: bool
    trust: bool  # use files that exist without checking them


def open_vae(architecture: Architecture, path_or_id: str, flag: str) -> ModelSource:
    """Find the VAE in a checkpoint, in its own file or folder, or on the Hub.

    Raises:
        UserError: nothing there; a VAE of another family.
    """
    if not isinstance(architecture, LatentDiffusion):
        raise UserError(
            f"{flag}: its latents are not made here, as its autoencoder is loaded otherwise; use tools/cache_latents.py"
        )
    try:
        source = vae_at(path_or_id)
    except UserError as error:
        raise UserError(str(error).replace("--vae", "model_name_or_path")) from None
    channels = source.config.get("latent_channels", LATENT_CHANNELS)
    if channels != LATENT_CHANNELS:
        raise UserError(f"model_name_or_path {path_or_id}: this VAE has {channels} latent channels, not 4")
    return source


def make_latents(prepared: Sequence[Prepared], architecture: Architecture, vae: ModelSource, how: Encoding) -> int:
    """Write the latents that are missing, where and as training reads them; return how many there were.

    Raises:
        UserError: see ``library.data.latent_cache.fill``.
        SystemExit: after Ctrl-C or SIGTERM.
    """
    wanted = [Wanted(i.path, i.size, i.bucket, None, flip=how.flip, alpha_mask=how.alpha_mask) for i in prepared]

    def encoder() -> Any:
        import torch

        device = device_for(how.device)
        model = Part(VAE, vae, built_by(kl_vae.build_vae)).load(dtype=how.dtype, device=str(device))

        def encode(pixels: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
            with torch.no_grad():
                return architecture.encode_images(model, pixels.to(device), generators)

        return encode

    with (
        Interrupt("stopping: what is being encoded is finished and written") as interrupt,
        WorkProgress("encoding images", "images", simple=False) as progress,
    ):

        def tell(done: int, total: int) -> None:
            progress.update(done, total)
            if interrupt.requested:
                logger.warning("stopped; the latents on disk are kept, and the same command continues")
                raise SystemExit(interrupt.exit_code)

        _, made = fill(
            wanted,
            encoder,
            architecture.latent,
            batch_size=how.batch_size,
            to_disk=True,
            vae_identity=vae_identity(vae),
            trust=how.trust,
            report=tell,
        )
    return made
