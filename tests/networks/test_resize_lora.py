"""resize_lora.py, svd_merge_lora.py and check_lora_weights.py against direct computations in float64."""

from __future__ import annotations

import json
import math
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from library.files.safetensors_io import read_header
from networks import check_lora_weights, resize_lora, svd_merge_lora
from networks.files.svd import decompose, decompose_product, dynamic
from tests.fixtures.file_tools import refusal as refusal_of
from tests.fixtures.file_tools import run_tool, saved
from tests.networks.test_merge_lora import products

pytestmark = pytest.mark.usefixtures("own_root_logger")

LINEAR = "lora_unet_down_blocks_0_attentions_0_proj_in"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
TEXT = "lora_te_text_model_encoder_layers_0_mlp_fc1"


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lora_file(rank=8, alpha=2.0, seed=0):
    return {
        f"{LINEAR}.lora_down.weight": random(rank, 24, seed=seed),
        f"{LINEAR}.lora_up.weight": random(20, rank, seed=seed + 1),
        f"{LINEAR}.alpha": torch.tensor(alpha),
        f"{CONV}.lora_down.weight": random(rank, 5, 3, 3, seed=seed + 2),
        f"{CONV}.lora_up.weight": random(30, rank, 1, 1, seed=seed + 3),
        f"{CONV}.alpha": torch.tensor(alpha),
        f"{TEXT}.lora_down.weight": random(rank, 12, seed=seed + 4),
        f"{TEXT}.lora_up.weight": random(40, rank, seed=seed + 5),
        f"{TEXT}.alpha": torch.tensor(alpha),
    }


def nearest(change, rank):
    left, values, right = torch.linalg.svd(change.flatten(1), full_matrices=False)
    return (left[:, :rank] * values[:rank] @ right[:rank]).view_as(change)


# ---- resize ----


def test_a_smaller_rank_is_the_nearest_and_keeps_the_strength(tmp_path):
    notes = {"ss_training_comment": "mine", "ss_network_args": json.dumps({"conv_dim": "8", "dropout": "0.1"})}
    source = saved(tmp_path / "a.safetensors", {**lora_file(), "extra": torch.ones(3)}, notes)
    run_tool(resize_lora, model=source, save_to=tmp_path / "b.safetensors", new_rank=3, new_conv_rank=5)
    before, after = load_file(source), load_file(tmp_path / "b.safetensors")
    assert before.keys() == after.keys() and torch.equal(after["extra"], before["extra"])
    for name, change in products(before).items():
        rank = 5 if name == CONV else 3
        assert after[f"{name}.lora_down.weight"].shape[0] == rank
        assert float(after[f"{name}.alpha"]) == pytest.approx(2.0 / 8 * rank)
        torch.testing.assert_close(products(after)[name], nearest(change, rank), atol=1e-5, rtol=1e-5)
    metadata = read_header(tmp_path / "b.safetensors").metadata
    assert metadata["ss_training_comment"] == "dimension is resized from 8 to 3 (conv: 5); mine"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("3", "0.75")
    assert json.loads(metadata["ss_network_args"]) == {"conv_dim": "5", "conv_alpha": "1.25", "dropout": "0.1"}
    assert len(metadata["sshs_model_hash"]) == 64


def test_the_same_rank_is_the_same_change_and_a_larger_one_too(tmp_path):
    source = saved(tmp_path / "a.safetensors", lora_file())
    for rank in (8, 64):
        run_tool(resize_lora, model=source, save_to=tmp_path / "b.safetensors", new_rank=rank)
        for name, change in products(load_file(source)).items():
            torch.testing.assert_close(
                products(load_file(tmp_path / "b.safetensors"))[name], change, atol=1e-5, rtol=1e-5
            )


def test_files_without_alphas_and_of_other_programs(tmp_path):
    down, up = random(4, 10), random(12, 4, seed=1)
    other = {
        "unet.x.lora_A.weight": down,
        "unet.x.lora_B.weight": up,
        "y.lora.down.weight": down,
        "y.lora.up.weight": up,
    }
    source = saved(tmp_path / "a.safetensors", other)
    run_tool(resize_lora, model=source, save_to=tmp_path / "b.safetensors", new_rank=2, save_precision="bf16")
    after = load_file(tmp_path / "b.safetensors")
    assert after.keys() == {*other, "unet.x.alpha", "y.alpha"}
    assert float(after["y.alpha"]) == 2.0 and {tensor.dtype for tensor in after.values()} == {torch.bfloat16}


SPECTRUM = torch.tensor([10.0, 5.0, 2.0, 1.0, 0.5, 0.1])


@pytest.mark.parametrize(
    ("method", "parameter", "expected"),
    [  # counted by hand, and one more is kept, as published
        ("sv_ratio", 4, 3),
        ("sv_ratio", 1, 2),
        ("sv_cumulative", 0.8, 3),  # 15 of 18.6 is 0.806
        ("sv_cumulative", 0.95, 5),  # 18 of 18.6 is 0.967
        ("sv_fro", 0.95, 3),  # 125 of 130.26 is 0.979 of the norm, 100 is 0.876
        ("sv_fro", 0.999, 5),
        ("sv_fro", 1.0, 6),
    ],
)
def test_ranks_that_a_spectrum_needs(method, parameter, expected):
    assert dynamic(method, parameter, 100)(SPECTRUM) == expected
    assert dynamic(method, parameter, 2)(SPECTRUM) == 2
    assert dynamic(method, parameter, 100)(torch.zeros(6)) == 1
    assert dynamic(method, parameter, 100)(torch.ones(1)) == 1


def test_each_module_gets_the_ranks_that_it_needs(tmp_path, capsys):
    tensors = lora_file()
    tensors[f"{TEXT}.lora_up.weight"][:, 1:] = 0  # of one rank in truth
    source = saved(tmp_path / "a.safetensors", tensors)
    options = {"dynamic_method": "sv_fro", "dynamic_param": 0.9, "new_rank": 100, "verbose": True}
    run_tool(resize_lora, model=source, save_to=tmp_path / "b.safetensors", **options)
    after = load_file(tmp_path / "b.safetensors")
    ranks = {name: after[f"{name}.lora_down.weight"].shape[0] for name in products(after)}
    assert ranks[TEXT] == 2 < ranks[LINEAR] < 8
    said = capsys.readouterr().out
    assert f"{TEXT}: rank 8 -> 2, sum 100.0%, Frobenius 100.0%" in said
    metadata = read_header(tmp_path / "b.safetensors").metadata
    assert metadata["ss_training_comment"] == "Dynamic resize with sv_fro: 0.9 from 8; "
    assert metadata["ss_network_dim"] == metadata["ss_network_alpha"] == "Dynamic"


@pytest.mark.parametrize("shape", [(30, 4, 20), (20, 4, 30), (6, 8, 7), (5, 5, 40)])
def test_a_product_is_decomposed_by_its_factors(shape):
    out, rank, width = shape
    up, down = random(out, rank).double(), random(rank, width, seed=1).double()
    found, expected = decompose_product(up, down), decompose(up @ down)
    count = len(found.values)
    torch.testing.assert_close(found.values, expected.values[:count])
    torch.testing.assert_close((found.left * found.values) @ found.right, up @ down)
    torch.testing.assert_close(found.left.T @ found.left, torch.eye(count, dtype=torch.float64), atol=1e-10, rtol=0)
    assert found.lost(count) == 0 and found.lost(0) == 1
    assert found.lost(2) == pytest.approx(float(expected.values[2:].norm() / expected.values.norm()))


def test_resizing_says_what_is_wrong(tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    source = saved(tmp_path / "a.safetensors", lora_file())
    refusal = partial(refusal_of, capsys, out, resize_lora)
    assert "--model" in refusal(save_to=out)
    assert "--save_to" in refusal(model=source)
    assert "--new_rank 0" in refusal(model=source, save_to=out, new_rank=0)
    assert "give both, or none" in refusal(model=source, save_to=out, dynamic_param=2)
    for method, parameter in (("sv_ratio", 0.5), ("sv_fro", 2), ("sv_cumulative", 0)):
        line = refusal(model=source, save_to=out, dynamic_method=method, dynamic_param=parameter)
        assert f"--dynamic_param {float(parameter)}" in line
    assert "one of the files that are read" in refusal(model=source, save_to=source)
    half = {key: tensor for key, tensor in lora_file().items() if key != f"{CONV}.lora_up.weight"}
    assert "one of its halves is missing" in refusal(model=saved(tmp_path / "h.safetensors", half), save_to=out)
    none = saved(tmp_path / "n.safetensors", {"a.hada_w1_a": torch.ones(2, 2)})
    assert "no LoRA" in refusal(model=none, save_to=out)
    mid = {**lora_file(), f"{CONV}.lora_mid.weight": torch.ones(8, 8, 3, 3)}
    assert "three factors" in refusal(model=saved(tmp_path / "m.safetensors", mid), save_to=out)


# ---- merge with a rank ----


def test_files_are_merged_into_the_nearest_of_a_rank(tmp_path, capsys):
    one, other = lora_file(), lora_file(rank=4, alpha=6.0, seed=9)
    files = [saved(tmp_path / "1.safetensors", one), saved(tmp_path / "2.safetensors", other)]
    options = {"models": files, "ratios": [0.5, -0.3], "new_rank": 6, "new_conv_rank": 7}
    run_tool(svd_merge_lora, **options, save_to=tmp_path / "m.safetensors")
    merged = load_file(tmp_path / "m.safetensors")
    sums = {name: 0.5 * change - 0.3 * products(other)[name] for name, change in products(one).items()}
    for name, change in sums.items():
        rank = 7 if name == CONV else 6
        assert float(merged[f"{name}.alpha"]) == rank
        torch.testing.assert_close(products(merged)[name], nearest(change, rank), atol=1e-5, rtol=1e-5)
    assert "largest error of the ranks" in " ".join(capsys.readouterr().err.split())
    metadata = read_header(tmp_path / "m.safetensors").metadata
    assert json.loads(metadata["ss_network_args"]) == {"conv_dim": "7", "conv_alpha": "7.0"}
    # at full rank nothing is lost or cut
    options |= {"new_rank": 100, "new_conv_rank": 100}
    run_tool(svd_merge_lora, **options, save_to=tmp_path / "whole.safetensors")
    for name, change in products(load_file(tmp_path / "whole.safetensors")).items():
        torch.testing.assert_close(change, sums[name], atol=1e-5, rtol=1e-5)


def test_a_lokr_becomes_a_lora(tmp_path):
    lokr = {f"{LINEAR}.lokr_w1": random(4, 4), f"{LINEAR}.lokr_w2_a": random(5, 2, seed=1)}
    lokr |= {f"{LINEAR}.lokr_w2_b": random(2, 6, seed=2), f"{LINEAR}.alpha": torch.tensor(1.0)}
    source = saved(tmp_path / "lokr.safetensors", lokr)
    run_tool(svd_merge_lora, models=source, new_rank=20, save_to=tmp_path / "lora.safetensors", lbws=str([0.5] * 17))
    small = lokr[f"{LINEAR}.lokr_w2_a"].double() @ lokr[f"{LINEAR}.lokr_w2_b"].double() / 2
    expected = 0.5 * torch.kron(lokr[f"{LINEAR}.lokr_w1"].double(), small)
    torch.testing.assert_close(
        products(load_file(tmp_path / "lora.safetensors"))[LINEAR], expected, atol=1e-5, rtol=1e-5
    )


def test_ranks_below_one_are_refused(tmp_path, capsys):
    source, out = saved(tmp_path / "a.safetensors", lora_file()), tmp_path / "out.safetensors"
    assert "--new_rank 0" in refusal_of(capsys, out, svd_merge_lora, models=source, save_to=out, new_rank=0)


# ---- check ----


def test_every_trained_tensor_is_a_line(tmp_path, capsys):
    source = saved(tmp_path / "a.safetensors", lora_file())
    parser = check_lora_weights.setup_parser()
    check_lora_weights.main(parser.parse_args([str(source)]))
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "number of LoRA modules: 6" and len(lines) == 6
    weights = load_file(source)
    for line in lines:
        name, shape, mean, least = line.split(",")
        values = weights[name].abs()
        assert shape == f"({'-'.join(map(str, values.shape))})"
        assert math.isclose(float(mean), values.mean(), rel_tol=1e-6) and float(least) == float(values.min())
    check_lora_weights.main(parser.parse_args([str(source), "-s"]))
    assert len(capsys.readouterr().out.splitlines()) == 10
