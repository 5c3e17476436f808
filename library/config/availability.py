"""Published options that this version refuses: what a run would silently not do otherwise."""

from __future__ import annotations

from types import MappingProxyType

_HUB = "uploads are not supported yet; upload the saved files with huggingface_hub's command line"
_DEEPSPEED = "DeepSpeed is not supported yet; use gradient checkpointing and an 8-bit optimizer to save memory"
_INITIAL = "starting in the middle is not supported yet; --resume goes on exactly where a state stood"
_DDP = "has no effect: adapters are trained without DistributedDataParallel; remove it"

#: option -> why it is refused, and what to use
REFUSED = MappingProxyType(
    {
        "dataset_class": (
            "a class written against the predecessor's inner classes cannot run here, where pictures, buckets, caches "
            "and random draws are made apart; describe the data with --dataset_config or --in_json"
        ),
        "huggingface_repo_id": _HUB,
        "huggingface_repo_type": _HUB,
        "huggingface_path_in_repo": _HUB,
        "huggingface_token": _HUB,
        "huggingface_repo_visibility": _HUB,
        "save_state_to_huggingface": _HUB,
        "async_upload": _HUB,
        "resume_from_huggingface": "states on the Hub are not supported yet; download it, and --resume the folder",
        "ddp_gradient_as_bucket_view": _DDP,
        "ddp_static_graph": _DDP,
        "initial_epoch": _INITIAL,
        "initial_step": _INITIAL,
        "skip_until_initial_step": _INITIAL,
        "deepspeed": _DEEPSPEED,
        "zero_stage": _DEEPSPEED,
        "offload_optimizer_device": _DEEPSPEED,
        "offload_optimizer_nvme_path": _DEEPSPEED,
        "offload_param_device": _DEEPSPEED,
        "offload_param_nvme_path": _DEEPSPEED,
        "zero3_init_flag": _DEEPSPEED,
        "zero3_save_16bit_model": _DEEPSPEED,
        "fp16_master_weights_and_gradients": _DEEPSPEED,
    }
)
