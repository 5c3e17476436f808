"""``tools/cache_latents.py`` as a user runs it, and training with what it made."""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path

import pytest

from library.config.config_file import read_args
from tests.fixtures.families import Tiny
from tests.fixtures.runs import (
    PATIENCE,
    launch_script,
    make_images,
    run_script,
    start_script,
    write_dataset,
)
from tools.cache_latents import CacheLatents, setup_parser

TOOL = "tools/cache_latents.py"
ONLY_TRAINING = ("output_dir", "output_name", "network_module", "network_dim", "max_train_steps", "seed")


def tool_arguments(tiny: Tiny, dataset: Path, **more: object) -> list[object]:
    without = dict.fromkeys((*ONLY_TRAINING, "learning_rate", "max_data_loader_n_workers"))
    return [*tiny.words(dataset, Path(), **{**without, **more}), *tiny.family.tool_flags]


def test_training_encodes_nothing_more(tmp_path: Path, tiny: Tiny) -> None:
    images = make_images(tmp_path / "images")  # seven
    dataset = write_dataset(tmp_path / "data.toml", images, subset="flip_aug = true")

    # options of training are taken too, as a configuration file may serve both
    flags = tool_arguments(tiny, dataset, vae_batch_size=2, learning_rate=1e-3, network_module="networks.lora")
    made, other = launch_script(TOOL, 2, *flags)
    assert made.code == other.code == 0, made.text + other.text
    assert "latents: 7 encoded by 2 processes, 0 from the cache" in made.text
    assert "no effect on the latent cache: --network_module, --learning_rate" in made.text
    assert len(list(images.glob(f"*{tiny.family.latent_suffix}"))) == 7
    assert not list(images.glob(".*")) and not (tmp_path / "out").exists()

    settings = {"cache_latents": True, "cache_latents_to_disk": True, "max_train_steps": 1}
    trained = tiny.run(dataset, tmp_path / "out", **settings)
    assert trained.code == 0, trained.text
    assert "latents: 0 encoded, 7 from the cache" in trained.text

    damaged, edited = images / f"0_0064x0064{tiny.family.latent_suffix}", images / "1.png"
    damaged.write_bytes(damaged.read_bytes()[:-300])
    shutil.copy(images / "0.png", edited.with_name("new.png"))
    edited.with_name("new.png").rename(edited.with_name("1.png"))  # of another size now, and so is its file's name
    again = run_script(TOOL, *tool_arguments(tiny, dataset), fresh=True)
    assert again.code == 0, again.text
    assert "latents: 2 encoded, 5 from the cache" in again.text
    warning, *more = [line for line in again.text.splitlines() if line.startswith("WARNING")]
    assert "made again" in warning and damaged.name in warning
    # other sizes that were in a damaged file are lost
    multi = tiny.family.architecture.latent.multi_resolution
    assert len(more) == multi and all("all its sizes are dropped" in line for line in more)


@pytest.mark.slow
def test_an_unreadable_image_ends_all_processes(tmp_path: Path, tiny: Tiny) -> None:
    images = make_images(tmp_path / "images", sizes=[(64, 64)] * 4)
    content = bytearray((images / "2.png").read_bytes())
    middle = content.index(b"IDAT") + 200
    content[middle : middle + 2000] = bytes(2000)  # its header and its end are good
    (images / "2.png").write_bytes(content)
    dataset = write_dataset(tmp_path / "data.toml", images)
    done = launch_script(TOOL, 2, *tool_arguments(tiny, dataset))
    assert [one.code for one in done] == [2, 2]
    errors = [line for one in done for line in one.text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "2.png: the image cannot be read" in errors[0], done


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_made(tmp_path: Path, tiny: Tiny) -> None:
    images = make_images(tmp_path / "images", sizes=[(128, 128)] * 50)
    dataset = write_dataset(tmp_path / "data.toml", images)
    dataset.write_text(dataset.read_text().replace("resolution = 64", "resolution = 128"))
    process = start_script(TOOL, *tool_arguments(tiny, dataset))
    while process.poll() is None and not list(images.glob("*.npz")):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, text
    assert "what is being encoded is finished" in text and "the same command continues" in text
    kept = len(list(images.glob("*.npz")))
    assert 0 < kept < 50 and not list(images.glob(".*"))
    again = run_script(TOOL, *tool_arguments(tiny, dataset))
    assert f"latents: {50 - kept} encoded, {kept} from the cache" in again.text, again.text


@pytest.mark.usefixtures("own_root_logger")
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--flux", "--clip_l", "l", "--t5xxl", "t5"], ["--ae: name the autoencoder"]),
        (
            ["--ae", "ae.safetensors", "--clip_l", "l.safetensors"],
            ["--ae, --clip_l", "not for Stable Diffusion 1.x and 2.x"],
        ),
        (["--sdxl", "--flux"], ["--sdxl and --flux exclude each other"]),
        (["--vae_batch_siez", "2"], ["--vae_batch_siez", 'did you mean "--vae_batch_size"']),
        (["--vae_batch_size", "-1"], ["--vae_batch_size -1", "at least 1"]),
        (["--dataset_config", "no/such.toml"], ["--dataset_config no/such.toml", "no such file"]),
        (["--random_crop"], ["--random_crop", "not with cached latents"]),
        (["--pretrained_model_name_or_path", "no/such.safetensors"], ["no/such.safetensors"]),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path,
    sd: Tiny,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    words: list[str],
) -> None:
    images = make_images(tmp_path / "images")
    dataset = write_dataset(tmp_path / "data.toml", images)
    with pytest.raises(SystemExit) as ended:
        arguments = [str(word) for word in tool_arguments(sd, dataset)]
        if flags[0] in arguments:  # the test's own value in the place of the usual one
            position = arguments.index(flags[0])
            del arguments[position : position + 2]
        arguments += flags
        CacheLatents().run(read_args(setup_parser(), arguments))
    assert ended.value.code == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert all(word in error for word in words), error
    assert not list(images.glob("*.npz"))


@pytest.mark.usefixtures("own_root_logger")
def test_the_data_is_shown_and_nothing_cached(tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    images = make_images(tmp_path / "images")
    dataset = write_dataset(tmp_path / "data.toml", images)
    CacheLatents().run(read_args(setup_parser(), [*map(str, tool_arguments(tiny, dataset)), "--debug_dataset"]))
    assert (tmp_path / "debug_dataset" / "images.jsonl").exists() and not list(images.glob("*.npz"))
