"""merge_models.py and show_metadata.py on small files of any names."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from library.files.safetensors_io import read_header
from tests.fixtures.file_tools import refusal as refusal_of
from tests.fixtures.file_tools import run_tool, saved
from tests.fixtures.live_tensors import LiveBytes
from tests.fixtures.tiny_flux_files import tiny_state
from tests.fixtures.tiny_sd import make_tiny_sd
from tools import merge_models, show_metadata

pytestmark = pytest.mark.usefixtures("own_root_logger")


def test_the_result_is_the_weighted_sum(tmp_path):
    states = [tiny_state("flux1_dev", seed=n) for n in range(3)]
    files = [saved(tmp_path / f"{n}.safetensors", state) for n, state in enumerate(states)]
    run_tool(merge_models, models=files, ratios=[0.5, 0.7, -0.4], output=tmp_path / "blend")
    blend = load_file(tmp_path / "blend.safetensors")
    assert blend.keys() == states[0].keys()
    for name, tensor in blend.items():
        expected = sum(ratio * state[name].double() for ratio, state in zip((0.5, 0.7, -0.4), states, strict=True))
        torch.testing.assert_close(tensor.double(), expected, atol=1e-6, rtol=1e-5)
    metadata = read_header(tmp_path / "blend.safetensors").metadata
    assert (metadata["modelspec.architecture"], metadata["modelspec.merged_from"]) == ("flux-1-dev", "0, 1, 2")
    run_tool(merge_models, models=files, output=tmp_path / "mean.safetensors", saving_precision="bf16")
    mean = load_file(tmp_path / "mean.safetensors")
    name = next(iter(mean))
    assert mean[name].dtype == torch.bfloat16
    torch.testing.assert_close(mean[name].float(), sum(s[name] for s in states) / 3, atol=1e-2, rtol=1e-2)


def test_keys_that_differ(tmp_path, capsys):
    one, other = {"a": torch.ones(2), "b": torch.ones(3)}, {"a": torch.full((2,), 3.0), "c": torch.ones(1)}
    files = [saved(tmp_path / f"{n}.safetensors", state) for n, state in enumerate((one, other))]
    run_tool(merge_models, models=files, output=tmp_path / "blend.safetensors", show_skipped=True)
    blend = load_file(tmp_path / "blend.safetensors")
    assert {name: tensor.tolist() for name, tensor in blend.items()} == {"a": [2.0, 2.0], "b": [1.0, 1.0, 1.0]}
    said = capsys.readouterr().err
    assert "lacks 1 tensors (b, ...)" in said and "1 tensors are not in" in said and "\nc" in said


def test_old_names_of_text_encoders_count_once_and_integers_stay(tmp_path):
    level = "cond_stage_model.transformer."
    new = {f"{level}text_model.encoder.x": torch.ones(2), f"{level}text_model.embeddings.position_ids": torch.arange(3)}
    old = {f"{level}encoder.x": torch.full((2,), 3.0), f"{level}embeddings.position_ids": torch.arange(3)}
    files = [saved(tmp_path / f"{n}.safetensors", state) for n, state in enumerate((new, old))]
    run_tool(merge_models, models=files, output=tmp_path / "blend.safetensors", saving_precision="fp16")
    blend = load_file(tmp_path / "blend.safetensors")
    assert blend[f"{level}text_model.encoder.x"].tolist() == [2.0, 2.0]
    assert torch.equal(blend[f"{level}text_model.embeddings.position_ids"], torch.arange(3))


def test_u_nets_alone(tmp_path):
    files = [make_tiny_sd(tmp_path / f"{n}.safetensors", seed=n).path for n in range(2)]
    run_tool(merge_models, models=files, unet_only=True, output=tmp_path / "blend.safetensors")
    one, other, blend = (load_file(path) for path in (*files, tmp_path / "blend.safetensors"))
    for name, tensor in blend.items():
        if name.startswith("model."):
            torch.testing.assert_close(tensor, (one[name] + other[name]) / 2)
        else:
            assert torch.equal(tensor, one[name])


def test_memory_is_that_of_a_few_tensors(tmp_path):
    files = [make_tiny_sd(tmp_path / f"{n}.safetensors", seed=n).path for n in range(2)]
    largest = max(torch.Size(info.shape).numel() * 4 for info in read_header(files[0]).tensors.values())
    with LiveBytes() as live:
        run_tool(merge_models, models=files, output=tmp_path / "blend.safetensors")
    assert 0 < live.peak <= 3 * largest


def test_errors_are_one_line(tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    one = saved(tmp_path / "1.safetensors", {"a": torch.ones(2)})
    other = saved(tmp_path / "2.safetensors", {"a": torch.ones(3)})
    refusal = partial(refusal_of, capsys, out, merge_models)
    assert "--models" in refusal(output=out)
    assert "--output" in refusal(models=[one])
    assert "3 numbers for 2 models" in refusal(models=[one, one], ratios=[1, 2, 3], output=out)
    assert "finite" in refusal(models=[one, one], ratios=[1, "nan"], output=out)
    assert "a is [3]" in refusal(models=[one, other], output=out)
    assert "no such file" in refusal(models=[one, tmp_path / "none.safetensors"], output=out)
    assert "files that are read" in refusal(models=[one, one], output=one)


def test_metadata_is_shown_in_order(tmp_path, capsys):
    run_tool(show_metadata, model=saved(tmp_path / "a.safetensors", {"a": torch.ones(1)}, {"z": "1", "b": "ä"}))
    out = capsys.readouterr().out
    assert json.loads(out) == {"b": "ä", "z": "1"} and out.index('"b"') < out.index('"z"') and '\n    "b"' in out
    run_tool(show_metadata, model=saved(tmp_path / "b.safetensors", {"a": torch.ones(1)}))
    said = capsys.readouterr()
    assert said.out == "" and "holds no metadata" in said.err
    with pytest.raises(SystemExit, match="2"):
        run_tool(show_metadata, model=tmp_path / "none.safetensors")
