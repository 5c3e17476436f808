"""networks/flux_merge_lora.py: LoRA files into tiny published models, and with each other."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from library.architectures.flux.adapters import CLIP_L, T5XXL, TRANSFORMER
from library.files.safetensors_io import read_header
from networks import flux_merge_lora as tool
from tests.fixtures.file_tools import refusal as refusal_of
from tests.fixtures.file_tools import run_tool, saved
from tests.fixtures.installed import require_peft
from tests.fixtures.layouts import table
from tests.fixtures.live_tensors import LiveBytes
from tests.fixtures.tiny_flux_files import (
    adapter_names,
    delta,
    diffusers_transformer,
    tiny_lora,
    tiny_shapes,
    tiny_state,
)
from tools import convert_diffusers_to_flux

pytestmark = pytest.mark.usefixtures("own_root_logger")

MODULE = "lora_unet_double_blocks_0_img_attn_qkv"
WEIGHT = "double_blocks.0.img_attn.qkv.weight"


def merge(**options: object) -> None:
    run_tool(tool, **options)


def with_changes(prefix: str, state: dict[str, Tensor], *loras: tuple[dict[str, Tensor], float]) -> dict[str, Tensor]:
    """The model merged by hand."""
    merged = {key: tensor.clone() for key, tensor in state.items()}
    count = 0
    for key in state:
        name = f"{prefix}_{key.removesuffix('.weight').replace('.', '_')}"
        for lora, ratio in loras:
            if f"{name}.lora_up.weight" in lora:
                merged[key] += ratio * delta(lora, name)
                count += 1
    assert count
    return merged


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, atol=1e-6, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize(
    "model, lora, part",
    [
        ("flux1_dev", "lora_flux_clip_l_t5xxl", TRANSFORMER),
        ("flux1_schnell", "lora_flux_unet_only", TRANSFORMER),
        ("chroma1", "lora_chroma", TRANSFORMER),
        ("clip_l", "lora_flux_clip_l_t5xxl", CLIP_L),
        ("t5xxl_encoder", "lora_flux_clip_l_t5xxl", T5XXL),
    ],
)
def test_every_published_adapter_finds_its_weight(model, lora, part):
    shapes, tensors = table(model), table(lora)
    places = part.places(shapes)
    names = {key.partition(".")[0] for key in tensors if key.startswith(part.kohya[0])}
    assert len(names) > 60 and names <= places.keys()
    assert part.usual_places(shapes, convs=True).keys() == names
    for name in names:
        out, width = shapes[places[name].name]
        assert (tensors[f"{name}.lora_up.weight"][0], tensors[f"{name}.lora_down.weight"][1]) == (out, width)


def test_all_models_at_once(tmp_path):
    flux, clip, t5 = tiny_state("flux1_dev"), tiny_state("clip_l", seed=1), tiny_state("t5xxl_encoder", seed=2)
    one = tiny_lora("lora_flux_clip_l_t5xxl", [flux, clip, t5])
    other = tiny_lora("lora_flux_unet_only", [flux], rank=3, alpha=8.0, seed=1)
    assert {key.partition(".")[0] for key in one} == adapter_names("lora_flux_clip_l_t5xxl")
    merge(
        flux_model=saved(tmp_path / "flux.safetensors", flux), save_to=tmp_path / "new.safetensors",
        clip_l=saved(tmp_path / "clip.safetensors", clip), clip_l_save_to=tmp_path / "new_clip.safetensors",
        t5xxl=saved(tmp_path / "t5.safetensors", t5), t5xxl_save_to=tmp_path / "new_t5.safetensors",
        models=[saved(tmp_path / "one.safetensors", one), saved(tmp_path / "other.safetensors", other)],
        ratios=[1.0, -0.5],
    )  # fmt: skip
    both = (one, 1.0), (other, -0.5)
    assert_close(load_file(tmp_path / "new.safetensors"), with_changes("lora_unet", flux, *both))
    assert_close(load_file(tmp_path / "new_clip.safetensors"), with_changes("lora_te1", clip, *both))
    assert_close(load_file(tmp_path / "new_t5.safetensors"), with_changes("lora_te3", t5, *both))
    metadata = read_header(tmp_path / "new.safetensors").metadata
    assert metadata["modelspec.architecture"] == "flux-1-dev"
    assert (metadata["modelspec.title"], metadata["modelspec.merged_from"]) == ("new", "flux, one, other")


@pytest.mark.parametrize("mem_eff", [False, True])
def test_chroma_with_a_prefix_in_bf16(tmp_path, mem_eff, capsys):
    chroma = tiny_state("chroma1", dtype=torch.bfloat16)
    chroma["final_layer.count"] = torch.tensor(3)
    lora = tiny_lora("lora_chroma", [chroma])
    text = {"lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight": torch.zeros(1, 4)}
    text |= {"lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_up.weight": torch.zeros(4, 1)}
    source = saved(tmp_path / "c.safetensors", {f"model.diffusion_model.{k}": t for k, t in chroma.items()})
    options = {"mem_eff_load_save": True} if mem_eff else {}
    merge(
        flux_model=source, save_to=tmp_path / "new.safetensors", save_precision="bf16", no_metadata=True,
        models=saved(tmp_path / "l.safetensors", lora | text), **options,
    )  # fmt: skip
    assert "its 1 modules of the T5-XXL are left out" in capsys.readouterr().err
    merged = load_file(tmp_path / "new.safetensors")
    wide = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in chroma.items()}
    for key, tensor in with_changes("lora_unet", wide, (lora, 1.0)).items():
        expected = tensor.bfloat16() if tensor.is_floating_point() else tensor
        torch.testing.assert_close(merged[f"model.diffusion_model.{key}"], expected, atol=1e-6, rtol=8e-3)
    assert read_header(tmp_path / "new.safetensors").metadata == {}
    # what was not changed is the same bit by bit
    assert torch.equal(merged["model.diffusion_model.img_in.weight"], chroma["img_in.weight"])


def test_from_and_to_fp8(tmp_path):
    flux = tiny_state("flux1_schnell", dtype=torch.float8_e4m3fn)
    flux["img_in.bias"] = torch.full_like(flux["img_in.bias"].float(), 1e4).bfloat16()
    lora = tiny_lora("lora_flux_unet_only", [flux])
    merge(
        flux_model=saved(tmp_path / "f.safetensors", flux), save_to=tmp_path / "new.safetensors", save_precision="fp8",
        models=saved(tmp_path / "l.safetensors", lora), precision="bf16",
    )  # fmt: skip
    merged = load_file(tmp_path / "new.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {torch.float8_e4m3fn}
    expected = flux[WEIGHT].float() + delta(lora, MODULE)
    torch.testing.assert_close(merged[WEIGHT].float(), expected, atol=4e-3, rtol=2**-3)
    assert float(merged["img_in.bias"][0].float()) == 448.0


@pytest.mark.parametrize("precision, size", [("float", 4), ("bf16", 2)])
def test_memory_is_that_of_one_tensor(tmp_path, monkeypatch, precision, size):
    flux = tiny_state("flux1_dev")
    source = saved(tmp_path / "f.safetensors", flux)
    lora = saved(tmp_path / "l.safetensors", tiny_lora("lora_flux_unet_only", [flux], rank=1))
    options = {"flux_model": source, "models": lora, "mem_eff_load_save": True, "save_precision": precision}
    merge(save_to=tmp_path / "whole.safetensors", **options)
    monkeypatch.setattr("networks.files.merge_model._CHUNK", 100)  # three rows of 32
    merged = {key: shape for key, shape in tiny_shapes("flux1_dev").items() if "blocks" in key}
    largest = max(torch.Size(shape).numel() * size for shape in merged.values())
    with LiveBytes() as live:
        merge(save_to=tmp_path / "parts.safetensors", **options)
    assert largest <= live.peak <= 1.2 * largest
    assert_close(load_file(tmp_path / "parts.safetensors"), load_file(tmp_path / "whole.safetensors"))


@pytest.mark.parametrize("axis", [0, 1])
def test_dora_is_merged_as_it_is_defined(tmp_path, axis):
    flux = tiny_state("flux1_dev")
    lora = {key: t for key, t in tiny_lora("lora_flux_unet_only", [flux]).items() if key.startswith(f"{MODULE}.")}
    base = flux[WEIGHT]
    scale = torch.linspace(0.5, 2.0, base.shape[1 - axis]).unsqueeze(axis)
    lora[f"{MODULE}.dora_scale"] = scale
    merge(
        flux_model=saved(tmp_path / "f.safetensors", flux), save_to=tmp_path / "new.safetensors",
        models=saved(tmp_path / "l.safetensors", lora), ratios=0.5,
    )  # fmt: skip
    direction = base + delta(lora, MODULE)
    goal = scale * direction / direction.norm(dim=axis, keepdim=True)
    torch.testing.assert_close(load_file(tmp_path / "new.safetensors")[WEIGHT], base + 0.5 * (goal - base))


def test_whole_differences_of_weights_and_biases(tmp_path):
    """ComfyUI extracts them; the model has the names of one of its files, with everything in it."""
    flux = tiny_state("flux1_dev")
    module, bias = WEIGHT.removesuffix(".weight"), "img_in.bias"
    lora = {
        f"diffusion_model.{module}.lora_down.weight": torch.ones(2, 32),
        f"diffusion_model.{module}.lora_up.weight": torch.ones(96, 2),
        "diffusion_model.img_in.diff_b": torch.arange(32.0),
        "diffusion_model.txt_in.diff": torch.ones_like(flux["txt_in.weight"]),
    }
    prefix = "model.diffusion_model."
    bundle = {f"{prefix}{key}": tensor for key, tensor in flux.items()}
    bundle |= {f"text_encoders.t5xxl.transformer.{k}": t for k, t in tiny_state("t5xxl_encoder").items()}
    bundle["text_encoders.t5xxl.transformer.scaled_fp8"] = torch.zeros(2)  # of the other model
    clip, norm = tiny_state("clip_l"), "text_model.encoder.layers.1.layer_norm1"
    lora |= {f"text_encoders.clip_l.transformer.{norm}.{kind}": torch.ones(32) for kind in ("diff", "diff_b")}
    merge(
        flux_model=saved(tmp_path / "f.safetensors", bundle), save_to=tmp_path / "new.safetensors", ratios=0.5,
        clip_l=saved(tmp_path / "c.safetensors", clip), clip_l_save_to=tmp_path / "new_clip.safetensors",
        models=saved(tmp_path / "l.safetensors", lora),
    )  # fmt: skip
    changed = {f"{norm}.{leaf}": clip[f"{norm}.{leaf}"] + 0.5 for leaf in ("weight", "bias")}
    assert_close(load_file(tmp_path / "new_clip.safetensors"), clip | changed)
    found = load_file(tmp_path / "new.safetensors")
    changed = {WEIGHT: flux[WEIGHT] + 1, bias: flux[bias] + torch.arange(32.0) / 2}
    changed["txt_in.weight"] = flux["txt_in.weight"] + 0.5
    assert_close(found, bundle | {f"{prefix}{key}": tensor for key, tensor in changed.items()})


@pytest.mark.parametrize("model_name", ["flux1_dev", "chroma1"])
def test_diffusers_names_against_peft(tmp_path, model_name):
    """PEFT merges into diffusers' model; the result, converted, equals the file merged in the published layout."""
    require_peft()
    from peft import LoraConfig, get_peft_model_state_dict

    model = diffusers_transformer(model_name)
    model.save_pretrained(tmp_path / "base")
    ends = ["to_q", "to_k", "add_v_proj", "to_out.0", "proj_mlp", "proj_out", "ff.net.0.proj", "norm_out.linear"]
    ends += ["norm1.linear", "context_embedder"]
    targets = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n.endswith(tuple(ends))]
    assert any("single_transformer_blocks.1.proj_mlp" in name for name in targets)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, rank_pattern={".*to_k": 2}, init_lora_weights=False)
    model.add_adapter(config)
    weights = {f"transformer.{key}": t.clone() for key, t in get_peft_model_state_dict(model).items()}
    modules = [key.removesuffix(".lora_A.weight") for key in weights if key.endswith(".lora_A.weight")]
    alphas = {f"{module}.alpha": torch.tensor(8.0) for module in modules}
    if model_name == "flux1_dev":  # alphas as AI-toolkit writes them, else as diffusers does
        file = saved(tmp_path / "l.safetensors", weights | alphas)
    else:
        metadata = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 8})}
        file = saved(tmp_path / "l.safetensors", weights, metadata)
    model.fuse_lora(lora_scale=0.5)
    model.unload_lora()
    model.save_pretrained(tmp_path / "fused")

    merge(
        flux_model=tmp_path / "base", save_to=tmp_path / "new.safetensors", ratios=0.5, diffusers=True, models=file,
    )  # fmt: skip
    arguments = ["--diffusers_path", str(tmp_path / "fused"), "--save_to", str(tmp_path / "expected.safetensors")]
    convert_diffusers_to_flux.main(convert_diffusers_to_flux.setup_parser().parse_args(arguments))
    expected = load_file(tmp_path / "expected.safetensors")
    assert_close(load_file(tmp_path / "new.safetensors"), expected)
    # the same with underscores, and as a published LoRA of its own
    renamed = {}
    for key, tensor in (weights | alphas).items():
        module = key.removesuffix(".lora_A.weight").removesuffix(".lora_B.weight").removesuffix(".alpha")
        leaf = key[len(module) :].replace("lora_A", "lora_down").replace("lora_B", "lora_up")
        renamed[f"lora_{module.replace('.', '_')}{leaf}"] = tensor
    merge(models=saved(tmp_path / "u.safetensors", renamed), save_to=tmp_path / "p.safetensors")
    published = load_file(tmp_path / "p.safetensors")
    assert all(key.startswith(("lora_unet_double_", "lora_unet_single_", "lora_unet_txt_in.", "lora_unet_final_layer"))
               for key in published)  # fmt: skip
    merge(
        flux_model=tmp_path / "base", save_to=tmp_path / "new.safetensors", ratios=0.5,
        models=tmp_path / "p.safetensors",
    )  # fmt: skip
    assert_close(load_file(tmp_path / "new.safetensors"), expected)


def test_parts_that_share_a_down_keep_their_rank(tmp_path):
    flux = tiny_state("flux1_dev")
    lora = tiny_lora("lora_flux_unet_only", [flux])
    down, ups = lora[f"{MODULE}.lora_down.weight"], lora[f"{MODULE}.lora_up.weight"].chunk(3)
    split = {}
    for part, up in zip(("to_q", "to_k", "to_v"), ups, strict=True):
        split[f"transformer.transformer_blocks.0.attn.{part}.lora_A.weight"] = down.clone()
        split[f"transformer.transformer_blocks.0.attn.{part}.lora_B.weight"] = up.clone()
    merge(models=saved(tmp_path / "l.safetensors", split), save_to=tmp_path / "new.safetensors")
    found = load_file(tmp_path / "new.safetensors")
    assert torch.equal(found[f"{MODULE}.lora_down.weight"], down)
    assert torch.equal(found[f"{MODULE}.lora_up.weight"], lora[f"{MODULE}.lora_up.weight"])


# ---- with each other ----


@pytest.fixture
def pair(tmp_path):
    flux = tiny_state("flux1_dev")
    loras = [tiny_lora("lora_flux_unet_only", [flux], alpha=2.0 * (n + 1), seed=n) for n in range(2)]
    notes = {"ss_base_model_version": "flux1"}
    return loras, [saved(tmp_path / f"{n}.safetensors", lora, notes) for n, lora in enumerate(loras)]


def test_concat_is_the_exact_sum(tmp_path, pair):
    (one, other), files = pair
    third = tiny_lora("lora_flux_unet_only", [tiny_state("flux1_dev")], rank=2, seed=5)
    only_here = {key: t for key, t in third.items() if key.startswith(f"{MODULE}.")}
    files.append(saved(tmp_path / "3.safetensors", only_here))
    merge(models=files, ratios=[0.7, -0.4, 2.0], concat=True, save_to=tmp_path / "new.safetensors")
    merged = load_file(tmp_path / "new.safetensors")
    assert merged.keys() == one.keys()
    for name in {key.partition(".")[0] for key in one}:
        expected = 0.7 * delta(one, name) - 0.4 * delta(other, name)
        if name == MODULE:
            expected += 2.0 * delta(third, name)
        torch.testing.assert_close(delta(merged, name), expected, atol=1e-6, rtol=1e-5)
    metadata = read_header(tmp_path / "new.safetensors").metadata
    assert metadata["modelspec.merged_from"] == "0, 1, 3" and len(metadata["sshs_model_hash"]) == 64
    assert metadata["ss_network_module"] == "networks.lora_flux" and metadata["ss_base_model_version"] == "flux1"
    assert metadata["ss_network_dim"] == "Dynamic"
    assert metadata["modelspec.architecture"] == "flux-1-dev/lora"


def test_without_concat_the_result_is_the_nearest_of_the_same_rank(tmp_path, pair, capsys):
    """The nearest is found by decomposing the sum, in float64."""
    (one, other), files = pair
    merge(models=files, ratios=[1.0, 0.5], save_to=tmp_path / "new.safetensors", no_metadata=True)
    assert "largest error of the ranks" in " ".join(capsys.readouterr().err.split())
    merged = load_file(tmp_path / "new.safetensors")
    assert merged.keys() == one.keys()
    for name in {key.partition(".")[0] for key in one}:
        whole = (delta(one, name) + 0.5 * delta(other, name)).double()
        left, values, right = torch.linalg.svd(whole, full_matrices=False)
        expected = left[:, :4] * values[:4] @ right[:4]
        torch.testing.assert_close(delta(merged, name).double(), expected, atol=1e-6, rtol=1e-5)
    metadata = read_header(tmp_path / "new.safetensors").metadata
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "4.0")
    assert not any(key.startswith("modelspec.") for key in metadata)

    for ratio in (0.5, -2.0):  # one file alone comes out at its ratio, with its rank and alpha
        merge(models=files[0], ratios=ratio, save_to=tmp_path / "new.safetensors")
        alone = load_file(tmp_path / "new.safetensors")
        torch.testing.assert_close(delta(alone, MODULE), ratio * delta(one, MODULE))
        assert float(alone[f"{MODULE}.alpha"]) == 2.0


def test_ranks_and_alphas_that_differ_are_right(tmp_path, pair):
    (one, _), files = pair
    wide = tiny_lora("lora_flux_unet_only", [tiny_state("flux1_dev")], rank=8, alpha=1.0, seed=5)
    saved(tmp_path / "wide.safetensors", wide)
    merge(models=[files[0], tmp_path / "wide.safetensors"], save_to=tmp_path / "new.safetensors")
    merged = load_file(tmp_path / "new.safetensors")
    whole = (delta(one, MODULE) + delta(wide, MODULE)).double()
    left, values, right = torch.linalg.svd(whole, full_matrices=False)
    found = delta(merged, MODULE).double()
    torch.testing.assert_close(found, left[:, :8] * values[:8] @ right[:8], atol=1e-6, rtol=1e-5)


def test_shuffle_changes_nothing(tmp_path, pair, capsys):
    _, files = pair
    merge(models=files, shuffle=True, save_to=tmp_path / "a.safetensors")
    assert "--shuffle changes nothing" in capsys.readouterr().err
    merge(models=files, save_to=tmp_path / "b.safetensors")
    first, again = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_errors_are_one_line_before_anything_is_written(tmp_path, pair, capsys):
    loras, files = pair
    flux = saved(tmp_path / "flux.safetensors", tiny_state("flux1_dev"))
    chroma = saved(tmp_path / "chroma.safetensors", tiny_state("chroma1"))
    clip = saved(tmp_path / "clip.safetensors", tiny_state("clip_l"))
    out = tmp_path / "out.safetensors"

    refusal = partial(refusal_of, capsys, out, tool)

    def lora(name: str, state: dict[str, Tensor]) -> Path:
        return saved(tmp_path / f"{name}.safetensors", state)

    assert "--models" in refusal(save_to=out)
    assert "--ratios 1.0 nan: must be finite" in refusal(models=files, ratios=[1, "nan"], save_to=out)
    assert "3 numbers for 2 files" in refusal(models=files, ratios=[1, 2, 3], save_to=out)
    assert "--save_to: say where" in refusal(models=files, flux_model=flux)
    assert "no --clip_l" in refusal(models=files, save_to=out, clip_l_save_to=tmp_path / "c.safetensors")
    assert "one of the files that are read" in refusal(models=files, save_to=files[0])
    assert "none of the LoRA files" in refusal(models=files, clip_l=clip, clip_l_save_to=out)
    assert "_mod_lin has no place in" in refusal(models=files, flux_model=chroma, save_to=out)
    assert "not a FLUX.1 or Chroma" in refusal(models=files, flux_model=clip, save_to=out)
    assert "fp8" in refusal(models=files, save_to=out, save_precision="fp8")  # a LoRA in fp8 is of no use
    assert "no such device" in refusal(models=files, save_to=out, working_device="cuda:77")
    assert "no such device" in refusal(models=files, save_to=out, working_device="meta")  # holds no numbers
    assert "published names" in refusal(models=files, save_to=out, diffusers=True)
    assert "no such file" in refusal(models=tmp_path / "none.safetensors", save_to=out)
    wide = {key: t.repeat(1, 2) if key.endswith("down.weight") else t for key, t in loras[0].items()}
    assert "made for another model" in refusal(models=lora("wide", wide), flux_model=flux, save_to=out)
    sick = {**loras[0], f"{MODULE}.lora_up.weight": torch.full((96, 4), float("nan"))}
    assert "holds NaN or infinity" in refusal(models=lora("sick", sick), flux_model=flux, save_to=out)
    half = {key: t for key, t in loras[0].items() if key != f"{MODULE}.lora_up.weight"}
    assert f"{MODULE}.lora_up.weight is missing" in refusal(models=lora("half", half), flux_model=flux, save_to=out)
    loha = {f"{MODULE}.hada_w1_a": torch.zeros(2, 2)}
    assert "fit no weight of [96, 32]" in refusal(models=lora("loha", loha), flux_model=flux, save_to=out)
    lokr = {f"{MODULE}.lokr_w1": torch.zeros(4, 4), f"{MODULE}.lokr_w2": torch.zeros(24, 8)}
    assert "a LoKr" in (line := refusal(models=lora("lokr", lokr), save_to=out)) and "--new_rank" in line
    more = {**loras[0], "lora_unet_img_in.count": torch.zeros(32)}
    assert ".count: unknown kind of tensor" in refusal(models=lora("more", more), flux_model=flux, save_to=out)
    twice = {**loras[0], "lora_unet_transformer_blocks_0_attn_to_q.lora_down.weight": torch.zeros(4, 32)}
    twice["lora_unet_transformer_blocks_0_attn_to_q.lora_up.weight"] = torch.zeros(32, 4)
    assert "are the same module" in refusal(models=lora("twice", twice), flux_model=flux, save_to=out)
    whole = {f"{MODULE}.diff": torch.zeros(96, 32), f"{MODULE}.diff_b": torch.zeros(7)}
    assert "qkv.bias of [7]" in refusal(models=lora("whole", whole), flux_model=flux, save_to=out)
    assert "merge into a model" in refusal(models=lora("whole", whole), save_to=out)
    dora = {**loras[0], f"{MODULE}.dora_scale": torch.ones(1, 32)}
    assert "DoRA" in refusal(models=lora("dora", dora), save_to=out)
    other = {key.replace("unet_double_blocks", "unet_input_blocks"): t for key, t in loras[0].items()}
    assert "no module of FLUX.1 or Chroma" in refusal(models=lora("sdxl", other), flux_model=flux, save_to=out)
    scaled = {**tiny_state("flux1_dev"), "scaled_fp8": torch.zeros(2)}
    assert "quantised with scales" in refusal(models=files, flux_model=lora("scaled", scaled), save_to=out)
