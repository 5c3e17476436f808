"""Training options without effect: length of the run, memory and speed, several processes."""

from __future__ import annotations

from library.config.arguments import TrainNetworkOptions
from library.config.no_effect.declare import idle
from library.launched import process_count


@idle("max_train_steps", reason="beside --max_train_epochs, which wins")
def epochs_win(o: TrainNetworkOptions) -> bool:
    return o.training.max_train_epochs is not None


@idle("dynamo_backend", reason="without --torch_compile")
def nothing_is_compiled(o: TrainNetworkOptions) -> bool:
    return not o.training.torch_compile


@idle("xformers", "sdpa", reason="beside --mem_eff_attn, which wins")
def memory_efficient_attention_wins(o: TrainNetworkOptions) -> bool:
    return o.training.mem_eff_attn


@idle("sdpa", reason="beside --xformers, which wins")
def xformers_wins(o: TrainNetworkOptions) -> bool:
    return o.training.xformers


@idle("cpu_offload_checkpointing", reason="without --gradient_checkpointing")
def no_checkpointing(o: TrainNetworkOptions) -> bool:
    return not o.training.gradient_checkpointing


@idle("fp8_base", reason="beside --fp8_base_unet, which leaves the text encoders as they are")
def only_the_denoiser(o: TrainNetworkOptions) -> bool:
    return o.training.fp8_base_unet


@idle(
    "ddp_timeout",
    "ddp_gradient_as_bucket_view",
    reason="with one process; several are started by: accelerate launch --multi_gpu",
)
def one_process(o: TrainNetworkOptions) -> bool:
    return process_count() == 1


@idle(
    "zero_stage",
    "offload_optimizer_device",
    "offload_optimizer_nvme_path",
    "offload_param_device",
    "offload_param_nvme_path",
    "zero3_init_flag",
    "zero3_save_16bit_model",
    "fp16_master_weights_and_gradients",
    reason="without --deepspeed",
)
def no_deepspeed(o: TrainNetworkOptions) -> bool:
    return not o.training.deepspeed


@idle(
    "offload_param_device",
    "offload_param_nvme_path",
    "zero3_init_flag",
    "zero3_save_16bit_model",
    reason="without --zero_stage 3",
)
def parameters_are_not_split(o: TrainNetworkOptions) -> bool:
    return o.training.deepspeed and o.training.zero_stage != 3


@idle("offload_optimizer_device", reason="with --zero_stage 0, which shares nothing out")
def nothing_is_shared_out(o: TrainNetworkOptions) -> bool:
    return o.training.deepspeed and o.training.zero_stage == 0


@idle("offload_optimizer_nvme_path", reason="without --offload_optimizer_device nvme")
def optimizer_stays_off_the_disk(o: TrainNetworkOptions) -> bool:
    return o.training.deepspeed and o.training.offload_optimizer_device != "nvme"


@idle("offload_param_nvme_path", reason="without --offload_param_device nvme")
def parameters_stay_off_the_disk(o: TrainNetworkOptions) -> bool:
    return o.training.deepspeed and o.training.zero_stage == 3 and o.training.offload_param_device != "nvme"
