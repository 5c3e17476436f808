"""A family with flow matching and own options through whole runs: training, resuming, validation, sample images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.fixtures.runs import logged, lora_arguments, metadata_of, train_here, write_dataset
from tests.fixtures.tiny_sd import MadeCheckpoint

SCRIPT = "tests.fixtures.flow_train_network"
#: everything that is drawn at random, and a loss that depends on the timestep
OPTIONS = {
    "max_train_steps": 4, "guidance_scale": 0.5, "timestep_sampling": "flux_shift", "model_prediction_type": "raw",
    "weighting_scheme": "cosmap", "noise_offset": 0.1, "ip_noise_gamma": 0.1, "ip_noise_gamma_random_strength": True,
    "loss_type": "huber", "min_timestep": 100, "max_timestep": 950, "network_dropout": 0.2,
}  # fmt: skip


def run(model: MadeCheckpoint, dataset: Path, output: Path, **more: object) -> Path:
    train_here(*lora_arguments(model, dataset, output, **{**OPTIONS, **more}), script=SCRIPT)
    return output


def test_training_resuming_validation_and_sample_images(
    tmp_path: Path, tiny_sd: MadeCheckpoint, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = write_dataset(tmp_path / "d.toml", images, dataset="batch_size = 2\nvalidation_split = 0.3")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(
        "a cat --d 1 --w 72\na cat --d 1 --g 3\na cat --d 1 --fs 7 --ss euler_a\na cat --d 1 --l 4 --n a dog\n"
    )
    watched = {"validate_every_n_steps": 2, "sample_prompts": prompts, "sample_every_n_steps": 4}
    whole = run(tiny_sd, dataset, tmp_path / "whole", save_every_n_steps=2, save_state=True, **watched)
    again = run(
        tiny_sd, dataset, tmp_path / "again", resume=whole / "tiny-step00000002-state", validate_every_n_steps=2
    )
    said = capsys.readouterr()

    # what was learned
    weights, resumed = load_file(whole / "tiny.safetensors"), load_file(again / "tiny.safetensors")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in weights.items())
    assert any(tensor.abs().max() > 0 for name, tensor in weights.items() if "lora_up" in name)
    assert "will not be exact" not in said.err
    curve = logged(whole, "loss/validation/step_average")
    assert len(curve) == 2 and all(0 < value < 100 for value in curve)
    assert logged(again, "loss/validation/step_average")[-1] == curve[-1]
    assert logged(again, "loss/current") == logged(whole, "loss/current")[2:]

    # what is recorded
    metadata = metadata_of(whole / "tiny.safetensors")
    expected = {
        "ss_timestep_sampling": "flux_shift", "ss_weighting_scheme": "cosmap", "ss_model_prediction_type": "raw",
        "ss_discrete_flow_shift": "3.0", "ss_guidance_scale": "0.5", "modelspec.prediction_type": "flow",
        "modelspec.timestep_range": "100,950",
    }  # fmt: skip
    assert {name: metadata.get(name) for name in expected} == expected
    state = json.loads((whole / "tiny-step00000002-state" / "train_state.json").read_text())
    assert "flux_shift" in json.dumps(state)

    # what was drawn: 72 pixels are not a multiple of 16; guidance, shift and negative prompt each make another image
    samples = [Image.open(path) for path in sorted((whole / "sample").glob("*.png"))]
    assert [sample.size for sample in samples] == [(64, 64)] * 4
    assert len({sample.tobytes() for sample in samples}) == 4
    assert [sample.text.get("sampler") for sample in samples] == ["euler"] * 4
    assert (samples[1].text["guidance_scale"], samples[2].text["flow_shift"]) == ("3", "7")
    assert "72 is not usable, 64 is used (multiples of 16" in said.err
    (idle,) = [line for line in said.err.splitlines() if "no effect with this model" in line]
    assert "sample_sampler (--ss)" in idle


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            {"strict": True, "min_snr_gamma": 5, "sigmoid_scale": 2, "timestep_sampling": "uniform"},
            ["--sigmoid_scale has no effect without", "--min_snr_gamma has no effect with flow matching"],
        ),
        (
            {"timestep_sampling": "sigmoid", "sigmoid_scale": 0.1, "min_timestep": 0, "max_timestep": 10},
            ["--min_timestep 0 and --max_timestep 10: the chosen timestep density has next to nothing"],
        ),
    ],
)
def test_what_cannot_work_is_one_line_each(
    tmp_path: Path,
    tiny_sd: MadeCheckpoint,
    images: Path,
    capsys: pytest.CaptureFixture[str],
    more: dict[str, object],
    words: list[str],
) -> None:
    dataset = write_dataset(tmp_path / "d.toml", images)
    given = {**more}
    if prompt := given.pop("prompt", None):
        (tmp_path / "p.txt").write_text(prompt)
        given |= {"sample_prompts": tmp_path / "p.txt", "sample_every_n_steps": 2}
    with pytest.raises(SystemExit) as ended:
        run(tiny_sd, dataset, tmp_path / "out", **given)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 2
    assert len(errors) == len(words) and all(word in line for word, line in zip(words, errors, strict=True))


def test_explain_and_dry_run(
    tmp_path: Path, tiny_sd: MadeCheckpoint, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = write_dataset(tmp_path / "d.toml", images)
    run(tiny_sd, dataset, tmp_path / "out", explain="all", without_text=True)
    table = capsys.readouterr().out
    for words in ("Toy model", "Weighting of timesteps", "Flow matching", "--timestep_sampling", "flux_shift"):
        assert words in table
    (row,) = [line for line in table.splitlines() if line.startswith("--guidance_scale")]
    assert "0.5" in row and "command line" in row and "no effect with --without_text" in table
    run(tiny_sd, dataset, tmp_path / "out", dry_run=True)
    assert "dry run: all checks passed" in capsys.readouterr().out
