"""Files of HunyuanImage-2.1 and of other models, recognized from their headers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.architectures.common.recognise import recognise_tensors
from library.architectures.hunyuan_image import HUNYUAN_IMAGE
from library.architectures.hunyuan_image.checkpoint import transformer_source
from library.architectures.hunyuan_image.options import HunyuanOptions
from library.errors import UserError
from tests.architectures.hunyuan_image.test_model import to_diffusers
from tests.fixtures.layouts import table
from tests.fixtures.tiny_hunyuan_image import MadeHunyuan, make_tiny_hunyuan


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeHunyuan:
    return make_tiny_hunyuan(tmp_path_factory.mktemp("hunyuan"))


def family(made: MadeHunyuan, **changed: object):
    given = {"text_encoder": str(made.text_encoder), "byt5": str(made.byt5), **changed}
    return HUNYUAN_IMAGE.changed(HunyuanOptions, **given)


def loaded(made: MadeHunyuan, path: Path) -> dict[str, torch.Tensor]:
    one = family(made)
    checkpoint = one.inspect(str(path), vae=str(made.vae), tokenizer_cache_dir=str(made.tokenizer_cache_dir))
    return one.load_denoiser(checkpoint, dtype=torch.float32, device="cpu").state_dict()


def test_the_same_weights_in_every_layout(made: MadeHunyuan, tmp_path: Path) -> None:
    state = load_file(made.path)
    sizes = transformer_source(made.path).config["sizes"]
    with_prefix = {f"model.diffusion_model.{name}": tensor for name, tensor in state.items()}
    save_file(with_prefix, tmp_path / "prefix.safetensors")
    (tmp_path / "pipeline" / "transformer").mkdir(parents=True)
    diffusers = {name: tensor.contiguous() for name, tensor in to_diffusers(state, sizes).items()}
    save_file(diffusers, tmp_path / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
    for path in (made.path, tmp_path / "prefix.safetensors", tmp_path / "pipeline"):
        found = loaded(made, path)
        assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state), path


def test_other_models_are_named(made: MadeHunyuan, tmp_path: Path) -> None:
    state = load_file(made.path)
    for name, text in {"guidance_in": "distilled", "time_r_in": "distilled"}.items():
        save_file({**state, f"{name}.mlp.0.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
        with pytest.raises(UserError, match=text):
            transformer_source(tmp_path / "other.safetensors")
    for layout, text in {"flux1_dev": "FLUX.1", "qwen25_vl_7b": "Qwen2.5-VL"}.items():
        found = recognise_tensors(table(layout), "hunyuan_image")
        assert found is not None and text in found.what
    assert recognise_tensors(table("hunyuan_image_21_dit"), "hunyuan_image") is None
    found = recognise_tensors(table("hunyuan_image_21_dit"), "flux")
    assert found is not None and "hunyuan_image_train_network.py" in found.remedy


def test_parts_that_are_missing_or_do_not_fit(made: MadeHunyuan, tmp_path: Path) -> None:
    cache = str(made.tokenizer_cache_dir)
    with pytest.raises(UserError) as raised:
        HUNYUAN_IMAGE.inspect(str(made.path), vae=None, tokenizer_cache_dir=cache)
    lines = str(raised.value).splitlines()
    assert [line.split()[0] for line in lines] == ["--text_encoder", "--byt5", "--vae"]
    empty = tmp_path / "empty.safetensors"
    empty.touch()
    for name in ("text_encoder", "byt5"):
        with pytest.raises(UserError) as raised:
            family(made, **{name: str(empty)}).inspect(str(made.path), vae=str(made.vae), tokenizer_cache_dir=cache)
        assert str(raised.value) == f"--{name} {empty}: not a safetensors file: it is empty"
    narrow = {
        name: tensor[:, :24] if tensor.dim() == 2 and tensor.shape[1] == 40 else tensor
        for name, tensor in load_file(made.byt5).items()
    }
    narrow["shared.weight"] = narrow["shared.weight"][:, :24].contiguous()
    save_file({name: tensor.contiguous() for name, tensor in narrow.items()}, tmp_path / "narrow.safetensors")
    one = family(made, byt5=str(tmp_path / "narrow.safetensors"))
    with pytest.raises(UserError, match="has states of width 24, and the transformer takes 40"):
        one.inspect(str(made.path), vae=str(made.vae), tokenizer_cache_dir=cache)
