"""Published options that this version refuses: what a run would silently not do otherwise."""

from __future__ import annotations

from types import MappingProxyType

_DEEPSPEED = (
    "adapters act inside the frozen model's own modules, which DeepSpeed would split; use gradient checkpointing and "
    "an 8-bit optimizer to save memory (docs/multi_gpu.md)"
)
_DDP = "has no effect: adapters are trained without DistributedDataParallel; remove it"

#: option -> why it is refused, and what to use
REFUSED = MappingProxyType(
    {
        "dataset_class": (
            "a class written against the predecessor's inner classes cannot run here, where pictures, buckets, caches "
            "and random draws are made apart; describe the data with --dataset_config or --in_json"
        ),
        "ddp_gradient_as_bucket_view": _DDP,
        "ddp_static_graph": _DDP,
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
