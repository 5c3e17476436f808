"""``--explain`` and ``--dry_run`` of the real script."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.fixtures.families import Tiny
from tests.fixtures.runs import run_script, write_dataset


def test_explain(tmp_path: Path, tiny: Tiny) -> None:
    """Nothing is checked for it but the options themselves: a run that is not ready can be explained too."""
    config = tmp_path / "run.toml"
    config.write_text("network_dim = 8\nwandb_api_key = 'k3y'\n", encoding="utf-8")
    done = run_script(tiny.file, "--config_file", config, "--huber_c", "0.2", "--explain")
    assert done.code == 0, done.text
    lines = {line.split()[0]: line for line in done.out.splitlines() if line.startswith("--")}
    assert lines["--network_dim"].split()[1] == "8"
    assert "command line" in lines["--huber_c"] and "no effect without" in done.out
    assert "follows from" in lines["--unet_lr"]
    assert "k3y" not in done.text


def test_dry_run(tmp_path: Path, tiny: Tiny, images: Path) -> None:
    dataset = write_dataset(tmp_path / "data.toml", images, dataset="batch_size = 2")
    family, output = tiny.family, tmp_path / "out"
    before = sorted(images.iterdir())
    arguments = {
        "max_train_steps": None,
        "max_train_epochs": 3,
        "save_every_n_epochs": 1,
        "save_last_n_epochs": 1,
        "save_every_n_steps": 4,
        "save_state": True,
        "cache_latents_to_disk": True,
        "network_args": family.network_args,
        "save_precision": "fp16",
        "dry_run": True,
    }
    done = tiny.run(dataset, output, **arguments)
    assert done.code == 0, done.text
    assert not output.exists() and sorted(images.iterdir()) == before, "nothing is written"
    rows = dict(line.split(": ", 1) for line in done.out.splitlines() if ": " in line)
    with torch.device("cpu"):
        stored = load_file(tiny.model.path)
    unet = sum(
        t.numel() for name, t in stored.items() if name.startswith(family.denoiser) and not name.endswith("pos_embed")
    )
    assert rows["denoiser"].startswith(f"{unet:,} parameters, ") and rows["denoiser"].endswith(" in float32")
    vae_file = load_file(tiny.model.flags[family.vae[0]])
    vae = sum(t.numel() for name, t in vae_file.items() if name.startswith(family.vae[1]))
    assert rows["VAE"].startswith(f"{vae:,} parameters")
    assert str(tiny.model.path) in rows["file"] and "F32" in rows["file"]
    parts = {
        name: int(value.split()[0].replace(",", "")) for name, value in rows.items() if name.startswith("trained,")
    }
    assert len(parts) == len(family.prefixes) and all(parts.values())
    assert rows["trained"].startswith(f"{sum(parts.values()):,} parameters")
    assert int(rows["steps an epoch"]) * 3 == int(rows["steps"].split()[0])
    assert "64x64" in rows["buckets"]
    for name in ("tiny-000001.safetensors", "tiny-000002-state", "tiny-step00000004.safetensors", "tiny.safetensors"):
        assert f"would write: {output / name}" in done.out
    assert "latents of 7 images" in done.out

    # what only loading would find otherwise: here a tensor that the header lacks
    torn = dict(stored)
    names = sorted(name for name in torn if name.startswith(family.denoiser) and not name.endswith("pos_embed"))
    missing = names[len(names) // 2]
    del torn[missing]
    save_file(torn, tmp_path / "torn.safetensors")
    broken = {**arguments, "pretrained_model_name_or_path": tmp_path / "torn.safetensors"}
    done = tiny.run(dataset, output, **broken)
    assert done.code == 2, done.text
    assert "error: " in done.err and "torn.safetensors" in done.err and "missing" in done.err
    assert "all checks passed" not in done.text


@pytest.mark.usefixtures("own_root_logger")
def test_files_of_weights_are_checked(
    tmp_path: Path, sd: Tiny, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their headers in every run; what of them fits the model in a dry run too, be it to be merged or to start from."""
    dataset = write_dataset(tmp_path / "data.toml", images)
    other, cut = tmp_path / "other.safetensors", tmp_path / "cut.safetensors"
    save_file({"foo.weight": torch.ones(100)}, other)
    cut.write_bytes(other.read_bytes()[:-1])

    def error(**given: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            sd.train(dataset, tmp_path / "out", **given)
        assert ended.value.code == 2
        return capsys.readouterr().err

    for name, value in (("network_weights", lambda path: path), ("base_weights", lambda path: [path])):
        said = error(**{name: value(cut)})
        assert f"error: --{name} {cut}: the file is cut short" in said and "adapters on" not in said
        assert "holds no tensors of networks.lora" in error(**{name: value(other)}, dry_run=True)
