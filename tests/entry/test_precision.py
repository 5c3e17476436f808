"""Precision, memory and speed options through the whole trainer: train, save, resume, draw."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.fixtures.families import Tiny
from tests.fixtures.runs import ROOT, make_images, metadata_of, train_here, write_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    images = make_images(folder / "images", [(64, 64)] * 4)  # one bucket, compiled once
    return write_dataset(folder / "data.toml", images, dataset="batch_size = 2")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny, dataset: Path) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("plain")
    tiny.train(dataset, folder, max_grad_norm=0, max_train_steps=3)
    return load_file(folder / "tiny.safetensors")


def assert_same(one: Path, other: Path) -> None:
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]


HALF = {"full_bf16": True, "mixed_precision": "bf16"}
FP8 = {"fp8_base": True, "mixed_precision": "bf16"}
SETS = {
    "bf16": {**HALF, "optimizer_type": "AdamW"},
    "bf16 fused": {
        **HALF,
        "optimizer_type": "Adafactor",
        "optimizer_args": ["relative_step=False", "scale_parameter=False"],
        "fused_backward_pass": True,
        "max_grad_norm": 0,
        "mem_eff_attn": True,
    },
    "fp8": {**FP8, "network_args": ["dora=True"], "gradient_checkpointing": True, "sdpa": True},
    "int8": {"quantize_base": "int8", "mixed_precision": "bf16", "fp8_te": True},
    "nf4": {"quantize_base": "nf4", "mixed_precision": "bf16", "gradient_checkpointing": True},
    "fp8 in blocks": {"fp8_scaled": True, "fp8_te": True, "fp8_matmul": True, "mixed_precision": "bf16"},
    "fp8 and bf16, lycoris": {
        **FP8,
        **HALF,
        "network_module": "lycoris.kohya",
        "network_args": ["algo=lora", "preset=attn-mlp"],
    },
}


@pytest.mark.parametrize("name", SETS)
def test_runs_save_draw_and_resume_exactly(
    tmp_path: Path, tiny: Tiny, dataset: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = dict(SETS[name])
    if name == "fp8":
        settings["network_args"] = [*settings["network_args"], *tiny.family.network_args]
    if settings.get("network_module") == "lycoris.kohya":
        pytest.importorskip("lycoris.kohya")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 2 --d 1")
    more = {**settings, "max_train_steps": 4, "save_every_n_steps": 2, "save_state": True}
    draws = {"sample_prompts": prompts, "sample_every_n_steps": 4} if name.startswith("fp8") else {}
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    tiny.train(dataset, whole, **more, **draws)
    weights = load_file(whole / "tiny.safetensors")
    trained = {n: t for n, t in weights.items() if not n.endswith(".alpha")}
    expected = torch.bfloat16 if "full_bf16" in settings else torch.float32
    assert {t.dtype for t in trained.values()} == {expected}
    assert all(t.isfinite().all() for t in weights.values())
    assert any(t.any() for n, t in trained.items() if "lora_up" in n)
    entries = metadata_of(whole / "tiny.safetensors")
    assert entries["ss_fp8_base"] == str("fp8_base" in settings)
    if draws:
        assert list((whole / "sample").glob("*.png"))
    state = whole / "tiny-step00000002-state"
    tiny.train(dataset, rest, **more, resume=state)
    assert_same(rest / "tiny.safetensors", whole / "tiny.safetensors")
    shown = capsys.readouterr()
    said = shown.out + shown.err
    assert ("in scaled fp8" in said) == ("fp8_base" in settings or "fp8_te" in settings)
    assert ("in block-scaled fp8" in said) == ("fp8_scaled" in settings)
    small = {"int8": "denoiser in int8", "nf4": "denoiser in NF4"}.get(str(settings.get("quantize_base")))
    assert small is None or small in said
    assert "not exactly" not in shown.out + shown.err


@pytest.mark.parametrize(
    ("settings", "bound"),
    [
        ({"fused_backward_pass": True}, 0.0),
        ({"mem_eff_attn": True}, 5e-5),
        ({"cpu_offload_checkpointing": True, "gradient_checkpointing": True}, 1e-6),
        ({"torch_compile": True, "dynamo_backend": "eager"}, 1e-6),
    ],
    ids=["fused", "attention", "host", "compiled"],
)
def test_what_saves_memory_or_time_changes_no_weight(
    tmp_path: Path,
    tiny: Tiny,
    dataset: Path,
    plain: dict[str, torch.Tensor],
    settings: dict[str, object],
    bound: float,
) -> None:
    tiny.train(dataset, tmp_path, max_grad_norm=0, max_train_steps=3, **settings)
    weights = load_file(tmp_path / "tiny.safetensors")
    assert weights.keys() == plain.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, plain[name], rtol=0, atol=bound)


@pytest.mark.parametrize(
    "precision",
    [
        {},
        HALF,
        # which train a part of their weights in a step, each another
        {"network_module": "networks.dylora", "network_dim": 8},
        {"network_args": ["module_dropout=0.5"]},
    ],
    ids=["float32", "bf16", "dylora", "module dropout"],
)
def test_a_fused_run_follows_the_schedule(
    tmp_path: Path, sd: Tiny, dataset: Path, precision: dict[str, object]
) -> None:
    """A long warm-up keeps the learning rate low; rounding draws differ from step to step."""
    schedule = {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 100, "learning_rate": 1e-3}
    settings = {**precision, **schedule, "max_train_steps": 6, "max_grad_norm": 0}
    for fused in (False, True):
        sd.train(dataset, tmp_path / str(fused), **settings, fused_backward_pass=fused)
    assert_same(tmp_path / "True" / "tiny.safetensors", tmp_path / "False" / "tiny.safetensors")
    largest = max(
        float(t.abs().max()) for n, t in load_file(tmp_path / "True/tiny.safetensors").items() if "lora_up" in n
    )
    # Adam moves a weight by about its learning rate: 1e-5 (0 + 1 + 2 + 3 + 4 + 5)
    assert 1e-5 < largest < 5e-4


def test_changed_precision_is_named_on_resume(
    tmp_path: Path, tiny: Tiny, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {"mixed_precision": "bf16", "max_train_steps": 2}
    tiny.train(dataset, tmp_path, **arguments, save_every_n_steps=1, save_state=True)
    state = tmp_path / "tiny-step00000001-state"
    changed = {**arguments, "fp8_base_unet": True, "full_bf16": True}
    tiny.train(dataset, tmp_path / "rest", **changed, resume=state)
    said = "".join(capsys.readouterr())
    assert "--full_bf16 was False and is now True" in said
    assert "--fp8_base_unet was False and is now True" in said


COMMANDS = re.findall(
    r"```bash\npython (.*?)```", (ROOT / "docs" / "precision_and_memory.md").read_text(encoding="utf-8"), re.DOTALL
)


@pytest.mark.skipif(not (ROOT / "examples/quickstart/model").exists(), reason="the example's model is not here")
@pytest.mark.parametrize(
    "command",
    [pytest.param(c, marks=[pytest.mark.slow] if "--torch_compile" in c else []) for c in COMMANDS],
    ids=lambda command: " ".join(command.split("--")[-2:]).strip(),
)
def test_commands_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.chdir(ROOT)
    script, *arguments = shlex.split(command.replace("\\\n", ""))
    assert script == "train_network.py"
    arguments[arguments.index("--output_dir") + 1] = str(tmp_path)
    train_here(*arguments, "--max_train_steps", 1, "--lr_warmup_steps", 0, "--max_data_loader_n_workers", 0)
    assert (tmp_path / "quickstart_lora.safetensors").is_file()


def test_the_page_has_commands() -> None:
    assert len(COMMANDS) == 5
