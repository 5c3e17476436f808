"""Modules that graphical programs and notebooks import by their published names."""

from __future__ import annotations

import argparse
import inspect
import sys
from pathlib import Path

import pytest

import train_network
from library.flux_train_utils import add_flux_train_arguments
from library.huggingface_util import upload
from library.train_util import BucketManager, read_config_from_file
from tests.fixtures.fake_hub import TOKEN, FakeHub, fake_hub


def test_read_config_from_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("epoch = 3\nnetwork_dim = 8\nseed = 1\n")
    monkeypatch.setattr(sys, "argv", ["train_network.py", "--config_file", str(tmp_path / "run.toml"), "--seed", "2"])
    parser = train_network.setup_parser()
    args = read_config_from_file(parser.parse_args(), parser)
    assert (args.network_dim, args.seed) == (8, 2)
    # set by the program itself
    monkeypatch.setattr(sys, "argv", ["train_network.py"])
    args = parser.parse_args()
    assert read_config_from_file(args, parser) is args
    args.config_file = str(tmp_path / "run.toml")
    assert read_config_from_file(args, parser).network_dim == 8


def test_buckets_are_those_of_training() -> None:
    manager = BucketManager(False, (512, 512), 256, 1024, 64)
    manager.make_buckets()
    assert (512, 512) in manager.predefined_resos and (768, 320) in manager.predefined_resos
    reso, resized, error = manager.select_bucket(1000, 750)
    assert reso == (576, 448) and resized == (597, 448)
    assert error == pytest.approx(576 / 448 - 1000 / 750)
    manager.add_image(reso, "a.png")
    manager.select_bucket(512, 512)
    manager.sort()
    assert manager.resos == [(512, 512), (576, 448)] and manager.buckets[manager.reso_to_id[reso]] == ["a.png"]
    assert manager.round_to_steps(200.0) == 192


def test_buckets_that_enlarge_nothing_and_fixed_sizes() -> None:
    small = BucketManager(True, (512, 512), 256, 1024, 64)
    assert small.select_bucket(300, 200)[0] == (256, 192)
    fixed = BucketManager(False, None, 256, None, 8)
    fixed.set_predefined_resos([(64, 128), (128, 64), (96, 96)])
    assert fixed.select_bucket(1000, 400)[0] == (128, 64) and fixed.select_bucket(1000, 1010)[0] == (96, 96)
    with pytest.raises(ValueError, match="max_reso"):
        BucketManager(False, None, 256, None, 8).make_buckets()


def test_add_flux_train_arguments() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--t5xxl")
    add_flux_train_arguments(parser)
    args = parser.parse_args(["--clip_l", "c.safetensors", "--discrete_flow_shift", "3.1"])
    assert (args.clip_l, args.discrete_flow_shift, args.t5xxl, args.guidance_scale) == ("c.safetensors", 3.1, None, 3.5)
    names = {"ae", "apply_t5_attn_mask", "t5xxl_max_token_length", "timestep_sampling", "model_prediction_type"}
    assert names <= set(vars(args))


def test_upload(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert list(inspect.signature(upload).parameters) == ["args", "src", "dest_suffix", "force_sync_upload"]
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"weights")
    with fake_hub() as hub:
        assert isinstance(hub, FakeHub)
        hub.use_here(monkeypatch, tmp_path / "cache")
        from library.files.hub import HubTarget, check_target

        check_target(HubTarget("me/lora", token=TOKEN), create=True)
        args = argparse.Namespace(
            huggingface_repo_id="me/lora", huggingface_token=TOKEN, huggingface_path_in_repo="runs", async_upload=True
        )
        upload(args, file, "/x.safetensors", force_sync_upload=True)
        assert "runs/x.safetensors" in hub.files("me/lora")
