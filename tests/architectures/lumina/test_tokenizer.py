"""Gemma's tokenizer as sentencepiece publishes it, in a folder or within the text encoder's file."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.architectures.lumina import LUMINA, gemma2
from library.architectures.lumina.options import LuminaOptions
from library.errors import UserError
from tests.fixtures.tiny_lumina import make_tiny_lumina

TEXTS = (
    "a photo of the cat",
    "  two  spaces, and a dog.",
    "1234 numbers: 5.6",
    "émoji 🐱 日本語",
    "line\none\ttab",
    "<start_of_turn>user",
    "",
)


@pytest.fixture(scope="module")
def model() -> bytes:
    """A tokenizer.model with the settings of Gemma's."""
    import sentencepiece

    written = io.BytesIO()
    words = "a photo of the cat dog numbers spaces and two line one tab user émoji paints describe image images".split()
    lines = [f"{one} {other} 12 {one}s, {other}." for one in words for other in words]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=written, model_type="bpe", vocab_size=380, byte_fallback=True,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>",
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False, split_digits=True,
        user_defined_symbols=["<mask>", "<start_of_turn>", "<end_of_turn>"], allow_whitespace_only_pieces=True,
        minloglevel=2,
    )  # fmt: skip
    return written.getvalue()


def assert_tokens_are_those_of_sentencepiece(tokenizer: object, model: bytes) -> None:
    import sentencepiece

    theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids, mask = gemma2.tokenize(tokenizer, TEXTS, length=64)
    for row, length, text in zip(ids.tolist(), mask.sum(dim=1).tolist(), TEXTS, strict=True):
        assert row[:length] == [2, *theirs.encode(text)], text
        assert not any(row[length:])


def test_tokenizer_model_alone(tmp_path: Path, model: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model)
    assert_tokens_are_those_of_sentencepiece(gemma2.load_tokenizer(tmp_path), model)


@pytest.mark.parametrize("bundled", [False, True], ids=["its own file", "a file of all parts"])
def test_within_the_file_of_the_text_encoder(
    tmp_path: Path, model: bytes, bundled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ComfyUI's files have it, so that nothing is fetched; a folder of the tokenizer counts more."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    made = make_tiny_lumina(tmp_path / "model", bundled=bundled)
    file = made.path if bundled else made.gemma2
    assert file is not None

    def inspected(cache: Path | None):
        family = LUMINA.changed(LuminaOptions, gemma2=made.gemma2 and str(made.gemma2), ae=made.ae and str(made.ae))
        return family, family.inspect(str(made.path), tokenizer_cache_dir=cache and str(cache))

    with pytest.raises(UserError, match="give --tokenizer_cache_dir a folder that holds Gemma's tokenizer.json"):
        inspected(None)
    content = torch.frombuffer(bytearray(model), dtype=torch.uint8)
    name = "text_encoders.spiece_model" if bundled else "spiece_model"
    save_file({**load_file(file), name: content}, file)
    family, checkpoint = inspected(None)
    assert_tokens_are_those_of_sentencepiece(family.load_tokenizers(checkpoint)[0], model)
    family.load_text_encoders(checkpoint, dtype=torch.float32, device="cpu")
    _, other = inspected(made.tokenizer_cache_dir)
    assert other.tokenizer_folder.is_relative_to(made.tokenizer_cache_dir)
    assert family.text_identity(checkpoint) != family.text_identity(other), "caches know the tokenizer"


def test_damaged_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(UserError, match="Gemma2's tokenizer cannot be read"):
        gemma2.load_tokenizer(tmp_path)
