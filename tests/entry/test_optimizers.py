"""Each family of optimizers through the trainer: saves and previews change nothing, and states go on exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.fixtures.runs import lora_arguments, train_here, write_dataset
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
