"""Words of embedding files: equal to diffusers' own loader, and refused with a line where they do not fit."""

from __future__ import annotations

import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from library.config.image_settings import ImageSettings
from library.diffusion.samplers import create_scheduler_for
from library.errors import UserError
from library.inference.generate import generate_latents
from library.inference.models import GenerateOptions, ImageModels
from library.inference.textual_inversion import (
    add_embeddings,
    as_read,
    finder,
    new_tokens,
    read_layered_vectors,
    read_vectors,
)
from tests.fixtures.tiny_sd import MadeCheckpoint

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

VECTORS = torch.randn(3, 32, generator=torch.Generator().manual_seed(3)) * 0.5


def written(path: Path, vectors: torch.Tensor = VECTORS) -> Path:
    if path.suffix == ".pt":  # as the common web interface writes them
        torch.save(
            {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": path.stem, "step": 9}, path
        )
    else:
        save_file({"emb_params": vectors}, path)
    return path


@pytest.mark.parametrize("name", ["goodone.pt", "goodone.safetensors"])
@pytest.mark.parametrize("count", [1, 3])
def test_as_diffusers(
    folder: MadeCheckpoint,
    models: ImageModels,
    options: GenerateOptions,
    settings: ImageSettings,
    tmp_path: Path,
    name: str,
    count: int,
) -> None:
    import diffusers

    path = written(tmp_path / name, VECTORS[:count])
    settings = replace(settings, prompt="a photo of goodone, cat", negative_prompt="goodone")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        folder.path, safety_checker=None, feature_extractor=None
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = create_scheduler_for("ddim", v_prediction=False)
    pipeline.load_textual_inversion({"goodone": VECTORS[0]} if count == 1 else VECTORS, token="goodone")
    expected = pipeline(
        prompt=settings.prompt, negative_prompt=settings.negative_prompt, num_inference_steps=settings.steps,
        guidance_scale=settings.scale, generator=torch.Generator().manual_seed(settings.seed), output_type="latent",
        width=64, height=64,
    ).images  # fmt: skip
    plain = generate_latents(models, [settings], options)
    add_embeddings([path], models.tokenizers, models.text_encoders)
    found = generate_latents(models, [settings], options)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (found - plain).abs().max() > 0.01


def ids_of(models: ImageModels, text: str) -> list[int]:
    tokens = models.architecture.tokenize(models.tokenizers, [text], max_token_length=None, weighted=True)
    return [int(token) for token in tokens["input_ids"][0, 0, 1:8]]


def test_words_and_weights(models: ImageModels, tmp_path: Path) -> None:
    """Words count in any case and within emphasis, not as parts of longer words; other embeddings stay."""
    add_embeddings(
        [written(tmp_path / "OneTok.pt"), written(tmp_path / "two.pt", VECTORS[:1])],
        models.tokenizers,
        models.text_encoders,
    )
    first = ids_of(models, "onetok")[:3]
    assert len(set(first)) == 3 and ids_of(models, "a (ONETOK:1.3)")[1:4] == first
    assert not set(first) & set(ids_of(models, "onetokx"))
    table = models.text_encoders[0].get_input_embeddings().weight
    torch.testing.assert_close(table[first], VECTORS)
    torch.testing.assert_close(table[ids_of(models, "two")[0]], VECTORS[0])
    tokens = models.architecture.tokenize(models.tokenizers, ["(onetok:1.5) cat"], max_token_length=None, weighted=True)
    assert tokens["weights"][0, 0, 1:5].tolist() == [1.5, 1.5, 1.5, 1.0]


OTHER = torch.ones(2, 32)


@pytest.mark.parametrize(
    "content",
    [
        {"string_to_param": torch.nn.ParameterDict({"*": torch.nn.Parameter(VECTORS)}), "string_to_token": {"*": 265}},
        {"string_to_param": {"*": VECTORS, "another": OTHER}},  # the first is the word in all programs
        {"string_to_param": {"my cat": VECTORS.bfloat16()}, "name": "x", "sd_checkpoint": None},
        {"<cat-toy>": VECTORS.half()},  # as diffusers' example writes it
        {"emb_params": VECTORS, "step": torch.tensor([3.0])},
        {"clip_l": VECTORS},
        {"step": torch.tensor(3.0), "*": torch.nn.Parameter(VECTORS)},
    ],
    ids=["module", "star", "bf16", "diffusers", "emb_params", "clip_l", "scalar"],
)
def test_files_of_other_programs(tmp_path: Path, content: dict[str, Any]) -> None:
    torch.save(content, tmp_path / "x.pt")
    (found,) = read_vectors(tmp_path / "x.pt", 1)
    assert found.dtype == torch.float32 and not found.requires_grad
    torch.testing.assert_close(found, VECTORS, rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("content", "encoders", "message"),
    [
        ({"string_to_param": {"a": VECTORS, "b": OTHER}}, 1, r"holds 2 words or tensors \(a, b\), not one embedding"),
        ({"string_to_param": [VECTORS]}, 1, "holds no embedding"),
        ({"clip_l": [1.0], "clip_g": VECTORS}, 2, "holds no clip_l and clip_g"),
        ({"clip_g": VECTORS}, 2, "holds no clip_l and clip_g"),
        ({1: VECTORS.int()}, 1, "holds no embedding"),
        ([VECTORS], 1, "holds no embedding"),
        ({f"lora_{n}.up": OTHER for n in range(9)}, 1, "holds 9 words or tensors .*, ..."),
    ],
)
def test_pickles_that_are_refused(tmp_path: Path, content: Any, encoders: int, message: str) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match=rf"--textual_inversion_embeddings .*x\.pt: {message}"):
        read_vectors(tmp_path / "x.pt", encoders)


@pytest.mark.parametrize("content", [{"IN01": [1.0]}, {"IN01": torch.tensor(1.0)}, {1: VECTORS}])
def test_layered_pickles_that_are_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match="holds no vectors for each layer"):
        read_layered_vectors(tmp_path / "x.pt")


@pytest.mark.parametrize("word", ["<cat-toy>", "MyCat", "my_cat", "caf\u00e9", "cafe\u0301s", "日本猫", "v1.5x", "x9"])
def test_words_of_all_sorts(models: ImageModels, word: str) -> None:
    """Tokenizers find them where the check of captions does, however captions are written."""
    ids = new_tokens(models.tokenizers[0], word, 2, flag="--token_string")
    for before, after, is_there in (
        ("a photo of ", "", True), ("", ", red", True), ("(", ":1.2)", True), ("the ", "'s tail", True),
        ("a ", "ful cat", False), ("a ", "_2", False),
    ):  # fmt: skip
        for spelt in (word, word.upper(), unicodedata.normalize("NFD", word)):
            caption = f"{before}{spelt}{after}"
            assert (ids[0] in ids_of(models, caption)) == is_there, caption
            assert (finder(word).search(as_read(caption)) is not None) == is_there, caption


def test_the_tokens_of_a_word_count(models: ImageModels, tmp_path: Path) -> None:
    """Captions that are cut are those whose tokens are too many with all vectors of their words."""
    from library.data.caption_lengths import measure_of

    vectors = VECTORS[:1].repeat(20, 1)
    measure = measure_of(models.architecture, models.tokenizers, max_token_length=None, weighted=False)
    caption = "a " * 50 + "longone a cat"
    before = measure(caption).tokens
    add_embeddings([written(tmp_path / "longone.pt", vectors)], models.tokenizers, models.text_encoders)
    assert measure("longone").tokens == 20
    after = measure("a " * 50 + "longone " + "a " * 7)
    assert (after.tokens, after.cut) == (77, "a a") and before < 75


@pytest.mark.parametrize(
    ("content", "encoders", "message"),
    [
        ({}, 1, "holds no embedding"),
        ({"clip_l": VECTORS, "clip_g": VECTORS}, 1, "is an embedding for SDXL"),
        ({"emb_params": VECTORS}, 2, "holds no clip_l and clip_g"),
        ({"clip_l": VECTORS, "clip_g": VECTORS[:1]}, 2, "other numbers of tokens"),
        ({"emb_params": VECTORS / 0}, 1, "holds NaN or infinity"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, content: dict[str, torch.Tensor], encoders: int, message: str) -> None:
    save_file({name: values.contiguous().clone() for name, values in content.items()}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=rf"--textual_inversion_embeddings .*x\.safetensors: .*{message}"):
        read_vectors(tmp_path / "x.safetensors", encoders)


def test_words_that_are_refused(models: ImageModels, tmp_path: Path) -> None:
    for name, vectors, message in (
        ("cat", VECTORS, '"cat" is a known word already'),
        ("new", VECTORS[:, :8], "have 8 numbers"),
    ):
        with pytest.raises(UserError, match=message):
            add_embeddings([written(tmp_path / f"{name}.pt", vectors)], models.tokenizers, models.text_encoders)
    with pytest.raises(UserError, match="gone.pt: no such file"):
        read_vectors(tmp_path / "gone.pt", 1)


def test_pickles_run_nothing(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"string_to_param": {"*": Evil()}}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="evil.pt: cannot be read"):
        read_vectors(tmp_path / "evil.pt", 1)
    assert not (tmp_path / "ran").exists()


def test_two_encoders(tmp_path: Path) -> None:
    save_file({"clip_l": VECTORS, "clip_g": torch.ones(3, 64)}, tmp_path / "xl.safetensors")
    first, second = read_vectors(tmp_path / "xl.safetensors", 2)
    assert torch.equal(first, VECTORS) and second.shape == (3, 64)
