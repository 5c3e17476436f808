"""Every rule between options, and every refused option."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from library.config.arguments import flat, for_others, without_secrets
from library.config.core import CORE
from library.config.declaration import Declaration, Facts
from library.config.rules import check
from library.errors import UserError
from library.training.kinds.adapter_options import TrainNetworkOptions
from tests.fixtures.subjects import SD, SDXL

#: the option names of the features that this version leaves out; one that is dropped here must be implemented
LEFT_OUT = (
    "dataset_class "
    "ddp_static_graph "
    "offload_optimizer_nvme_path offload_param_nvme_path fp16_master_weights_and_gradients"
).split()

GOOD = {
    "pretrained_model_name_or_path": "model.safetensors",
    "dataset_config": Path("data.toml"),
    "output_dir": "output",
    "network_module": "networks.lora",
    "learning_rate": 1e-4,
}


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the files that the tables below name, in the working directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("data.toml", "p.txt", "m.json", "w.safetensors", "v.safetensors"):
        Path(name).touch()
    Path("state").mkdir()


def options(**given: object) -> TrainNetworkOptions:
    return TrainNetworkOptions.from_args(argparse.Namespace(**{**GOOD, **given}))


def test_a_good_set_has_no_findings() -> None:
    assert check(options(), SD) == []


UNET_ONLY = {"network_train_unet_only": True}

ERRORS = [
    ({"pretrained_model_name_or_path": None}, "--pretrained_model_name_or_path"),
    ({"network_module": None}, "--network_module"),
    ({"output_dir": None}, "--output_dir"),
    ({"output_name": "a/b"}, "--output_name a/b"),
    ({"dataset_config": None}, "no data"),
    ({"network_train_unet_only": True, "network_train_text_encoder_only": True}, "exclude each other"),
    ({"dim_from_weights": True}, "--network_weights"),
    ({"train_embedding": "a b", "embedding_init_word": "cat"}, "--train_embedding 'a b': must be one word"),
    ({"train_embedding": "qux"}, "--embedding_init_word: name a known word"),
    ({"learning_rate": 0.0}, "nothing to train"),
    ({"unet_lr": 0.0, "text_encoder_lr": [0.0]}, "nothing to train"),
    ({"unet_lr": 0.0, **UNET_ONLY}, "nothing to train"),
    ({"ema_decay": 1.0}, "--ema_decay 1.0: must be above 0 and below 1"),
    ({"base_weights": ["w.safetensors"], "base_weights_multiplier": [1.0, 2.0]}, "--base_weights_multiplier"),
    ({"output_dir": "p.txt"}, "--output_dir p.txt"),
    ({"output_dir": "~/out"}, "--output_dir ~/out; only shells replace ~, so write"),
    ({"logging_dir": "~/logs"}, "--logging_dir ~/logs; only shells replace ~, so write"),
    ({"train_data_dir": "~/images", "dataset_config": None}, "no such folder; only shells replace ~, so write"),
    ({"output_dir": "p.txt/out"}, "p.txt is a file, not a folder"),
    ({"logging_dir": "p.txt/logs"}, "--logging_dir p.txt/logs: "),
    ({"dataset_config": Path("gone.toml")}, "--dataset_config gone.toml: no such file"),
    ({"dataset_config": None, "train_data_dir": "gone"}, "--train_data_dir gone: no such folder"),
    ({"dataset_config": None, "train_data_dir": "state", "reg_data_dir": "p.txt"}, "--reg_data_dir p.txt: a file"),
    ({"network_weights": "gone.safetensors"}, "--network_weights gone.safetensors: no such file"),
    ({"network_weights": "state"}, "--network_weights state: a folder"),
    ({"base_weights": ["w.safetensors", "gone.safetensors"]}, "--base_weights gone.safetensors"),
    ({"sample_prompts": "gone.txt", "sample_at_first": True}, "--sample_prompts gone.txt"),
    ({"log_tracker_config": "gone.toml"}, "--log_tracker_config gone.toml"),
    ({"metadata_thumbnail": "gone.png"}, "--metadata_thumbnail gone.png: no such file"),
    ({"resume": "gone-state"}, "--resume gone-state: no such folder"),
    ({"resume": "p.txt"}, "--resume p.txt: a file, not a folder"),
    ({"dataset_config": None, "in_json": "gone.json"}, "--in_json gone.json: no such file"),
    ({"optimizer_type": "Lion", "use_8bit_adam": True}, "exclude each other"),
    ({"use_8bit_adam": True, "use_lion_optimizer": True}, "exclude each other"),
    ({"learning_rate": float("nan")}, "--learning_rate nan: must be a finite number"),
    ({"text_encoder_lr": [float("inf")]}, "--text_encoder_lr inf: must be a finite number"),
    ({"text_encoder_lr": [-1e-5]}, "--text_encoder_lr -1e-05"),
    ({"min_snr_gamma": -1.0}, "--min_snr_gamma -1.0"),
    ({"multires_noise_iterations": -1}, "--multires_noise_iterations -1"),
    ({"huber_scale": -1.0, "loss_type": "huber"}, "--huber_scale"),
    ({"full_bf16": True, "full_fp16": True, "mixed_precision": "bf16"}, "exclude each other"),
    ({"full_bf16": True}, "--mixed_precision bf16"),
    ({"full_fp16": True, "mixed_precision": "bf16"}, "--mixed_precision fp16"),
    ({"quantize_base": "nf4", "fp8_scaled": True}, "--quantize_base nf4: not with --fp8_scaled"),
    ({"memory_plan": "much"}, "--memory_plan much: give gigabytes"),
    ({"compile": True, "torch_compile": True}, "--compile: not with --torch_compile"),
    ({"compile": True, "compile_mode": "max-autotune", "compile_backend": "eager"}, "a mode of inductor"),
    ({"fused_backward_pass": True}, "--max_grad_norm 0"),
    ({"fused_backward_pass": True, "max_grad_norm": 0.0, "mixed_precision": "fp16"}, "use bf16"),
    ({"fused_backward_pass": True, "max_grad_norm": 0.0, "on_nan": "skip"}, "not with --on_nan skip"),
    ({"deepspeed": True, "offload_optimizer_device": "nvme"}, "--offload_optimizer_device nvme: "),
    (
        {"deepspeed": True, "zero_stage": 3, "offload_param_device": "nvme"},
        "--offload_param_device nvme: weights and states are kept in",
    ),
    ({"deepspeed": True, "full_bf16": True, "mixed_precision": "bf16"}, "--full_bf16: not with DeepSpeed"),
    ({"deepspeed": True, "full_fp16": True, "mixed_precision": "fp16"}, "--full_fp16: not with DeepSpeed"),
    ({"deepspeed": True, "fused_backward_pass": True, "max_grad_norm": 0.0}, "--fused_backward_pass: not with DeepS"),
    ({"cache_latents": True, "random_crop": True}, "--random_crop"),
    ({"cache_latents": True, "color_aug": True}, "--color_aug"),
    ({"cache_latents_to_disk": True, "face_crop_aug_range": "1,2"}, "--face_crop_aug_range"),
    ({"cache_text_encoder_outputs": True}, "--cache_text_encoder_outputs: not while the text encoder is trained"),
    (
        {"cache_text_encoder_outputs_to_disk": True, **UNET_ONLY, "base_weights": ["w.safetensors"]},
        "--cache_text_encoder_outputs_to_disk: not with --base_weights",
    ),
    (
        {"text_encoder_batch_size": -1, "cache_text_encoder_outputs": True, **UNET_ONLY},
        "--text_encoder_batch_size -1: must be at least 1",
    ),
    (
        {"text_encoder_cache_variants": 0, "cache_text_encoder_outputs": True, **UNET_ONLY},
        "--text_encoder_cache_variants 0: must be at least 1",
    ),
    ({"conditioning_data_dir": "no/such"}, "--conditioning_data_dir no/such: no such folder"),
    ({"max_train_steps": 0}, "--max_train_steps 0: must be at least 1"),
    ({"save_every_n_steps": -1}, "--save_every_n_steps -1: must be at least 1, or left out"),
    ({"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps"),
    ({"network_dim": 0}, "--network_dim"),
    ({"clip_skip": 0}, "--clip_skip"),
    ({"learning_rate": -1.0}, "--learning_rate"),
    ({"network_dropout": 1.5}, "--network_dropout"),
    ({"caption_dropout_rate": -0.1}, "--caption_dropout_rate"),
    ({"min_timestep": 500, "max_timestep": 400}, "--min_timestep 500"),
    ({"max_timestep": 1001}, "--max_timestep 1001"),
    ({"scale_v_pred_loss_like_noise_pred": True}, "--v_parameterization"),
    ({"v_pred_like_loss": 0.5, "v_parameterization": True}, "--v_pred_like_loss"),
    ({"huber_c": 0.0, "loss_type": "huber"}, "--huber_c"),
    ({"validate_every_n_epochs": 0}, "--validate_every_n_epochs 0: must be at least 1"),
    ({"huggingface_repo_type": "space", "huggingface_repo_id": "a/b"}, "--huggingface_repo_type space"),
    ({"initial_epoch": -1}, "--initial_epoch -1"),
    ({"scale_weight_norms": -1.0}, "--scale_weight_norms -1.0"),
    ({"initial_step": -1}, "--initial_step -1"),
    ({"early_stopping_patience": 0}, "--early_stopping_patience 0: must be at least 1"),
]


@pytest.mark.parametrize(("given", "words"), ERRORS, ids=lambda v: v if isinstance(v, str) else "")
def test_errors(given: dict[str, object], words: str) -> None:
    with pytest.raises(UserError) as found:
        check(options(**given), SD)
    assert words in str(found.value)
    assert len(str(found.value).splitlines()) == 1


WARNINGS = [
    ({"fused_backward_pass": True, "max_grad_norm": 0.0, "gradient_accumulation_steps": 2}, "saves little memory with"),
    (
        {"text_encoder_lr": [1e-4, 1e-5]},
        "--text_encoder_lr has 2 values, and the model has 1 text encoder: 0.0001 is used",
    ),
    (
        {"dataset_config": None, "in_json": "m.json", "reg_data_dir": "gone"},
        "--reg_data_dir has no effect with --in_json",
    ),
    ({"sdpa": True, "mem_eff_attn": True}, "--sdpa has no effect beside --mem_eff_attn"),
    ({"adaptive_noise_scale": 0.1}, "--adaptive_noise_scale has no effect without --noise_offset"),
    ({"zero_terminal_snr": True}, "--zero_terminal_snr"),
    ({"v2": True, "clip_skip": 2}, "--clip_skip"),
    ({"huggingface_repo_id": "a/b", "huggingface_repo_visibility": "pubic"}, "taken as private"),
    ({"output_name": "my_lora.safetensors"}, "leave .safetensors out"),
    ({"learning_rate": 2e-6}, "--learning_rate 2e-06 (the default): teaches an adapter next to nothing; 1e-4 is usual"),
    ({"learning_rate": 2e-6, "unet_lr": 1e-6, "network_train_unet_only": True}, "--unet_lr 1e-06: teaches an adapter"),
]

#: looks like a finding above, and is none
FINE = [
    {"text_encoder_lr": [1e-4, 1e-4]},
    {"sample_prompts": "state/sample/prompt.txt", "output_dir": "state", "sample_every_n_steps": 0},
    *(
        {name: 0}
        for name in (
            "scale_weight_norms",
            "max_train_epochs",
            "save_n_epoch_ratio",
            "save_every_n_steps",
            "save_last_n_epochs",
            "min_snr_gamma",
            "noise_offset",
            "network_dropout",
            "initial_epoch",
        )
    ),
    {"network_weights": "w.safetensors", "dim_from_weights": True, "resume": "state"},
    {"base_weights": ["w.safetensors", "v.safetensors"], "base_weights_multiplier": [0.5]},
    {"output_dir": "state/deeper/out"},
    {"learning_rate": 2e-6, "unet_lr": 1e-4},
    {"learning_rate": 2e-6, "optimizer_type": "Adafactor"},
    {"learning_rate": 2e-6, "network_args": ["network_reg_lrs=attn2=1e-4"]},
    {"dataset_config": None, "train_data_dir": "state"},
    {"cache_text_encoder_outputs_to_disk": True, **UNET_ONLY, "skip_cache_check": True, "text_encoder_batch_size": 2},
    {"dataset_config": None, "in_json": "m.json"},
    {"dataset_config": None, "in_json": "m.json", "train_data_dir": "state", "dataset_repeats": 3},
    {"token_warmup_min": 3},  # the dataset file may have its own token_warmup_step
    {"token_warmup_min": 3, "token_warmup_step": 0.1},
    {"noise_offset": 0.05, "multires_noise_iterations": 6, "multires_noise_discount": 0.8},
    {"adaptive_noise_scale": -0.05, "noise_offset": 0.05},
    {"loss_type": "smooth_l1", "huber_schedule": "constant", "huber_c": 0.2},
    {"cache_latents_to_disk": True, "skip_cache_check": True, "vae_batch_size": 4},
    {"min_timestep": 0, "max_timestep": 1000},
    {"wandb_run_name": "r", "log_with": "all"},
    {"save_every_n_epochs": 1, "save_last_n_epochs": 2, "save_last_n_epochs_state": 1, "save_state": True},
]


@pytest.mark.parametrize(("given", "words"), WARNINGS, ids=lambda v: v if isinstance(v, str) else "")
def test_warnings(given: dict[str, object], words: str) -> None:
    found = check(options(**given), SD)
    assert len(found) == 1 and words in found[0]


@pytest.mark.parametrize("given", FINE, ids=lambda given: "-".join(given))
def test_no_finding(given: dict[str, object]) -> None:
    assert check(options(**given), SD) == []


def test_numbered_rates_are_for_two_text_encoders() -> None:
    assert check(options(text_encoder_lr1=0.0), SDXL) == []
    for architecture, given, words in (
        (SD, {"text_encoder_lr1": 1e-5}, "--text_encoder_lr1: for models with two text encoders, this one has 1; use"),
        (SDXL, {"text_encoder_lr2": -1e-5}, "--text_encoder_lr2 -1e-05: must be at least 0"),
        (
            SDXL,
            {"text_encoder_lr": [1e-5, 2e-5], "text_encoder_lr1": 1e-5, "text_encoder_lr2": 2e-5},
            "--text_encoder_lr1, --text_encoder_lr2: not with --text_encoder_lr",
        ),
    ):
        with pytest.raises(UserError) as found:
            check(options(**given), architecture)
        assert words in str(found.value) and len(str(found.value).splitlines()) == 1


def test_every_rule_has_a_case() -> None:
    cases = [options(**given) for given, _ in (*ERRORS, *WARNINGS)]
    found = [
        rule.__name__
        for rule in (*CORE.rules, *SD.declaration.rules)
        if not any(list(rule(case, SD.facts(case))) for case in cases)
    ]
    assert set(found) <= {"numbered_rates", "attention_that_works"}  # which have tests of their own


def test_the_familys_reason_wins_and_is_said_once() -> None:
    class Family:
        declaration = Declaration(
            refused={"full_bf16": "the family's reason", "min_snr_gamma": "flow models have no SNR"}
        )

        def facts(self, options: TrainNetworkOptions) -> Facts:
            return Facts(trained_encoders=(True,))

    with pytest.raises(UserError) as found:
        check(options(full_bf16=True, mixed_precision="bf16", min_snr_gamma=5.0), Family())
    lines = str(found.value).splitlines()
    assert sorted(lines) == ["--full_bf16: the family's reason", "--min_snr_gamma: flow models have no SNR"]


def test_what_is_left_out_is_refused() -> None:
    assert set(CORE.refused) == set(LEFT_OUT)


def test_all_errors_at_once() -> None:
    with pytest.raises(UserError) as found:
        check(options(network_dim=0, learning_rate=-1.0, network_module=None), SD)
    assert len(str(found.value).splitlines()) == 3


def _other_value(default: object, kind: object) -> object:
    if default is False:
        return True
    return {int: 7, float: 0.5}.get(kind, "other")  # type: ignore[call-overload]


@pytest.mark.parametrize("name", sorted(CORE.refused))
def test_every_refused_option_is_refused_with_its_reason(name: str) -> None:
    field = next(field for field, _ in flat(options()) if field.name == name)
    with pytest.raises(UserError) as found:
        check(options(**{name: _other_value(field.default, field.metadata["type"])}), SD)
    assert f"--{name}: {CORE.refused[name]}" in str(found.value)


def test_secrets_stay_out() -> None:
    shown = without_secrets(options(wandb_api_key="k", huggingface_token="t"))
    assert "wandb_api_key" not in shown and "huggingface_token" not in shown
    assert shown["output_dir"] == "output"


def test_a_missing_package_is_told_before_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="--xformers: the package xformers is not installed"):
        check(options(xformers=True), SD)
    with pytest.raises(
        UserError, match="--attn_mode flash: the package flash_attn is not installed; pip install flash-attn"
    ):
        check(options(attn_mode="flash", mixed_precision="bf16"), SD)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert check(options(xformers=True), SD) == []
    assert check(options(attn_mode="flash", mixed_precision="bf16"), SD) == []
    with pytest.raises(UserError, match="--attn_mode flash: works in half precision only"):
        check(options(attn_mode="flash"), SD)


def test_attention_without_a_backward_pass_is_refused() -> None:
    with pytest.raises(UserError, match="--attn_mode sageattn: has no backward pass and is for generating only"):
        check(options(attn_mode="sageattn"), SD)


def test_trackers_see_no_folders(tmp_path: Path) -> None:
    place = tmp_path / "gone" / "model.safetensors"
    shown = for_others(
        options(
            pretrained_model_name_or_path=str(place),
            vae="state/../w.safetensors",
            base_weights=[str(tmp_path / "w.safetensors"), "user/model"],
            dataset_config=tmp_path / "data.toml",
            train_data_dir="images",
            logging_dir="/logs",
            wandb_api_key="k",
            caption_separator=";",
        )
    )
    assert not {"output_dir", "train_data_dir", "logging_dir", "wandb_api_key"} & set(shown)
    assert shown["pretrained_model_name_or_path"] == "model.safetensors"
    assert (shown["vae"], shown["base_weights"]) == ("w.safetensors", ["w.safetensors", "user/model"])
    assert (shown["dataset_config"], shown["caption_separator"], shown["resume"]) == ("data.toml", ";", None)
    assert str(tmp_path) not in str(shown)
