"""Published options that this version refuses: what a run would silently not do otherwise."""

from __future__ import annotations

from types import MappingProxyType

_DEEPSPEED = (
    "adapters are too small for ZeRO 1 and 2, and what ZeRO 3 does for the frozen model, FSDP does: choose FSDP "
    "version 2 in accelerate config (docs/multi_gpu.md)"
)

#: option -> why it is refused, and what to use
REFUSED = MappingProxyType(
    {
        "dataset_class": (
            "a class written against the predecessor's inner classes cannot run here, where pictures, buckets, caches "
            "and random draws are made apart; describe the data with --dataset_config or --in_json"
        ),
        "ddp_static_graph": "has no effect: gradients are exchanged once a step, after all of them are made; remove it",
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
