"""Options that do not change the result of a run on a CPU reach the code that needs them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from library.architectures.sd import SD
from library.data.run_plan import RunPlan
from library.inference.prompt_line import SamplePrompt
from library.training import caching, loading
from library.training.caching import CacheJob, cache_latents, inspect_model
from library.training.caption_encoder import CaptionEncoder
from library.training.kinds.adapter_options import TrainNetworkOptions
from library.training.loading import batch_preparation
from library.training.models import Models
from library.training.network_module import NetworkModule
from library.training.previews import PreviewGenerator, generate_options
from library.training.processes import make_accelerator
from library.training.setup import objective_of


def options(**given: object) -> TrainNetworkOptions:
    return TrainNetworkOptions.from_args(argparse.Namespace(output_dir="out", **given))


MODELS = Models([], [None], None, None)  # type: ignore[list-item, arg-type]


class Listener:
    """An object whose methods keep the keyword arguments they are called with."""

    def __init__(self, **answers: Any) -> None:
        self._answers = answers
        self.received: dict[str, Mapping[str, Any]] = {}

    def __getattr__(self, name: str) -> Any:
        def method(*_: Any, **given: Any) -> Any:
            self.received[name] = given
            return self._answers.get(name)

        return method


def test_the_model_is_looked_for_as_the_options_say() -> None:
    given = {
        "v2": True, "v_parameterization": True, "vae": "v", "tokenizer_cache_dir": "t",
        "disable_mmap_load_safetensors": True,
    }  # fmt: skip
    family = Listener()
    inspect_model(family, options(pretrained_model_name_or_path="m", **given).model)  # type: ignore[arg-type]
    received = dict(family.received["inspect"])
    assert received.pop("disable_mmap") is given.pop("disable_mmap_load_safetensors")
    assert received == given


def job(device: str = "cpu", **given: object) -> CacheJob:
    return CacheJob(
        architecture=Listener(vae_identity="identity"),  # type: ignore[arg-type]
        checkpoint=None,
        data=Listener(cache_latents=0, image_count=0),  # type: ignore[arg-type]
        options=options(console_log_simple=True, **given),
        accelerator=SimpleNamespace(
            device=torch.device(device), num_processes=1, process_index=0, is_main_process=False
        ),  # type: ignore[arg-type]
        weight_dtype=torch.bfloat16,
        interrupt=SimpleNamespace(requested=False),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(("given", "dtype"), [({}, torch.bfloat16), ({"no_half_vae": True}, torch.float32)])
def test_the_precision_of_the_vae(given: dict[str, object], dtype: torch.dtype) -> None:
    made = job(**given)
    made.load_vae()
    assert made.architecture.received["load_vae"]["dtype"] == dtype


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"batch_size": 1, "to_disk": False, "trust": False}),
        ({"vae_batch_size": 4}, {"batch_size": 4, "to_disk": False, "trust": False}),
        ({"cache_latents_to_disk": True}, {"batch_size": 1, "to_disk": True, "trust": False}),
        ({"skip_cache_check": True}, {"batch_size": 1, "to_disk": False, "trust": True}),
    ],
)
def test_how_latents_are_cached(given: dict[str, object], expected: dict[str, object]) -> None:
    made = job(**given)
    cache_latents(made)
    assert made.data.received["cache_latents"].items() >= expected.items()


def test_highvram_keeps_memory_between_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    released = []
    monkeypatch.setattr(caching.torch.cuda, "empty_cache", lambda: released.append(True))
    job("cuda", highvram=True).release_memory()
    assert not released
    job("cuda").release_memory()
    assert released


def test_the_time_that_processes_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    import accelerate

    made = Listener()
    monkeypatch.setattr(accelerate, "Accelerator", lambda **given: made.Accelerator(**given) or made)
    made.device = torch.device("cuda")
    made.num_processes = 1
    make_accelerator(options().training)
    assert made.received["Accelerator"]["kwargs_handlers"] == []
    make_accelerator(options(ddp_timeout=7).training)
    (handler,) = made.received["Accelerator"]["kwargs_handlers"]
    assert handler.timeout == timedelta(minutes=7)


def run_of(device: str = "cpu", **given: object) -> Any:
    return SimpleNamespace(architecture=SD, options=options(**given), device=torch.device(device))


def test_how_batches_are_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    models = Models([], [], None, None)  # type: ignore[arg-type]

    def prepared(device: str = "cpu", **given: object) -> dict[str, Any]:
        return batch_preparation(run_of(device, **given), models)

    plain = prepared()
    assert (plain["num_workers"], plain["pin_memory"], plain["persistent"]) == (3, False, False)
    for given, used in ((2, 2), (4, 4), (7, 4), (8, 3), (0, 0)):  # 8 is the default
        assert prepared(max_data_loader_n_workers=given)["num_workers"] == used
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    assert prepared()["num_workers"] == 1
    assert prepared(persistent_data_loader_workers=True)["persistent"] is True
    assert prepared("cuda")["pin_memory"] is True
    assert (plain["tokenize"].max_token_length, plain["tokenize"].weighted) == (None, False)
    assert prepared(max_token_length=225)["tokenize"].max_token_length == 225
    assert prepared(weighted_captions=True)["tokenize"].weighted is True


def test_sample_images_are_drawn_as_is_trained() -> None:
    how = {"device": torch.device("cpu"), "dtype": torch.float16}
    drawn = generate_options(options(zero_terminal_snr=True, clip_skip=2, max_token_length=150), **how)
    assert (drawn.dtype, drawn.zero_terminal_snr, drawn.clip_skip, drawn.max_token_length) == (
        *(torch.float16, True, 2, 150),
    )
    plain = generate_options(options(), **how)
    assert (plain.zero_terminal_snr, plain.clip_skip, plain.max_token_length) == (False, None, None)


def test_how_often_and_how_long_is_validated(monkeypatch: pytest.MonkeyPatch) -> None:
    received: dict[str, Any] = {}
    monkeypatch.setattr(loading, "ValidationData", lambda data, **given: received.update(given))
    run = SimpleNamespace(
        options=options(
            validate_every_n_steps=3,
            validate_every_n_epochs=2,
            max_validation_steps=5,
            ip_noise_gamma=0.1,
            noise_offset=0.2,
        ),
        plan=RunPlan(4, 1, 10),
        data=None,
        sharding=None,
        objective=SimpleNamespace(levels=lambda *_: [1]),
        accelerator=SimpleNamespace(process_index=0, num_processes=1),
        names=SimpleNamespace(best=lambda: Path("best.safetensors")),
    )
    made = loading.validation_of(run, *(None,) * 4, loading={})  # type: ignore[arg-type]
    assert received["max_batches"] == 5
    assert (made._policy.every_n_steps, made._policy.every_n_epochs) == (3, 2)
    assert (made._noise.ip_gamma, made._noise.offset) == (None, 0.2)


def test_zero_terminal_snr_changes_the_schedule() -> None:
    info: Any = SimpleNamespace(v_prediction=True)
    for given, ends_in_noise in (({}, False), ({"zero_terminal_snr": True}, True)):
        schedule = objective_of(SD, options(**given), info).schedule  # type: ignore[attr-defined]
        assert (schedule.alphas_cumprod[-1] == 0) == ends_in_noise


def test_captions_are_encoded_by_the_layer_asked_for() -> None:
    family: Any = Listener()
    CaptionEncoder(family, [], device=torch.device("cpu"), clip_skip=2, trains=lambda: True).encode({})
    assert family.received["encode_text"] == {"clip_skip": 2}


def ours(multiplier: float, dim: int, alpha: float, vae: Any, text: Any, unet: Any, neuron_dropout: Any, **more: Any):
    return SimpleNamespace(dim=dim, alpha=alpha, neuron_dropout=neuron_dropout, **more)


def others(multiplier: float, dim: int, alpha: float, vae: Any, text: Any, unet: Any, **more: Any):
    return SimpleNamespace(dim=dim, alpha=alpha, **more)


@pytest.mark.parametrize(("create", "dropout"), [(ours, "neuron_dropout"), (others, "dropout")])
def test_what_a_network_is_made_with(create: Any, dropout: str) -> None:
    given = options(network_dim=8, network_alpha=4.0, network_dropout=0.2, network_module="some.module")
    module: Any = SimpleNamespace(create_network=create, __name__="some.module")
    network, _ = NetworkModule(module, given.network, {"conv_dim": "2"}).create(MODELS, sharded=False)
    assert vars(network) == {"dim": 8, "alpha": 4.0, dropout: 0.2, "conv_dim": "2"}


def test_the_sampler_of_sample_images(monkeypatch: pytest.MonkeyPatch) -> None:
    from library.inference import generate

    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(generate, "generate_images", lambda models, batch, how, features: batch)
    preview = PreviewGenerator(
        SD,
        MODELS,
        [],
        SimpleNamespace(sampler=lambda *names: asked.append(names)),  # type: ignore[arg-type]
        SimpleNamespace(v_prediction=False),  # type: ignore[arg-type]
        options(sample_sampler="euler_a", pretrained_model_name_or_path="m"),
        device=torch.device("cpu"),
        dtype=torch.float32,
        prompts={},
    )
    preview([SamplePrompt("a cat", sample_sampler="lms")], [None])
    assert asked == [("lms", "euler_a")]


def test_the_strength_of_what_is_merged_first() -> None:
    given = options(network_module="networks.lora", base_weights=["a", "b"], base_weights_multiplier=[0.5])
    made: Any = SimpleNamespace(
        create_network_from_weights=lambda multiplier, path, *_, for_inference: (multiplier, path)
    )
    found = NetworkModule(made, given.network, {}).base_networks(MODELS)
    merges = [(path, strength, merged.network, merged.weights) for path, strength, merged in found]
    assert merges == [("a", 0.5, 0.5, "a"), ("b", 1.0, 1.0, "b")]
