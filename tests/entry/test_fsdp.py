"""FSDP through accelerate's configuration file: the frozen model in pieces, the same run otherwise."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.entry.test_processes import DESCENT
from tests.entry.test_resume import GENERAL, assert_same_weights, hard
from tests.fixtures.families import FLUX, Tiny
from tests.fixtures.runs import (
    PATIENCE,
    ROOT,
    Finished,
    launch_script,
    logged,
    make_images,
    start_processes,
    write_dataset,
)
from tests.fixtures.tiny_flux import make_tiny_controlnet


def of_configuration(path: Path) -> dict[str, str]:
    """Return the environment that ``accelerate launch --config_file`` gives to the processes that it starts."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    parser = launch_command_parser()
    args = parser.parse_args(["--config_file", str(path), "--main_process_port", "0", "train_network.py"])
    env = prepare_multi_gpu_env(_validate_launch_command(args)[0])
    return {name: value for name, value in env.items() if os.environ.get(name) != value}


@pytest.fixture(scope="module")
def fsdp() -> dict[str, str]:
    return of_configuration(ROOT / "examples" / "accelerate" / "fsdp.yaml")


def launch(tiny: Tiny, env: dict[str, str], dataset: Path, output: Path, **more: object) -> list[Finished]:
    """Two processes, which must end well."""
    done = launch_script(tiny.file, 2, *tiny.words(dataset, output, **more), env=env)
    assert [process.code for process in done] == [0, 0], done[0].text + done[1].text
    return done


def assert_close_weights(one: Path, other: Path, atol: float = 1e-6) -> None:
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys()
    for name, tensor in b.items():
        torch.testing.assert_close(a[name], tensor, rtol=0, atol=atol, msg=lambda text, n=name: f"{n}: {text}")


def samples(output: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)).astype(int) for path in sorted(output.glob("sample/*.png"))]


def test_two_that_share_the_model_are_one_with_all_of_it(tmp_path: Path, tiny: Tiny, fsdp: dict[str, str]) -> None:
    """Like tests/entry/test_processes.py without FSDP, with previews and validations that cannot be shared evenly."""
    images = make_images(tmp_path / "images", sizes=[(64, 64)] * 5)
    (tmp_path / "prompts.txt").write_text("".join(f"a cat --w 64 --h 64 --s {n} --d {n}\n" for n in (1, 2, 3)))
    settings = {
        **DESCENT,
        "validate_every_n_steps": 2,
        "sample_prompts": tmp_path / "prompts.txt",
        "sample_at_first": True,
    }
    one = write_dataset(tmp_path / "one.toml", images, dataset="batch_size = 2\nvalidation_split = 0.6")
    tiny.train(one, tmp_path / "one", **settings)
    two = write_dataset(tmp_path / "two.toml", images, dataset="batch_size = 1\nvalidation_split = 0.6")
    own = {"ddp_gradient_as_bucket_view": True, "save_state_on_train_end": True}
    done = launch(tiny, fsdp, two, tmp_path / "two", **settings, **own)

    for name in ("tiny-step00000001", "tiny-step00000002", "tiny"):
        assert_close_weights(tmp_path / "two" / f"{name}.safetensors", tmp_path / "one" / f"{name}.safetensors")
    for key in ("loss/current", "loss/validation/step_average"):
        together, alone = logged(tmp_path / "two", key), logged(tmp_path / "one", key)
        assert alone and together == pytest.approx(alone, abs=2e-6)
    # the first process keeps the images, and each is kept once
    drawn = samples(tmp_path / "two")
    assert len(drawn) == 3
    for ours, theirs in zip(drawn, samples(tmp_path / "one"), strict=True):
        assert np.abs(ours - theirs).max() <= 1
    here, total = (int(n.replace(",", "")) for n in re.search(r"([\d,]+) of ([\d,]+) frozen", done[0].text).groups())
    assert 0.5 <= here / total < 0.51
    # states are those of any run in several processes
    state = {path.name for path in (tmp_path / "two" / "tiny-state").iterdir()}
    assert {"model.safetensors", "optimizer.bin", "random_states_0.pkl", "random_states_1.pkl"} <= state


@pytest.mark.slow
def test_stage_3_of_zero_is_the_same(tmp_path: Path, sd: Tiny, fsdp: dict[str, str]) -> None:
    data = write_dataset(tmp_path / "data.toml", make_images(tmp_path / "images", sizes=[(64, 64)] * 4))
    launch(sd, fsdp, data, tmp_path / "fsdp", **DESCENT)
    done = launch(sd, {}, data, tmp_path / "zero", **DESCENT, deepspeed=True, zero_stage=3, zero3_init_flag=True)
    assert "sharding: ZeRO stage 3, " in done[0].text and "frozen parameters in each process's" in done[0].text
    assert_close_weights(tmp_path / "zero" / "tiny.safetensors", tmp_path / "fsdp" / "tiny.safetensors", atol=0)


@pytest.mark.slow
def test_resumes_exactly_and_is_the_run_without(tmp_path: Path, tiny: Tiny, fsdp: dict[str, str]) -> None:
    images = make_images(tmp_path / "images")
    dataset = write_dataset(tmp_path / "data.toml", images, general=GENERAL, subset="num_repeats = 3")
    # gradients near 0 differ in sign, which Adam would make as large as all others
    descent = {"optimizer_type": "SGD", "learning_rate": 0.1, "optimizer_args": ["momentum=0.9"]}
    more = {"ema_decay": 0.9, "max_train_steps": 4, "gradient_checkpointing": True, "scale_weight_norms": 1.0}
    # dropout of convolutions draws in another order, as FSDP needs another layout of weights
    settings = hard(tiny, **descent, **more, network_dropout=None)
    launch(tiny, fsdp, dataset, tmp_path / "whole", **settings)
    state = tmp_path / "whole" / "tiny-step00000002-state"
    rest = launch(tiny, fsdp, dataset, tmp_path / "rest", **settings, resume=state)
    assert "not exactly" not in rest[0].text
    launch(tiny, {}, dataset, tmp_path / "plain", **settings, ddp_gradient_as_bucket_view=True)
    for name in ("tiny.safetensors", "tiny-ema.safetensors"):
        assert_same_weights(tmp_path / "rest" / name, tmp_path / "whole" / name)
        assert_close_weights(tmp_path / "whole" / name, tmp_path / "plain" / name, atol=2e-6)


#: adapters whose forward reads the frozen weights, and what is trained beside or around it
KINDS = {
    "dora": {"network_args": ["dora=True", "conv_dim=2"], "gradient_checkpointing": True},
    "dora on output": {"network_args": ["dora=True", "dora_on_output=True"], "network_train_unet_only": True},
    "oft": {
        "network_module": "networks.oft",
        "network_args": ["enable_conv=True"],
        "network_alpha": 1e-2,
        "network_train_unet_only": True,
    },
    "lycoris": {"network_module": "lycoris.kohya", "network_args": ["algo=lora", "dora_wd=True", "preset=attn-mlp"]},
    "text encoders": {"network_train_text_encoder_only": True, "gradient_checkpointing": True},
}


def assert_two_are_one(
    folder: Path, tiny: Tiny, fsdp: dict[str, str], settings: dict[str, object], subset: str = ""
) -> None:
    """Two processes at batch size 1 with FSDP, one without at 2."""
    images = make_images(folder / "images", [(64, 64)] * 2)
    one = write_dataset(folder / "one.toml", images, dataset="batch_size = 2", subset=subset)
    tiny.train(one, folder / "one", **settings)
    two = write_dataset(folder / "two.toml", images, dataset="batch_size = 1", subset=subset)
    launch(tiny, fsdp, two, folder / "two", **settings)
    assert_close_weights(folder / "two" / "tiny.safetensors", folder / "one" / "tiny.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_find_whole_weights(tmp_path: Path, sd: Tiny, fsdp: dict[str, str], kind: str) -> None:
    if "lycoris" in kind:
        pytest.importorskip("lycoris.kohya")
    settings = {"optimizer_type": "SGD", "learning_rate": 0.1, "max_train_steps": 3, **KINDS[kind]}
    assert_two_are_one(tmp_path, sd, fsdp, settings)


@pytest.mark.slow
def test_merged_weights_are_shared_out(tmp_path: Path, sd: Tiny, fsdp: dict[str, str]) -> None:
    base = write_dataset(tmp_path / "base.toml", make_images(tmp_path / "others", [(64, 64)] * 3))
    settings = {"optimizer_type": "SGD", "learning_rate": 1.0}
    sd.train(base, tmp_path / "base", **settings)
    settings |= {"base_weights": tmp_path / "base" / "tiny.safetensors", "base_weights_multiplier": 3}
    assert_two_are_one(tmp_path, sd, fsdp, settings)


@pytest.mark.slow
def test_a_controlnet_is_shared_out_with_its_transformer(tmp_path: Path, fsdp: dict[str, str]) -> None:
    """Beside cached outputs of T5 and CLIP-L that is trained, with images of a cached and of a guided prompt."""
    flux = Tiny(FLUX, FLUX.make(tmp_path / "model"))
    control = make_images(tmp_path / "control", [(64, 64)] * 2)
    settings = {"optimizer_type": "SGD", "learning_rate": 0.1, "max_train_steps": 3, "gradient_checkpointing": True}
    settings |= {"controlnet_model_name_or_path": make_tiny_controlnet(tmp_path / "net"), "cache_latents": True}
    settings |= {"cache_text_encoder_outputs": True, "sample_at_first": True, "sample_every_n_steps": 2}
    settings["sample_prompts"] = tmp_path / "prompts.txt"
    settings["sample_prompts"].write_text("a cat --w 64 --h 64 --s 1 --d 1\na dog --w 64 --h 64 --s 2 --d 2 --l 2\n")
    assert_two_are_one(tmp_path, flux, fsdp, settings, subset=f"conditioning_data_dir = '{control}'")
    drawn, alone = samples(tmp_path / "two"), samples(tmp_path / "one")
    assert len(drawn) == len(alone) == 4
    assert all(np.abs(ours - theirs).max() <= 1 for ours, theirs in zip(drawn, alone, strict=True))


@pytest.mark.slow
def test_what_does_not_go_together_is_one_line(tmp_path: Path, sd: Tiny, fsdp: dict[str, str]) -> None:
    dataset = write_dataset(tmp_path / "data.toml", make_images(tmp_path / "images", [(64, 64)] * 2))
    env = {**fsdp, "FSDP_TRANSFORMER_CLS_TO_WRAP": "BasicTransformerBlok"}
    ended = launch_script(sd.file, 2, *sd.words(dataset, tmp_path), env=env)
    assert [process.code for process in ended] == [2, 2], ended[0].text
    assert 'did you mean "BasicTransformerBlock"?' in ended[0].err and "Traceback" not in ended[0].text


@pytest.mark.slow
def test_a_signal_to_one_stops_all_after_the_same_step(tmp_path: Path, sd: Tiny, fsdp: dict[str, str]) -> None:
    dataset = write_dataset(tmp_path / "data.toml", make_images(tmp_path / "images", [(64, 64)] * 4))
    words = sd.words(dataset, tmp_path / "out", max_train_steps=10_000)
    first, second = start_processes(sd.file, 2, *words, env=fsdp)
    try:
        seen = []
        for line in first.stderr:
            seen.append(line)
            if "first step" in line:
                break
        first.send_signal(signal.SIGTERM)
        texts = [process.communicate(timeout=PATIENCE) for process in (first, second)]
    finally:
        first.kill()
        second.kill()
    assert first.returncode == 143, "".join(seen) + "".join(texts[0])
    assert not any("Traceback" in text for pair in texts for text in pair)
    (state,) = (tmp_path / "out").glob("tiny-step*-state")
    assert str(state) in "".join(texts[0])
