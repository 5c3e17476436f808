"""The record of training in a saved file: the published ``ss_*`` keys (``modelspec.*`` is separate).

Every value is a string from Python's ``str``: ``None`` is "None", booleans are "True" and "False".
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from library.architectures.base import Architecture
from library.architectures.model_info import ModelInfo
from library.config.arguments import RunOptions
from library.config.dataset_keys import number_range
from library.files.hashes import HashInBackground, model_hash
from library.files.modelspec import build_modelspec

PROJECT_ROOT = Path(__file__).resolve().parents[2]


@lru_cache(maxsize=1)
def source_revision() -> str | None:
    """Return the commit of this checkout, or ``None`` outside of git."""
    if not (PROJECT_ROOT / ".git").exists():
        return None
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


@dataclass(frozen=True)
class HashedFile:
    """A model file whose hashes are computed during training, and read at the first save."""

    name: str
    short_hash: str | None
    full_hash: HashInBackground | None

    @staticmethod
    def of(path_or_id: str) -> HashedFile:
        path = Path(path_or_id)
        if not path.exists():
            return HashedFile(path_or_id, None, None)  # a Hub id is recorded as it is
        if path.is_dir():
            return HashedFile(path.name, "IsADirectory", None)
        return HashedFile(path.name, model_hash(path), HashInBackground(path))

    def entries(self, kind: str) -> dict[str, object]:
        """``kind`` is "sd_model" or "vae"."""
        found: dict[str, object] = {f"ss_{kind}_name": self.name}
        if self.short_hash is not None:
            found[f"ss_{kind}_hash"] = self.short_hash
            found[f"ss_new_{kind}_hash"] = self.full_hash.result() if self.full_hash else self.short_hash
        return found


@dataclass(frozen=True)
class RunRecord:
    """The entries that are known once a run is set up; ``at_save`` adds those of a save."""

    options: RunOptions
    architecture: Architecture
    info: ModelInfo
    modelspec_suffix: str  # of the kind of training
    minimum: Sequence[str] = ()  # entries that --no_metadata keeps
    #: the ``ss_*`` keys; without ``fixed`` there are none
    fixed: Mapping[str, str] | None = None
    model_file: HashedFile | None = None
    vae_file: HashedFile | None = None

    def at_save(self, *, step: int, epoch: int) -> dict[str, str]:
        """Return the metadata of a file saved after ``step`` steps in ``epoch``, both counted from 1."""
        if self.fixed is None:
            return self._modelspec()
        entries: dict[str, object] = dict(self.fixed)
        for kind, file in (("sd_model", self.model_file), ("vae", self.vae_file)):
            entries |= file.entries(kind) if file is not None else {}
        entries["ss_training_finished_at"] = time.time()
        entries["ss_steps"] = step
        entries["ss_epoch"] = epoch
        if self.options.output.no_metadata:
            entries = {name: value for name, value in entries.items() if name in self.minimum}
        text = {name: value if isinstance(value, str) else str(value) for name, value in entries.items()}
        return text | self._modelspec()

    def _modelspec(self) -> dict[str, str]:
        options = self.options
        spec = self.architecture.modelspec(self.info)
        low, high = options.noise.min_timestep, options.noise.max_timestep
        is_limited = low is not None or high is not None
        given = options.modelspec
        return build_modelspec(
            architecture_id=spec["architecture"] + self.modelspec_suffix,
            implementation=spec["implementation"],
            title=given.metadata_title or options.output.output_name,
            resolution=options.dataset.resolution,
            default_resolution=spec["default_resolution"],
            prediction_type=spec.get("prediction_type"),
            timestep_range=(low or 0, 1000 if high is None else high) if is_limited else None,
            encoder_layer=options.model.clip_skip,
            source_revision=source_revision(),
            author=given.metadata_author,
            description=given.metadata_description,
            license=given.metadata_license,
            tags=given.metadata_tags,
            usage_hint=given.metadata_usage_hint,
            thumbnail=given.metadata_thumbnail,
            merged_from=given.metadata_merged_from,
            trigger_phrase=given.metadata_trigger_phrase,
            preprocessor=given.metadata_preprocessor,
            is_negative_embedding=given.metadata_is_negative_embedding,
        )


def fixed_entries(
    options: RunOptions,
    architecture: Architecture,
    info: ModelInfo,
    *,
    session_id: int,
    started_at: float,
    seed: int,
    num_epochs: int,
    total_steps: int,
    optimizer_name: str,
    scheduler_name: str,
    kind: Mapping[str, object],
    data: Mapping[str, object],
) -> dict[str, str]:
    """Return the ``ss_*`` keys of the whole run.

    Args:
        kind: what the kind of training adds.
        data: the data layer's keys (``ss_datasets``, ``ss_tag_frequency``, counts ...); tables become JSON.
    """
    o = options
    entries: dict[str, object] = {
        "ss_session_id": session_id,
        "ss_training_started_at": started_at,
        "ss_output_name": o.output.output_name,
        "ss_learning_rate": o.optimizer.learning_rate,
        "ss_num_epochs": num_epochs,
        "ss_gradient_checkpointing": o.training.gradient_checkpointing,
        "ss_gradient_accumulation_steps": o.training.gradient_accumulation_steps,
        "ss_max_train_steps": total_steps,
        "ss_lr_warmup_steps": o.scheduler.lr_warmup_steps,
        "ss_lr_scheduler": scheduler_name,
        "ss_mixed_precision": o.training.mixed_precision,
        "ss_full_fp16": o.training.full_fp16,
        "ss_clip_skip": o.model.clip_skip,
        "ss_max_token_length": o.model.max_token_length,
        "ss_cache_latents": o.dataset.cache_latents,
        "ss_seed": seed,
        "ss_lowram": o.training.lowram,
        "ss_noise_offset": o.noise.noise_offset,
        "ss_multires_noise_iterations": o.noise.multires_noise_iterations,
        "ss_multires_noise_discount": o.noise.multires_noise_discount,
        "ss_adaptive_noise_scale": o.noise.adaptive_noise_scale,
        "ss_zero_terminal_snr": o.noise.zero_terminal_snr,
        "ss_training_comment": o.output.training_comment,
        "ss_sd_scripts_commit_hash": source_revision() or "(unknown)",
        "ss_optimizer": optimizer_name,
        "ss_max_grad_norm": o.optimizer.max_grad_norm,
        "ss_caption_dropout_rate": o.dataset.caption_dropout_rate,
        "ss_caption_dropout_every_n_epochs": o.dataset.caption_dropout_every_n_epochs,
        "ss_caption_tag_dropout_rate": o.dataset.caption_tag_dropout_rate,
        "ss_face_crop_aug_range": number_range(o.dataset.face_crop_aug_range),
        "ss_prior_loss_weight": o.loss.prior_loss_weight,
        "ss_min_snr_gamma": o.loss.min_snr_gamma,
        "ss_ip_noise_gamma": o.noise.ip_noise_gamma,
        "ss_debiased_estimation": o.loss.debiased_estimation_loss,
        "ss_noise_offset_random_strength": o.noise.noise_offset_random_strength,
        "ss_ip_noise_gamma_random_strength": o.noise.ip_noise_gamma_random_strength,
        "ss_loss_type": o.loss.loss_type,
        "ss_huber_schedule": o.loss.huber_schedule,
        "ss_huber_scale": o.loss.huber_scale,
        "ss_huber_c": o.loss.huber_c,
        "ss_fp8_base": o.training.fp8_base,
        "ss_fp8_base_unet": o.training.fp8_base_unet,
        "ss_validation_seed": o.validation.validation_seed,
        "ss_validation_split": o.validation.validation_split,
        "ss_max_validation_steps": o.validation.max_validation_steps,
        "ss_validate_every_n_epochs": o.validation.validate_every_n_epochs,
        "ss_validate_every_n_steps": o.validation.validate_every_n_steps,
        "ss_resize_interpolation": o.dataset.resize_interpolation,
    }
    entries |= kind
    entries |= architecture.metadata(info)
    tables = {name for name, value in data.items() if isinstance(value, (dict, list))} | {"ss_bucket_info"}
    entries |= {name: json.dumps(value) if name in tables else value for name, value in data.items()}
    return {name: value if isinstance(value, str) else str(value) for name, value in entries.items()}
