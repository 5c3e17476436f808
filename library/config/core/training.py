"""Options of the run: length, precision, memory, several processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from library.config.availability import NO_NVME, NOT_WITH_DEEPSPEED, OF_DEEPSPEED
from library.config.declaration import Declaration, Facts, Finding, error, idle
from library.config.fields import option
from library.launched import WEIGHTS, process_count, zero_stage

OnNan = Literal["stop", "skip", "rollback"]


@dataclass(frozen=True)
class TrainingOptions:
    """Training."""

    max_train_steps: int = option(1600, "optimizer steps of the run", type=int, unit="steps", minimum=1, harmless=True)
    max_train_epochs: int | None = option(
        None,
        "epochs of the run; wins over --max_train_steps",
        type=int,
        neutral=(0,),
        unit="epochs",
        minimum=1,
        harmless=True,
    )
    seed: int | None = option(
        None, "makes the run repeatable (drawn and recorded, if not given)", type=int, unit="", harmless=True
    )
    gradient_accumulation_steps: int = option(
        1, "gradient accumulation: batches per optimizer step", type=int, unit="batches", minimum=1
    )
    gradient_checkpointing: bool = option(
        False, "save memory by recomputing activations in the backward pass", harmless=True
    )
    mixed_precision: str = option(
        "no", "compute in half precision: bf16, or fp16 on a GPU", choices=["no", "fp16", "bf16"]
    )
    sdpa: bool = option(False, "use torch's scaled dot product attention")
    xformers: bool = option(False, "use xformers' attention")
    mem_eff_attn: bool = option(False, "use torch's attention with the kernel that takes the least memory")
    attn_mode: str | None = option(
        None,
        "implementation of attention, instead of --sdpa, --xformers and --mem_eff_attn; sdpa is another name for "
        "torch, and sageattn cannot train",
        choices=["torch", "xformers", "flash", "sageattn", "sdpa", "flex"],
    )
    split_attn: bool = option(False, "compute attention image by image, which takes less memory")
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
    cpu_offload_checkpointing: bool = option(False, "keep checkpointed activations in host memory", harmless=True)
    lowram: bool = option(
        False, "for machines with little host memory; loading goes to the device at once in any case", harmless=True
    )
    highvram: bool = option(
        False, "for devices with much memory; keep the device's cache between stages", harmless=True
    )
    ddp_timeout: int | None = option(
        None, "minutes to wait for other processes", type=int, neutral=(0,), unit="minutes", minimum=1, harmless=True
    )
    ddp_gradient_as_bucket_view: bool = option(
        False, "keep gradients in the tensors that processes exchange", harmless=True
    )
    ddp_static_graph: bool = option(False, "a setting of torch's DistributedDataParallel", harmless=True)
    deepspeed: bool = option(False, "train with DeepSpeed")
    zero_stage: int = option(
        2, "DeepSpeed: ZeRO stage; 3 shards weights, too", type=int, choices=[0, 1, 2, 3], unit="", harmless=True
    )
    offload_optimizer_device: str | None = option(
        None, "DeepSpeed: where optimizer states go", choices=[None, "cpu", "nvme"], harmless=True
    )
    offload_optimizer_nvme_path: str | None = option(None, "DeepSpeed: folder on the NVMe disk for them")
    offload_param_device: str | None = option(
        None, "DeepSpeed: where parameters go", choices=[None, "cpu", "nvme"], harmless=True
    )
    offload_param_nvme_path: str | None = option(None, "DeepSpeed: folder on the NVMe disk for them")
    zero3_init_flag: bool = option(False, "DeepSpeed: split large models while they are made")
    zero3_save_16bit_model: bool = option(False, "DeepSpeed: save 16-bit weights under ZeRO stage 3")
    fp16_master_weights_and_gradients: bool = option(False, "DeepSpeed: fp16 master weights")
    on_nan: OnNan = option(
        "stop",
        "on a NaN or infinite loss or gradient: stop, skip the update, or rollback to the last snapshot in memory",
        choices=["stop", "skip", "rollback"],
        harmless=True,
    )
    fp8_scaled: bool = option(
        False, "keep the frozen denoiser in fp8 with a scale for every 64 inputs of a layer, finer than --fp8_base_unet"
    )
    fp8_te: bool = option(False, "keep frozen text encoders in scaled fp8")
    fp8_matmul: bool = option(
        False, "with a base in fp8: round inputs to fp8 as well, and multiply fp8 numbers where the device can"
    )
    memory_plan: str | None = option(
        None,
        "GB of device memory, or auto for what is free: trace a step before loading, print what it takes, and choose "
        "checkpointing, fp8 and swapped blocks so that it fits",
        harmless=True,
    )
    compile: bool = option(False, "compile the model's blocks, with the settings below instead of --dynamo_backend")
    compile_backend: str = option("inductor", "compiler of --compile")
    compile_mode: str | None = option(
        None,
        "inductor's mode of --compile",
        choices=[None, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"],
        neutral=("default",),
    )
    compile_dynamic: str | None = option(
        None,
        "code for any size: true, false, or auto, where torch decides (false, if not given: code for each bucket)",
        choices=[None, "true", "false", "auto"],
        neutral=("false",),
    )
    compile_fullgraph: bool = option(False, "an error where a block cannot be compiled as one graph")
    compile_cache_size_limit: int | None = option(
        None,
        "compiled versions of one block at most (no limit that matters, if not given)",
        type=int,
        unit="versions",
        minimum=1,
        neutral=(0,),
    )
    cuda_allow_tf32: bool = option(False, "compute products of float32 numbers in TF32 on NVIDIA GPUs", harmless=True)
    cuda_cudnn_benchmark: bool = option(False, "let cuDNN try its algorithms for each size", harmless=True)
    quantize_base: str | None = option(
        None, "keep the frozen denoiser in int8 or nf4 (4 bits)", choices=[None, "int8", "nf4"]
    )


# ---- what cannot work ----


def half_precision(o: Any, facts: Facts) -> Iterator[Finding]:
    t = o.training
    if t.full_fp16 and t.full_bf16:
        yield error("--full_fp16 and --full_bf16 exclude each other: give one")
        return
    for name, precision in (("full_fp16", "fp16"), ("full_bf16", "bf16")):
        if getattr(t, name) and t.mixed_precision != precision:
            yield error(f"--{name}: needs --mixed_precision {precision}; add it, or remove --{name}")


def shards_optimizer(training: TrainingOptions) -> bool:
    """Whether DeepSpeed updates the weights: with ZeRO stage 0 to 2, of the options or of accelerate's configuration."""
    stage = zero_stage()
    if stage is None and training.deepspeed:
        stage = training.zero_stage
    return stage is not None and stage < WEIGHTS


def deepspeed(o: Any, facts: Facts) -> Iterator[Finding]:
    """Check the options of DeepSpeed; ``library.training.zero`` checks accelerate's configuration."""
    for name in ("offload_optimizer_device", "offload_param_device"):
        if o.training.deepspeed and getattr(o.training, name) == "nvme":
            yield error(f"--{name} nvme: {NO_NVME}")
    if not shards_optimizer(o.training):
        return
    for name in ("full_bf16", "full_fp16", "fused_backward_pass"):
        if getattr(o.optimizer if name == "fused_backward_pass" else o.training, name):
            yield error(f"--{name}: {NOT_WITH_DEEPSPEED[name]}")


def one_form(o: Any, facts: Facts) -> Iterator[Finding]:
    t = o.training
    if t.quantize_base is None:
        return
    for name in ("fp8_base", "fp8_base_unet", "fp8_scaled"):
        if getattr(t, name):
            yield error(
                f"--quantize_base {t.quantize_base}: not with --{name}, another form of the same weights; remove one"
            )


def memory_budget(o: Any, facts: Facts) -> Iterator[Finding]:
    given = o.training.memory_plan
    if given is None or given == "auto":
        return
    try:
        is_size = 0 < float(given) < 1e6
    except ValueError:
        is_size = False
    if not is_size:
        yield error(f"--memory_plan {given}: give gigabytes, such as 12 or 7.5, or auto")


def compilers(o: Any, facts: Facts) -> Iterator[Finding]:
    t = o.training
    if t.compile and t.torch_compile:
        yield error("--compile: not with --torch_compile, which compiles the same blocks; remove one of them")
    if t.compile and t.compile_mode not in (None, "default") and t.compile_backend != "inductor":
        yield error(
            f"--compile_mode {t.compile_mode}: a mode of inductor, not of --compile_backend {t.compile_backend}; "
            "remove one of them"
        )


# ---- what has no effect ----


@idle("max_train_steps", reason="beside --max_train_epochs, which wins")
def epochs_win(o: Any) -> bool:
    return o.training.max_train_epochs is not None


@idle("dynamo_backend", reason="without --torch_compile")
def nothing_is_compiled(o: Any) -> bool:
    return not o.training.torch_compile


@idle(
    "compile_backend",
    "compile_mode",
    "compile_dynamic",
    "compile_fullgraph",
    "compile_cache_size_limit",
    reason="without --compile",
)
def nothing_is_compiled_anew(o: Any) -> bool:
    return not o.training.compile


@idle("cpu_offload_checkpointing", reason="without --gradient_checkpointing")
def no_checkpointing(o: Any) -> bool:
    return not o.training.gradient_checkpointing


@idle("fp8_base", reason="beside --fp8_base_unet, which leaves the text encoders as they are")
def only_the_denoiser(o: Any) -> bool:
    return o.training.fp8_base_unet


@idle("fp8_base_unet", reason="beside --fp8_scaled, which is finer")
def blocks_have_scales(o: Any) -> bool:
    return o.training.fp8_scaled


@idle("fp8_te", reason="beside --fp8_base, which stores the text encoders in fp8")
def encoders_in_fp8_anyway(o: Any) -> bool:
    return o.training.fp8_base and not o.training.fp8_base_unet


@idle("fp8_te", reason="beside cached text encoder outputs")
def encoders_are_cached(o: Any) -> bool:
    return o.dataset.cache_text_encoder_outputs or o.dataset.cache_text_encoder_outputs_to_disk


@idle("fp8_matmul", reason="without --fp8_base or --fp8_base_unet, whose scales are for whole rows")
def nothing_in_rows_of_fp8(o: Any) -> bool:
    t = o.training
    encoders = t.fp8_te or (t.fp8_base and not t.fp8_base_unet)
    return not encoders and (t.fp8_scaled or not t.fp8_base_unet)


@idle(
    "ddp_timeout",
    "ddp_gradient_as_bucket_view",
    reason="with one process; several are started by: accelerate launch --multi_gpu",
)
def one_process(o: Any) -> bool:
    return process_count() == 1


@idle(
    "zero_stage",
    "offload_optimizer_device",
    "offload_optimizer_nvme_path",
    "offload_param_device",
    "offload_param_nvme_path",
    "fp16_master_weights_and_gradients",
    reason="without --deepspeed",
)
def no_deepspeed(o: Any) -> bool:
    return not o.training.deepspeed


@idle(
    "offload_param_device",
    "offload_param_nvme_path",
    reason="without --zero_stage 3",
)
def parameters_are_not_split(o: Any) -> bool:
    return o.training.deepspeed and o.training.zero_stage != WEIGHTS


@idle("zero3_init_flag", reason="in this version: with stage 3 weights are loaded in parts in any case")
def models_are_made_in_parts(o: Any) -> bool:
    return True


@idle("zero3_save_16bit_model", reason="in this version: files hold whole weights, in the dtype of --save_precision")
def files_are_whole(o: Any) -> bool:
    return True


@idle("offload_optimizer_device", reason="with --zero_stage 0, which shards nothing")
def nothing_is_shared_out(o: Any) -> bool:
    return o.training.deepspeed and o.training.zero_stage == 0


@idle("offload_optimizer_nvme_path", reason="without --offload_optimizer_device nvme")
def optimizer_stays_off_the_disk(o: Any) -> bool:
    return o.training.deepspeed and o.training.offload_optimizer_device != "nvme"


@idle("offload_param_nvme_path", reason="without --offload_param_device nvme")
def parameters_stay_off_the_disk(o: Any) -> bool:
    return o.training.deepspeed and o.training.zero_stage == WEIGHTS and o.training.offload_param_device != "nvme"


@idle("lowram", reason="in this version: weights are streamed to the device in any case")
def loading_is_streamed(o: Any) -> bool:
    return True


DECLARATION = Declaration(
    groups={"training": TrainingOptions},
    rules=(
        half_precision,
        deepspeed,
        one_form,
        memory_budget,
        compilers,
    ),
    idle=(
        epochs_win,
        nothing_is_compiled,
        nothing_is_compiled_anew,
        no_checkpointing,
        only_the_denoiser,
        blocks_have_scales,
        encoders_in_fp8_anyway,
        encoders_are_cached,
        nothing_in_rows_of_fp8,
        one_process,
        no_deepspeed,
        parameters_are_not_split,
        models_are_made_in_parts,
        files_are_whole,
        nothing_is_shared_out,
        optimizer_stays_off_the_disk,
        parameters_stay_off_the_disk,
        loading_is_streamed,
    ),
    refused={
        **OF_DEEPSPEED,
        "ddp_static_graph": "has no effect: gradients are exchanged once a step, after all of them are made; remove it",
    },
)
