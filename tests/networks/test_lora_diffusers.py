"""lora_diffusers.py on tiny pipelines, and lora_interrogator.py on a tiny checkpoint."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from PIL import Image, ImageChops
from safetensors.torch import load_file

from library.architectures.sd import SD
from library.errors import UserError
from networks import lora, lora_diffusers, lora_interrogator
from networks.files import pipeline_network
from networks.files.convert import convert
from networks.lora_diffusers import create_network_from_weights, merge_lora_weights
from tests.fixtures.file_tools import refusal as refusal_of
from tests.fixtures.file_tools import run_tool
from tests.fixtures.tiny_sd import make_tiny_sd
from tests.fixtures.tiny_sdxl import make_tiny_sdxl
from tests.networks.test_merge_lora import Checkpoint, make, products

pytestmark = pytest.mark.usefixtures("own_root_logger")


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def pipeline(request, tmp_path_factory):
    """(the folder of a tiny pipeline, a LoRA for it, tensors of the LoRA)."""
    folder = tmp_path_factory.mktemp(request.param)
    made = (make_tiny_sdxl if request.param == "sdxl" else make_tiny_sd)(folder / "model", layout="diffusers")
    file = make(Checkpoint(made, request.param, lora), folder / "lora.safetensors", conv_dim="2")
    return made.path, file, request.param == "sdxl"


def loaded(folder, sdxl):
    import diffusers

    kind = diffusers.StableDiffusionXLPipeline if sdxl else diffusers.StableDiffusionPipeline
    return kind.from_pretrained(folder)


def states(pipe) -> dict[str, torch.Tensor]:
    parts = {name: getattr(pipe, name, None) for name in ("unet", "text_encoder", "text_encoder_2")}
    return {
        f"{part}.{name}": tensor.clone()
        for part, model in parts.items()
        if model is not None
        for name, tensor in model.state_dict().items()
    }


def image(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe("a cat", num_inference_steps=2, generator=generator, width=64, height=64, output_type="pt").images


def test_a_lora_is_put_on_and_taken_off(pipeline):
    folder, file, sdxl = pipeline
    pipe, weights = loaded(folder, sdxl), load_file(file)
    before, original = states(pipe), image(pipe)
    encoders = [pipe.text_encoder, pipe.text_encoder_2] if sdxl else pipe.text_encoder
    network = create_network_from_weights(encoders, pipe.unet, weights, multiplier=1.0)
    network.load_state_dict(weights)
    network.apply_to(0.5)
    applied = image(pipe)
    assert not torch.allclose(applied, original, atol=1e-3)
    network.unapply_to()
    assert torch.equal(image(pipe), original)
    network.merge_to(0.5)
    torch.testing.assert_close(image(pipe), applied, atol=1e-4, rtol=1e-3)
    merged = states(pipe)
    changed = [name for name in merged if not torch.equal(merged[name], before[name])]
    assert len(changed) == len(products(weights))
    network.restore_from(0.5)
    after = states(pipe)
    assert all(torch.equal(after[name], before[name]) for name in before)
    merge_lora_weights(pipe, weights, 0.5)
    again = states(pipe)
    for name in merged:
        torch.testing.assert_close(again[name], merged[name], atol=1e-6, rtol=1e-6)


def test_strengths_are_those_that_are_given(pipeline):
    folder, file, sdxl = pipeline
    pipe, weights = loaded(folder, sdxl), load_file(file)
    name = "lora_unet_middle_block_1_proj_in" if sdxl else "lora_unet_mid_block_attentions_0_proj_in"
    weight = pipe.unet.mid_block.attentions[0].proj_in.weight
    before = weight.detach().clone()
    merge_lora_weights(pipe, weights, -0.3)
    change = (weight.detach() - before).double()
    torch.testing.assert_close(change, -0.3 * products(weights)[name].view_as(change), atol=1e-6, rtol=1e-5)


def test_other_names_and_wrong_files(pipeline, tmp_path):
    folder, file, sdxl = pipeline
    pipe = loaded(folder, sdxl)
    encoders = [pipe.text_encoder, pipe.text_encoder_2] if sdxl else [pipe.text_encoder]
    convert(file, tmp_path / "d.safetensors", "diffusers", family="sdxl" if sdxl else "sd")
    network = create_network_from_weights(encoders, pipe.unet, load_file(tmp_path / "d.safetensors"))
    assert len(network.network.adapters) == len(products(load_file(file)))
    wrong = {f"lora_unet_nowhere.{kind}": torch.ones(2, 2) for kind in ("lora_down.weight", "lora_up.weight")}
    with pytest.raises(UserError, match="nowhere"):
        create_network_from_weights(encoders, pipe.unet, wrong)
    with pytest.raises(UserError, match="text encoders are given"):
        create_network_from_weights([*encoders, *encoders], loaded(folder, sdxl).unet, load_file(file))


def test_the_demonstration(pipeline, tmp_path, monkeypatch, capsys):
    folder, file, _ = pipeline
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(folder)
    small = {"num_inference_steps": 2, "width": 64, "height": 64}
    monkeypatch.setattr(pipeline_network, "demonstrate", partial(pipeline_network.demonstrate, **small))
    flags = {"sdxl": True} if pipeline[2] else {}
    run_tool(lora_diffusers, model_id="model", lora_weights=file, prompt="a cat", **flags)
    found = {path.stem.removeprefix("model_"): Image.open(path).convert("RGB") for path in tmp_path.glob("*.png")}
    assert len(found) == 7 and capsys.readouterr().out.count("saved: ") == 7

    def apart(one: str, other: str) -> int:
        return max(high for _, high in ImageChops.difference(found[one], found[other]).getextrema())

    for state in ("unapplied_lora", "unmerged_lora", "restore_original"):
        assert apart("original", state) == 0
    assert apart("original", "applied_lora") > 3
    assert apart("applied_lora", "merged_lora") <= 1 and apart("merged_lora", "convenience_merged_lora") == 0


# ---- the interrogator ----


@pytest.mark.parametrize("clip_skip", [None, 2])
def test_tokens_that_change_most(tmp_path, capsys, clip_skip):
    made = make_tiny_sd(tmp_path / "model.safetensors")
    checkpoint = Checkpoint(made, "sd", lora)
    file = make(checkpoint, tmp_path / "lora.safetensors")
    options = {"sd_model": made.path, "model": file, "tokenizer_cache_dir": made.tokenizer_cache_dir, "batch_size": 50}
    run_tool(lora_interrogator, **options, **({} if clip_skip is None else {"clip_skip": clip_skip}))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == lora_interrogator.SHOWN
    values = [float(line.rpartition(" ")[2]) for line in lines]
    assert values == sorted(values, reverse=True) and values[-1] > 0
    # the first one again, by itself
    token = int(lines[0][1 : lines[0].index("]")])
    (encoder,), unet = checkpoint.models()
    cache = str(made.tokenizer_cache_dir)
    found = SD.inspect(str(made.path), v2=False, v_parameterization=False, vae=None, tokenizer_cache_dir=cache)
    (tokenizer,) = SD.load_tokenizers(found)
    ids = torch.tensor([[tokenizer.bos_token_id, token, tokenizer.eos_token_id]])

    def state() -> torch.Tensor:
        with torch.no_grad():
            output = encoder(ids, output_hidden_states=True)
            if clip_skip is None:
                return output.last_hidden_state
            return getattr(encoder, "text_model", encoder).final_layer_norm(output.hidden_states[-2])

    before = state()
    network, weights = lora.create_network_from_weights(1.0, str(file), None, encoder, unet)
    network.apply_to(encoder, unet)
    network.load_state_dict(weights)
    assert values[0] == pytest.approx(float((state() - before).abs().mean()), abs=2e-6)


def test_the_interrogator_says_what_is_wrong(tmp_path, capsys):
    made = make_tiny_sd(tmp_path / "model.safetensors")
    encoders, unet = Checkpoint(made, "sd", lora).models()
    lora.create_network(1.0, 2, 1.0, None, [], unet).save_weights(tmp_path / "unet.safetensors", None, {})
    out = tmp_path / "none"
    refusal = partial(refusal_of, capsys, out, lora_interrogator, tokenizer_cache_dir=made.tokenizer_cache_dir)
    assert "--sd_model" in refusal(model=tmp_path / "unet.safetensors")
    assert "--model" in refusal(sd_model=made.path)
    assert "nothing for the text encoder" in refusal(sd_model=made.path, model=tmp_path / "unet.safetensors")
    both = make(Checkpoint(made, "sd", lora), tmp_path / "both.safetensors")
    assert "--clip_skip 9" in refusal(sd_model=made.path, model=both, clip_skip=9)
    assert "--batch_size 0" in refusal(sd_model=made.path, model=both, batch_size=0)
    assert encoders
