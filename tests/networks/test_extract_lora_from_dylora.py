"""``networks/extract_lora_from_dylora.py``: the first ranks of a DyLoRA are plain LoRAs."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from networks import lora
from networks.dylora import create_network
from networks.extract_lora_from_dylora import main, setup_parser
from tests.fixtures.adapted import randomize, sd_outputs
from tests.fixtures.runs import metadata_of

METADATA = {
    "ss_network_module": "networks.dylora",
    "ss_network_dim": "6",
    "ss_network_alpha": "3.0",
    "ss_network_args": json.dumps({"unit": "2", "conv_dim": "6"}),
    "ss_sd_model_name": "model.safetensors",
    "ss_training_comment": "mine",
}


@pytest.fixture
def dylora(tiny_unet, tiny_text_encoder):
    network = create_network(1.0, 6, 3.0, None, tiny_text_encoder, tiny_unet, unit="2", conv_dim="6", conv_alpha="2")
    network.apply_to(tiny_text_encoder, tiny_unet)
    return randomize(network)


def run(*words):
    main(setup_parser().parse_args([str(word) for word in words]))


def test_what_a_step_computed_is_what_the_extracted_lora_computes(tmp_path, dylora, tiny_unet, tiny_text_encoder):
    model = tmp_path / "dy.safetensors"
    dylora.save_weights(model, None, METADATA)
    computed = {}
    for block, rank in enumerate((2, 4, 6)):
        for adapter in dylora.adapters:
            adapter.train().train_block(block)
        computed[rank] = sd_outputs(tiny_text_encoder, tiny_unet)
    dylora.remove()
    run("--model", model, "--save_to", tmp_path / "lora.safetensors")  # by the file's own unit
    files = sorted(tmp_path.glob("lora-*"))
    assert [file.name for file in files] == [f"lora-000{rank}.safetensors" for rank in (2, 4, 6)]
    for file, (rank, expected) in zip(files, computed.items(), strict=True):
        entries = metadata_of(file)
        assert entries["ss_network_module"] == "networks.lora" and entries["ss_network_dim"] == str(rank)
        assert entries["ss_network_alpha"] == "3.0" and entries["ss_sd_model_name"] == "model.safetensors"
        assert entries["ss_training_comment"] == f"split from DyLoRA, rank 6 to {rank}; mine"
        assert json.loads(entries["ss_network_args"]) == {"conv_dim": str(rank)}
        assert len(entries["sshs_model_hash"]) == 64
        network, weights = lora.create_network_from_weights(1.0, str(file), None, tiny_text_encoder, tiny_unet)
        network.apply_to(tiny_text_encoder, tiny_unet)
        network.load_state_dict(weights)
        assert {adapter.rank for adapter in network.adapters} == {rank}
        found = sd_outputs(tiny_text_encoder, tiny_unet)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)
        network.remove()
    assert len({metadata_of(file)["sshs_model_hash"] for file in files}) == 3


def test_a_file_that_says_nothing(tmp_path, capsys, own_root_logger):
    """A file of another writer: half precision, no metadata, a module of fewer ranks, no alpha in another."""
    tensors = {
        "lora_unet_a.lora_down.weight": torch.randn(4, 3).half(),
        "lora_unet_a.lora_up.weight": torch.randn(5, 4).half(),
        "lora_unet_b.lora_down.weight": torch.randn(1, 3, 3, 3).half(),
        "lora_unet_b.lora_up.weight": torch.randn(5, 1, 1, 1).half(),
        "lora_unet_b.alpha": torch.tensor(1.0).half(),
    }
    save_file(tensors, tmp_path / "dy.safetensors")
    words = ("--model", tmp_path / "dy.safetensors", "--save_to", tmp_path / "lora.safetensors", "--unit", 3)
    run(*words)
    said = capsys.readouterr().err
    assert "taken for a DyLoRA" in said and "saved rank 3" in said
    found = load_file(tmp_path / "lora-0003.safetensors")
    assert torch.equal(found["lora_unet_a.lora_up.weight"], tensors["lora_unet_a.lora_up.weight"][:, :3])
    assert torch.equal(found["lora_unet_a.lora_down.weight"], tensors["lora_unet_a.lora_down.weight"][:3])
    assert torch.equal(found["lora_unet_b.lora_up.weight"], tensors["lora_unet_b.lora_up.weight"])
    assert float(found["lora_unet_a.alpha"]) == 4.0 and float(found["lora_unet_b.alpha"]) == 1.0
    assert not (tmp_path / "lora-0004.safetensors").exists()


def test_an_old_file_of_sdxl_names_its_second_encoder(tmp_path, caplog):
    names = ("lora_te_text_model_x", "lora_unet_input_blocks_4_1_proj_in")
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 3) for name in names}
    tensors |= {f"{name}.lora_up.weight": torch.ones(3, 2) for name in names}
    save_file(tensors, tmp_path / "dy.safetensors", {"ss_network_module": "networks.dylora"})
    run("--model", tmp_path / "dy.safetensors", "--save_to", tmp_path / "lora.safetensors")
    assert len(load_file(tmp_path / "lora-0001.safetensors")) == 6
    assert all("lora_te_" not in name for name in load_file(tmp_path / "lora-0002.safetensors"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"--unit": 7}, "--unit 7: must be from 1 to the rank of the file, 6"),
        ({"--model": None}, "--model: is required"),
        ({"--save_to": None}, "--save_to: is required"),
        ({"--save_to": "lora.onnx"}, "lora.onnx: the file's name must end with"),
        ({"--model": "gone.safetensors"}, "gone.safetensors: no such file"),
        ({"--model": "out-0006.safetensors"}, "out-0006.safetensors: is one of the files that are read"),
        ({"--model": "lora.safetensors"}, "it was trained as networks.lora"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, capsys, own_root_logger, dylora, words, said):
    monkeypatch.chdir(tmp_path)
    dylora.save_weights("dy.safetensors", None, METADATA)
    dylora.save_weights("lora.safetensors", None, METADATA | {"ss_network_module": "networks.lora"})
    if words.get("--model") == "out-0006.safetensors":
        dylora.save_weights("out-0006.safetensors", None, METADATA)
    given = {"--model": "dy.safetensors", "--save_to": "out.safetensors", **words}
    with pytest.raises(SystemExit, match="2"):
        run(*(word for pair in given.items() if pair[1] is not None for word in pair))
    assert said in capsys.readouterr().err
    assert {file.name for file in tmp_path.glob("out*")} <= {words.get("--model")}
