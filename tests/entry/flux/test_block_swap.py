"""``--blocks_to_swap``: blocks that wait in host memory change no number of a run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from library.memory import block_stream
from library.training import loading
from tests.entry.flux.conftest import Train
from tests.fixtures.tiny_flux import FluxFileSizes, MadeFlux, make_tiny_flux

pytestmark = pytest.mark.usefixtures("own_root_logger")


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> MadeFlux:
    """A model of whose blocks 4 can be swapped, 3 of them as 1 double and 4 single ones."""
    sizes = FluxFileSizes(double_blocks=4, single_blocks=6)
    return make_tiny_flux(tmp_path_factory.mktemp("deep"), sizes=sizes)


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[block_stream.BlockStream]:
    """Those that runs make."""
    made = []
    real = block_stream.stream_blocks

    def spy(*args: object, **settings: object) -> block_stream.BlockStream:
        made.append(real(*args, **settings))
        return made[-1]

    monkeypatch.setattr(block_stream, "stream_blocks", spy)
    return made


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="plain"),
        pytest.param({"fp8_base": True, "network_train_unet_only": True}, id="fp8"),
        pytest.param(
            {"mixed_precision": "bf16", "network_args": ["dora=True"]}, id="bf16-dora", marks=pytest.mark.slow
        ),
        pytest.param({"torch_compile": True, "dynamo_backend": "eager"}, id="compiled"),
        pytest.param(
            {"compile": True, "compile_backend": "aot_eager", "compile_fullgraph": True},
            id="traced",
            marks=pytest.mark.slow,
        ),
        pytest.param({"network_module": "networks.oft_flux", "network_dim": 4}, id="oft", marks=pytest.mark.slow),
        pytest.param({"network_dropout": 0.3, "ema_decay": 0.9}, id="dropout-ema", marks=pytest.mark.slow),
    ],
)
def test_a_run_is_the_same(
    train: Train, tmp_path: Path, deep: MadeFlux, streams: list[block_stream.BlockStream], settings: dict[str, object]
) -> None:
    """With validation and sample images."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 2 --d 5\n")
    more = {
        "model": deep,
        "sample_prompts": prompts,
        "sample_every_n_steps": 2,
        "validation_split": 0.34,
        "validate_every_n_steps": 1,
        **settings,
    }
    plain = train("plain", gradient_checkpointing=True, **more)
    assert not streams
    swapped = train("swapped", blocks_to_swap=3, **more)
    assert_equal(swapped, plain)
    (stream,) = streams
    assert stream.copied > 5
    one, other = (next((tmp_path / name / "sample").glob("*.png")) for name in ("plain", "swapped"))
    assert np.array_equal(np.asarray(Image.open(one)), np.asarray(Image.open(other)))


def test_resuming_with_another_number_of_blocks_is_exact(train: Train, tmp_path: Path, deep: MadeFlux) -> None:
    saves = {"save_state": True, "save_every_n_steps": 1, "model": deep, "network_train_unet_only": True}
    whole = train("whole", blocks_to_swap=2, **saves)
    state = tmp_path / "whole" / "tiny-step00000002-state"
    assert "--blocks_to_swap" not in json.loads((state / "train_state.json").read_text())["fingerprint"]
    assert_equal(train("resumed", blocks_to_swap=3, resume=state, **saves), whole)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"blocks_to_swap": 5}, "--blocks_to_swap 5: the model has 4 and 6 blocks, of which 4 can be swapped"),
        ({"split_mode": True}, "--blocks_to_swap 18: the model has 4 and 6 blocks, of which 4 can be swapped"),
        ({"blocks_to_swap": -1}, "--blocks_to_swap -1: must be at least 0"),
        (
            {"blocks_to_swap": 1, "compile": True, "compile_mode": "reduce-overhead"},
            "--blocks_to_swap: not with --compile_mode reduce-overhead",
        ),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_mistakes(
    monkeypatch: pytest.MonkeyPatch,
    train: Train,
    deep: MadeFlux,
    capsys: pytest.CaptureFixture[str],
    settings: dict[str, object],
    words: str,
    dry_run: bool,
) -> None:
    monkeypatch.setattr(loading, "load_denoiser", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(SystemExit):
        train("mistake", model=deep, dry_run=dry_run, **settings)
    assert words in capsys.readouterr().err


def test_the_old_form(train: Train, deep: MadeFlux, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FileNotFoundError):  # a dry run writes nothing
        train("dry", model=deep, dry_run=True, split_mode=True, blocks_to_swap=2)
    said = capsys.readouterr()
    assert "--split_mode has no effect beside --blocks_to_swap" in said.err
    assert "2 blocks to swap wait on the host" in said.out


def test_the_plan_tells_it(train: Train, deep: MadeFlux, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FileNotFoundError):  # a dry run writes nothing
        train("dry", model=deep, dry_run=True, blocks_to_swap=3, fp8_base_unet=True, cache_text_encoder_outputs=True,
              network_train_unet_only=True, cache_latents=True)  # fmt: skip
    said = capsys.readouterr().out
    assert "memory, denoiser: float32, frozen, in scaled fp8, 3 blocks to swap wait on the host" in said
    assert "memory, text encoder 1: only its cached outputs are used" in said
    assert "memory, VAE: float32, frozen, not kept after caching" in said
