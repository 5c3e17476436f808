"""Published options that this version refuses: what a run would silently not do otherwise."""

from __future__ import annotations

from types import MappingProxyType

_DEEPSPEED = (
    "adapters act inside the frozen model's own modules, which DeepSpeed would split; use gradient checkpointing and "
    "an 8-bit optimizer to save memory (docs/multi_gpu.md)"
)
_FULL = "training in half precision only is not supported yet; use --mixed_precision with float32 adapters"
_FP8 = "fp8 base models are not supported yet; --mixed_precision bf16 halves the memory"
_COMPILE = "compiling is not supported yet; remove it"
_DDP = "has no effect: adapters are trained without DistributedDataParallel; remove it"

#: option -> why it is refused, and what to use
REFUSED = MappingProxyType(
    {
        "dataset_class": "dataset classes of your own are not supported yet; use --dataset_config",
        "debug_dataset": "not supported yet; the summary before the first step shows the buckets",
        "full_fp16": _FULL,
        "full_bf16": _FULL,
        "fp8_base": _FP8,
        "fp8_base_unet": _FP8,
        "torch_compile": _COMPILE,
        "dynamo_backend": _COMPILE,
        "cpu_offload_checkpointing": "not supported yet; use --gradient_checkpointing",
        "mem_eff_attn": "superseded; use --sdpa, which takes no more memory",
        "fused_backward_pass": "only full-model training gains by it, as adapters' gradients are small; remove it",
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
