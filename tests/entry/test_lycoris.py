"""``--network_module lycoris.kohya`` with the real package: trains, saves, resumes, reloads, merges, draws."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from library.architectures.sd import SD
from library.inference.networks import apply_networks, choose_networks
from tests.fixtures.runs import lora_arguments, metadata_of, train_here, write_dataset
from tests.fixtures.tiny_sd import MadeCheckpoint

pytest.importorskip("lycoris")
pytest.importorskip("lycoris.kohya")

#: network args of each kind, and a tensor that its files hold
KINDS = {
    "lora": (["algo=lora", "conv_dim=2"], ".lora_down.weight"),
    "dora": (["algo=lora", "dora_wd=True"], ".dora_scale"),
    "loha": (["algo=loha"], ".hada_w1_a"),
    "lokr": (["algo=lokr", "factor=4"], ".lokr_w1"),
    "diag-oft": (["algo=diag-oft"], ".oft_blocks"),
    "boft": (["algo=boft"], ".oft_blocks"),
}
FAST = ("dora", "lokr")


def models_of(tiny_sd: MadeCheckpoint) -> SimpleNamespace:
    """The bare models of a checkpoint, as ``gen_img.py`` holds them."""
    checkpoint = SD.inspect(
        str(tiny_sd.path),
        v2=False,
        v_parameterization=False,
        vae=None,
        tokenizer_cache_dir=str(tiny_sd.tokenizer_cache_dir),
    )
    settings = {"dtype": torch.float32, "device": "cpu"}
    return SimpleNamespace(
        text_encoders=SD.load_text_encoders(checkpoint, **settings),
        denoiser=SD.load_denoiser(checkpoint, **settings),
        vae=None,
    )


def outputs(models: SimpleNamespace) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    with torch.no_grad():
        context = models.text_encoders[0](torch.tensor([[1, 5, 9, 2]])).last_hidden_state
        return models.denoiser(latents, torch.tensor([300]), context).sample


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset") / "data.toml", pictures)


@pytest.mark.parametrize("kind", [k if k in FAST else pytest.param(k, marks=pytest.mark.slow) for k in KINDS])
def test_it_trains_resumes_reloads_and_draws(
    tmp_path: Path, tiny_sd: MadeCheckpoint, dataset: Path, kind: str
) -> None:
    network_args, tensor = KINDS[kind]
    whole, rest, more = tmp_path / "whole", tmp_path / "rest", tmp_path / "more"
    options = {
        "network_module": "lycoris.kohya",
        "network_dim": 4,
        "network_alpha": 2,
        "network_args": network_args,
        "learning_rate": 1e-2,
        "max_train_steps": 4,
        "save_every_n_steps": 2,
        "save_state": True,
        "ema_decay": 0.5,
    }
    train_here(*lora_arguments(tiny_sd, dataset, whole, **options))
    file = whole / "tiny.safetensors"
    weights = load_file(file)
    assert any(name.endswith(tensor) for name in weights), sorted(weights)[:6]
    assert metadata_of(file)["ss_network_module"] == "lycoris.kohya"
    train_here(*lora_arguments(tiny_sd, dataset, rest, **options, resume=whole / "tiny-step00000002-state"))
    for name in ("tiny.safetensors", "tiny-ema.safetensors"):
        again, first = load_file(rest / name), load_file(whole / name)
        assert again.keys() == first.keys()
        assert all(torch.equal(again[key], first[key]) for key in first), name
    # from its weights, and beside itself as part of the base model
    start = {"network_weights": file, "base_weights": [file], "base_weights_multiplier": [0.5], "ema_decay": None}
    train_here(*lora_arguments(tiny_sd, dataset, more, **{**options, **start, "max_train_steps": 1}))
    assert load_file(more / "tiny.safetensors").keys() == weights.keys()

    (choice,) = choose_networks(["lycoris.kohya"], [str(file)], None, None)
    plain = outputs(models_of(tiny_sd))
    results = []
    for merge in (False, True):
        models = models_of(tiny_sd)
        apply_networks([choice], models, merge=merge, dtype=torch.float32, device=torch.device("cpu"))
        results.append(outputs(models))
    assert not torch.allclose(results[0], plain, atol=1e-4)
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-3)
