"""networks/flux_extract_lora.py: the difference of two tiny published models as a LoRA."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library.files.safetensors_io import read_header
from networks import flux_extract_lora as tool
from networks import flux_merge_lora
from tests.fixtures.file_tools import refusal as refusal_of
from tests.fixtures.file_tools import run_tool, saved
from tests.fixtures.live_tensors import LiveBytes
from tests.fixtures.tiny_flux_files import adapter_names, delta, tiny_lora, tiny_shapes, tiny_state

pytestmark = pytest.mark.usefixtures("own_root_logger")


def extract(before: Path, after: Path, target: Path, **options: object) -> None:
    run_tool(tool, model_org=before, model_tuned=after, save_to=target, **options)


def merge(model: Path, lora: Path, target: Path) -> None:
    run_tool(flux_merge_lora, flux_model=model, models=lora, save_to=target)


@pytest.fixture(params=[("flux1_dev", "lora_flux_unet_only", "flux1"), ("chroma1", "lora_chroma", "chroma")])
def changed(request, tmp_path):
    """A model, the model with a LoRA of rank 4 in it, and that LoRA."""
    name, table, version = request.param
    model = tiny_state(name)
    lora = tiny_lora(table, [model])
    before = saved(tmp_path / "before.safetensors", model)
    merge(before, saved(tmp_path / "lora.safetensors", lora), tmp_path / "after.safetensors")
    return table, version, before, tmp_path / "after.safetensors", lora


def test_a_low_rank_change_is_found_and_merges_back(changed, tmp_path):
    table, version, before, after, lora = changed
    extract(before, after, tmp_path / "found.safetensors", dim=4, clamp_quantile=1)
    found = load_file(tmp_path / "found.safetensors")
    names = adapter_names(table)
    assert {key.partition(".")[0] for key in found} == names
    assert {key: t.shape for key, t in found.items()} == {key: t.shape for key, t in lora.items()}
    for name in names:
        assert float(found[f"{name}.alpha"]) == 4.0
        torch.testing.assert_close(delta(found, name), delta(lora, name), atol=1e-6, rtol=1e-4)
    metadata = read_header(tmp_path / "found.safetensors").metadata
    expected = {"ss_base_model_version": version, "ss_network_module": "networks.lora_flux", "ss_network_dim": "4"}
    assert expected.items() <= metadata.items() and metadata["ss_network_alpha"] == "4.0"
    assert metadata["modelspec.architecture"].endswith("/lora") and len(metadata["sshs_model_hash"]) == 64

    merge(before, tmp_path / "found.safetensors", tmp_path / "back.safetensors")
    back, goal = load_file(tmp_path / "back.safetensors"), load_file(after)
    assert all(torch.allclose(back[key], goal[key], atol=1e-5) for key in goal)


def test_a_smaller_rank_is_the_nearest_one(changed, tmp_path):
    _, _, before, after, lora = changed
    options = {"dim": 2, "clamp_quantile": 1, "save_precision": "bf16", "no_metadata": True}
    extract(before, after, tmp_path / "found.safetensors", **options)
    found = load_file(tmp_path / "found.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    name = "lora_unet_single_blocks_1_linear1"
    # Eckart and Young: what is left out is as long as the singular values from the third on
    rest = torch.linalg.svdvals(delta(lora, name))[2:].norm()
    short = {key: tensor.float() for key, tensor in found.items()}
    torch.testing.assert_close((delta(short, name) - delta(lora, name)).norm(), rest, rtol=1e-2, atol=0)
    assert not any(key.startswith("modelspec.") for key in read_header(tmp_path / "found.safetensors").metadata)


def test_numbers_beyond_the_quantile_are_cut(changed, tmp_path):
    _, _, before, after, _ = changed
    extract(before, after, tmp_path / "whole.safetensors", clamp_quantile=1)
    extract(before, after, tmp_path / "cut.safetensors", clamp_quantile=0.9, mem_eff_safe_open=True)
    whole, cut = load_file(tmp_path / "whole.safetensors"), load_file(tmp_path / "cut.safetensors")
    name = "lora_unet_double_blocks_1_txt_mlp_0"
    sides = [f"{name}.lora_down.weight", f"{name}.lora_up.weight"]
    limit = torch.cat([whole[key].flatten() for key in sides]).quantile(0.9)
    for key in sides:
        torch.testing.assert_close(cut[key], whole[key].clamp(-limit, limit))


def test_memory_is_that_of_a_few_tensors(tmp_path):
    one, other = (saved(tmp_path / f"{n}.safetensors", tiny_state("flux1_dev", seed=n)) for n in range(2))
    largest = max(torch.Size(shape).numel() * 4 for shape in tiny_shapes("flux1_dev").values())
    with LiveBytes() as live:
        extract(one, other, tmp_path / "found.safetensors", dim=1, mem_eff_safe_open=True)
    found = sum(tensor.numel() * 4 for tensor in load_file(tmp_path / "found.safetensors").values())
    assert 0 < live.peak <= 4 * largest + 2 * found


def test_errors_are_one_line(tmp_path, capsys):
    flux, schnell = tiny_state("flux1_dev"), tiny_state("flux1_schnell", seed=1)
    before = saved(tmp_path / "before.safetensors", flux)

    found = tmp_path / "found.safetensors"
    refusal = partial(refusal_of, capsys, found, tool, model_org=before, save_to=found)

    other = saved(tmp_path / "other.safetensors", schnell)
    assert "--dim 0" in refusal(model_tuned=other, dim=0)
    assert "--clamp_quantile" in refusal(model_tuned=other, clamp_quantile=1.5)
    assert "are both" in refusal(model_tuned=before)
    assert "nothing to extract" in refusal(model_tuned=saved(tmp_path / "same.safetensors", flux))
    assert "files that are read" in refusal(model_tuned=other, save_to=other)
    assert "no such file" in refusal(model_tuned=tmp_path / "none.safetensors")
    assert "has no weight for" in refusal(model_tuned=saved(tmp_path / "chroma.safetensors", tiny_state("chroma1")))
    small = {**schnell, "single_blocks.0.linear2.weight": torch.zeros(32, 8)}
    assert "different sizes" in refusal(model_tuned=saved(tmp_path / "small.safetensors", small))
    sick = {**schnell, "single_blocks.0.linear2.weight": torch.full((32, 160), float("nan"))}
    assert "not finite" in refusal(model_tuned=saved(tmp_path / "sick.safetensors", sick))
    # a schnell and a dev model have the same blocks
    extract(before, other, tmp_path / "found.safetensors")
