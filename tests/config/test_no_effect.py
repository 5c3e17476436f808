"""Options without effect: a table of every condition, and that no option is forgotten.

``Case``: an option, a run in which it changes nothing, and what lifts that. A new option needs a rule in
``library/config/no_effect/`` with a case here, or a line in ``ALWAYS``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import pytest

from library.config.arguments import flat
from library.config.core import CORE
from library.config.declaration import Declaration, Facts
from library.config.no_effect import reasons, report, without_effect
from library.config.rules import check
from library.data.dataset_config import load_dataset_config
from library.data.idle_options import ON_VALIDATION, without_effect_on_data
from library.data.idle_options import OPTIONS as DATA_OPTIONS
from library.data.run_plan import RunPlan
from library.errors import NoEffect, UserError
from library.optim.optimizers import resolve_optimizer
from library.optim.schedule_checks import check_scheduler
from library.training.idle_options import without_effect_in_plan
from library.training.kinds.adapter import Adapter
from library.training.kinds.adapter_options import TrainNetworkOptions
from library.training.settings import schedule_settings
from tests.fixtures.runs import make_images
from tests.fixtures.subjects import SD

Given = dict[str, object]


class Case(NamedTuple):
    option: str
    given: Given  # without effect here
    lifted: Given  # has an effect with these on top
    words: str = ""  # of the reason


#: what the options alone tell
CASES = [
    Case("no_half_vae", {"no_half_vae": True}, {"mixed_precision": "bf16"}, "--mixed_precision"),
    Case("train_data_dir", {"train_data_dir": "x", "dataset_config": Path("d.toml")}, {"dataset_config": None}),
    Case("reg_data_dir", {"reg_data_dir": "x", "dataset_config": Path("d.toml")}, {"dataset_config": None}),
    Case("in_json", {"in_json": "m.json", "dataset_config": Path("d.toml")}, {"dataset_config": None}),
    Case(
        "caption_extension",
        {"caption_extension": ".txt", "caption_extention": ".cap"},
        {"caption_extention": None},
        "--caption_extention",
    ),
    Case("reg_data_dir", {"reg_data_dir": "r", "in_json": "m.json"}, {"in_json": None}, "--in_json"),
    Case("skip_cache_check", {"skip_cache_check": True}, {"cache_latents_to_disk": True}),
    Case("vae_batch_size", {"vae_batch_size": 4}, {"cache_latents": True}),
    Case("skip_cache_check", {"skip_cache_check": True}, {"cache_text_encoder_outputs_to_disk": True}),
    Case("text_encoder_batch_size", {"text_encoder_batch_size": 2}, {"cache_text_encoder_outputs": True}),
    Case("text_encoder_cache_variants", {"text_encoder_cache_variants": 2}, {"cache_text_encoder_outputs": True}),
    Case("highvram", {"highvram": True}, {"cache_latents_to_disk": True}),
    Case("highvram", {"highvram": True}, {"cache_text_encoder_outputs": True}),
    Case(
        "persistent_data_loader_workers",
        {"persistent_data_loader_workers": True, "max_data_loader_n_workers": 0},
        {"max_data_loader_n_workers": 1},
    ),
    # the network and its rates
    Case(
        "text_encoder_lr",
        {"text_encoder_lr": [1e-5], "network_train_unet_only": True},
        {"network_train_unet_only": False},
    ),
    *(
        Case(name, {name: 1e-5, "network_train_unet_only": True}, {"network_train_unet_only": False})
        for name in ("text_encoder_lr1", "text_encoder_lr2")
    ),
    Case(
        "unet_lr",
        {"unet_lr": 1e-5, "network_train_text_encoder_only": True},
        {"network_train_text_encoder_only": False},
    ),
    Case("learning_rate", {"learning_rate": 2e-4, "unet_lr": 1e-4, "text_encoder_lr": [1e-5]}, {"unet_lr": None}),
    Case(
        "learning_rate",
        {"learning_rate": 2e-4, "unet_lr": 1e-4, "text_encoder_lr1": 1e-5, "text_encoder_lr2": 1e-5},
        {"text_encoder_lr2": None},
    ),
    Case("learning_rate", {"learning_rate": 2e-4, "unet_lr": 1e-4, "network_train_unet_only": True}, {"unet_lr": None}),
    Case("network_dim", {"network_dim": 8, "dim_from_weights": True}, {"dim_from_weights": False}),
    Case("network_alpha", {"network_alpha": 8.0, "dim_from_weights": True}, {"dim_from_weights": False}),
    Case("network_weights", {"network_weights": "w.safetensors", "resume": "s"}, {"resume": None}),
    Case("network_weights", {"network_weights": "w.safetensors", "resume": "s"}, {"dim_from_weights": True}),
    # a word beside the network
    *(
        Case(name, {name: value}, {"train_embedding": "qux"}, "--train_embedding")
        for name, value in (
            ("embedding_init_word", "cat"),
            ("embedding_vectors", 2),
            ("embedding_weights", "w.pt"),
            ("embedding_lr", 1e-3),
            ("bundle_embedding", True),
        )
    ),
    Case(
        "embedding_init_word",
        {"train_embedding": "qux", "embedding_init_word": "cat", "embedding_weights": "w.pt"},
        {"embedding_weights": None},
        "--embedding_weights",
    ),
    Case(
        "embedding_weights",
        {"train_embedding": "qux", "embedding_weights": "w.pt", "resume": "s"},
        {"resume": None},
        "--resume",
    ),
    # length of the run, memory, processes
    Case("mem_eff_attn", {"mem_eff_attn": True, "attn_mode": "torch"}, {"attn_mode": None}, "--attn_mode"),
    Case("xformers", {"xformers": True, "attn_mode": "torch"}, {"attn_mode": None}, "--attn_mode"),
    Case("sdpa", {"sdpa": True, "attn_mode": "torch"}, {"attn_mode": None}, "--attn_mode"),
    Case("split_attn", {"split_attn": True}, {"train_batch_size": 2}, "one image"),
    Case("xformers", {"xformers": True, "mem_eff_attn": True}, {"mem_eff_attn": False}, "--mem_eff_attn"),
    Case("sdpa", {"sdpa": True, "mem_eff_attn": True}, {"mem_eff_attn": False}, "--mem_eff_attn"),
    Case("sdpa", {"sdpa": True, "xformers": True}, {"xformers": False}, "--xformers"),
    Case("max_train_steps", {"max_train_steps": 10, "max_train_epochs": 2}, {"max_train_epochs": None}),
    Case("fp8_base", {"fp8_base": True, "fp8_base_unet": True}, {"fp8_base_unet": False}, "--fp8_base_unet"),
    Case("fp8_base_unet", {"fp8_base_unet": True, "fp8_scaled": True}, {"fp8_scaled": False}, "--fp8_scaled"),
    Case("fp8_te", {"fp8_te": True, "fp8_base": True}, {"fp8_base": False}, "--fp8_base"),
    Case("fp8_te", {"fp8_te": True, "cache_text_encoder_outputs": True}, {"cache_text_encoder_outputs": False}),
    Case("fp8_matmul", {"fp8_matmul": True}, {"fp8_base_unet": True}),
    *(
        Case(name, {name: value}, {"compile": True})
        for name, value in (
            ("compile_backend", "eager"),
            ("compile_mode", "max-autotune"),
            ("compile_dynamic", "true"),
            ("compile_fullgraph", True),
            ("compile_cache_size_limit", 32),
        )
    ),
    Case("dynamo_backend", {"dynamo_backend": "eager"}, {"torch_compile": True}),
    Case("cpu_offload_checkpointing", {"cpu_offload_checkpointing": True}, {"gradient_checkpointing": True}),
    Case("zero_stage", {"zero_stage": 3}, {"deepspeed": True}),
    Case("offload_optimizer_device", {"offload_optimizer_device": "cpu"}, {"deepspeed": True}),
    Case(
        "offload_optimizer_device",
        {"offload_optimizer_device": "cpu", "deepspeed": True, "zero_stage": 0},
        {"zero_stage": 1},
    ),
    Case("fp16_master_weights_and_gradients", {"fp16_master_weights_and_gradients": True}, {"deepspeed": True}),
    Case(
        "offload_optimizer_nvme_path",
        {"offload_optimizer_nvme_path": "x", "deepspeed": True},
        {"offload_optimizer_device": "nvme"},
    ),
    Case(
        "offload_param_device", {"offload_param_device": "cpu", "deepspeed": True}, {"zero_stage": 3}, "--zero_stage 3"
    ),
    Case(
        "offload_param_nvme_path",
        {"offload_param_nvme_path": "x", "deepspeed": True, "zero_stage": 3},
        {"offload_param_device": "nvme"},
    ),
    Case("offload_param_device", {"offload_param_device": "cpu", "zero_stage": 3}, {"deepspeed": True}, "--deepspeed"),
    Case(
        "offload_optimizer_nvme_path",
        {"offload_optimizer_nvme_path": "x", "offload_optimizer_device": "nvme"},
        {"deepspeed": True},
        "--deepspeed",
    ),
    Case(
        "offload_param_nvme_path",
        {"offload_param_nvme_path": "x", "offload_param_device": "nvme", "zero_stage": 3},
        {"deepspeed": True},
        "--deepspeed",
    ),
    Case(
        "offload_param_nvme_path",
        {"offload_param_nvme_path": "x", "offload_param_device": "nvme", "deepspeed": True},
        {"zero_stage": 3},
        "--zero_stage 3",
    ),
    # noise and loss
    Case("noise_offset_random_strength", {"noise_offset_random_strength": True}, {"noise_offset": 0.1}),
    Case("adaptive_noise_scale", {"adaptive_noise_scale": 0.1}, {"noise_offset": 0.1}),
    Case("multires_noise_discount", {"multires_noise_discount": 0.8}, {"multires_noise_iterations": 6}),
    Case("ip_noise_gamma_random_strength", {"ip_noise_gamma_random_strength": True}, {"ip_noise_gamma": 0.1}),
    Case("huber_schedule", {"huber_schedule": "constant"}, {"loss_type": "huber"}),
    Case("huber_c", {"huber_c": 0.2}, {"loss_type": "smooth_l1"}),
    Case("huber_scale", {"huber_scale": 2.0}, {"loss_type": "huber"}),
    # saving and going on
    Case("save_every_n_epochs", {"save_every_n_epochs": 2, "save_n_epoch_ratio": 5}, {"save_n_epoch_ratio": None}),
    Case("save_last_n_epochs", {"save_last_n_epochs": 2}, {"save_n_epoch_ratio": 4}),
    Case("save_last_n_epochs_state", {"save_last_n_epochs_state": 2, "save_state": True}, {"save_every_n_epochs": 1}),
    Case("save_last_n_epochs_state", {"save_last_n_epochs_state": 2, "save_every_n_epochs": 1}, {"save_state": True}),
    Case("save_last_n_steps", {"save_last_n_steps": 20}, {"save_every_n_steps": 5}),
    Case("save_last_n_steps_state", {"save_last_n_steps_state": 9, "save_state": True}, {"save_every_n_steps": 5}),
    Case("save_last_n_steps_state", {"save_last_n_steps_state": 9, "save_every_n_steps": 5}, {"save_state": True}),
    Case("save_state_on_train_end", {"save_state_on_train_end": True, "save_state": True}, {"save_state": False}),
    *(
        Case(name, {name: value, "save_model_as": "pt"}, {"save_model_as": "safetensors"}, "metadata")
        for name, value in {
            "no_metadata": True,
            "training_comment": "c",
            "metadata_title": "t",
            "metadata_author": "a",
            "metadata_description": "d",
            "metadata_license": "l",
            "metadata_tags": "a,b",
            "metadata_usage_hint": "u",
            "metadata_thumbnail": "t.png",
            "metadata_merged_from": "m",
            "metadata_trigger_phrase": "p",
            "metadata_preprocessor": "p",
            "metadata_is_negative_embedding": "yes",
        }.items()
    ),
    Case("training_comment", {"training_comment": "c", "no_metadata": True}, {"no_metadata": False}, "--no_metadata"),
    Case("huggingface_repo_type", {"huggingface_repo_type": "model"}, {"huggingface_repo_id": "a/b"}),
    Case("huggingface_path_in_repo", {"huggingface_path_in_repo": "x"}, {"huggingface_repo_id": "a/b"}),
    Case("huggingface_repo_visibility", {"huggingface_repo_visibility": "public"}, {"huggingface_repo_id": "a/b"}),
    Case("huggingface_token", {"huggingface_token": "t"}, {"huggingface_repo_id": "a/b"}),
    Case("huggingface_token", {"huggingface_token": "t"}, {"resume_from_huggingface": True, "resume": "a/b"}),
    Case("async_upload", {"async_upload": True}, {"huggingface_repo_id": "a/b"}),
    Case(
        "save_state_to_huggingface",
        {"save_state_to_huggingface": True, "save_state": True},
        {"huggingface_repo_id": "a/b"},
    ),
    Case(
        "save_state_to_huggingface",
        {"save_state_to_huggingface": True, "huggingface_repo_id": "a/b"},
        {"save_state_on_train_end": True},
    ),
    Case("resume_from_huggingface", {"resume_from_huggingface": True}, {"resume": "a/b"}),
    Case("initial_epoch", {"initial_epoch": 2, "initial_step": 5}, {"initial_step": None}),
    Case("skip_until_initial_step", {"skip_until_initial_step": True}, {"initial_step": 2}),
    Case("skip_until_initial_step", {"skip_until_initial_step": True, "initial_epoch": 2}, {"initial_step": 2}),
    *(
        Case(name, {"initial_step": 3, "resume": "s", name: value}, {"resume": None, "initial_step": step}, "--resume")
        for name, value, step in (
            ("initial_epoch", 2, None),
            ("initial_step", 3, 3),
            ("skip_until_initial_step", True, 3),
        )
    ),
    # sample images and logs
    Case("sample_prompts", {"sample_prompts": "p.txt"}, {"sample_at_first": True}),
    Case("sample_every_n_steps", {"sample_every_n_steps": 5}, {"sample_prompts": "p.txt"}, "--sample_prompts"),
    Case("sample_every_n_epochs", {"sample_every_n_epochs": 5}, {"sample_prompts": "p.txt"}),
    *(
        Case(name, {name: off, "sample_prompts": "p.txt"}, {name: 1}, "off")
        for name in ("sample_every_n_steps", "sample_every_n_epochs")
        for off in (-1, -2)
    ),
    Case(
        "sample_prompts",
        {"sample_prompts": "p.txt", "sample_every_n_steps": -2, "sample_every_n_epochs": -1},
        {"sample_every_n_steps": 1},
    ),
    Case("sample_at_first", {"sample_at_first": True}, {"sample_prompts": "p.txt"}),
    Case(
        "sample_every_n_steps",
        {"sample_every_n_steps": 5, "sample_every_n_epochs": 1, "sample_prompts": "p.txt"},
        {"sample_every_n_epochs": None},
        "--sample_every_n_epochs",
    ),
    Case("sample_sampler", {"sample_sampler": "heun"}, {"sample_prompts": "p.txt", "sample_at_first": True}),
    Case("wandb_run_name", {"wandb_run_name": "r"}, {"log_with": "all"}),
    Case("wandb_api_key", {"wandb_api_key": "k", "log_with": "tensorboard"}, {"log_with": "wandb"}),
]

#: what depends on the dataset file: the tables of a file with one subset, before and after
#: (option, its value, file's tables without effect, file's tables with one, words)
DATA_CASES = [
    *(
        (name, value, {table: {key: other}}, {}, "their own values")
        for name, value, table, key, other in [
            ("train_batch_size", 2, "dataset", "batch_size", 4),
            ("resolution", "64", "dataset", "resolution", 128),
            ("enable_bucket", True, "dataset", "enable_bucket", "false"),
            ("resize_interpolation", "area", "dataset", "resize_interpolation", "'lanczos'"),
            ("dataset_repeats", 3, "subset", "num_repeats", 2),
            ("flip_aug", True, "subset", "flip_aug", "false"),
            ("random_crop", True, "subset", "random_crop", "false"),
            ("face_crop_aug_range", "1.0,2.0", "subset", "face_crop_aug_range", "[2.0, 3.0]"),
            ("color_aug", True, "subset", "color_aug", "false"),
            ("alpha_mask", True, "subset", "alpha_mask", "false"),
            ("conditioning_data_dir", "masks", "subset", "conditioning_data_dir", "'images'"),
            ("caption_extention", "cap", "subset", "caption_extension", "'.txt'"),
            ("shuffle_caption", True, "subset", "shuffle_caption", "false"),
            ("keep_tokens_separator", "|||", "subset", "keep_tokens_separator", "'###'"),
            ("secondary_separator", ";;;", "subset", "secondary_separator", "';'"),
            ("caption_prefix", "a", "subset", "caption_prefix", "'b'"),
            ("caption_suffix", "a", "subset", "caption_suffix", "'b'"),
            ("enable_wildcard", True, "subset", "enable_wildcard", "false"),
            ("caption_dropout_rate", 0.1, "subset", "caption_dropout_rate", 0.2),
            ("caption_dropout_every_n_epochs", 2, "subset", "caption_dropout_every_n_epochs", 3),
            ("caption_tag_dropout_rate", 0.1, "subset", "caption_tag_dropout_rate", 0.2),
            ("token_warmup_step", 10, "subset", "token_warmup_step", 20),
        ]
    ),
    ("min_bucket_reso", 32, {}, {"dataset": {"enable_bucket": "true"}}, "--enable_bucket"),
    ("max_bucket_reso", 512, {}, {"dataset": {"enable_bucket": "true"}}, "--enable_bucket"),
    (
        "max_bucket_reso",
        512,
        {"dataset": {"enable_bucket": "true", "bucket_no_upscale": "true"}},
        {"dataset": {"enable_bucket": "true", "min_bucket_reso": 64}},
        "--bucket_no_upscale",
    ),
    ("bucket_reso_steps", 32, {}, {"dataset": {"enable_bucket": "true", "min_bucket_reso": 64}}, "--enable_bucket"),
    ("bucket_no_upscale", True, {}, {"dataset": {"enable_bucket": "true"}}, "--enable_bucket"),
    ("cache_info", True, {"subset": {"metadata_file": "'m.json'"}}, {}, "metadata files"),
    ("caption_extension", "cap", {"subset": {"metadata_file": "'m.json'"}}, {}, "metadata files"),
    ("keep_tokens", 2, {}, {"subset": {"shuffle_caption": "true"}}, "--shuffle_caption"),
    ("caption_separator", ";", {}, {"subset": {"secondary_separator": "'+'"}}, "tags"),
    ("token_warmup_min", 3, {}, {"subset": {"token_warmup_step": 9}}, "--token_warmup_step"),
    ("validation_split", 0.1, {"dataset": {"validation_split": 0}}, {}, "their own values"),
    ("prior_loss_weight", 0.5, {}, {"more": "is_reg = true"}, "regularization"),
    *((name, 3, {}, {"dataset": {"validation_split": 0.5}}, "validation images") for name in ON_VALIDATION),
]

#: what depends on optimizer and schedule
SCHEDULE_CASES = [
    Case("lr_warmup_steps", {"lr_warmup_steps": 10}, {"lr_scheduler": "cosine"}, "--lr_scheduler constant"),
    Case("lr_decay_steps", {"lr_decay_steps": 10, "lr_scheduler": "cosine"}, {"lr_scheduler": "warmup_stable_decay"}),
    Case("lr_scheduler_num_cycles", {"lr_scheduler_num_cycles": 3}, {"lr_scheduler": "cosine_with_restarts"}),
    Case("lr_scheduler_power", {"lr_scheduler_power": 2.0}, {"lr_scheduler": "polynomial", "learning_rate": 1e-3}),
    Case("lr_scheduler_timescale", {"lr_scheduler_timescale": 9}, {"lr_scheduler": "inverse_sqrt"}),
    Case("lr_scheduler_min_lr_ratio", {"lr_scheduler_min_lr_ratio": 0.1}, {"lr_scheduler": "cosine_with_min_lr"}),
    Case(
        "lr_scheduler",
        {"lr_scheduler": "cosine", "lr_scheduler_type": "StepLR", "lr_scheduler_args": ["step_size=3"]},
        {"lr_scheduler_type": "", "lr_scheduler_args": None},
    ),
    Case("lr_scheduler", {"lr_scheduler": "cosine", "optimizer_type": "Adafactor"}, {"optimizer_type": "AdamW"}),
    Case(
        "lr_scheduler_type",
        {"lr_scheduler_type": "StepLR", "lr_scheduler_args": ["step_size=3"], "optimizer_type": "Adafactor"},
        {"optimizer_type": "AdamW"},
    ),
    Case(
        "lr_scheduler_args",
        {"lr_scheduler_type": "StepLR", "lr_scheduler_args": ["step_size=3"], "optimizer_type": "Adafactor"},
        {"optimizer_type": "AdamW"},
    ),
    Case("unet_lr", {"unet_lr": 1e-3, "optimizer_type": "Adafactor"}, {"optimizer_args": ["relative_step=False"]}),
]

#: what depends on the length of the run, here of 2 epochs with 4 steps each
PLAN_CASES = [
    Case("save_every_n_steps", {"save_every_n_steps": 9}, {"save_every_n_steps": 8}, "8 steps"),
    Case("sample_every_n_steps", {"sample_every_n_steps": 9}, {"sample_every_n_steps": 8}),
    Case("sample_every_n_epochs", {"sample_every_n_epochs": 3}, {"sample_every_n_epochs": 2}, "2 epochs"),
    Case("save_every_n_epochs", {"save_every_n_epochs": 2}, {"save_every_n_epochs": 1}, "final file"),
]

#: without effect in every run; the reason says why they are still there
NEVER = {"lowram", "zero3_init_flag", "zero3_save_16bit_model"}

#: options that act whenever they are given, or whose uselessness is an error of its own
ALWAYS = set(
    """
    pretrained_model_name_or_path v2 v_parameterization tokenizer_cache_dir vae clip_skip max_token_length
    disable_mmap_load_safetensors
    weighted_captions dataset_config cache_latents cache_latents_to_disk cache_text_encoder_outputs
    cache_text_encoder_outputs_to_disk on_bad_image max_data_loader_n_workers
    output_dir output_name save_model_as save_precision save_state huggingface_repo_id resume
    network_module network_args network_train_unet_only network_train_text_encoder_only dim_from_weights
    scale_weight_norms base_weights base_weights_multiplier network_dropout train_embedding
    optimizer_type use_8bit_adam use_lion_optimizer optimizer_args max_grad_norm
    max_train_epochs seed gradient_accumulation_steps gradient_checkpointing mixed_precision torch_compile
    compile memory_plan cuda_allow_tf32 cuda_cudnn_benchmark
    attn_mode full_fp16 full_bf16 fp8_scaled quantize_base fused_backward_pass
    deepspeed zero_terminal_snr min_timestep max_timestep noise_offset multires_noise_iterations ip_noise_gamma
    min_snr_gamma v_pred_like_loss
    loss_type scale_v_pred_loss_like_noise_pred debiased_estimation_loss masked_loss
    early_stopping_patience save_best ema_decay debug_dataset
    logging_dir log_with log_prefix log_tracker_name log_tracker_config log_config
    console_log_level console_log_file console_log_simple config_file output_config strict explain dry_run
    on_nan replay
    """.split()
)

#: tested below, each in a test of its own
OTHERS = {"ddp_timeout", "ddp_gradient_as_bucket_view", "save_n_epoch_ratio"}


def options(*given: Given) -> TrainNetworkOptions:
    merged: Given = {}
    for values in given:
        merged |= values
    return TrainNetworkOptions.from_args(argparse.Namespace(**merged))


def idle_names(given: TrainNetworkOptions) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for names, reason in reasons(given, SD.declaration):
        for name in names:
            found.setdefault(name, []).append(reason)
    return found


def case_id(case: Case) -> str:
    return case.option


def test_no_option_is_forgotten() -> None:
    covered = {case.option for case in (*CASES, *SCHEDULE_CASES, *PLAN_CASES)} | {case[0] for case in DATA_CASES}
    covered |= NEVER | OTHERS
    assert not covered & ALWAYS, "an option in ALWAYS has a case"
    names = {field.name for field, _ in flat(options())}
    for name in sorted(names - covered - ALWAYS - set(CORE.refused)):
        pytest.fail(
            f"--{name}: decide when it has no effect. If there is such a run, declare a rule with @idle beside it, in "
            "library/config/core/, and add a Case to tests/config/test_no_effect.py; else add it to ALWAYS there"
        )
    assert covered | ALWAYS <= names, "a case or a line of ALWAYS names no option"


def test_every_rule_names_options_and_has_a_case() -> None:
    names = {field.name for field, _ in flat(options())}
    for rule in (*CORE.idle, *SD.declaration.idle):
        assert set(rule.names) <= names, rule
        for name in rule.names:
            if name in NEVER | OTHERS:
                continue
            assert any(
                case.option == name and rule.reason in idle_names(options(case.given)).get(name, []) for case in CASES
            ), f"--{name} {rule.reason}: add a Case to tests/config/test_no_effect.py"
    assert {case[0] for case in DATA_CASES} == {*DATA_OPTIONS, *ON_VALIDATION, "prior_loss_weight"}, (
        "DATA_CASES: one for each option"
    )


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_it_has_no_effect_until_that_is_lifted(case: Case) -> None:
    found = idle_names(options(case.given))
    assert case.option in found and case.words in " ".join(found[case.option])
    assert case.option not in idle_names(options(case.given, case.lifted)), case.lifted


@pytest.mark.parametrize("case", SCHEDULE_CASES, ids=case_id)
def test_schedules_and_optimizers(case: Case) -> None:
    def found(given: TrainNetworkOptions) -> list[str]:
        o = given.optimizer
        optimizer = resolve_optimizer(
            o.optimizer_type,
            False,
            False,
            o.optimizer_args,
            o.learning_rate,
            learning_rates_of_parts=Adapter.learning_rate_flags(given),
        )
        warnings = (*optimizer.warnings, *check_scheduler(optimizer, schedule_settings(given)))
        return [
            text
            for text in warnings
            if isinstance(text, NoEffect)
            and f"--{case.option}" in text.split(":")[0]
            or case.option == "unet_lr"
            and isinstance(text, NoEffect)
            and "--unet_lr" in text
        ]

    (text,) = found(options(case.given))
    assert case.words in text
    assert found(options(case.given, case.lifted)) == []


@pytest.mark.parametrize("case", PLAN_CASES, ids=case_id)
def test_runs_that_are_too_short(case: Case) -> None:
    plan = RunPlan(batches_per_epoch=4, gradient_accumulation_steps=1, total_steps=8)
    (text,) = without_effect_in_plan(options(case.given), plan)
    assert text.startswith(f"--{case.option} has no effect in a run of") and case.words in text
    assert without_effect_in_plan(options(case.given, case.lifted), plan) == []


def test_what_programs_write_anyway_is_no_news(tmp_path: Path) -> None:
    written: Given = {
        "output_dir": str(tmp_path), "output_name": "n", "wandb_run_name": "n", "sample_sampler": "euler_a",
        "sample_prompts": f"{tmp_path}/sample/prompt.txt", "learning_rate": 1e-4, "unet_lr": 1e-4,
        "text_encoder_lr": [1e-4, 1e-4], "save_every_n_epochs": 1, "max_bucket_reso": 2048, "huber_c": 0.1,
        "max_timestep": 1000, "max_token_length": 75, "clip_skip": 1, "max_train_steps": 1600, "max_train_epochs": 3,
    }  # fmt: skip
    assert idle_names(options(written)) == {}
    assert without_effect_in_plan(options(written), RunPlan(4, 1, 4)) == []
    other: Given = {"wandb_run_name": "other", "sample_prompts": "mine.txt", "learning_rate": 1e-3}
    assert set(idle_names(options(written, other))) == {"wandb_run_name", "sample_prompts", "learning_rate"}


def test_a_ratio_of_saves_needs_two_epochs() -> None:
    one = RunPlan(batches_per_epoch=4, gradient_accumulation_steps=1, total_steps=4)
    (text,) = without_effect_in_plan(options({"save_n_epoch_ratio": 2}), one)
    assert text.startswith("--save_n_epoch_ratio has no effect")
    two = RunPlan(batches_per_epoch=4, gradient_accumulation_steps=1, total_steps=8)
    assert without_effect_in_plan(options({"save_n_epoch_ratio": 2}), two) == []


def test_data_begin_with_every_epoch_anyway() -> None:
    plan = RunPlan(batches_per_epoch=8, gradient_accumulation_steps=2, total_steps=12)
    given = {"initial_step": 8, "skip_until_initial_step": True}
    (text,) = without_effect_in_plan(options(given), plan)
    assert text.startswith("--skip_until_initial_step has no effect as step 8")
    assert without_effect_in_plan(options(given, {"initial_step": 7}), plan) == []


@pytest.mark.parametrize("given", [{"ddp_timeout": 5}, {"ddp_gradient_as_bucket_view": True}])
def test_some_need_several_processes(monkeypatch: pytest.MonkeyPatch, given: dict[str, object]) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert set(given) <= set(idle_names(options(given)))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not set(given) & set(idle_names(options(given)))


@pytest.mark.parametrize("name", sorted(NEVER))
def test_never(name: str) -> None:
    assert name in idle_names(options({name: True}))


# ---- the dataset file ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("data")
    make_images(made / "images", sizes=[(64, 64)])
    make_images(made / "masks", sizes=[(64, 64)])
    (made / "m.json").write_text('{"0.png": {"caption": "a cat"}}', encoding="utf-8")
    return made


def on_data(given: TrainNetworkOptions) -> list[NoEffect]:
    return without_effect_on_data(
        given, load_dataset_config(given.dataset.dataset_config, given.dataset, given.validation)
    )


def dataset_file(folder: Path, tables: dict[str, object], *, resolution: bool) -> Path:
    def lines(table: str) -> str:
        return "".join(f"{key} = {value}\n" for key, value in dict(tables.get(table, {})).items())

    subset = "[[datasets.subsets]]\nimage_dir = 'images'\n"
    text = f"[[datasets]]\n{'resolution = 256' if resolution else ''}\n{lines('dataset')}{subset}{lines('subset')}"
    if "more" in tables:
        text += f"[[datasets.subsets]]\nimage_dir = 'images'\n{tables['more']}\n"
    (folder / "data.toml").write_text(text, encoding="utf-8")
    return folder / "data.toml"


@pytest.mark.parametrize(("name", "value", "idle", "active", "words"), DATA_CASES, ids=lambda v: str(v)[:20])
def test_dataset_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: object, idle: Given, active: Given, words: str
) -> None:
    monkeypatch.chdir(folder)
    resolution = name != "resolution"
    given = {name: value, "dataset_config": Path("data.toml")}
    dataset_file(folder, idle, resolution=resolution)
    (text,) = on_data(options(given))
    assert f"--{name} has no effect" in text and words in text
    dataset_file(folder, active, resolution=resolution)
    assert on_data(options(given)) == []


def test_folders_say_their_repeats_themselves(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    make_images(folder / "all" / "2_cat", sizes=[(64, 64)])
    given: Given = {"train_data_dir": "all", "resolution": "64", "dataset_repeats": 5}
    (text,) = on_data(options(given))
    assert text.startswith("--dataset_repeats has no effect with these folders")
    metadata: Given = {"train_data_dir": "images", "in_json": "m.json"}
    assert on_data(options(given, metadata)) == []
    (text,) = on_data(options(given, metadata, {"caption_extension": ".cap"}))
    assert text == "--caption_extension has no effect with metadata files, which hold the captions"


def test_one_subset_that_reads_it_is_enough(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    dataset_file(folder, {"subset": {"flip_aug": "false"}, "more": "num_repeats = 2"}, resolution=True)
    assert on_data(options({"flip_aug": True, "dataset_config": Path("data.toml")})) == []


# ---- what becomes of it ----


def test_options_at_their_default_are_never_reported() -> None:
    assert reasons(options(), SD.declaration) == []
    assert without_effect(options({"huber_c": 0.1, "dynamo_backend": "inductor"}), SD.declaration) == []


def test_one_line_for_each_reason() -> None:
    given = options({"huber_c": 0.2, "huber_scale": 2.0, "huber_schedule": "constant", "sample_at_first": True})
    assert without_effect(given, SD.declaration) == [
        "--huber_schedule, --huber_c and --huber_scale have no effect without --loss_type huber or smooth_l1",
        "--sample_at_first has no effect without --sample_prompts, a file",
    ]


def test_strict_makes_them_errors_beside_the_others(tmp_path: Path) -> None:
    good: Given = {
        "pretrained_model_name_or_path": "m",
        "network_module": "networks.lora",
        "output_dir": str(tmp_path / "out"),
        "train_data_dir": str(tmp_path),
        "learning_rate": 1e-4,
    }
    assert len(check(options(good, {"huber_c": 0.2, "lowram": True}), SD)) == 2
    strict: Given = {**good, "strict": True}
    assert check(options(strict), SD) == []
    with pytest.raises(UserError) as found:
        check(options(strict, {"huber_c": 0.2, "lowram": True, "network_dim": 0}), SD)
    lines = str(found.value).splitlines()
    assert [line.split()[0] for line in lines] == ["--network_dim", "--lowram", "--huber_c"]
    assert lines[1].endswith("remove it (an error by --strict)")
    # unusual, but not without effect
    assert "--zero_terminal_snr" in check(options(strict, {"zero_terminal_snr": True}), SD)[0]


def test_later_findings_are_reported_alike(caplog: pytest.LogCaptureFixture) -> None:
    findings = ["unusual", NoEffect("--a has no effect without --b")]
    report(findings, strict=False)
    assert caplog.messages == findings
    with pytest.raises(UserError, match=r"^--a has no effect without --b; remove it \(an error by --strict\)$"):
        report(findings, strict=True)
    report(["unusual"], strict=True)


# ---- what a family declares ----


class FlowFamily:
    """A family declares what cannot work with it, and what changes nothing."""

    declaration = Declaration(
        refused={"v_parameterization": "flow models predict the velocity between noise and image; remove it"},
        unused={"min_snr_gamma": "with flow matching, which has no SNR weighting"},
    )

    def facts(self, options: TrainNetworkOptions) -> Facts:
        return Facts(trained_encoders=(True,))


def test_a_familys_declarations(tmp_path: Path) -> None:
    good: Given = {
        "pretrained_model_name_or_path": "m",
        "network_module": "networks.lora",
        "output_dir": str(tmp_path / "out"),
        "train_data_dir": str(tmp_path),
        "learning_rate": 1e-4,
    }
    family = FlowFamily()
    assert check(options(good, {"min_snr_gamma": 5.0}), family) == [
        "--min_snr_gamma has no effect with flow matching, which has no SNR weighting"
    ]
    assert check(options(good, {"min_snr_gamma": 5.0}), SD) == []
    with pytest.raises(UserError, match="--min_snr_gamma has no effect with flow .* by --strict"):
        check(options(good, {"min_snr_gamma": 5.0, "strict": True}), family)
    with pytest.raises(UserError, match="--v_parameterization: flow models predict the velocity"):
        check(options(good, {"v_parameterization": True}), family)


def test_families_declare_options_that_exist() -> None:
    names = {field.name for field, _ in flat(options())}
    assert set(SD.declaration.refused) | set(SD.declaration.unused) <= names
