"""The options of ``tools/latent_upscaler.py train``; nothing here imports torch."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from library.config.arguments import Options, flat
from library.config.fields import int_or_float, option, out_of_range
from library.errors import UserError

#: sides of crops are multiples of this many pixels, as an autoencoder has 8 pixels for each latent one
CROP_STEP = 8


@dataclass(frozen=True)
class UpscalerFiles:
    """Files."""

    vae_path: str | None = option(None, "VAE file, its folder, or the folder of a model")
    train_data_dir: str | None = option(None, "folder of images, which are learned from at their own size")
    recursive: bool = option(False, "its folders too")
    output_file: str | None = option(None, "the network, a .safetensors file; its state is beside it, as .state")
    weights: str | None = option(None, "network to start from, instead of a new one")
    overwrite: bool = option(False, "replace an --output_file that exists")
    resume: bool = option(False, "go on from the state beside --output_file")


@dataclass(frozen=True)
class UpscalerTraining:
    """Training."""

    max_train_steps: int = option(10000, "steps of the whole run", type=int, unit="steps", minimum=1)
    batch_size: int = option(4, "crops in a step", type=int, unit="crops", minimum=1)
    vae_batch_size: int = option(1, "crops at once in the VAE", type=int, unit="crops", minimum=1)
    resolution: int = option(256, "sides of the large crops", type=int, unit="pixels", minimum=4 * CROP_STEP)
    scale: float = option(
        2.0, "how much smaller the images are that it learns to enlarge", type=float, unit="", above=1
    )
    flip_aug: bool = option(False, "mirror half of the crops")
    width: int = option(128, "channels of a new network; 128 is that of published files", type=int, unit="", minimum=2)
    seed: int = option(0, "seed of crops and of a new network", type=int, unit="", minimum=0)
    learning_rate: float = option(2e-4, "learning rate", type=float, unit="rate", minimum=0)
    optimizer_type: str = option("", "AdamW (if not given), Lion, Prodigy, ..., as in training scripts")
    optimizer_args: list[str] | None = option(None, "its arguments, key=value", nargs="*")
    lr_scheduler: str = option("constant", "constant, constant_with_warmup, linear, cosine, ...")
    lr_warmup_steps: int | float = option(
        0, "warm-up steps, or a fraction of the run (0.1 or 10%)", type=int_or_float, unit="steps, or share of the run"
    )
    max_grad_norm: float = option(1.0, "largest norm of the gradient; 0 for any", type=float, unit="norm", minimum=0)
    loss_type: str = option("l1", "l1 or l2", choices=["l1", "l2"])
    mixed_precision: str = option("no", "precision of the network; the VAE has float32", choices=["no", "bf16"])
    device: str | None = option(None, "where to compute (cuda if there is one, else cpu)")


@dataclass(frozen=True)
class UpscalerWatching:
    """Saving and validation."""

    save_every_n_steps: int = option(1000, "save network and state every N steps", type=int, unit="steps", minimum=1)
    validation_split: float = option(
        0.1, "share of the images kept from training; 0 for no validation", type=float, unit="", minimum=0, below=1
    )
    validate_every_n_steps: int = option(500, "validate every N steps", type=int, unit="steps", minimum=1)
    validation_crops: int = option(16, "crops to validate with", type=int, unit="crops", minimum=1)


@dataclass(frozen=True)
class UpscalerOptions(Options):
    files: UpscalerFiles
    training: UpscalerTraining
    watching: UpscalerWatching


def read_options(args: argparse.Namespace) -> UpscalerOptions:
    """Return the options.

    Raises:
        UserError: one is missing, out of range, or names a file that would be replaced.
    """
    from library.files.streamed import check_target  # it imports torch, which --help does not need

    options = UpscalerOptions.from_args(args)
    files, resolution = options.files, options.training.resolution
    for name in ("vae_path", "train_data_dir", "output_file"):
        if not getattr(files, name):
            raise UserError(f"train: --{name} is required")
    findings = [wrong for field, value in flat(options) if (wrong := out_of_range(field, value)) is not None]
    if resolution % CROP_STEP:
        findings.append(f"--resolution {resolution}: must be a multiple of {CROP_STEP}")
    if small_side(options) >= resolution or small_side(options) < CROP_STEP:
        findings.append(
            f"--scale {options.training.scale:g}: makes crops of {resolution} pixels {small_side(options)} pixels "
            f"wide; they must be smaller, and at least {CROP_STEP}"
        )
    if files.weights and options.training.width != UpscalerTraining.width:
        findings.append("--width has no effect with --weights, whose network has its own; leave one of them out")
    if files.resume and files.weights:
        findings.append("--weights has no effect with --resume, whose state holds the network; leave one of them out")
    if findings:
        raise UserError("\n".join(findings))
    target = Path(files.output_file or "")
    check_target(target, "--output_file", sources=[Path(files.weights)] if files.weights else [])
    state = state_file(target)
    if files.resume and not state.is_file():
        raise UserError(f"--resume: {state} does not exist; leave --resume out to begin")
    if not files.resume and not files.overwrite and (target.exists() or state.exists()):
        found = target if target.exists() else state
        raise UserError(f"{found} exists already; continue it with --resume, or replace it with --overwrite")
    return options


def small_side(options: UpscalerOptions) -> int:
    """Return the side of the small crops in pixels."""
    return round(options.training.resolution / options.training.scale)


def state_file(target: Path) -> Path:
    """Return the file of the state that belongs to a network's file."""
    return target.with_suffix(".state")
