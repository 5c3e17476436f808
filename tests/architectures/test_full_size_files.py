"""Files of the published names and sizes, without numbers: what families read of them, and what they write again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from library.architectures.common import transformer_file
from library.architectures.hunyuan_image import HUNYUAN_IMAGE
from library.architectures.hunyuan_image.options import HunyuanOptions
from library.architectures.lumina import LUMINA
from library.architectures.lumina.options import LuminaOptions
from library.architectures.part import Part
from library.architectures.sd3 import whole as sd3_whole
from library.architectures.sd3.options import SD3FullOptions, SD3Options
from library.architectures.whole_models import SavedModel
from tests.fixtures.layouts import header_file, table
from tests.fixtures.tiny_flux import CLIP_TOKENIZER, T5_TOKENIZER, make_tiny_t5_tokenizer
from tests.fixtures.tiny_hunyuan_image import QWEN_TOKENIZER, make_tiny_qwen_tokenizer
from tests.fixtures.tiny_lumina import TOKENIZER as GEMMA_TOKENIZER
from tests.fixtures.tiny_lumina import make_tiny_gemma_tokenizer
from tests.fixtures.tiny_sd import make_tiny_tokenizer
from tests.fixtures.tiny_sd3 import OPENCLIP_TOKENIZER

Shapes = dict[str, tuple[int, ...]]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizers")
    for name in (CLIP_TOKENIZER, OPENCLIP_TOKENIZER):
        make_tiny_tokenizer(folder / name)
    make_tiny_t5_tokenizer(folder / T5_TOKENIZER)
    make_tiny_gemma_tokenizer(folder / GEMMA_TOKENIZER)
    make_tiny_qwen_tokenizer(folder / QWEN_TOKENIZER)
    return str(folder)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> dict[str, Shapes]:
    """Names and shapes of the files that ``write`` would write."""
    found: dict[str, Shapes] = {}

    def write_file(path: Path, tensors: Mapping[str, object], **settings: object) -> None:
        found[path.name] = {name: tensor.shape for name, tensor in tensors.items()}  # type: ignore[attr-defined]

    for module in (sd3_whole, transformer_file):
        monkeypatch.setattr(module, "write_file", write_file)
    return found


def loaded(parts: Mapping[str, Part]) -> tuple[dict[str, torch.nn.Module], dict[Path, set[str]]]:
    """All parts on the meta device, and the names that they use of each file."""
    models, used = {}, {}
    for name, part in parts.items():
        models[name] = part.load(dtype=torch.bfloat16, device="meta")
        own = models[name].state_dict().keys()
        layout = part.source.layout
        names = {n for n in part.source.file_names() if own & set(layout.model_names(n))}
        used.setdefault(part.source.file.path, set()).update(names)
    return models, used


@pytest.mark.parametrize(
    ("checkpoint", "version"),
    [("sd3_medium_checkpoint", "medium"), ("sd35_medium_checkpoint", "5-medium"), ("sd35_large_checkpoint", "5-large")],
)
def test_stable_diffusion_3(
    tmp_path: Path, checkpoint: str, version: str, tokenizers: str, written: dict[str, Shapes]
) -> None:
    """And with T5's embeddings under both of their names, as some files have them."""
    tables = {name: table(name if name != "t5xxl" else "t5xxl_encoder") for name in ("clip_l", "clip_g", "t5xxl")}
    files = {name: header_file(tmp_path / f"{name}.safetensors", shapes) for name, shapes in tables.items()}
    model = header_file(tmp_path / "model.safetensors", table(checkpoint))
    family = sd3_whole.SD3_WHOLE.changed(SD3Options, **{name: str(path) for name, path in files.items()})
    family = family.changed(SD3FullOptions, train_t5xxl=True)
    found = family.inspect(str(model), vae=None, tokenizer_cache_dir=tokenizers)
    assert found.info.version == version
    models, used = loaded(family.for_model(found).parts(found))
    assert used[model] == table(checkpoint).keys()
    for name, path in files.items():
        assert used[path] == tables[name].keys()
    del models["vae"]  # which is never trained
    family.for_model(found).write(tmp_path / "out.safetensors", found, models, SavedModel("safetensors"))
    assert written == {
        "out.safetensors": table(checkpoint),
        **{f"out_{name}.safetensors": shapes for name, shapes in tables.items()},
    }
    twice = {**tables["t5xxl"], "encoder.embed_tokens.weight": (32128, 4096)}
    header_file(files["t5xxl"], twice)
    again = family.inspect(str(model), vae=None, tokenizer_cache_dir=tokenizers)
    loaded({"t5xxl": family.for_model(again).parts(again)["text_encoder_3"]})


def test_lumina(tmp_path: Path, tokenizers: str, written: dict[str, Shapes]) -> None:
    names = {"model": "lumina_image_2", "gemma2": "gemma2_2b", "ae": "flux_ae"}
    files = {name: header_file(tmp_path / f"{name}.safetensors", table(layout)) for name, layout in names.items()}
    family = LUMINA.changed(LuminaOptions, gemma2=str(files["gemma2"]), ae=str(files["ae"]))
    found = family.inspect(str(files["model"]), tokenizer_cache_dir=tokenizers)
    models, used = loaded(family.parts(found))
    for name, layout in names.items():
        assert used[files[name]] == table(layout).keys()
    family.write(tmp_path / "out.safetensors", found, models, SavedModel("safetensors"))
    assert written == {"out.safetensors": table("lumina_image_2")}


def test_hunyuan_image(tmp_path: Path, tokenizers: str, written: dict[str, Shapes]) -> None:
    """Qwen2.5-VL's part for images, its last two layers and what follows them are not used."""
    names = {
        "model": "hunyuan_image_21_dit", "text_encoder": "qwen25_vl_7b", "byt5": "byt5_small_glyph_encoder",
        "vae": "hunyuan_image_21_vae",
    }  # fmt: skip
    files = {name: header_file(tmp_path / f"{name}.safetensors", table(layout)) for name, layout in names.items()}
    options = {name: str(files[name]) for name in ("text_encoder", "byt5")}
    family = HUNYUAN_IMAGE.changed(HunyuanOptions, **options)
    found = family.inspect(str(files["model"]), vae=str(files["vae"]), tokenizer_cache_dir=tokenizers)
    models, used = loaded(family.parts(found))
    spare = ("visual.", "lm_head.", "model.norm.", "model.layers.26.", "model.layers.27.")
    for name, layout in names.items():
        needed = {key for key in table(layout) if name != "text_encoder" or not key.startswith(spare)}
        assert used[files[name]] == needed, name
    family.write(tmp_path / "out.safetensors", found, models, SavedModel("safetensors"))
    assert written == {"out.safetensors": table("hunyuan_image_21_dit")}
