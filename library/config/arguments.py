"""Every option of ``train_network.py``: frozen dataclasses whose fields are the published flags.

A field's name is the flag's, its default the published one. ``TrainNetworkOptions.from_args`` turns a parsed
namespace into them; nothing deeper sees the namespace.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from typing_extensions import Self

from library.config.fields import add_flags, int_or_float, normalized, option
from library.config.parser import SuggestingParser

T = TypeVar("T")


@dataclass(frozen=True)
class ModelOptions:
    """Model."""

    pretrained_model_name_or_path: str | None = option(
        None, "base model: a .safetensors or .ckpt file, a Diffusers folder, or a Hub id"
    )
    v2: bool = option(False, "the model is Stable Diffusion 2.x")
    v_parameterization: bool = option(False, "the model predicts v (2.x at 768 pixels and its descendants)")
    tokenizer_cache_dir: str | None = option(
        None, "folder with tokenizer files, or where those from the Hub are kept, for work offline"
    )
    vae: str | None = option(
        None, "use this VAE instead of the model's: checkpoint, VAE file, Diffusers folder, or Hub id"
    )
    no_half_vae: bool = option(False, "keep the VAE in float32 under fp16 or bf16")
    clip_skip: int | None = option(
        None, "take the text encoder's n-th layer from the end (1 is the last)", type=int, neutral=(1,)
    )
    max_token_length: int | None = option(
        None,
        "tokens of a caption: 150 or 225 (75 if not given)",
        type=int,
        choices=[None, 150, 225],
        neutral=(75,),
    )
    weighted_captions: bool = option(False, "read (word:1.2) and [word] in captions as emphasis")
    disable_mmap_load_safetensors: bool = option(
        False, "read the model into memory instead of mapping its file; faster on some network drives and in WSL"
    )


@dataclass(frozen=True)
class DatasetOptions:
    """Data, where the dataset file does not say otherwise."""

    dataset_config: Path | None = option(None, "dataset file, .toml or .json", type=Path)
    train_data_dir: str | None = option(
        None, "folder with sub-folders <repeats>_<class tokens> of images, or with the images of --in_json"
    )
    reg_data_dir: str | None = option(None, "the same for regularization images")
    in_json: str | None = option(None, "metadata file of captions and tags, instead of caption files")
    dataset_repeats: int = option(
        1, "how often each image is used in an epoch, with --in_json or a dataset file that does not say", type=int
    )
    dataset_class: str | None = option(None, "import path of a dataset class (package.module.Class)")
    train_batch_size: int = option(1, "images in a batch, of each process", type=int)
    resolution: str | None = option(None, "training size in pixels: a number, or width,height")
    caption_extension: str = option(".caption", "ending of caption files")
    caption_extention: str | None = option(None, "old spelling of --caption_extension; wins over it")
    caption_separator: str = option(",", "what separates the tags of a caption")
    caption_prefix: str | None = option(None, "text before every caption")
    caption_suffix: str | None = option(None, "text after every caption")
    shuffle_caption: bool = option(False, "shuffle a caption's tags each time it is used")
    keep_tokens: int = option(0, "leave this many tags at the front in their place", type=int)
    keep_tokens_separator: str = option(
        "", "text in the caption that ends the part left in its place, e.g. |||; wins over --keep_tokens"
    )
    secondary_separator: str | None = option(None, "joins tags that are shuffled and dropped as one, e.g. ;;;")
    enable_wildcard: bool = option(False, "read {a|b} in captions as a choice, and several lines as one choice each")
    caption_dropout_rate: float = option(0.0, "share of uses without any caption, 0 to 1", type=float)
    caption_dropout_every_n_epochs: int = option(0, "no captions in every n-th epoch", type=int)
    caption_tag_dropout_rate: float = option(0.0, "share of tags left out, 0 to 1", type=float)
    token_warmup_min: int = option(1, "tags used at the start of the tag warm-up", type=int)
    token_warmup_step: float = option(0, "steps until all tags are used; below 1, a share of the run", type=float)
    color_aug: bool = option(False, "vary hue and gamma a little each time")
    flip_aug: bool = option(False, "mirror half of the uses, left to right")
    face_crop_aug_range: str | None = option(None, "crop around the face: low,high of the enlargement, e.g. 2.0,4.0")
    random_crop: bool = option(False, "crop at a random place instead of the middle")
    alpha_mask: bool = option(False, "weight the loss by the image's transparency")
    enable_bucket: bool = option(False, "train on several aspect ratios, each image in the nearest")
    min_bucket_reso: int = option(256, "smallest side of a bucket, pixels", type=int)
    max_bucket_reso: int = option(1024, "largest side of a bucket, pixels", type=int)
    bucket_reso_steps: int = option(64, "sides of buckets are multiples of this, pixels", type=int)
    bucket_no_upscale: bool = option(False, "make buckets from the images' own sizes, and never enlarge")
    resize_interpolation: str | None = option(
        None,
        "how images are resized (area to shrink and lanczos to enlarge, if not given)",
        choices=["lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area"],
    )
    cache_latents: bool = option(False, "encode all images once, before training, and keep the latents in memory")
    cache_latents_to_disk: bool = option(False, "keep them beside the images, for later runs too")
    vae_batch_size: int = option(1, "images encoded at a time", type=int, neutral=(0,))
    skip_cache_check: bool = option(False, "trust cache files without looking into them")
    cache_info: bool = option(False, "remember captions and sizes in metadata_cache.json")
    conditioning_data_dir: str | None = option(
        None, "folder of mask images for --masked_loss, with the names of the images"
    )
    on_bad_image: str = option(
        "stop",
        "images that cannot be read: name all and stop before training, or warn and leave them out",
        choices=["stop", "skip"],
    )
    debug_dataset: bool = option(
        False, "show what would be trained on, in windows or on sheets in <output_dir>/debug_dataset, and end"
    )
    max_data_loader_n_workers: int = option(
        8,
        "processes that prepare batches, at most as many as the processor has threads (by default one less); 0 "
        "prepares them in the main one",
        type=int,
    )
    persistent_data_loader_workers: bool = option(False, "keep these processes between epochs")
    cache_text_encoder_outputs: bool = option(
        False, "encode all captions once, before training, and keep the text encoder's outputs in memory"
    )
    cache_text_encoder_outputs_to_disk: bool = option(False, "keep them beside the images, for later runs too")
    text_encoder_batch_size: int | None = option(
        None, "captions encoded at a time (8, if not given)", type=int, neutral=(0,)
    )
    text_encoder_cache_variants: int = option(
        1, "captions of an image to encode where they are drawn anew each time (shuffled, tags dropped, ...)", type=int
    )


@dataclass(frozen=True)
class OutputOptions:
    """Output."""

    output_dir: str | None = option(None, "folder for weights, states, samples and logs")
    output_name: str | None = option(None, "name of the files, without ending (last, if not given)")
    save_model_as: str = option("safetensors", "format of the weights", choices=[None, "ckpt", "pt", "safetensors"])
    save_precision: str | None = option(
        None,
        "precision of saved weights (float, or that of --full_fp16 or --full_bf16, if not given)",
        choices=[None, "float", "fp16", "bf16"],
    )
    save_every_n_epochs: int | None = option(None, "save after every n-th epoch", type=int, neutral=(0,))
    save_every_n_steps: int | None = option(None, "save after every n-th step", type=int, neutral=(0,))
    save_n_epoch_ratio: int | None = option(
        None, "save so that there are at least n saves over the run", type=int, neutral=(0,)
    )
    save_last_n_epochs: int | None = option(None, "keep only the last n of the epochs' saves", type=int, neutral=(0,))
    save_last_n_epochs_state: int | None = option(
        None,
        "the same for states (as --save_last_n_epochs, if not given)",
        type=int,
        neutral=(0,),
    )
    save_last_n_steps: int | None = option(None, "keep only saves of the last n steps", type=int, neutral=(0,))
    save_last_n_steps_state: int | None = option(
        None,
        "the same for states (as --save_last_n_steps, if not given)",
        type=int,
        neutral=(0,),
    )
    save_state: bool = option(False, "save the training state with the weights, to go on from with --resume")
    save_state_on_train_end: bool = option(False, "save the state at the end only")
    no_metadata: bool = option(False, "write no more metadata than other programs need")
    training_comment: str | None = option(None, "text to record in the metadata")
    huggingface_repo_id: str | None = option(None, "upload saves to this Hub repository, name/model")
    huggingface_repo_type: str | None = option(None, "its type, e.g. model")
    huggingface_path_in_repo: str | None = option(None, "folder in it")
    huggingface_token: str | None = option(None, "Hub access token; never recorded", secret=True)
    huggingface_repo_visibility: str | None = option(None, "public, or private (the default of a new one)")
    save_state_to_huggingface: bool = option(False, "upload states too")
    async_upload: bool = option(False, "upload while training goes on")


@dataclass(frozen=True)
class ResumeOptions:
    """Going on with an earlier run."""

    resume: str | None = option(None, "state folder to go on from, exactly where it stood")
    resume_from_huggingface: bool = option(False, "take the state from the Hub: repo/path:revision:type")
    skip_until_initial_step: bool = option(False, "pass over the data before the initial step")
    initial_epoch: int | None = option(None, "epoch to start at, counted from 1", type=int, neutral=(0, 1))
    initial_step: int | None = option(
        None, "step to start at, counted from 0; wins over --initial_epoch", type=int, neutral=(0,)
    )


@dataclass(frozen=True)
class NetworkOptions:
    """Network."""

    network_module: str | None = option(
        None, "what is trained: networks.lora (or lora_fa, dylora, oft), or a third-party module such as lycoris.kohya"
    )
    network_dim: int | None = option(None, "rank; 4 to 128 are common (the module's default, if not given)", type=int)
    network_alpha: float = option(1, "strength is alpha / rank; half the rank is common", type=float)
    network_dropout: float | None = option(
        None,
        "share of the adapter's inner values dropped in training, 0 to 1",
        type=float,
        neutral=(0,),
    )
    network_args: list[str] | None = option(
        None, "more options of the module, key=value, e.g. conv_dim=4 conv_alpha=1", nargs="*"
    )
    network_train_unet_only: bool = option(False, "train the U-Net's adapters only")
    network_train_text_encoder_only: bool = option(False, "train the text encoder's adapters only")
    network_weights: str | None = option(None, "start from these adapter weights")
    dim_from_weights: bool = option(False, "take ranks from --network_weights")
    scale_weight_norms: float | None = option(
        None,
        "scale adapters down to this norm after each step; 1 is a start",
        type=float,
        neutral=(0,),
    )
    base_weights: list[str] | None = option(None, "adapter files to merge into the base model first", nargs="*")
    base_weights_multiplier: list[float] | None = option(
        None, "strength of each (1, if not given)", type=float, nargs="*"
    )


@dataclass(frozen=True)
class OptimizerOptions:
    """Optimizer."""

    optimizer_type: str = option(
        "", "AdamW (if not given), AdamW8bit, Lion, Adafactor, Prodigy, ..., a class of torch.optim, or module.Class"
    )
    use_8bit_adam: bool = option(False, "old spelling of --optimizer_type AdamW8bit")
    use_lion_optimizer: bool = option(False, "old spelling of --optimizer_type Lion")
    optimizer_args: list[str] | None = option(
        None, "more arguments, key=value, e.g. weight_decay=0.01 betas=.9,.999", nargs="*"
    )
    learning_rate: float = option(2e-06, "learning rate; 1e-4 to 1e-3 are common for LoRA", type=float)
    unet_lr: float | None = option(None, "rate of the U-Net's adapters (as --learning_rate, if not given)", type=float)
    text_encoder_lr: list[float] | None = option(
        None, "rate of the text encoder's adapters, one for each encoder", type=float, nargs="*"
    )
    max_grad_norm: float = option(1.0, "largest norm of the gradient; 0 for no limit", type=float)
    fused_backward_pass: bool = option(
        False, "update each weight as soon as its gradient is there, to save memory; needs --max_grad_norm 0"
    )
    ema_decay: float | None = option(
        None, "also save a moving average of the weights, as <name>-ema; 0.999 is common", type=float
    )
    text_encoder_lr1: float | None = option(
        None, "rate of the first text encoder's adapters (CLIP-L), instead of --text_encoder_lr", type=float
    )
    text_encoder_lr2: float | None = option(
        None, "the same of the second (OpenCLIP ViT-bigG of SDXL, T5-XXL of FLUX.1)", type=float
    )

    @property
    def text_encoder_lrs(self) -> list[float] | None:
        """One rate for all text encoders, or one for each; ``None`` where ``learning_rate`` is theirs."""
        numbered = (self.text_encoder_lr1, self.text_encoder_lr2)
        if any(rate is not None for rate in numbered):
            return [self.learning_rate if rate is None else rate for rate in numbered]
        return self.text_encoder_lr or None


@dataclass(frozen=True)
class SchedulerOptions:
    """Learning-rate schedule."""

    lr_scheduler: str = option(
        "constant", "constant, constant_with_warmup, linear, cosine, cosine_with_restarts, polynomial, ..."
    )
    lr_warmup_steps: int | float = option(0, "steps of warm-up, or a share of the run (0.1 or 10%)", type=int_or_float)
    lr_decay_steps: int | float = option(
        0, "steps of decay of warmup_stable_decay, or a share of the run", type=int_or_float
    )
    lr_scheduler_num_cycles: int = option(1, "restarts of cosine_with_restarts", type=int)
    lr_scheduler_power: float = option(1, "power of polynomial", type=float)
    lr_scheduler_timescale: int | None = option(
        None,
        "timescale of inverse_sqrt, steps (the warm-up's, if not given)",
        type=int,
        neutral=(0,),
    )
    lr_scheduler_min_lr_ratio: float | None = option(
        None, "lowest rate, as a share of the highest, of schedules that take one", type=float
    )
    lr_scheduler_type: str = option("", "a scheduler class instead: of torch.optim.lr_scheduler, or module.Class")
    lr_scheduler_args: list[str] | None = option(
        None, "arguments of the schedule, key=value, e.g. num_cycles=1.5", nargs="*"
    )


@dataclass(frozen=True)
class TrainingOptions:
    """Training."""

    max_train_steps: int = option(1600, "optimizer steps of the run", type=int)
    max_train_epochs: int | None = option(
        None, "epochs of the run; wins over --max_train_steps", type=int, neutral=(0,)
    )
    seed: int | None = option(None, "makes the run repeatable (drawn and recorded, if not given)", type=int)
    gradient_accumulation_steps: int = option(1, "batches that make one step", type=int)
    gradient_checkpointing: bool = option(False, "save memory by computing activations twice")
    mixed_precision: str = option(
        "no", "compute in half precision: bf16, or fp16 on a GPU", choices=["no", "fp16", "bf16"]
    )
    sdpa: bool = option(False, "use torch's scaled dot product attention")
    xformers: bool = option(False, "use xformers' attention")
    mem_eff_attn: bool = option(False, "use torch's attention with the kernel that takes the least memory")
    torch_compile: bool = option(False, "compile the model's blocks")
    dynamo_backend: str = option(
        "inductor",
        "compiler of --torch_compile",
        choices=[
            "eager", "aot_eager", "inductor", "aot_ts_nvfuser", "nvprims_nvfuser", "cudagraphs", "ofi", "fx2trt",
            "onnxrt", "tensort", "ipex", "tvm",
        ],
        neutral=("no", "NO"),
    )  # fmt: skip
    full_fp16: bool = option(
        False, "trained weights, gradients and optimizer state in fp16; needs --mixed_precision fp16"
    )
    full_bf16: bool = option(
        False, "trained weights, gradients and optimizer state in bf16; needs --mixed_precision bf16"
    )
    fp8_base: bool = option(False, "keep frozen U-Net and text encoders in scaled fp8")
    fp8_base_unet: bool = option(False, "keep the frozen U-Net in scaled fp8, and not the text encoders")
    cpu_offload_checkpointing: bool = option(False, "keep checkpointed activations in host memory")
    lowram: bool = option(False, "for machines with little host memory; loading goes to the device at once in any case")
    highvram: bool = option(False, "for devices with much memory; keep the device's cache between stages")
    ddp_timeout: int | None = option(None, "minutes to wait for other processes", type=int, neutral=(0,))
    ddp_gradient_as_bucket_view: bool = option(False, "keep gradients in the tensors that processes exchange")
    ddp_static_graph: bool = option(False, "a setting of torch's DistributedDataParallel")
    deepspeed: bool = option(False, "train with DeepSpeed")
    zero_stage: int = option(2, "DeepSpeed: ZeRO stage", type=int, choices=[0, 1, 2, 3])
    offload_optimizer_device: str | None = option(
        None, "DeepSpeed: where optimizer states go", choices=[None, "cpu", "nvme"]
    )
    offload_optimizer_nvme_path: str | None = option(None, "DeepSpeed: folder on the NVMe disk for them")
    offload_param_device: str | None = option(None, "DeepSpeed: where parameters go", choices=[None, "cpu", "nvme"])
    offload_param_nvme_path: str | None = option(None, "DeepSpeed: folder on the NVMe disk for them")
    zero3_init_flag: bool = option(False, "DeepSpeed: split large models while they are made")
    zero3_save_16bit_model: bool = option(False, "DeepSpeed: save 16-bit weights under ZeRO stage 3")
    fp16_master_weights_and_gradients: bool = option(False, "DeepSpeed: fp16 master weights")
    on_nan: str = option(
        "stop",
        "a loss or gradient that is not finite: stop, skip the update, or rollback to the last state kept in memory",
        choices=["stop", "skip", "rollback"],
    )


@dataclass(frozen=True)
class NoiseOptions:
    """Noise and timesteps."""

    noise_offset: float | None = option(
        None,
        "adds a constant per channel to the noise, for darker and brighter images; 0.1 is common",
        type=float,
        neutral=(0,),
    )
    noise_offset_random_strength: bool = option(False, "draw the offset's strength between 0 and --noise_offset")
    adaptive_noise_scale: float | None = option(
        None, "adds the latents' mean times this to --noise_offset", type=float, neutral=(0,)
    )
    multires_noise_iterations: int | None = option(
        None,
        "adds coarser noise in this many layers; 6 to 10 are common",
        type=int,
        neutral=(0,),
    )
    multires_noise_discount: float = option(0.3, "weight of each coarser layer to the one before", type=float)
    ip_noise_gamma: float | None = option(
        None, "perturbs the model's input only; 0.1 is common", type=float, neutral=(0,)
    )
    ip_noise_gamma_random_strength: bool = option(False, "draw its strength between 0 and --ip_noise_gamma")
    zero_terminal_snr: bool = option(False, "change the noise schedule so that it ends in pure noise")
    min_timestep: int | None = option(None, "lowest timestep trained, 0 to 999", type=int, neutral=(0,))
    max_timestep: int | None = option(None, "timesteps trained stay below this, 1 to 1000", type=int, neutral=(1000,))


@dataclass(frozen=True)
class LossOptions:
    """Loss."""

    loss_type: str = option("l2", "how prediction and target are compared", choices=["l1", "l2", "huber", "smooth_l1"])
    huber_schedule: str = option(
        "snr",
        "how the threshold of huber and smooth_l1 goes with the timestep",
        choices=["constant", "exponential", "snr"],
    )
    huber_c: float = option(0.1, "that threshold", type=float)
    huber_scale: float = option(1.0, "a factor of it", type=float)
    min_snr_gamma: float | None = option(None, "weights timesteps by min-SNR; 5 in the paper", type=float, neutral=(0,))
    scale_v_pred_loss_like_noise_pred: bool = option(
        False, "scale the loss of v-prediction to that of noise prediction"
    )
    v_pred_like_loss: float | None = option(
        None,
        "adds the loss of v-prediction with this weight, for models that predict noise",
        type=float,
        neutral=(0,),
    )
    debiased_estimation_loss: bool = option(False, "weight timesteps by 1 / sqrt(SNR)")
    prior_loss_weight: float = option(1.0, "weight of regularization images", type=float)
    masked_loss: bool = option(False, "weight the loss by mask images, see --conditioning_data_dir")


@dataclass(frozen=True)
class SampleOptions:
    """Sample images while training."""

    sample_prompts: str | None = option(None, "file of prompts: .txt with one a line, .toml or .json")
    sample_every_n_steps: int | None = option(None, "draw them after every n-th step", type=int, neutral=(0,))
    sample_every_n_epochs: int | None = option(
        None, "draw them after every n-th epoch; wins over steps", type=int, neutral=(0,)
    )
    sample_at_first: bool = option(False, "draw them before the first step too")
    sample_sampler: str = option(
        "ddim",
        "sampler",
        choices=[
            "ddim", "pndm", "lms", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a", "dpmsolver", "dpmsolver++",
            "dpmsingle", "k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a",
        ],
    )  # fmt: skip

    @property
    def steps_between(self) -> int | None:
        """``None`` where it is off, as at 0 and below, which programs write for it."""
        return _if_positive(self.sample_every_n_steps)

    @property
    def epochs_between(self) -> int | None:
        return _if_positive(self.sample_every_n_epochs)

    @property
    def is_asked_for(self) -> bool:
        """Whether there is a time to draw; if there are prompts is another question."""
        return bool(self.steps_between or self.epochs_between or self.sample_at_first)


def _if_positive(number: int | None) -> int | None:
    return number if number is not None and number > 0 else None


@dataclass(frozen=True)
class ValidationOptions:
    """Validation."""

    validation_split: float = option(
        0.0, "share of images kept for validation, 0 to 1, where the dataset file does not say", type=float
    )
    validation_seed: int | None = option(
        None, "seed of that choice and of the noise of validation (as --seed, if not given)", type=int
    )
    validate_every_n_steps: int | None = option(None, "validate after every n-th step too", type=int, neutral=(0,))
    validate_every_n_epochs: int | None = option(
        None,
        "validate after every n-th epoch (after each, if not given)",
        type=int,
    )
    max_validation_steps: int | None = option(
        None, "batches of a validation at most, of all processes together; always the same ones", type=int
    )
    early_stopping_patience: int | None = option(
        None, "end the run after this many validations in a row without a new lowest loss", type=int
    )
    save_best: bool = option(False, "keep the weights of the lowest validation loss so far in <output_name>-best")


@dataclass(frozen=True)
class LoggingOptions:
    """Logs."""

    logging_dir: str | None = option(None, "folder of TensorBoard logs (<output_dir>/logs, if not given)")
    log_with: str | None = option(
        None,
        "where figures go; TensorBoard is always on",
        choices=["tensorboard", "wandb", "all"],
        neutral=("tensorboard",),
    )
    log_prefix: str | None = option(None, "text before the name of the run's folder")
    log_tracker_name: str | None = option(None, "name of the project in the tracker (network_train, if not given)")
    wandb_run_name: str | None = option(None, "name of the run in wandb")
    log_tracker_config: str | None = option(None, "TOML file of settings for the trackers, a table for each")
    wandb_api_key: str | None = option(None, "wandb key; never recorded", secret=True)
    log_config: bool = option(False, "record the run's options in the trackers, without secrets and folders")


@dataclass(frozen=True)
class ModelSpecOptions:
    """Metadata of the saved file."""

    metadata_title: str | None = option(None, "title (the output's name, if not given)")
    metadata_author: str | None = option(None, "author")
    metadata_description: str | None = option(None, "description")
    metadata_license: str | None = option(None, "license")
    metadata_tags: str | None = option(None, "tags, separated by commas")
    metadata_usage_hint: str | None = option(None, "how to use it")
    metadata_thumbnail: str | None = option(None, "image: a file or a data URL")
    metadata_merged_from: str | None = option(None, "models it was merged from")
    metadata_trigger_phrase: str | None = option(None, "words that call it up")
    metadata_preprocessor: str | None = option(None, "preprocessor it needs")
    metadata_is_negative_embedding: str | None = option(None, "whether it is a negative embedding")


@dataclass(frozen=True)
class ConsoleOptions:
    """Console."""

    console_log_level: str | None = option(
        None, "least importance shown (INFO, if not given)", choices=["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
    )
    console_log_file: str | None = option(None, "write the console's lines to this file instead")
    console_log_simple: bool = option(False, "plain lines without colours, tables and bars")


@dataclass(frozen=True)
class ConfigFileOptions:
    """Configuration file."""

    config_file: str | None = option(None, "TOML file of these options, without their dashes; the command line wins")
    output_config: bool = option(False, "write all options to --config_file, and end")
    strict: bool = option(False, "an option that has no effect in this run is an error instead of a warning")
    explain: bool = option(False, "show every option's value and where it comes from, and end")
    dry_run: bool = option(False, "check everything and show what would be done, without loading weights, and end")
    replay: str | None = option(None, "run the one step of this .replay file again, say what is not finite, and end")


@dataclass(frozen=True)
class TrainNetworkOptions:
    """All options of adapter training, by group."""

    model: ModelOptions
    dataset: DatasetOptions
    network: NetworkOptions
    output: OutputOptions
    training: TrainingOptions
    optimizer: OptimizerOptions
    scheduler: SchedulerOptions
    noise: NoiseOptions
    loss: LossOptions
    sample: SampleOptions
    resume: ResumeOptions
    validation: ValidationOptions
    logging: LoggingOptions
    modelspec: ModelSpecOptions
    console: ConsoleOptions
    config: ConfigFileOptions

    @classmethod
    def groups(cls) -> dict[str, type]:
        """The dataclass of each attribute."""
        return {name: globals()[str(field.type)] for name, field in cls.__dataclass_fields__.items()}

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Self:
        """Options from a namespace; attributes that are missing take their defaults."""
        return cls(**{name: _group_from_args(group, args) for name, group in cls.groups().items()})  # type: ignore[attr-defined]


def _group_from_args(group: type[T], args: argparse.Namespace) -> T:
    given = vars(args)
    known = [field for field in dataclasses.fields(group) if field.name in given]  # type: ignore[arg-type]
    return group(**{field.name: normalized(field, given[field.name]) for field in known})


def with_groups(kind: type[T], groups: Mapping[str, type]) -> type[T]:
    """The same class of options with further groups after the first one, such as a family's own; always one class."""
    return _with_groups(kind, tuple(groups.items())) if groups else kind


@functools.cache
def _with_groups(kind: type[Any], groups: tuple[tuple[str, type], ...]) -> type[Any]:
    (first, *rest) = kind.groups().items()
    joined = dict([first, *groups, *rest])
    return dataclasses.make_dataclass(
        kind.__name__, groups, bases=(kind,), namespace={"groups": classmethod(lambda cls: dict(joined))}, frozen=True
    )


def build_parser(groups: Sequence[type], *, description: str | None, epilog: str | None) -> argparse.ArgumentParser:
    """A parser with one section for each group; flags may not be shortened."""
    parser = SuggestingParser(
        usage="%(prog)s [options]",  # argparse's own would name every flag, some 150 lines before the first help
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for group in groups:
        add_flags(parser, group)
    return parser


def flat(options: Any) -> Iterator[tuple[dataclasses.Field[Any], Any]]:
    """Every option's field and value, group by group."""
    for group_field in dataclasses.fields(options):
        group = getattr(options, group_field.name)
        for field in dataclasses.fields(group):
            yield field, getattr(group, field.name)


def without_secrets(options: Any) -> dict[str, Any]:
    """Option values by name, without tokens and keys; for logs and trackers."""
    return {field.name: value for field, value in flat(options) if not field.metadata["secret"]}


def for_others(options: Any) -> dict[str, Any]:
    """Option values by name, for trackers that others may see: no secrets, no folders, of files only their names."""
    known = without_secrets(options)
    return {name: _without_folder(value) for name, value in known.items() if not name.endswith(("_dir", "_nvme_path"))}


def _without_folder(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_folder(entry) for entry in value]
    is_place = isinstance(value, (str, Path)) and (os.path.isabs(value) or os.path.exists(value))
    return os.path.basename(os.path.normpath(value)) if is_place and value else value


def hide_secrets(options: Any, words: list[str]) -> None:
    """Blot out secrets in a command line; trackers such as wandb record ``sys.argv`` as they find it."""
    for secret in {value for field, value in flat(options) if field.metadata["secret"] and value}:
        words[:] = [word.replace(secret, "***") for word in words]
