"""Known keys of configuration files that are no option of the script that reads them, and their meaning.

Graphical programs write their own keys, and one file is used for several scripts. Such keys are listed here: they are
ignored, or stand for an option. A key close to one of the script's options is a typing mistake. Any other is unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any

#: keys that programs write for themselves; they have no effect here
_OF_PROGRAMS = frozenset(
    {
        # the kohya_ss GUI; the steps that it makes of its epochs are in max_train_steps
        "epoch", "noise_offset_type", "LoRA_type", "lora_type", "lowvram", "sdxl", "v1", "flux1_checkbox",
        "sd3_checkbox", "sd3_cache_text_encoder_outputs", "sd3_cache_text_encoder_outputs_to_disk",
        "flux1_cache_text_encoder_outputs", "flux1_cache_text_encoder_outputs_to_disk", "flux_fused_backward_pass",
        "sd3_fused_backward_pass", "train_blocks", "stop_text_encoder_training_pct", "num_cpu_threads_per_process",
        "num_processes", "num_machines", "main_process_port", "multi_gpu", "gpu_ids", "dynamo_mode",
        "dynamo_use_dynamic", "dynamo_use_fullgraph", "extra_accelerate_launch_args", "additional_parameters",
        # front ends that keep their own settings in the file of the run
        "save_toml", "save_toml_location", "tag_occurrence", "model_train_type", "enable_preview", "positive_prompts",
        "negative_prompts", "randomly_choice_prompt", "prompt_file", "sample_width", "sample_height", "sample_cfg",
        "sample_seed", "sample_steps", "ui_custom_params", "network_args_custom", "optimizer_args_custom",
        "enable_base_weight", "enable_block_weights", "lycoris_algo", "full_path", "use_latent_files",
    }
)  # fmt: skip

#: published options of other scripts of the suite
_OF_OTHER_SCRIPTS = frozenset(
    {
        "ae", "apply_lg_attn_mask", "apply_t5_attn_mask", "block_lr", "blocks_to_swap",
        "blockwise_fused_optimizers", "byt5", "clip_g", "clip_g_dropout_rate", "clip_l", "clip_l_dropout_rate",
        "cond_emb_dim", "control_net_lr", "controlnet_model_name_or_path", "cross_attn_lr", "diffusers_xformers",
        "discrete_flow_shift", "double_blocks_to_swap", "enable_scaled_pos_embed", "fp8_scaled", "fp8_vl",
        "fused_optimizer_groups", "gemma2", "gemma2_max_token_length", "guidance_scale", "init_word",
        "learning_rate_te", "learning_rate_te1", "learning_rate_te2", "learning_rate_te3", "llm_adapter_lr",
        "llm_adapter_path", "logit_mean", "logit_std", "mem_eff_save", "mlp_lr", "mod_lr", "mode_scale",
        "model_prediction_type", "model_type", "no_token_padding", "num_last_block_to_freeze",
        "num_vectors_per_token", "pos_emb_random_crop_rate", "qwen3", "qwen3_max_token_length", "sample_batch_size",
        "save_clip", "save_t5xxl", "self_attn_lr", "sigmoid_scale", "single_blocks_to_swap",
        "skip_latents_validity_check", "split_mode", "stop_text_encoder_training", "system_prompt",
        "t5_dropout_rate", "t5_max_token_length", "t5_tokenizer_path", "t5xxl", "t5xxl_device", "t5xxl_dtype",
        "t5xxl_max_token_length", "text_encoder", "text_encoder_cpu", "timestep_sampling", "token_string",
        "train_t5xxl", "train_text_encoder", "training_shift", "unsloth_offload_checkpointing", "use_flash_attn",
        "use_object_template", "use_safetensors", "use_sage_attn", "use_style_template", "use_t5xxl_cache_only",
        "vae_chunk_size", "vae_disable_cache", "weighting_scheme", "weights",
    }
)  # fmt: skip

#: published options of the scripts that train adapters, which those for whole models do not have
_OF_ADAPTER_SCRIPTS = frozenset(
    {
        "base_weights", "base_weights_multiplier", "conditioning_data_dir", "cpu_offload_checkpointing",
        "dataset_repeats", "dim_from_weights", "fp8_base_unet", "in_json", "initial_epoch", "initial_step",
        "masked_loss", "network_alpha", "network_args", "network_dim", "network_dropout", "network_module",
        "network_train_text_encoder_only", "network_train_unet_only", "network_weights", "no_half_vae", "no_metadata",
        "prior_loss_weight", "reg_data_dir", "scale_weight_norms", "skip_until_initial_step", "text_encoder_lr",
        "text_encoder_lr1", "text_encoder_lr2", "training_comment", "unet_lr", "weighted_captions",
    }
)  # fmt: skip

Options = dict[str, Any]


def _network_arg(name: str) -> Callable[[Any, Mapping[str, Any]], Options]:
    """Treat a key as a network arg, unless the network args have it."""

    def meaning(value: Any, options: Mapping[str, Any]) -> Options:
        words = options.get("network_args", [])
        said = any(word.partition("=")[0].strip() == name for word in words)
        return {} if said or not value else {"network_args": [*words, f"{name}={value}"]}

    return meaning


def _option(name: str) -> Callable[[Any, Mapping[str, Any]], Options]:
    """Treat a key as an older name of an option, unless the file has the option itself."""
    return lambda value, options: {} if name in options else {name: value}


#: keys that stand for options: key -> the options, from its value and the other options
_STANDS_FOR: Mapping[str, Callable[[Any, Mapping[str, Any]], Options]] = MappingProxyType(
    {
        "loraplus_lr_ratio": _network_arg("loraplus_lr_ratio"),
        "loraplus_unet_lr_ratio": _network_arg("loraplus_unet_lr_ratio"),
        "loraplus_text_encoder_lr_ratio": _network_arg("loraplus_text_encoder_lr_ratio"),
        "lr_restart_cycles": _option("lr_scheduler_num_cycles"),
    }
)


def is_of_other_scripts(key: str) -> bool:
    """Return whether the key is a published option of other training scripts."""
    return key in _OF_OTHER_SCRIPTS or key in _OF_ADAPTER_SCRIPTS


def is_known(key: str) -> bool:
    """Whether the key is known: programs write it for themselves, for other scripts, or for an option."""
    return any(key in keys for keys in (_OF_PROGRAMS, _OF_OTHER_SCRIPTS, _OF_ADAPTER_SCRIPTS, _STANDS_FOR))


def options_meant(key: str, value: Any, options: Mapping[str, Any]) -> Options:
    """Return the options that a known key stands for, if any.

    Args:
        options: the options in the file.
    """
    meaning = _STANDS_FOR.get(key)
    return meaning(value, options) if meaning is not None else {}


def typing_mistake_of(key: str, options: Collection[str]) -> str | None:
    """Return the option that was probably intended, if the key differs by a letter or two."""
    allowed = 0 if len(key) <= 3 else 1 if len(key) <= 5 else 2
    near = [(distance, name) for name in options if (distance := _distance(key, name, allowed)) <= allowed]
    return min(near)[1] if near else None


def _distance(a: str, b: str, most: int) -> int:
    """Count the letters to insert, remove, replace or swap with their neighbour; at most ``most + 1``.

    Damerau 1964; the optimal string alignment form.
    """
    if abs(len(a) - len(b)) > most:
        return most + 1
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        older, before, row = before, row, [i]
        for j, y in enumerate(b, start=1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                cost = min(cost, older[j - 2] + 1)
            row.append(cost)
    return min(row[-1], most + 1)
