"""networks/convert_lora.py: names of every family, strengths, joint modules, refusals, the command line."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.errors import UserError
from networks import convert_flux_lora, convert_lora
from networks.files import convert as conversion
from networks.files.convert import AlreadyConverted, convert
from networks.files.families import detect_family, family_named
from tests.fixtures.file_tools import ROOT, saved
from tests.fixtures.layouts import table
from tests.fixtures.runs import metadata_of

#: table -> (family, title)
TABLES = {
    "lora_sd15_conv": ("sd", "Stable Diffusion 1.x"),
    "lora_sd21_conv": ("sd2", "Stable Diffusion 2.x"),
    "lora_sdxl_conv": ("sdxl", "Stable Diffusion XL"),
    "lora_flux_clip_l_t5xxl": ("flux", "FLUX.1"),
    "lora_flux_in_dims": ("flux", "FLUX.1"),
    "lora_flux_split_qkv": ("flux", "FLUX.1"),
    "lora_chroma_t5xxl": ("flux", "FLUX.1 or Chroma"),
    "lora_sd3_medium_clip_lg_t5xxl": ("sd3", "Stable Diffusion 3"),
    "lora_sd35_medium_clip_lg": ("sd3", "Stable Diffusion 3"),
    "lora_lumina_embedder_dims": ("lumina", "Lumina-Image 2.0"),
    "lora_lumina_gemma2": ("lumina", "Lumina-Image 2.0"),
    "lora_hunyuan_image": ("hunyuan_image", "HunyuanImage-2.1"),
    "lora_hunyuan_image_split_qkv": ("hunyuan_image", "HunyuanImage-2.1"),
}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def some_modules(name: str, *, divisor: int = 32, alpha: float = 2.0) -> dict[str, Tensor]:
    """Random tensors for one module of each kind in a table, of smaller widths."""
    shapes = table(name)
    kinds = {re.sub(r"(?<!te)\d+", "#", key.partition(".")[0]) + key[-8:-7]: key.partition(".")[0] for key in shapes}
    chosen = set(kinds.values())
    tensors = {}
    for seed, (key, shape) in enumerate(shapes.items()):
        if key.partition(".")[0] in chosen:
            small = [size // divisor if size >= divisor else size for size in shape]
            tensors[key] = torch.tensor(alpha) if not shape else random(*small, seed=seed)
    return tensors


def assert_same(file: Path, tensors: dict[str, Tensor]) -> None:
    found = load_file(file)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def linear(down: Tensor, up: Tensor, alpha: float | None) -> dict[str, Tensor]:
    tensors = {"lora_down.weight": down, "lora_up.weight": up}
    return tensors if alpha is None else {**tensors, "alpha": torch.tensor(alpha)}


def named(module: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{module}.{name}": tensor for name, tensor in tensors.items()}


# ---- names ----


@pytest.mark.parametrize("name", TABLES)
def test_families_are_recognised_from_published_names(name):
    assert detect_family(table(name), {}, "file").title == TABLES[name][1]


@pytest.mark.parametrize(
    ("width", "title"), [(1536, "Stable Diffusion 3"), (2432, "Stable Diffusion 3"), (3072, "FLUX.1 or Chroma")]
)
@pytest.mark.parametrize("layer", ["attn.add_q_proj", "attn.to_q", "ff.net.2"])
@pytest.mark.parametrize("program", ["transformer.{}.lora_A.weight", "lora_transformer_{}.lora_down.weight"])
def test_widths_tell_transformers_with_diffusers_names_apart(width, title, layer, program):
    """Without metadata, and without a layer that only one of them has."""
    path = f"transformer_blocks.7.{layer}"
    name = program.format(path if "lora_A" in program else path.replace(".", "_"))
    shapes = {name: (4, width * 4 if layer == "ff.net.2" else width)}
    assert detect_family(shapes, {}, "file").title == title


def blocks(double: int, single: int, leaf: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """A layer of every block by the names that FLUX.1 and others share."""
    names = [f"double_blocks_{n}_img_attn_proj" for n in range(double)] + [
        f"single_blocks_{n}_linear2" for n in range(single)
    ]
    return {f"lora_unet_{name}.{leaf}": shape for name in names}


@pytest.mark.parametrize(
    ("shapes", "title"),
    [
        ({"lora_unet_double_blocks_3_img_mlp_0.lora_down.weight": (4, 3584)}, "HunyuanImage-2.1"),
        ({"lora_unet_double_blocks_3_img_mlp_0.lora_down.weight": (4, 3072)}, "FLUX.1 or Chroma"),
        ({"lora_unet_single_blocks_3_linear2.lora_down.weight": (4, 17920)}, "HunyuanImage-2.1"),
        ({"diffusion_model.double_blocks.0.img_mod.lin.lora_A.weight": (4, 3584)}, "HunyuanImage-2.1"),
        ({"diffusion_model.double_blocks.0.img_mod.lin.lora_A.weight": (4, 3072)}, "FLUX.1"),
        ({"transformer.single_transformer_blocks.0.proj_out.lora_A.weight": (4, 17920)}, "HunyuanImage-2.1"),
        ({"transformer.single_transformer_blocks.0.norm.linear.lora_A.weight": (4, 3072)}, "FLUX.1"),
        (blocks(20, 40, "lokr_w1", (8, 8)), "HunyuanImage-2.1"),
        (blocks(19, 38, "lokr_w1", (8, 8)), "FLUX.1 or Chroma"),
        ({f"lora_unet_transformer_blocks_{n}_attn_to_q.lokr_w1": (8, 8) for n in range(24)}, "Stable Diffusion 3"),
    ],
)
def test_widths_and_numbers_of_blocks_tell_models_with_the_same_names_apart(shapes, title):
    assert detect_family(shapes, {}, "file").title == title


def test_a_video_model_with_the_names_of_an_image_model():
    with pytest.raises(UserError, match="made for HunyuanVideo, whose names are not known yet"):
        detect_family(blocks(20, 40, "lora_down.weight", (4, 3072)), {}, "file")


@pytest.mark.parametrize(
    ("name", "to"),
    [
        (name, to)
        for name, (family, _) in TABLES.items()
        for to in ("diffusers", "peft", "comfyui")
        if to not in family_named(family).unwritten
    ],
)
def test_there_and_back_gives_the_same_bytes(tmp_path, name, to):
    alpha = 6.0 if name.endswith("split_qkv") else 2.0  # a power of two times the rank of the joint modules
    tensors = some_modules(name, alpha=alpha)
    source = saved(tmp_path / "a.safetensors", tensors, {"ss_tag": "kept", "sshs_model_hash": "wrong"})
    family = TABLES[name][0]
    there = tmp_path / ("there" if to == "peft" else "there.safetensors")
    report = convert(source, there, to, family=family)
    assert report.difference.absolute == 0 and report.difference.modules >= len(tensors) // 3
    back = tmp_path / "back.safetensors"
    assert convert(there, back, "kohya", family=family).difference.absolute == 0
    if name.endswith("split_qkv"):  # 6 / 4 is no power of two
        found = load_file(back)
        assert found.keys() == tensors.keys()
        assert all(torch.allclose(found[key], tensor, rtol=1e-6) for key, tensor in tensors.items())
        return
    assert_same(back, tensors)
    metadata = metadata_of(back)
    assert metadata.keys() == {"ss_tag", "sshs_model_hash", "sshs_legacy_hash"} and metadata["ss_tag"] == "kept"
    data = back.read_bytes()
    assert metadata["sshs_model_hash"] == hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()


@pytest.mark.parametrize(
    ("name", "checkpoint", "prefix"),
    [
        ("lora_sd15_conv", "sd15_checkpoint", "model."),
        ("lora_sd21_conv", "sd21_checkpoint", "model."),
        ("lora_sdxl_conv", "sdxl_base_checkpoint", "model."),
        ("lora_flux_in_dims", "flux1_dev", ""),
        ("lora_chroma_t5xxl", "chroma1", ""),
    ],
)
def test_comfyui_names_are_those_of_the_checkpoint(tmp_path, name, checkpoint, prefix):
    source = saved(tmp_path / "a.safetensors", some_modules(name))
    convert(source, tmp_path / "b.safetensors", "comfyui", family=TABLES[name][0])
    keys = load_file(tmp_path / "b.safetensors")
    modules = {key.removesuffix(".lora_up.weight") for key in keys if key.endswith(".lora_up.weight")}
    denoiser = {prefix + m if prefix else m.removeprefix("diffusion_model.") for m in modules if m[0] == "d"}
    assert denoiser and {f"{module}.weight" for module in denoiser} <= table(checkpoint).keys()
    encoders = {module.split(".")[1] for module in modules if module.startswith("text_encoders.")}
    expected = {"sd15": {"clip_l"}, "sd21": {"clip_h"}, "sdxl": {"clip_l", "clip_g"}, "chroma": {"t5xxl"}}
    assert encoders == expected.get(name.split("_")[1], set())


def test_names_that_comfyui_would_not_read_are_refused(tmp_path):
    source = saved(tmp_path / "a.safetensors", some_modules("lora_hunyuan_image"))
    with pytest.raises(UserError, match="use networks/convert_hunyuan_image_lora_to_comfy.py"):
        convert(source, tmp_path / "b.safetensors", "comfyui")
    assert not (tmp_path / "b.safetensors").exists()


def test_old_spellings_are_read(tmp_path):
    q, fc1 = linear(random(2, 8), random(8, 2, seed=1), None), linear(random(2, 4), random(6, 2, seed=1), None)
    old = {
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight": q["lora_down.weight"],
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.up.weight": q["lora_up.weight"],
        "text_encoder.encoder.layers.0.mlp.fc1.lora_linear_layer.down.weight": fc1["lora_down.weight"],
        "text_encoder.encoder.layers.0.mlp.fc1.lora_linear_layer.up.weight": fc1["lora_up.weight"],
    }
    convert(saved(tmp_path / "a.safetensors", old), tmp_path / "b.safetensors", "kohya", family="sd")
    alpha = torch.tensor(2.0)
    assert_same(
        tmp_path / "b.safetensors",
        {
            **named("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q", {**q, "alpha": alpha}),
            **named("lora_te_text_model_encoder_layers_0_mlp_fc1", {**fc1, "alpha": alpha}),
        },
    )


def test_published_names_with_diffusers_paths_become_the_usual_ones(tmp_path):
    tensors = linear(random(2, 8), random(8, 2, seed=1), 2.0)
    given = {
        **named("lora_unet_down_blocks_1_attentions_0_proj_in", tensors),
        **named("lora_te1_text_model_encoder_layers_0_mlp_fc1", {n: t.clone() for n, t in tensors.items()}),
    }
    convert(saved(tmp_path / "a.safetensors", given), tmp_path / "b.safetensors", "kohya")
    renamed = {name.replace("down_blocks_1_attentions_0", "input_blocks_4_1"): t for name, t in given.items()}
    assert_same(tmp_path / "b.safetensors", renamed)


def test_files_of_onetrainer_become_the_usual_ones(tmp_path):
    """Diffusers' paths below ``lora_transformer``, and T5 as the second encoder."""
    one, other = (linear(random(2, 8, seed=seed), random(8, 2), 2.0) for seed in range(2))
    q = "encoder_block_0_layer_0_SelfAttention_q"
    given = {
        **named("lora_transformer_transformer_blocks_3_attn_to_out_0", one),
        **named(f"lora_te2_{q}", other),
    }
    convert(saved(tmp_path / "a.safetensors", given), tmp_path / "b.safetensors", "kohya")
    expected = {**named("lora_unet_double_blocks_3_img_attn_proj", one), **named(f"lora_te3_{q}", other)}
    assert_same(tmp_path / "b.safetensors", expected)


@pytest.mark.parametrize("level", ["", "transformer."])
def test_one_file_of_peft_is_read(tmp_path, level):
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 2, "use_rslora": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    module = f"base_model.model.{level}transformer_blocks.0.attn.to_out.0"
    tensors = {f"{module}.lora_A.weight": random(4, 8), f"{module}.lora_B.weight": random(8, 4)}
    convert(saved(tmp_path / "adapter_model.safetensors", tensors), tmp_path / "b.safetensors", "kohya")
    expected = linear(random(4, 8), random(8, 4), 4.0)  # alpha / sqrt(rank) is 1
    assert_same(tmp_path / "b.safetensors", named("lora_unet_double_blocks_0_img_attn_proj", expected))


# ---- strengths ----

TO_Q = "transformer_blocks.0.attn1.to_q"
SD_Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
SD_Q_DIFFUSERS = f"unet.down_blocks.0.attentions.0.{TO_Q}"


@pytest.mark.parametrize(
    ("alpha", "dtype", "up_dtype", "size"),
    [
        (2.0, torch.bfloat16, torch.bfloat16, 1.0),  # a half: exact
        (3.0, torch.bfloat16, torch.float32, 1.0),  # three quarters are one bit too many
        (3.0, torch.float32, torch.float32, 1.0),  # comes back within a rounding
        (4.0, torch.float16, torch.float16, 1.0),
        (2**-3, torch.float16, torch.float16, 1e-4),  # into down: up would fall below float16's smallest numbers
    ],
)
def test_strengths_go_into_the_weights_and_come_back(tmp_path, alpha, dtype, up_dtype, size):
    down, up = random(4, 16, dtype=dtype), (random(16, 4, seed=1) * size).to(dtype)
    tensors = named(SD_Q, linear(down, up, alpha))
    tensors[f"{SD_Q}.alpha"] = tensors[f"{SD_Q}.alpha"].to(dtype)
    report = convert(saved(tmp_path / "a.safetensors", tensors), tmp_path / "b.safetensors", "diffusers")
    written = load_file(tmp_path / "b.safetensors")
    up_there, down_there = (written[f"{SD_Q_DIFFUSERS}.lora_{x}.weight"] for x in "BA")
    assert up_there.dtype == up_dtype and down_there.dtype == dtype
    rounding = 1e-6 if dtype == torch.float32 else 0.0
    expected = up.double() @ down.double() * (alpha / 4)
    torch.testing.assert_close(up_there.double() @ down_there.double(), expected, rtol=rounding, atol=rounding)
    assert report.widened == (up_dtype != dtype) and ("float32" in " ".join(report.lines())) == report.widened
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "kohya")
    if dtype != torch.float32:
        assert_same(tmp_path / "c.safetensors", tensors)
    again = load_file(tmp_path / "c.safetensors")
    assert all(torch.allclose(again[name], tensor, rtol=1e-6, atol=0) for name, tensor in tensors.items())


def test_alphas_in_the_metadata_of_diffusers_count_once(tmp_path):
    config = {"unet.lora_alpha": 8, "unet.r": 4, "unet.alpha_pattern": {}}
    tensors = {f"{SD_Q_DIFFUSERS}.lora_A.weight": random(4, 8), f"{SD_Q_DIFFUSERS}.lora_B.weight": random(8, 4)}
    source = saved(tmp_path / "a.safetensors", tensors, {"lora_adapter_metadata": json.dumps(config), "own": "kept"})
    convert(source, tmp_path / "b.safetensors", "kohya")
    assert float(load_file(tmp_path / "b.safetensors")[f"{SD_Q}.alpha"]) == 8
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "diffusers")
    assert torch.equal(load_file(tmp_path / "c.safetensors")[f"{SD_Q_DIFFUSERS}.lora_B.weight"], random(8, 4) * 2)
    metadata = metadata_of(tmp_path / "c.safetensors")
    assert "lora_adapter_metadata" not in metadata and metadata["own"] == "kept"


@pytest.mark.parametrize(
    "metadata", ["nonsense", "[1]", '{"unet.lora_alpha": "x"}', '{"unet.lora_alpha": 1, "unet.alpha_pattern": 3}']
)
def test_alphas_that_cannot_be_understood_are_an_error(tmp_path, metadata):
    tensors = {f"{SD_Q_DIFFUSERS}.lora_A.weight": random(4, 8), f"{SD_Q_DIFFUSERS}.lora_B.weight": random(8, 4)}
    source = saved(tmp_path / "a.safetensors", tensors, {"lora_adapter_metadata": metadata})
    with pytest.raises(UserError, match=r"a\.safetensors: its metadata lora_adapter_metadata"):
        convert(source, tmp_path / "b.safetensors", "kohya")


@pytest.mark.parametrize("record", ["[1]", '{"all": 5, "modules": {}}', '{"all": {"alpha": "x"}, "modules": {}}'])
def test_a_record_that_cannot_be_understood_is_none(tmp_path, record):
    tensors = {f"{SD_Q_DIFFUSERS}.lora_A.weight": random(4, 8), f"{SD_Q_DIFFUSERS}.lora_B.weight": random(8, 4)}
    source = saved(tmp_path / "a.safetensors", tensors, {"convert_lora_alphas": record})
    convert(source, tmp_path / "b.safetensors", "kohya")
    assert float(load_file(tmp_path / "b.safetensors")[f"{SD_Q}.alpha"]) == 4


def test_pickled_files_are_read(tmp_path):
    shared = random(8, 8)
    tensors = named(SD_Q, linear(shared[:4], shared[:, 4:], 4.0))
    torch.save(tensors, tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "b.safetensors", "comfyui")
    convert(tmp_path / "a.pt", tmp_path / "d.safetensors", "diffusers")
    for there in ("b", "d"):
        convert(tmp_path / f"{there}.safetensors", tmp_path / "c.safetensors", "kohya")
        assert_same(tmp_path / "c.safetensors", tensors)


def test_save_precision_casts_everything(tmp_path):
    source = saved(tmp_path / "a.safetensors", named(SD_Q, linear(random(4, 8), random(8, 4, seed=1), 3.0)))
    report = convert(source, tmp_path / "b.safetensors", "comfyui", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "b.safetensors").values()} == {torch.bfloat16}
    assert 1e-4 < report.difference.relative < 1e-2


def test_a_cast_that_loses_too_much_is_not_written(tmp_path):
    weights = linear(random(4, 8) * 1e-6, random(8, 4, seed=1) * 1e-6, 4.0)
    source = saved(tmp_path / "a.safetensors", named(SD_Q, weights))
    with pytest.raises(UserError, match="not written: the weight deltas of .* differ .*use float or bf16"):
        convert(source, tmp_path / "b.safetensors", "diffusers", dtype=torch.float16)
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_fault_in_what_was_written_is_found(tmp_path, monkeypatch):
    source = saved(tmp_path / "a.safetensors", some_modules("lora_flux_in_dims"))
    right = conversion.save_tensors

    def wrong(file, tensors, metadata):
        key = next(key for key in tensors if key.endswith("to_k.lora_B.weight"))
        changed = tensors[key].clone()
        changed[-1, -1] += 0.01
        right(file, {**tensors, key: changed}, metadata)

    monkeypatch.setattr(conversion, "save_tensors", wrong)
    with pytest.raises(UserError, match=r"not written: the weight deltas of .*_qkv differ by 0\.0"):
        convert(source, tmp_path / "b.safetensors", "diffusers")
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


# ---- joint modules ----

QKV = "lora_unet_double_blocks_3_img_attn_qkv"
LINEAR1 = "lora_unet_single_blocks_0_linear1"


def block(name: str) -> str:
    return f"transformer.transformer_blocks.3.attn.{name}"


def test_a_joint_module_shares_its_down_weight(tmp_path):
    down, up = random(4, 8), random(8 * 3 + 32, 4, seed=1)
    convert(
        saved(tmp_path / "a.safetensors", named(LINEAR1, linear(down, up, 4.0))),
        tmp_path / "b.safetensors",
        "diffusers",
    )
    written = load_file(tmp_path / "b.safetensors")
    single = "transformer.single_transformer_blocks.0"
    for module, rows in (
        ("attn.to_q", up[:8]),
        ("attn.to_k", up[8:16]),
        ("attn.to_v", up[16:24]),
        ("proj_mlp", up[24:]),
    ):
        assert torch.equal(written.pop(f"{single}.{module}.lora_A.weight"), down)
        assert torch.equal(written.pop(f"{single}.{module}.lora_B.weight"), rows)
    assert not written


@pytest.mark.parametrize("ranks", [(4, 4, 4), (1, 4, 2), (0, 3, 3)], ids=str)
def test_block_sparse_weights_become_small_ranks_again(tmp_path, ranks):
    ups = [random(8, rank, seed=i) for i, rank in enumerate(ranks)]
    tensors = named(QKV, linear(random(sum(ranks), 8), torch.block_diag(*ups), sum(ranks) / 2))
    convert(saved(tmp_path / "a.safetensors", tensors), tmp_path / "b.safetensors", "diffusers")
    written = load_file(tmp_path / "b.safetensors")
    found = [written.get(f"{block(name)}.lora_B.weight") for name in ("to_q", "to_k", "to_v")]
    assert [0 if up is None else up.shape[1] for up in found] == list(ranks)
    assert all(up is None or torch.equal(up, given / 2) for up, given in zip(found, ups, strict=True))
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "kohya")
    if 0 not in ranks:
        assert_same(tmp_path / "c.safetensors", tensors)


def test_parts_with_ranks_and_strengths_of_their_own_are_joined(tmp_path):
    config = {"transformer.lora_alpha": 2, "transformer.alpha_pattern": {"transformer_blocks.3.attn.to_v": 9}}
    parts = {"to_q": (random(2, 8), random(8, 2)), "to_v": (random(3, 8, seed=1), random(8, 3, seed=1))}
    tensors = {}
    for name, (down, up) in parts.items():
        tensors |= {f"{block(name)}.lora_A.weight": down, f"{block(name)}.lora_B.weight": up}
    source = saved(tmp_path / "a.safetensors", tensors, {"lora_adapter_metadata": json.dumps(config)})
    convert(source, tmp_path / "b.safetensors", "kohya")
    joint = load_file(tmp_path / "b.safetensors")
    down, up, alpha = (joint[f"{QKV}.{name}"] for name in ("lora_down.weight", "lora_up.weight", "alpha"))
    delta = up @ down * (float(alpha) / len(down))
    (q_down, q_up), (v_down, v_up) = parts["to_q"], parts["to_v"]
    torch.testing.assert_close(delta, torch.cat([q_up @ q_down, torch.zeros(8, 8), v_up @ v_down * 3]))


def test_equal_down_weights_are_shared_again(tmp_path):
    down, ups = random(4, 8), [random(8, 4, seed=i) for i in range(3)]
    tensors = {}
    for name, up in zip(("add_q_proj", "add_k_proj", "add_v_proj"), ups, strict=True):
        tensors |= {f"{block(name)}.lora_A.weight": down.clone(), f"{block(name)}.lora_B.weight": up}
    convert(saved(tmp_path / "a.safetensors", tensors), tmp_path / "b.safetensors", "comfyui")
    expected = linear(down, torch.cat(ups), 4.0)
    assert_same(tmp_path / "b.safetensors", named("diffusion_model.double_blocks.3.txt_attn.qkv", expected))


def test_scale_and_shift_of_the_last_layer_change_places(tmp_path):
    up = random(16, 4, seed=1)
    tensors = named("lora_unet_final_layer_adaLN_modulation_1", linear(random(4, 8), up, 4.0))
    convert(saved(tmp_path / "a.safetensors", tensors), tmp_path / "b.safetensors", "diffusers", family="flux")
    written = load_file(tmp_path / "b.safetensors")["transformer.norm_out.linear.lora_B.weight"]
    assert torch.equal(written, torch.cat([up[8:], up[:8]]))


# ---- other kinds of adapters ----


def test_dora_of_output_features_becomes_peft_s_and_back(tmp_path):
    conv = "lora_unet_down_blocks_0_attentions_0_proj_in"
    tensors = {
        **named(SD_Q, {**linear(random(2, 8), random(6, 2), 2.0), "dora_scale": random(6, 1)}),
        **named(conv, {**linear(random(2, 8, 1, 1), random(6, 2, 1, 1), 1.0), "dora_scale": random(6, 1, 1, 1)}),
    }
    convert(saved(tmp_path / "a.safetensors", tensors), tmp_path / "b.safetensors", "diffusers")
    written = load_file(tmp_path / "b.safetensors")
    assert torch.equal(written[f"{SD_Q_DIFFUSERS}.lora_magnitude_vector.weight"], random(6))
    assert written["unet.down_blocks.0.attentions.0.proj_in.lora_magnitude_vector.weight"].shape == (1, 6, 1, 1)
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "kohya")
    assert_same(tmp_path / "c.safetensors", tensors)


def test_what_can_be_renamed_is_renamed(tmp_path):
    loha = {name: random(2, 3, seed=i) for i, name in enumerate(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"))}
    dora = {**linear(random(2, 8), random(24, 2), 2.0), "dora_scale": random(1, 8)}
    tensors = {**named(LINEAR1, loha), **named(QKV, dora)}
    convert(saved(tmp_path / "a.safetensors", tensors), tmp_path / "b.safetensors", "comfyui")
    expected = {
        **named("diffusion_model.single_blocks.0.linear1", loha),
        **named("diffusion_model.double_blocks.3.img_attn.qkv", dora),
    }
    assert_same(tmp_path / "b.safetensors", expected)


def test_fp8_becomes_bf16(tmp_path):
    """Also where parts are compared and joined, for which torch has no fp8."""
    tensors = {}
    for part in ("to_q", "to_k", "to_v"):
        tensors[f"{block(part)}.lora_A.weight"] = random(2, 8, dtype=torch.float8_e4m3fn)
        tensors[f"{block(part)}.lora_B.weight"] = random(8, 2, seed=len(tensors), dtype=torch.float8_e4m3fn)
    convert(saved(tmp_path / "a.safetensors", tensors), tmp_path / "b.safetensors", "kohya")
    found = load_file(tmp_path / "b.safetensors")[f"{QKV}.lora_up.weight"]
    ups = [tensor.bfloat16() for name, tensor in tensors.items() if "lora_B" in name]
    assert found.dtype == torch.bfloat16 and torch.equal(found, torch.cat(ups))


def test_extracted_files_of_comfyui_keep_their_biases(tmp_path):
    tensors = {
        **named("diffusion_model.double_blocks.3.img_attn.qkv", linear(random(2, 8), random(24, 2), None)),
        "diffusion_model.double_blocks.3.img_attn.qkv.diff_b": random(24, seed=3),
        "diffusion_model.img_in.diff_b": random(8),
    }
    report = convert(saved(tmp_path / "a.safetensors", tensors), tmp_path / "b.safetensors", "kohya")
    assert report.difference.modules == 3  # compared as a LoRA, by its parts
    expected = {**linear(random(2, 8), random(24, 2), 2.0), "diff_b": random(24, seed=3)}
    assert_same(tmp_path / "b.safetensors", {**named(QKV, expected), "lora_unet_img_in.diff_b": random(8)})


@pytest.mark.parametrize(
    ("proj", "embedder"),
    [("double_blocks.3.img_attn.proj", "img_in"), ("transformer_blocks.3.attn.to_out.0", "x_embedder")],
)
def test_names_without_their_model_are_read(tmp_path, proj, embedder):
    one, other = (linear(random(2, 8, seed=seed), random(8, 2), 2.0) for seed in range(2))
    source = saved(tmp_path / "a.safetensors", {**named(proj, one), **named(embedder, other)})
    convert(source, tmp_path / "b.safetensors", "kohya")
    expected = {**named("lora_unet_double_blocks_3_img_attn_proj", one), **named("lora_unet_img_in", other)}
    assert_same(tmp_path / "b.safetensors", expected)


# ---- refusals ----

PLAIN = linear(random(2, 8), random(24, 2), 2.0)


@pytest.mark.parametrize(
    ("tensors", "to", "message"),
    [
        (named(QKV, {"lokr_w1": random(2, 2), "lokr_w2": random(2, 2)}), "diffusers", rf"{QKV}\.lokr_w1: .*plain LoRA"),
        (named(QKV, {**PLAIN, "dora_scale": random(24, 1)}), "diffusers",
         "dora_scale: the other naming orders the module"),
        (named(SD_Q, {**PLAIN, "dora_scale": random(1, 8)}), "diffusers", "one magnitude for each input feature"),
        (named(SD_Q, {"lora_down.weight": random(2, 8)}), "comfyui", r"lora_up\.weight is missing"),
        (named(SD_Q, {"alpha": random(1), "dora_scale": random(1)}), "diffusers", r"lora_down\.weight is missing"),
        (named(SD_Q, linear(random(2, 8), random(24, 3), 2.0)), "comfyui", r"\[2, 8\] and lora_up .* do not fit"),
        (named(SD_Q, linear(random(0, 8), random(24, 0), 2.0)), "comfyui", r"\[0, 8\] and lora_up .* do not fit"),
        (named(SD_Q, {**PLAIN, "alpha": random(2)}), "comfyui", r"alpha: holds 2 numbers"),
        (named(QKV, linear(random(2, 8), random(25, 2), 2.0)), "diffusers", "25 outputs of 8 inputs fit no split"),
        (named(f"{SD_Q}_more", PLAIN), "comfyui", "no module of Stable Diffusion 1.x"),
        ({**named(SD_Q, PLAIN), f"{SD_Q}.bias": random(3)}, "comfyui", r"\.bias: unknown kind of tensor"),
        ({**named(SD_Q, PLAIN), "unet.x.lora_A.weight": random(3)}, "comfyui", "names of several programs"),
        ({**named(QKV, PLAIN), **named("lora_unet_transformer_blocks_3_attn_to_k", PLAIN)}, "comfyui", "same module"),
        ({"model.weight": random(3)}, "comfyui", "not a LoRA"),
        ({}, "comfyui", "holds no tensors of an adapter or any others"),
        (named("oft_unet_x", {"oft_blocks": random(2, 3, 3)}), "comfyui", "oft_unet_x.alpha is missing"),
        (named("oft_unet_down_blocks_0_attentions_0_proj_in", {"oft_blocks": random(2, 3, 3), "alpha": random(1)}),
         "diffusers",
         "for plain LoRA and DoRA only"),
        (named("lora_unet_blocks_1_x", PLAIN), "comfyui", "made for Anima"),
        (named("lora_unet_joint_blocks_0_x", PLAIN), "comfyui", "no module of Stable Diffusion 3"),
        (named("unet.mid_block.attentions.0.proj_in", PLAIN), "kohya", "say which with --family"),
        (named(SD_Q, linear(random(2, 8) / 0, random(24, 2), 2.0)), "comfyui", "holds NaN or infinity"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_is_named(tmp_path, tensors, to, message):
    source = saved(tmp_path / "a.safetensors", tensors)
    with pytest.raises(UserError, match=message) as error:
        convert(source, tmp_path / "b.safetensors", to)
    assert "\n" not in str(error.value) and "a.safetensors" in str(error.value) or "finite" in message
    assert not (tmp_path / "b.safetensors").exists()


def test_stable_diffusion_3_there_and_back(tmp_path):
    """The metadata tell its diffusers' names from those of FLUX.1."""
    name = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    tensors = named(name, linear(random(2, 8), random(24, 2), 2.0))
    source = tmp_path / "a.safetensors"
    save_file(tensors, source, {"modelspec.architecture": "stable-diffusion-3-medium/lora"})
    convert(source, tmp_path / "b.safetensors", "diffusers")
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "kohya")
    assert "transformer.transformer_blocks.0.attn.to_q.lora_A.weight" in load_file(tmp_path / "b.safetensors")
    back = load_file(tmp_path / "c.safetensors")
    assert back.keys() == tensors.keys()
    first, second = (
        file[f"{name}.lora_up.weight"] @ file[f"{name}.lora_down.weight"] * (float(file[f"{name}.alpha"]) / rank)
        for file, rank in ((tensors, 2), (back, len(back[f"{name}.lora_down.weight"])))
    )
    torch.testing.assert_close(first, second)


def test_paths_are_checked_first(tmp_path):
    source = saved(tmp_path / "a.safetensors", named(SD_Q, PLAIN))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    for model, to_file, to, message in [
        (tmp_path / "no.safetensors", tmp_path / "b.safetensors", "comfyui", "no such file"),
        (source, tmp_path / "full" / ".." / "a.safetensors", "comfyui", "one of the files that are read"),
        (source, tmp_path / "missing" / "b.safetensors", "comfyui", "does not exist; make it first"),
        (source, tmp_path / "b.pt", "comfyui", "must end with .safetensors"),
        (source, tmp_path / "full", "peft", "name a new one"),
        (tmp_path / "full", tmp_path / "b.safetensors", "comfyui", "without adapter_model.safetensors"),
    ]:
        with pytest.raises(UserError, match=message):
            convert(model, to_file, to)
    with pytest.raises(AlreadyConverted, match="already has kohya's"):
        convert(source, tmp_path / "b.safetensors", "kohya")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.safetensors", "full"]


# ---- command lines ----


def test_the_commands_of_the_documentation_work(tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"^python networks/(convert_\w+)\.py (.*)$", text, re.MULTILINE)
    assert len(commands) == 9
    monkeypatch.chdir(tmp_path)
    saved(Path("lora.safetensors"), some_modules("lora_sdxl_conv"))
    rotations = {"oft_blocks": random(2, 4, 4), "alpha": torch.tensor(1e-2)}
    saved(Path("my_oft.safetensors"), named("oft_unet_down_blocks_0_attentions_0_proj_in", rotations))
    saved(Path("flux_lora.safetensors"), some_modules("lora_flux_split_qkv"))
    for script, arguments in commands:
        module = {"convert_lora": convert_lora, "convert_flux_lora": convert_flux_lora}[script]
        assert module.main(module.setup_parser().parse_args(arguments.split())) == 0, arguments
    assert capsys.readouterr().out.count("written: ") == 9
    assert_same(Path("lora_kohya.safetensors"), load_file("lora.safetensors"))


def flux(capsys, *arguments: object) -> tuple[int, str]:
    args = convert_flux_lora.setup_parser().parse_args([str(a) for a in arguments])
    try:
        code = convert_flux_lora.main(args)
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, capsys.readouterr().err


def test_the_published_script_checks_what_it_is_given(tmp_path, capsys):
    source = saved(tmp_path / "a.safetensors", named(QKV, PLAIN))
    paths = ["--src_path", source, "--dst_path", tmp_path / "b.safetensors"]
    assert flux(capsys, *paths, "--dst", "ai-toolkit")[0] == 1
    code, error = flux(capsys, *paths, "--src", "sd-script")
    assert code == 2 and 'did you mean "sd-scripts"?' in error
    code, error = flux(capsys, *paths)
    assert code == 2 and "has kohya's (published) names, not diffusers' names" in error
    saved(source, named("lora_unet_input_blocks_4_1_proj_in", PLAIN))
    code, error = flux(capsys, *paths, "--src", "sd-scripts", "--dst", "ai-toolkit")
    assert code == 2 and "no module of FLUX.1" in error
