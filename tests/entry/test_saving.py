"""The files of whole runs: forms, precisions, retention of weights and states, and numbers in metadata."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.fixtures.families import Tiny
from tests.fixtures.runs import make_images, metadata_of, write_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three batches an epoch."""
    folder = tmp_path_factory.mktemp("dataset")
    return write_dataset(folder / "data.toml", make_images(folder / "images", sizes=[(64, 64)] * 3))


def test_retention_and_numbers(tmp_path: Path, tiny: Tiny, dataset: Path) -> None:
    tiny.train(
        dataset,
        tmp_path,
        max_train_steps=None,
        max_train_epochs=4,
        save_n_epoch_ratio=4,
        save_last_n_epochs=2,
        save_last_n_epochs_state=1,
        save_every_n_steps=2,
        save_last_n_steps=4,
        save_last_n_steps_state=2,
        save_state=True,
        save_precision="fp16",
        ema_decay=0.9,
        training_comment="a comment",
        network_train_unet_only=True,
        cache_latents=True,
    )
    kept = {"tiny-000002": (6, 2), "tiny-000003": (9, 3), "tiny": (12, 4)}
    kept |= {f"tiny-step{step:08d}": (step, epoch) for step, epoch in ((8, 3), (10, 4), (12, 4))}
    expected = {f"{name}{part}.safetensors" for name in kept for part in ("", "-ema")}
    assert {p.name for p in tmp_path.glob("*.safetensors")} == expected
    for name, (step, epoch) in kept.items():
        for part in ("", "-ema"):
            entries = metadata_of(tmp_path / f"{name}{part}.safetensors")
            assert (entries["ss_steps"], entries["ss_epoch"], entries["ss_num_epochs"]) == (str(step), str(epoch), "4")
            assert entries["ss_training_comment"] == "a comment"
            assert entries.get("ss_ema_decay") == ("0.9" if part else None)
        assert {t.dtype for t in load_file(tmp_path / f"{name}.safetensors").values()} == {torch.float16}

    states = {
        folder.name: tuple(
            json.loads((folder / "train_state.json").read_text())[k] for k in ("current_step", "current_epoch")
        )
        for folder in tmp_path.glob("*-state")
    }
    assert states == {
        "tiny-000003-state": (9, 3),
        "tiny-step00000010-state": (10, 4),
        "tiny-step00000012-state": (12, 4),
        "tiny-state": (12, 4),
    }
    # the state keeps full precision whatever is saved
    model = load_file(next((tmp_path / "tiny-state").glob("model*.safetensors")))
    assert {t.dtype for t in model.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("form", "precision", "dtype"),
    [
        ("safetensors", "bf16", torch.bfloat16),
        ("safetensors", "float", torch.float32),
        ("ckpt", "fp16", torch.float16),
        ("pt", None, torch.float32),
    ],
)
def test_forms_and_precisions(
    tmp_path: Path, tiny: Tiny, dataset: Path, form: str, precision: str | None, dtype: torch.dtype
) -> None:
    settings = {"save_model_as": form, "save_precision": precision, "max_train_steps": 1, "output_name": None}
    tiny.train(dataset, tmp_path, **settings, no_metadata=form == "safetensors")
    (file,) = (p for p in tmp_path.iterdir() if p.is_file())
    assert file.name == f"last.{form}"
    tensors = load_file(file) if form == "safetensors" else torch.load(file, weights_only=True)
    assert {t.dtype for t in tensors.values()} == {dtype}
    assert any(name.startswith(tiny.family.prefixes[0]) for name in tensors)
    if form == "safetensors":
        entries = metadata_of(file)
        assert not {"ss_steps", "ss_epoch", "ss_seed", "ss_training_comment"} & set(entries)
