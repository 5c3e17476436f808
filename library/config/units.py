"""What the numbers of options count or measure, for ``docs/options/``.

Every option that takes numbers stands in here; an empty text is a plain factor. Kept apart from the options, whose help
is read on a terminal and says the unit where it matters.
"""

from __future__ import annotations

from types import MappingProxyType

_BY_UNIT = {
    "pixels": ("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps"),
    "tokens": ("max_token_length",),
    "tags": ("keep_tokens", "token_warmup_min"),
    "layers": ("clip_skip", "multires_noise_iterations"),
    "images": ("train_batch_size", "vae_batch_size"),
    "captions": ("text_encoder_batch_size",),
    "captions an image": ("text_encoder_cache_variants",),
    "uses an epoch": ("dataset_repeats",),
    "processes": ("max_data_loader_n_workers",),
    "epochs": (
        "caption_dropout_every_n_epochs",
        "save_every_n_epochs",
        "save_last_n_epochs",
        "save_last_n_epochs_state",
        "max_train_epochs",
        "sample_every_n_epochs",
        "validate_every_n_epochs",
    ),
    "epoch, from 1": ("initial_epoch",),
    "steps": (
        "save_every_n_steps",
        "save_last_n_steps",
        "save_last_n_steps_state",
        "max_train_steps",
        "sample_every_n_steps",
        "validate_every_n_steps",
        "lr_scheduler_timescale",
    ),
    "step, from 0": ("initial_step",),
    "steps, or share of the run": ("lr_warmup_steps", "lr_decay_steps", "token_warmup_step"),
    "saves a run": ("save_n_epoch_ratio",),
    "batches": ("gradient_accumulation_steps", "max_validation_steps"),
    "validations": ("early_stopping_patience",),
    "cycles": ("lr_scheduler_num_cycles",),
    "minutes": ("ddp_timeout",),
    "share, 0 to 1": (
        "caption_dropout_rate",
        "caption_tag_dropout_rate",
        "network_dropout",
        "validation_split",
        "lr_scheduler_min_lr_ratio",
    ),
    "rank": ("network_dim",),
    "timestep, 0 to 1000": ("min_timestep", "max_timestep"),
    "rate": ("learning_rate", "unet_lr", "text_encoder_lr", "text_encoder_lr1", "text_encoder_lr2"),
    "norm": ("max_grad_norm", "scale_weight_norms"),
    "standard deviations of the noise": ("noise_offset", "ip_noise_gamma"),
    "SNR": ("min_snr_gamma",),
    "": (
        "seed",
        "validation_seed",
        "network_alpha",
        "base_weights_multiplier",
        "lr_scheduler_power",
        "zero_stage",
        "adaptive_noise_scale",
        "multires_noise_discount",
        "ema_decay",
        "huber_c",
        "huber_scale",
        "v_pred_like_loss",
        "prior_loss_weight",
    ),
}

#: option -> unit
UNITS = MappingProxyType({name: unit for unit, names in _BY_UNIT.items() for name in names})
