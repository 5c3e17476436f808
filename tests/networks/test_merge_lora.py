"""Adapters of every kind merged into checkpoints of SD 1.x, 2.x and SDXL: ``merge_lora.py``, ``sdxl_merge_lora.py``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from library.architectures.adapters import AdapterFamily
from library.architectures.sd import SD
from library.architectures.sdxl import SDXL
from library.files.safetensors_io import read_header
from networks import dylora, lora, merge_lora, merge_lora_old, oft, sdxl_merge_lora
from networks.files.families import family_named, family_of_model
from networks.third_party import denoiser_argument, text_argument
from tests.fixtures.adapted import randomize
from tests.fixtures.file_tools import refusal as refusal_of
from tests.fixtures.file_tools import run_tool, saved
from tests.fixtures.layouts import table
from tests.fixtures.live_tensors import LiveBytes
from tests.fixtures.tiny_sd import MadeCheckpoint, make_tiny_sd
from tests.fixtures.tiny_sdxl import make_tiny_sdxl

pytestmark = pytest.mark.usefixtures("own_root_logger")


@dataclass
class Checkpoint:
    made: MadeCheckpoint
    kind: str
    tool: ModuleType

    @property
    def path(self) -> Path:
        return self.made.path

    def models(self, path: Path | None = None) -> tuple[list[nn.Module], nn.Module]:
        """The text encoders and the U-Net of a file, on the host."""
        cache = str(self.made.tokenizer_cache_dir)
        family = SDXL if self.kind == "sdxl" else SD
        settings = {} if family is SDXL else {"v2": self.kind == "sd2"}
        found = family.inspect(
            str(path or self.path), v_parameterization=False, vae=None, tokenizer_cache_dir=cache, **settings
        )
        encoders = family.load_text_encoders(found, dtype=torch.float32, device="cpu")
        return encoders, family.load_denoiser(found, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module", params=["sd", "sd2", "sdxl"])
def checkpoint(request, tmp_path_factory) -> Checkpoint:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "sdxl":
        return Checkpoint(make_tiny_sdxl(folder / "model.safetensors"), "sdxl", sdxl_merge_lora)
    made = make_tiny_sd(folder / "model.safetensors", v2=request.param == "sd2")
    return Checkpoint(made, request.param, merge_lora)


def make(
    checkpoint: Checkpoint, file: Path, module: ModuleType = lora, rank: int = 4, seed: int = 0, **args: str
) -> Path:
    """A file of random adapters for a checkpoint."""
    encoders, unet = checkpoint.models()
    text = [] if module is oft else encoders
    alpha = 0.05 if module is oft else 3.0
    network = randomize(module.create_network(1.0, rank, alpha, None, text, unet, **args), 0.1 + 0.05 * seed)
    network.save_weights(file, None, {"ss_base_model_version": "x", "modelspec.title": file.stem.upper()})
    return file


def changed_models(checkpoint: Checkpoint, files: list[tuple[ModuleType, Path, float]]) -> list[nn.Module]:
    """The models with the files in them, by the networks themselves."""
    from networks.adapter_module import merge_all_forever

    encoders, unet = checkpoint.models()
    adapters = []
    for module, file, ratio in files:
        text = [] if module is oft else encoders
        network, weights = module.create_network_from_weights(ratio, str(file), None, text, unet)
        adapters += network.adapters_to_merge(text, unet, weights)
    merge_all_forever(adapters)
    return [*encoders, unet]


def assert_same_models(one: list[nn.Module], other: list[nn.Module]) -> None:
    for left, right in zip(one, other, strict=True):
        states = left.state_dict(), right.state_dict()
        assert states[0].keys() == states[1].keys()
        for name, tensor in states[0].items():
            torch.testing.assert_close(states[1][name], tensor, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["plain", "convs", "dora", "dylora", "oft"])
def test_a_checkpoint_becomes_what_the_networks_make_of_it(tmp_path, checkpoint, kind):
    module, args = {
        "plain": (lora, {}),
        "convs": (lora, {"conv_dim": "2"}),
        "dora": (lora, {"dora": "True", "conv_dim": "2"}),
        "dylora": (dylora, {"unit": "2"}),
        "oft": (oft, {"enable_all_linear": "True", "enable_conv": "True"}),
    }[kind]
    one = make(checkpoint, tmp_path / "one.safetensors", module, **args)
    other = make(checkpoint, tmp_path / "other.safetensors", rank=2, seed=1)
    run_tool(
        checkpoint.tool, sd_model=checkpoint.path, models=[one, other], ratios=[0.5, -0.7],
        save_to=tmp_path / "merged.safetensors",
    )  # fmt: skip
    expected = changed_models(checkpoint, [(module, one, 0.5), (lora, other, -0.7)])
    encoders, unet = checkpoint.models(tmp_path / "merged.safetensors")
    assert_same_models(expected, [*encoders, unet])
    before, after = load_file(checkpoint.path), load_file(tmp_path / "merged.safetensors")
    assert before.keys() == after.keys()
    # everything else in the file is as it was
    same = [name for name in before if torch.equal(before[name], after[name])]
    assert all(name in same for name in before if name.startswith("first_stage_model."))
    metadata = read_header(tmp_path / "merged.safetensors").metadata
    assert metadata["modelspec.merged_from"] == "model, ONE, OTHER" and metadata["modelspec.title"] == "merged"
    assert "/lora" not in metadata["modelspec.architecture"]


def lycoris_file(checkpoint: Checkpoint, file: Path, **args: str) -> tuple[Path, list[nn.Module]]:
    """A file of LyCORIS, and the models that it makes."""
    kohya = pytest.importorskip("lycoris.kohya")
    encoders, unet = checkpoint.models()
    text, denoiser = text_argument(encoders), denoiser_argument("lycoris.kohya", unet)
    network = kohya.create_network(1.0, 4, 4.0, None, text, denoiser, preset="attn-mlp", **args)
    network.apply_to(text, denoiser, True, True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        network.save_weights(str(file), None, {})
        for adapter in network.loras:
            adapter.restore() if hasattr(adapter, "restore") else None
            change = adapter.get_diff_weight(1.0)[0]
            adapter.org_module[0].weight.data += change.view_as(adapter.org_module[0].weight)
    return file, [*encoders, unet]


@pytest.mark.parametrize("algo", ["loha", "lokr", "diag-oft"])
def test_files_of_lycoris(tmp_path, checkpoint, algo):
    args = {"algo": algo, **({"factor": "4"} if algo == "lokr" else {})}
    file, expected = lycoris_file(checkpoint, tmp_path / "l.safetensors", **args)
    run_tool(checkpoint.tool, sd_model=checkpoint.path, models=file, save_to=tmp_path / "merged.safetensors")
    encoders, unet = checkpoint.models(tmp_path / "merged.safetensors")
    assert_same_models(expected, [*encoders, unet])


def test_memory_is_that_of_a_few_tensors(tmp_path, checkpoint):
    file = make(checkpoint, tmp_path / "l.safetensors", rank=1)
    options = {"sd_model": checkpoint.path, "models": file, "save_to": tmp_path / "merged.safetensors"}
    largest = max(torch.Size(info.shape).numel() * 4 for info in read_header(checkpoint.path).tensors.values())
    with LiveBytes() as live:
        run_tool(checkpoint.tool, **options, save_precision="float")
    held = sum(tensor.numel() * 4 for tensor in load_file(file).values())
    assert live.peak <= 2 * largest + 2 * held


def test_names_and_places_are_those_of_the_published_tables():
    for model, adapters, key in (
        ("sd15_checkpoint", "lora_sd15_conv", "sd"),
        ("sd21_checkpoint", "lora_sd21_conv", "sd2"),
        ("sdxl_base_checkpoint", "lora_sdxl_conv", "sdxl"),
    ):
        shapes, tensors = table(model), table(adapters)
        family = family_of_model(shapes)
        assert family.key == key
        places = {}
        for part in family.parts:
            places |= part.usual_places(shapes, convs=True)
        names = {name.partition(".")[0] for name in tensors}
        assert places.keys() == names
        for name, place in places.items():
            out, down = tensors[f"{name}.lora_up.weight"][0], tensors[f"{name}.lora_down.weight"]
            assert (
                place.shape[:2] == (out, down[1])
                and torch.Size(place.shape).numel() == out * torch.Size(down[1:]).numel()
            )


# ---- with each other ----


def products(file: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every module's change in float64."""
    found = {}
    for key, up in file.items():
        if key.endswith(".lora_up.weight"):
            name = key.removesuffix(".lora_up.weight")
            down = file[f"{name}.lora_down.weight"].double()
            product = up.double().flatten(1) @ down.flatten(1) * float(file[f"{name}.alpha"]) / len(down)
            found[name] = product.view(len(up), *down.shape[1:])
    return found


def test_the_sum_of_files(tmp_path, checkpoint):
    one = make(checkpoint, tmp_path / "one.safetensors", conv_dim="2")
    other = make(checkpoint, tmp_path / "other.safetensors", rank=3, seed=1)
    options = {"models": [one, other], "ratios": [0.5, -0.7]}
    run_tool(checkpoint.tool, **options, concat=True, save_to=tmp_path / "exact.safetensors")
    run_tool(checkpoint.tool, **options, save_to=tmp_path / "near.safetensors")
    changes = [products(load_file(file)) for file in (one, other)]
    exact, near = (load_file(tmp_path / f"{name}.safetensors") for name in ("exact", "near"))
    for name, found in products(exact).items():
        expected = 0.5 * changes[0][name] - 0.7 * changes[1].get(name, torch.zeros(()))
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
        left, values, right = torch.linalg.svd(expected.flatten(1), full_matrices=False)
        rank = near[f"{name}.lora_down.weight"].shape[0]
        goal = (left[:, :rank] * values[:rank] @ right[:rank]).view_as(expected)
        torch.testing.assert_close(products(near)[name], goal, atol=1e-6, rtol=1e-5)
    metadata = read_header(tmp_path / "exact.safetensors").metadata
    assert metadata["ss_network_module"] == "networks.lora" and metadata["ss_base_model_version"] == "x"
    assert metadata["ss_network_dim"] == "Dynamic" and len(metadata["sshs_model_hash"]) == 64
    lora.create_network_from_weights(1.0, str(tmp_path / "near.safetensors"), None, *checkpoint.models())


def test_half_of_one_file_is_half_of_its_effect(tmp_path, checkpoint):
    one = make(checkpoint, tmp_path / "one.safetensors")
    for ratio in (0.5, -1.0):
        run_tool(checkpoint.tool, models=one, ratios=ratio, save_to=tmp_path / "half.safetensors")
        before, after = load_file(one), load_file(tmp_path / "half.safetensors")
        assert before.keys() == after.keys()
        for name, change in products(before).items():
            torch.testing.assert_close(products(after)[name], change * ratio, atol=1e-7, rtol=1e-5)


# ---- blocks, old names, mistakes ----


@pytest.fixture(scope="module")
def xl(tmp_path_factory) -> Checkpoint:
    made = make_tiny_sdxl(tmp_path_factory.mktemp("xl") / "model.safetensors")
    return Checkpoint(made, "sdxl", sdxl_merge_lora)


def test_factors_by_block(tmp_path, xl):
    file = make(xl, tmp_path / "l.safetensors", conv_dim="2")
    factors = [0.5, *([0.0] * 9), 2.0, *([1.0] * 9)]  # BASE, IN00 to IN08, MID, OUT00 to OUT08
    run_tool(sdxl_merge_lora, models=file, lbws=[str(factors)], save_to=tmp_path / "by_block.safetensors", ratios=0.5)
    before, after = products(load_file(file)), products(load_file(tmp_path / "by_block.safetensors"))
    expected = {"_te": 0.25, "_input_": 0.0, "_middle_": 1.0, "_output_": 0.5}
    for name, change in before.items():
        factor = next(value for piece, value in expected.items() if piece in name)
        torch.testing.assert_close(after[name], change * factor, atol=1e-7, rtol=1e-5)
    run_tool(
        sdxl_merge_lora, sd_model=xl.path, models=file, lbws=[str(factors)], save_to=tmp_path / "model.safetensors"
    )
    name = "model.diffusion_model.input_blocks.4.1.proj_in.weight"
    assert torch.equal(load_file(tmp_path / "model.safetensors")[name], load_file(xl.path)[name])


def test_the_old_script_writes_no_modelspec(tmp_path):
    sd = Checkpoint(make_tiny_sd(tmp_path / "model.safetensors"), "sd", merge_lora)
    file = make(sd, tmp_path / "l.safetensors")
    for tool, name in ((merge_lora, "new"), (merge_lora_old, "old")):
        run_tool(tool, sd_model=sd.path, models=file, save_to=tmp_path / f"{name}.safetensors")
    new, old = (load_file(tmp_path / f"{name}.safetensors") for name in ("new", "old"))
    assert all(torch.equal(new[key], old[key]) for key in new)
    assert read_header(tmp_path / "old.safetensors").metadata == {}


def test_errors_are_one_line_before_anything_is_written(tmp_path, xl, capsys):
    sd = Checkpoint(make_tiny_sd(tmp_path / "sd.safetensors"), "sd", merge_lora)
    file, other = make(xl, tmp_path / "xl_lora.safetensors"), make(sd, tmp_path / "sd_lora.safetensors")
    out = tmp_path / "out.safetensors"
    refusal = partial(refusal_of, capsys, out, sdxl_merge_lora)
    assert "--models" in refusal(save_to=out)
    assert "--save_to" in refusal(models=file)
    assert "one of the files that are read" in refusal(models=file, save_to=file)
    assert "this script is for Stable Diffusion XL" in refusal(models=file, sd_model=sd.path, save_to=out)
    assert "no model of Stable Diffusion XL" in refusal(models=other, sd_model=xl.path, save_to=out)
    assert "numbers in brackets" in refusal(models=file, lbws="1,2", save_to=out)
    assert "there are lists of 12, 17, 20, 26" in refusal(models=file, lbws="[1,2]", save_to=out)
    assert "2 lists for 1 files" in refusal(models=file, lbws=["[1]", "[1]"], save_to=out)
    assert "all must be of one length" in refusal(models=[file, file], lbws=[str([1] * 12), str([1] * 17)], save_to=out)
    dora = make(xl, tmp_path / "dora.safetensors", dora="True")
    assert "merge into a model" in refusal(models=[dora, file], save_to=out)
    assert "has no ranks to put side by side" in refusal(models=[dora, file], concat=True, save_to=out)
    refusal = partial(refusal_of, capsys, out, merge_lora)
    assert "only adapters of one kind" in refusal(models=[other, file], save_to=out)
    wide = {
        key: t.repeat(1, 2, *(1,) * (t.dim() - 2)) if "lora_down" in key else t for key, t in load_file(other).items()
    }
    wide = saved(tmp_path / "wide.safetensors", wide)
    assert "made for another model" in refusal(models=wide, sd_model=sd.path, save_to=out)


def test_families_are_found_by_key() -> None:
    assert isinstance(family_named("sd2"), AdapterFamily)
