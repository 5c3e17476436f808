"""DeepSpeed through options and through accelerate's configuration: states in pieces, the same run otherwise."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

import pytest
import torch

from library.training import kept_state
from tests.entry.test_fsdp import assert_close_weights
from tests.entry.test_resume import GENERAL, assert_same_weights, hard
from tests.fixtures.families import Tiny
from tests.fixtures.runs import ROOT, Finished, launch_script, logged, make_images, write_dataset

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")


@pytest.fixture(scope="module")
def configured() -> dict[str, str]:
    """Return the environment that ``accelerate launch --config_file`` gives to the processes that it starts."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    path = ROOT / "examples" / "accelerate" / "deepspeed.yaml"
    words = ["--config_file", str(path), "--main_process_port", "0", "train_network.py"]
    args, given, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    args.deepspeed_fields_from_accelerate_config = ",".join(given.deepspeed_config)
    env = prepare_deepspeed_cmd_env(args)[1]
    return {name: value for name, value in env.items() if os.environ.get(name) != value}


def launch(tiny: Tiny, env: dict[str, str], dataset: Path, output: Path, **more: object) -> list[Finished]:
    """Two processes, which must end well."""
    done = launch_script(tiny.file, 2, *tiny.words(dataset, output, **more), env=env)
    assert [process.code for process in done] == [0, 0], done[0].text + done[1].text
    return done


@pytest.mark.slow
def test_two_with_pieces_of_states_are_one_with_all(tmp_path: Path, sd: Tiny, configured: dict[str, str]) -> None:
    """With clipping, accumulation, a limit of norms and averages, by accelerate's configuration."""
    images = make_images(tmp_path / "images", [(64, 64)] * 4)
    descent = {"optimizer_type": "SGD", "learning_rate": 0.5, "optimizer_args": ["momentum=0.9"]}
    settings = {**descent, "max_train_steps": 4, "save_every_n_steps": 1, "gradient_accumulation_steps": 2}
    settings |= {"max_grad_norm": 0.01, "scale_weight_norms": 0.05, "ema_decay": 0.9, "lr_scheduler": "cosine"}
    settings |= {"save_state_on_train_end": True, "network_dim": 3}
    one = write_dataset(tmp_path / "one.toml", images, dataset="batch_size = 2")
    sd.train(one, tmp_path / "one", **settings)
    norms = logged(tmp_path / "one", "norm/grad_norm")
    assert len(norms) == 4 and min(norms) > 0.01, "nothing was clipped"
    two = write_dataset(tmp_path / "two.toml", images, dataset="batch_size = 1")
    done = launch(sd, configured, two, tmp_path / "two", **settings)

    files = [
        f"tiny{step}{kind}.safetensors" for step in ("-step00000001", "-step00000002", "") for kind in ("", "-ema")
    ]
    for file in (*files, "tiny-state/model.safetensors"):
        assert_close_weights(tmp_path / "two" / file, tmp_path / "one" / file)
    assert logged(tmp_path / "two", "norm/grad_norm") == pytest.approx(norms, abs=1e-5)
    # the state is that of any run
    states = [tmp_path / folder / "tiny-state" / "optimizer.bin" for folder in ("two", "one")]
    together, alone = (torch.load(state, weights_only=True) for state in states)
    assert together["param_groups"] == alone["param_groups"] and together["state"].keys() == alone["state"].keys()
    for number, values in alone["state"].items():
        torch.testing.assert_close(together["state"][number], values, rtol=0, atol=1e-6)
    # DeepSpeed keeps its news to itself, and what the configuration says otherwise is named
    found = re.search(r"ZeRO stage 2, states of ([\d,]+) of ([\d,]+) trained", done[0].text).groups()
    here, total = (int(number.replace(",", "")) for number in found)
    assert total // 2 <= here <= total // 2 + 4
    assert "deprecated" not in done[0].text and "[WARNING]" not in done[0].text
    assert "gradient_accumulation_steps 1 is not used" in done[0].text


@pytest.mark.slow
def test_resumes_exactly_and_is_the_run_without(tmp_path: Path, sd: Tiny) -> None:
    """In bf16 with AdamW, whose state knows its step; and on without DeepSpeed, from its state."""
    images = make_images(tmp_path / "images")
    dataset = write_dataset(tmp_path / "data.toml", images, general=GENERAL, subset="num_repeats = 3")
    settings = hard(sd, ema_decay=0.9, max_train_steps=4, mixed_precision="bf16")
    shared = {**settings, "deepspeed": True, "zero_stage": 1, "offload_optimizer_device": "cpu", "on_nan": "rollback"}
    launch(sd, {}, dataset, tmp_path / "whole", **shared)
    state = tmp_path / "whole" / "tiny-step00000002-state"
    rest = launch(sd, {}, dataset, tmp_path / "rest", **shared, resume=state)
    assert "not exactly" not in rest[0].text
    launch(sd, {}, dataset, tmp_path / "without", **settings, resume=state)
    for name in ("tiny.safetensors", "tiny-ema.safetensors"):
        assert_same_weights(tmp_path / "rest" / name, tmp_path / "whole" / name)
        assert_close_weights(tmp_path / "without" / name, tmp_path / "whole" / name)


@pytest.mark.slow
def test_one_process_with_its_states_on_the_host(
    tmp_path: Path, sd: Tiny, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a launcher, and going back after steps that are not finite; a wrong optimizer is one line."""
    monkeypatch.setattr(kept_state, "KEPT_EVERY", 2)
    dataset = write_dataset(tmp_path / "data.toml", make_images(tmp_path / "images", [(64, 64)] * 4))
    bad = make_images(tmp_path / "bad", [(64, 64)])
    overflows = "[[datasets]]\nresolution = 64\nnetwork_multiplier = 3e38\n[[datasets.subsets]]\n"
    dataset.write_text(dataset.read_text() + f"{overflows}image_dir = '{bad}'\ncaption_extension = '.txt'\n")
    settings = {"max_train_steps": 9, "on_nan": "rollback", "network_train_unet_only": True}
    shared = {**settings, "deepspeed": True, "zero_stage": 1, "offload_optimizer_device": "cpu"}
    said = {}
    for name, own in (("host", shared), ("plain", settings)):
        sd.train(dataset, tmp_path / name, **own)
        said[name] = re.findall(r"step \d+ .* went back to those after step \d+", capsys.readouterr().err)
    assert said["host"] == said["plain"] != []
    assert_close_weights(tmp_path / "host" / "tiny.safetensors", tmp_path / "plain" / "tiny.safetensors")
    with pytest.raises(SystemExit) as ended:
        sd.train(dataset, tmp_path / "out", **shared, optimizer_type="Adafactor")
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 2 and len(errors) == 1
    assert "--optimizer_type Adafactor: DeepSpeed gives it pieces" in errors[0]
