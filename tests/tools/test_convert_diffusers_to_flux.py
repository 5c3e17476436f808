"""tools/convert_diffusers_to_flux.py: files that diffusers writes become the published file."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.architectures.common.joined_layout import join
from library.architectures.flux.diffusers_layout import (
    diffusers_plan,
    open_diffusers_transformer,
    open_transformer,
    published_plan,
)
from library.files.safetensors_io import read_header
from tests.fixtures.file_tools import refusal as refusal_of
from tests.fixtures.file_tools import run_tool
from tests.fixtures.layouts import table
from tests.fixtures.live_tensors import LiveBytes
from tests.fixtures.tiny_flux_files import diffusers_transformer, tiny_shapes, tiny_state
from tools import convert_diffusers_to_flux as tool

pytestmark = pytest.mark.usefixtures("own_root_logger")

KINDS = ["flux1_dev", "flux1_schnell", "chroma1"]


def convert(source: Path, target: Path, **options: object) -> None:
    run_tool(tool, diffusers_path=source, save_to=target, **options)


@pytest.fixture(scope="module", params=KINDS)
def saved(request, tmp_path_factory):
    """A pipeline's folder with the transformer in shards, as diffusers writes it."""
    model = diffusers_transformer(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder / "transformer", max_shard_size="150KB")
    assert len(list((folder / "transformer").glob("*-of-*.safetensors"))) > 2
    return request.param, folder


def test_a_sharded_folder_becomes_the_published_file_bit_by_bit(saved, tmp_path):
    name, folder = saved
    convert(folder, tmp_path / "model.safetensors")
    written, published = load_file(tmp_path / "model.safetensors"), tiny_state(name)
    assert written.keys() == published.keys()
    assert all(torch.equal(written[key], published[key]) for key in published)
    metadata = read_header(tmp_path / "model.safetensors").metadata
    architecture = {"flux1_dev": "flux-1-dev", "flux1_schnell": "flux-1-schnell", "chroma1": "chroma"}[name]
    assert (metadata["modelspec.architecture"], metadata["modelspec.title"]) == (architecture, "model")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("name", KINDS)
def test_the_plans_are_inverse_and_know_every_published_tensor(name):
    state = tiny_state(name)
    there = diffusers_plan({key: tuple(tensor.shape) for key, tensor in state.items()})
    diffusers = {key: join(there, key, state.__getitem__) for key in there}
    back = published_plan({key: tuple(tensor.shape) for key, tensor in diffusers.items()})
    assert back.keys() == state.keys()
    assert all(torch.equal(join(back, key, diffusers.__getitem__), state[key]) for key in state)
    full = diffusers_plan(table(name))
    single = full["single_transformer_blocks.37.proj_mlp.weight"]
    assert single == (("single_blocks.37.linear1.weight", 9216, 21504),)


def test_every_way_to_name_the_source_gives_the_same_file(tmp_path):
    model = diffusers_transformer("flux1_dev").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "pipe" / "transformer", max_shard_size="100KB")
    inner = tmp_path / "pipe" / "transformer"
    model.save_pretrained(tmp_path / "one")
    shards = sorted(inner.glob("*.safetensors"))
    sources = [tmp_path / "pipe", inner, shards[0], shards[-1], tmp_path / "one"]
    sources.append(tmp_path / "one" / "diffusion_pytorch_model.safetensors")
    written = []
    for number, source in enumerate(sources):
        options = {"mem_eff_load_save": True} if number % 2 else {}
        convert(source, tmp_path / "model.safetensors", **options)
        written.append(load_file(tmp_path / "model.safetensors"))
        assert {t.dtype for t in written[-1].values()} == {torch.bfloat16}
    assert all(torch.equal(one[key], written[0][key]) for one in written for key in one)
    # a model loader streams the same tensors without the tool
    streamed = open_diffusers_transformer(tmp_path / "pipe")
    assert all(torch.equal(tensor, written[0][key]) for key, tensor in streamed.read(list(streamed.shapes)))
    assert {key: t.shape for key, t in streamed.on_meta(list(streamed.shapes))} == {
        key: t.shape for key, t in written[0].items()
    }
    assert open_transformer(inner).shapes == open_transformer(tmp_path / "model.safetensors").shapes


@pytest.mark.parametrize("precision, dtype", [("fp16", torch.float16), ("fp8", torch.float8_e4m3fn)])
def test_save_precision(tmp_path, precision, dtype):
    model = diffusers_transformer("flux1_schnell")
    with torch.no_grad():
        model.proj_out.weight[0, 0] = 1000.0  # more than fp8 can hold
    model.save_pretrained(tmp_path / "transformer")
    convert(tmp_path, tmp_path / "model.safetensors", save_precision=precision)
    state = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {dtype}
    weight = state["final_layer.linear.weight"].float()
    assert weight[0, 0] == (448.0 if precision == "fp8" else 1000.0)
    assert torch.equal(weight[1], model.proj_out.weight[1].to(dtype).float())


def test_fp8_is_joined(tmp_path):
    plan = diffusers_plan(tiny_shapes("flux1_dev"))
    state = tiny_state("flux1_dev", dtype=torch.float8_e4m3fn)
    save_file(
        {key: join(plan, key, state.__getitem__).contiguous() for key in plan}, tmp_path / "diffusers.safetensors"
    )
    convert(tmp_path / "diffusers.safetensors", tmp_path / "model.safetensors")
    written = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(written[key].view(torch.uint8), state[key].view(torch.uint8)) for key in state)


def test_no_more_than_one_output_tensor_lives_at_once(saved, tmp_path):
    name, folder = saved
    largest = max(torch.Size(shape).numel() * 4 for shape in tiny_shapes(name).values())
    with LiveBytes() as live:
        convert(folder, tmp_path / "model.safetensors", mem_eff_load_save=True)
    assert 0 < live.peak <= largest


def test_errors_are_one_line_and_leave_nothing(tmp_path, capsys):
    folder, model = tmp_path, diffusers_transformer("flux1_dev")
    inner = tmp_path / "broken"
    model.save_pretrained(inner, max_shard_size="150KB")
    shard = sorted(inner.glob("*.safetensors"))[1]
    state = load_file(shard)

    out = tmp_path / "x.safetensors"
    refusal = partial(refusal_of, capsys, out, tool, save_to=out)

    assert "does not exist" in refusal(diffusers_path=folder, save_to=tmp_path / "nowhere" / "x.safetensors")
    assert ".safetensors" in refusal(diffusers_path=folder, save_to=tmp_path / "x.ckpt")
    assert 'did you mean "bf16"' in refusal(diffusers_path=folder, save_precision="bf61")
    assert "no such file" in refusal(diffusers_path=tmp_path / "nothing.safetensors")

    assert "files that are read" in refusal(diffusers_path=inner, save_to=shard)

    gone = next(iter(state))
    save_file({key: tensor for key, tensor in state.items() if key != gone}, shard)
    assert gone in (line := refusal(diffusers_path=inner)) and "index" in line
    next(inner.glob("*.index.json")).unlink()
    assert f"the first is {gone}" in refusal(diffusers_path=sorted(inner.glob("*.safetensors"))[0])
    shard.unlink()
    assert shard.name in refusal(diffusers_path=inner)

    unet = tmp_path / "unet"
    unet.mkdir()
    (unet / "config.json").write_text(json.dumps({}))
    save_file({"down_blocks.0.weight": torch.zeros(2)}, unet / "diffusion_pytorch_model.safetensors")
    assert "not a FLUX.1 or Chroma transformer" in refusal(diffusers_path=unet)
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"down_blocks.0.weight": torch.zeros(2)}, unet / "diffusion_pytorch_model.bin")
    assert "pickled" in refusal(diffusers_path=unet)
    save_file(tiny_state("flux1_dev"), unet / "diffusion_pytorch_model.safetensors")
    assert "published layout already" in refusal(diffusers_path=unet)
