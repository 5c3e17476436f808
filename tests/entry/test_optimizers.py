"""Each family of optimizers through the trainer: saves and previews change nothing, and states go on exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.fixtures.runs import logged, lora_arguments, train_here, write_dataset
from tests.fixtures.tiny_sd import MadeCheckpoint

#: optimizer -> package, and options
FAMILIES = {
    "PagedAdamW8bit": ("bitsandbytes", {}),
    "bitsandbytes.optim.AdEMAMix8bit": ("bitsandbytes", {}),
    "Lion": ("lion_pytorch", {"lr_scheduler": "warmup_stable_decay", "lr_warmup_steps": 0.25, "lr_decay_steps": "25%"}),
    "DAdaptAdam": ("dadaptation", {"learning_rate": 1.0}),
    "Prodigy": ("prodigyopt", {"learning_rate": 1.0, "optimizer_args": ["d_coef=2", "weight_decay=0.01"]}),
    "Adafactor": ("transformers", {"optimizer_args": ["warmup_init=True"], "max_grad_norm": 0}),
    "RMSprop": ("torch", {"lr_scheduler_type": "OneCycleLR", "lr_scheduler_args": ["max_lr=0.01", "total_steps=6"]}),
    "AdamWScheduleFree": ("schedulefree", {"optimizer_args": ["warmup_steps=2"]}),
    "prodigyplus.ProdigyPlusScheduleFree": ("prodigyplus", {"learning_rate": 1.0, "unet_lr": 0.5}),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset") / "data.toml", images)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", FAMILIES)
def test_saves_change_nothing_and_states_go_on_exactly(
    tmp_path: Path, tiny_sd: MadeCheckpoint, dataset: Path, name: str
) -> None:
    package, options = FAMILIES[name]
    pytest.importorskip(package)
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --s 1 --d 1\n")
    options = {"optimizer_type": name, "max_train_steps": 5, "cache_latents": True, **options}
    busy = {
        "save_every_n_steps": 1,
        "save_state": True,
        "sample_prompts": tmp_path / "prompts.txt",
        "sample_every_n_steps": 2,
    }
    train_here(*lora_arguments(tiny_sd, dataset, tmp_path / "plain", **options))
    train_here(*lora_arguments(tiny_sd, dataset, tmp_path / "busy", **options, **busy))
    state = tmp_path / "busy" / "tiny-step00000003-state"
    train_here(*lora_arguments(tiny_sd, dataset, tmp_path / "rest", **options, resume=state))
    plain, first = load_file(tmp_path / "plain" / "tiny.safetensors"), load_file(tmp_path / "busy" / "tiny.safetensors")
    rest = load_file(tmp_path / "rest" / "tiny.safetensors")
    start = load_file(tmp_path / "busy" / "tiny-step00000001.safetensors")
    assert any(not torch.equal(start[key], plain[key]) for key in plain), "it trains"
    assert all(torch.isfinite(tensor).all() for tensor in plain.values())
    assert not [key for key in plain if not torch.equal(plain[key], first[key])], "saves and previews change nothing"
    assert not [key for key in plain if not torch.equal(plain[key], rest[key])], "a state goes on exactly"


@pytest.mark.parametrize(
    ("name", "package", "arguments"),
    [
        ("pytorch_optimizer.ScheduleFreeAdamW", "pytorch_optimizer", []),
        ("AdamWScheduleFree", "schedulefree", ["warmup_steps=2"]),
    ],
)
def test_averaged_weights_are_saved(
    tmp_path: Path, tiny_sd: MadeCheckpoint, dataset: Path, name: str, package: str, arguments: list[str]
) -> None:
    """Files hold the weights for use, states those that are trained."""
    pytest.importorskip(package)
    options = {"optimizer_type": name, "optimizer_args": arguments, "max_train_steps": 4, "cache_latents": True}
    train_here(*lora_arguments(tiny_sd, dataset, tmp_path, **options, learning_rate=0.1, save_state_on_train_end=True))
    used, trained = load_file(tmp_path / "tiny.safetensors"), load_file(tmp_path / "tiny-state" / "model.safetensors")
    ups = [name for name in used if name.endswith("lora_up.weight")]
    assert ups and not any(torch.equal(used[name], trained[name]) for name in ups)


#: what is new on resume -> whether it changes the rest of the run
CHANGES = {
    "learning_rate": ({"learning_rate": 5e-3}, True),
    "unet_lr": ({"unet_lr": 5e-3}, True),
    "arguments": ({"optimizer_args": ["weight_decay=0.9"]}, True),
    "schedule": ({"lr_scheduler": "constant"}, True),
    "nothing": ({"learning_rate": 1e-3, "optimizer_args": ["weight_decay=0.01"]}, False),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_new_on_resume_takes_effect(tmp_path: Path, tiny_sd: MadeCheckpoint, dataset: Path, name: str) -> None:
    """The result is that of a stopped run whose weights and momenta are kept, with the new values set by hand."""
    changed, differs = CHANGES[name]
    options = {
        "optimizer_args": ["weight_decay=0.01"],
        "lr_scheduler": "constant_with_warmup",
        "lr_warmup_steps": 8,
        "learning_rate": 1e-3,
        "max_train_steps": 5,
        "cache_latents": True,
        "max_grad_norm": 0,
    }
    saving = {"save_every_n_steps": 3, "save_state": True}
    train_here(*lora_arguments(tiny_sd, dataset, tmp_path / "whole", **options, **saving))
    state = tmp_path / "whole" / "tiny-step00000003-state"
    train_here(*lora_arguments(tiny_sd, dataset, tmp_path / "rest", **{**options, **changed}, resume=state))
    whole, rest = (load_file(tmp_path / folder / "tiny.safetensors") for folder in ("whole", "rest"))
    assert any(not torch.equal(whole[key], rest[key]) for key in whole) is differs
    rate = changed.get("unet_lr", changed.get("learning_rate", 1e-3))
    factor = 1.0 if name == "schedule" else 4 / 8  # trackers show the learning rate that follows the fourth step
    assert logged(tmp_path / "rest", "lr/unet")[0] == pytest.approx(rate * factor)
    assert len(logged(tmp_path / "rest", "lr/unet")) == 2


def test_what_cannot_change_on_resume_is_refused(
    tmp_path: Path, tiny_sd: MadeCheckpoint, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"max_train_steps": 3, "cache_latents": True, "optimizer_args": ["amsgrad=False"]}
    train_here(*lora_arguments(tiny_sd, dataset, tmp_path / "a", **options, save_every_n_steps=1, save_state=True))
    state = tmp_path / "a" / "tiny-step00000001-state"
    for changed, words in (
        ({"optimizer_args": ["amsgrad=True"]}, "cannot continue from"),
        ({"lr_scheduler_type": "StepLR", "lr_scheduler_args": ["step_size=1"]}, "--lr_scheduler_type not given, not"),
    ):
        with pytest.raises(SystemExit):
            train_here(*lora_arguments(tiny_sd, dataset, tmp_path / "b", **{**options, **changed}, resume=state))
        assert words in capsys.readouterr().err
