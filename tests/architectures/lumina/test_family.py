"""Files, captions, layouts and the objective of Lumina-Image 2.0."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.architectures.conditioning import Conditioning
from library.architectures.lumina import LUMINA, LuminaImage2, gemma2
from library.architectures.lumina.checkpoint import LuminaCheckpoint
from library.architectures.lumina.model import NextDiT
from library.architectures.lumina.options import LuminaFlowOptions, LuminaOptions
from library.architectures.lumina.sizes import NextDiTSizes, infer_sizes
from library.architectures.whole_models import SavedModel
from library.config.arguments import TrainingOptions
from library.errors import UserError
from tests.architectures.lumina.opened import in_diffusers_names, opened
from tests.fixtures.layouts import LAYOUTS, table
from tests.fixtures.tiny_lumina import (
    MadeLumina,
    full_sizes,
    gemma2_shapes,
    make_tiny_lumina,
    transformer_shapes,
)
from tests.fixtures.tiny_sd3 import make_tiny_sd3

CAPTIONS = ("a cat", "a red dog of the cat")


def encoded(family: LuminaImage2, checkpoint: LuminaCheckpoint, captions: tuple[str, ...] = CAPTIONS) -> Conditioning:
    tokens = family.tokenize(family.load_tokenizers(checkpoint), captions, max_token_length=None, weighted=False)
    encoders = family.load_text_encoders(checkpoint, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        return family.encode_text(encoders, tokens, clip_skip=None)


# ---- files ----


def test_parts_in_one_file_are_those_apart(tmp_path: Path) -> None:
    one, two = (opened(make_tiny_lumina(tmp_path / str(n), bundled=bool(n))) for n in (0, 1))
    for name in ("hidden_state", "attention_mask", "input_ids"):
        assert torch.equal(encoded(*one)[name], encoded(*two)[name])
    for load in ("load_denoiser", "load_vae"):
        states = [getattr(f, load)(c, dtype=torch.float32, device="cpu").state_dict() for f, c in (one, two)]
        assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_a_diffusers_folder_is_read_as_the_published_files(tmp_path: Path) -> None:
    made = make_tiny_lumina(tmp_path / "published")
    family, checkpoint = opened(made)
    denoiser = family.load_denoiser(checkpoint, dtype=torch.float32, device="cpu")
    folder = tmp_path / "folder"
    for part in ("transformer", "text_encoder", "vae"):
        (folder / part).mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "Lumina2Pipeline"}))
    save_file(in_diffusers_names(denoiser), folder / "transformer" / "diffusion_pytorch_model.safetensors")
    encoder = family.load_text_encoder(checkpoint, 0, dtype=torch.float32, device="cpu")
    encoder.save_pretrained(folder / "text_encoder")
    family.load_vae(checkpoint, dtype=torch.float32, device="cpu").save_pretrained(folder / "vae")
    (made.tokenizer_cache_dir / "Alpha-VLLM_Lumina-Image-2.0").rename(folder / "tokenizer")
    other, found = opened(MadeLumina(folder, None, None, tmp_path / "none"))
    assert not found.sizes.final_norm, "diffusers leaves out the norm that nothing uses"
    state = other.load_denoiser(found, dtype=torch.float32, device="cpu").state_dict()
    published = denoiser.state_dict()
    assert published.keys() - state.keys() == {"norm_final.weight"}
    assert all(torch.equal(tensor, published[name]) for name, tensor in state.items())
    theirs = other.load_text_encoder(found, 0, dtype=torch.float32, device="cpu").state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in encoder.state_dict().items())
    assert not other.unused_modules(
        "denoiser", other.load_denoiser(found, dtype=torch.float32, device="meta"), clip_skip=None
    )


def test_a_saved_transformer_is_the_source_bit_for_bit(tmp_path: Path) -> None:
    made = make_tiny_lumina(tmp_path, dtype=torch.bfloat16)
    family, checkpoint = opened(made)
    denoiser = family.load_denoiser(checkpoint, dtype=torch.bfloat16, device="cpu")
    path = tmp_path / "saved.safetensors"
    family.write(path, checkpoint, {"denoiser": denoiser}, SavedModel("safetensors"))
    source, saved = load_file(made.path), load_file(path)
    assert source.keys() == saved.keys()
    assert all(
        torch.equal(tensor, saved[name]) and tensor.dtype == saved[name].dtype for name, tensor in source.items()
    )
    with pytest.raises(UserError, match="would overwrite"):
        family.write(made.path, checkpoint, {"denoiser": denoiser}, SavedModel("safetensors"))


def test_published_names_and_shapes() -> None:
    assert transformer_shapes(full_sizes()) == table("lumina_image_2")
    assert gemma2_shapes(full_sizes()) == table("gemma2_2b")
    assert infer_sizes(table("lumina_image_2")) == NextDiTSizes()
    with torch.device("meta"):
        transformer = NextDiT(infer_sizes(table("lumina_image_2")))
        config = gemma2.infer_config({name.removeprefix("model."): s for name, s in table("gemma2_2b").items()})
        encoder = gemma2.build(config)
    assert {name: tuple(t.shape) for name, t in transformer.state_dict().items()} == table("lumina_image_2")
    assert {f"model.{name}": tuple(t.shape) for name, t in encoder.state_dict().items()} == table("gemma2_2b")
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (8, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("cap_embedder.0.weight"), r"not a Lumina-Image 2.0 transformer"),
        (lambda s: s.pop("layers.1.attention.qkv.weight"), "1 of the transformer's tensors are missing"),
        (
            lambda s: s.update({"layers.0.feed_forward.w1.weight_scale": torch.ones(1)}),
            r"w1.weight_scale is a scale, and .*has no fp8 numbers",
        ),
        (lambda s: s.update({"x_embedder.weight": s["x_embedder.weight"] / 0}), "holds NaN or infinity"),
    ],
)
def test_damaged_transformers(tmp_path: Path, change, message: str) -> None:
    made = make_tiny_lumina(tmp_path)
    state = load_file(made.path)
    change(state)
    save_file(state, made.path)
    with pytest.raises(UserError, match=message):
        family, checkpoint = opened(made)
        family.load_denoiser(checkpoint, dtype=torch.float32, device="cpu")


def test_wrong_and_missing_files_are_named(tmp_path: Path) -> None:
    made = make_tiny_lumina(tmp_path)
    assert made.gemma2 is not None and made.ae is not None
    missing = MadeLumina(made.path, None, None, made.tokenizer_cache_dir)
    with pytest.raises(UserError, match=r"--gemma2: name the Gemma2 text encoder.*\n--ae: name the autoencoder"):
        opened(missing)
    swapped = MadeLumina(made.path, made.ae, made.gemma2, made.tokenizer_cache_dir)
    with pytest.raises(UserError, match="--gemma2 .*not a Gemma2 text encoder.*VAE"):
        opened(swapped)
    with pytest.raises(UserError, match="is a Gemma2 text encoder; give the transformer here"):
        opened(MadeLumina(made.gemma2, made.gemma2, made.ae, made.tokenizer_cache_dir))
    of_sd3 = make_tiny_sd3(tmp_path / "sd3").path
    with pytest.raises(UserError, match="--ae .*a checkpoint of Stable Diffusion, whose VAE is another one"):
        opened(MadeLumina(made.path, made.gemma2, of_sd3, made.tokenizer_cache_dir))
    wide = {name: torch.zeros(s) for name, s in gemma2_shapes(full_sizes().__class__(caption=48)).items()}
    save_file(wide, made.gemma2)
    with pytest.raises(UserError, match="gives states of width 48, the transformer takes 32"):
        opened(made)


# ---- text ----


def test_captions_are_padded_on_the_right(tmp_path: Path) -> None:
    family, checkpoint = opened(make_tiny_lumina(tmp_path), gemma2_max_token_length=20)
    (tokenizer,) = family.load_tokenizers(checkpoint)
    long = "a photo of the red dog and the blue cat"
    tokens = family.tokenize([tokenizer], ["a cat", "", long], max_token_length=None, weighted=False)
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    assert ids.shape == mask.shape == (3, 24), "a multiple of 8"
    assert (ids[:, 0] == tokenizer.bos_token_id).all()
    assert mask.sum(dim=1).tolist() == [len(tokenizer("a cat").input_ids), 1, 20], "cut at the given length"
    assert (ids[mask == 0] == tokenizer.pad_token_id).all()
    settings = {"padding": "max_length", "max_length": 20, "truncation": True, "padding_side": "right"}
    theirs = tokenizer(["a cat", "", long], **settings, return_tensors="pt")
    assert torch.equal(ids[:, :20], theirs.input_ids) and torch.equal(mask[:, :20], theirs.attention_mask)
    assert not mask[:, 20:].any()
    length = family.caption_length([tokenizer], long, max_token_length=None, weighted=False)
    assert length.limit == 19 and length.tokens > 19 and long.endswith(length.cut) and length.cut


def test_states_are_those_before_the_last_layer(tmp_path: Path) -> None:
    """Without the last layer and the final norm; padding changes nothing."""
    family, checkpoint = opened(make_tiny_lumina(tmp_path), gemma2_max_token_length=24)
    found = encoded(family, checkpoint)
    encoder = family.load_text_encoder(checkpoint, 0, dtype=torch.float32, device="cpu")
    encoder.layers, encoder.norm = encoder.layers[:-1], torch.nn.Identity()
    encoder.config.num_hidden_layers -= 1
    for row, count in enumerate(found["attention_mask"].sum(dim=1).tolist()):
        with torch.no_grad():
            expected = encoder(input_ids=found["input_ids"][row : row + 1, :count]).last_hidden_state
        torch.testing.assert_close(found["hidden_state"][row, :count], expected[0], rtol=1e-5, atol=1e-5)


def test_the_system_prompt_is_before_captions_and_prompts_alone() -> None:
    family = LUMINA.changed(LuminaOptions, system_prompt="You paint.")
    assert family.worded("a cat", "caption") == family.worded("a cat", "prompt") == "You paint. <Prompt Start> a cat"
    assert family.worded("a cat", "negative") == "a cat"
    assert family.worded("", "caption") == "", "a dropped caption is the empty negative prompt"
    assert family.with_system_prompt_in_negative().worded("a", "negative") == "You paint. <Prompt Start> a"
    assert LUMINA.worded("a cat", "prompt") == "a cat"
    assert family.text.settings["system_prompt"] == "You paint.", "caches are made again for another one"


# ---- the objective ----


@pytest.mark.parametrize("kind", ["raw", "sigma_scaled", "additive"])
def test_what_is_right_has_no_loss_and_is_followed_to_the_image(kind: str) -> None:
    """The model's own output is image minus noise, in a time from noise to image; additive, what is added to x_t."""
    family = LUMINA.changed(LuminaFlowOptions, model_prediction_type=kind)
    objective = family.objective(v_prediction=False, zero_terminal_snr=False)
    latents, noise, timesteps = torch.randn(2, 16, 4, 4), torch.randn(2, 16, 4, 4), torch.tensor([250.0, 900.0])
    noisy = objective.noised(latents, noise, timesteps)
    seen: list[Tensor] = []

    def perfect(noisy: Tensor, times: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        seen.append(times)
        return latents - noisy if kind == "additive" else latents - noise

    conditioning = Conditioning({"hidden_state": torch.zeros(2, 8, 32), "attention_mask": torch.ones(2, 8)})
    output = family.predict(perfect, noisy, timesteps, conditioning)  # type: ignore[arg-type]
    torch.testing.assert_close(seen[0], torch.tensor([0.75, 0.1]))
    found, target = objective.comparable(output, timesteps), objective.target(latents, noise, timesteps)
    torch.testing.assert_close(found, target, rtol=1e-4, atol=1e-5)
    velocity = objective.for_sampler(output, timesteps)
    sigmas = (timesteps / 1000).view(-1, 1, 1, 1)
    torch.testing.assert_close(noisy - sigmas * velocity, latents, rtol=1e-4, atol=1e-4)


def test_defaults_are_the_published_ones() -> None:
    objective = LUMINA.objective(v_prediction=False, zero_terminal_snr=False)
    assert (objective.timestep_sampling, objective.shift, objective.prediction_type) == ("shift", 6.0, "raw")
    assert objective.sampling_shift == 6.0


# ---- adapters ----


@pytest.fixture(scope="module")
def full_models():
    with torch.device("meta"):
        transformer = NextDiT(NextDiTSizes())
        encoder = gemma2.build(
            gemma2.infer_config({name.removeprefix("model."): s for name, s in table("gemma2_2b").items()})
        )
    return [encoder], transformer


def adapted(models, args, *, text: bool = False, rank: int = 4):
    module = importlib.import_module("networks.lora_lumina")
    encoders, transformer = models
    with torch.device("meta"):
        network = module.create_network(1.0, rank, 1.0, None, encoders, transformer, **args)
        network.apply_to(encoders, transformer, text, True)
    try:
        return network.state_dict()
    finally:
        network.remove()


@pytest.mark.parametrize("name", ["lora_lumina_unet_only", "lora_lumina_gemma2", "lora_lumina_embedder_dims"])
def test_names_and_shapes_of_adapters_are_published(full_models, name: str) -> None:
    import gzip

    about = json.loads(gzip.decompress((LAYOUTS / f"{name}.json.gz").read_bytes()))
    state = adapted(full_models, about["network_args"], text=about["apply_text_encoder"], rank=about["rank"])
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == table(name)


@pytest.mark.parametrize(
    ("args", "ranks"),
    [
        # the first key that fits a layer counts
        ({"attn_dim": "3", "refiner_dim": "5"}, {"layers_0_attention_qkv": 3, "noise_refiner_0_attention_out": 3,
          "noise_refiner_0_feed_forward_w1": 5, "layers_0_feed_forward_w1": 4}),
        ({"mlp_dim": "6", "mod_dim": "0"}, {"layers_25_feed_forward_w2": 6, "layers_0_adaLN_modulation_1": None,
          "final_layer_adaLN_modulation_1": None, "final_layer_linear": 4}),
        ({"train_blocks": "refiners"}, {"layers_0_attention_qkv": None, "context_refiner_1_attention_qkv": 4,
          "noise_refiner_1_attention_qkv": 4, "final_layer_linear": None}),
        (
            {"train_blocks": "noise_refiner"},
            {"context_refiner_1_attention_qkv": None, "noise_refiner_1_attention_qkv": 4},
        ),
        ({"train_blocks": "transformer"}, {"layers_9_attention_out": 4, "noise_refiner_0_attention_out": None,
          "final_layer_linear": 4}),
        ({"train_block_indices": "0,20-25"}, {"layers_0_attention_qkv": 4, "layers_19_attention_qkv": None,
          "layers_20_attention_qkv": 4, "context_refiner_0_attention_qkv": 4, "final_layer_linear": 4}),
        ({"train_block_indices": "none"}, {"layers_0_attention_qkv": None, "final_layer_linear": None,
          "noise_refiner_0_attention_qkv": 4}),
        ({"embedder_dims": "[0,2,7]"}, {"x_embedder": None, "t_embedder_mlp_2": 2, "cap_embedder_1": 7}),
    ],
)  # fmt: skip
def test_network_args(full_models, args, ranks) -> None:
    state = adapted(full_models, args)
    found = {name: state.get(f"lora_unet_{name}.lora_down.weight") for name in ranks}
    assert {name: None if down is None else down.shape[0] for name, down in found.items()} == ranks


def test_split_qkv_has_an_adapter_for_each_projection(full_models, tmp_path: Path) -> None:
    """The file joins them: what is not of its own projection is zero in it, and it is read back as it was."""
    state = adapted(full_models, {"split_qkv": "True"})
    up = state["lora_unet_layers_0_attention_qkv.lora_up.weight"]
    assert state["lora_unet_layers_0_attention_qkv.lora_down.weight"].shape == (12, 2304) and up.shape == (3840, 12)
    module = importlib.import_module("networks.lora_lumina")
    family, checkpoint = opened(make_tiny_lumina(tmp_path))
    denoiser = family.load_denoiser(checkpoint, dtype=torch.float32, device="cpu")
    network = module.create_network(1.0, 2, 1.0, None, [], denoiser, split_qkv="True")
    network.apply_to([], denoiser, False, True)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter)
    network.save_weights(tmp_path / "split.safetensors", None, {})
    network.remove()
    up = load_file(tmp_path / "split.safetensors")["lora_unet_layers_0_attention_qkv.lora_up.weight"]
    pieces = [part.split(2, dim=1) for part in up.split((72, 24, 24))]  # query, key, value
    assert all((pieces[row][column] != 0).any() == (row == column) for row in range(3) for column in range(3))
    again, _ = module.create_network_from_weights(1.0, str(tmp_path / "split.safetensors"), None, [], denoiser)
    kinds = {type(adapter).__name__ for adapter in again.adapters if adapter.lora_name.endswith("qkv")}
    assert kinds == {"SplitLoraModule"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"conv_dim": "4"}, "conv_dim.*has no convolutions"),
        ({"block_dims": "4"}, "counts the blocks of a U-Net"),
        ({"train_blocks": "final"}, "must be all, transformer or refiners"),
        ({"train_block_indices": "26"}, "26 is out of range; the model has 26 transformer blocks, 0-25"),
        ({"train_blocks": "refiners", "train_block_indices": "1"}, "exclude each other"),
        ({"embedder_dims": "[1,2]"}, "embedder_dims"),
        ({"attn_dims": "4"}, "attn_dims.*attn_dim"),
    ],
)
def test_wrong_network_args_are_named(full_models, args, message: str) -> None:
    with pytest.raises(UserError, match=message):
        adapted(full_models, args)


@pytest.mark.parametrize(("own", "training", "expected"), [
    ({}, {}, "math"), ({}, {"attn_mode": "xformers"}, "xformers"), ({"use_flash_attn": True}, {"sdpa": True}, "flash"),
])  # fmt: skip
def test_use_flash_attn_is_an_attention_of_the_run(
    own: dict[str, bool], training: dict[str, object], expected: str
) -> None:
    """The trace of ``--memory_plan`` asks for it too, to replace what does not run without numbers."""
    assert LUMINA.changed(LuminaOptions, **own).attention(TrainingOptions(**training)) == expected
