"""Captions: what is tokenized, what quoted text gives, and states equal to those of transformers' whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from library.architectures.hunyuan_image import HUNYUAN_IMAGE, qwen, text
from library.architectures.hunyuan_image.options import HunyuanOptions
from library.errors import UserError
from library.memory.placing import STAYS
from library.memory.stored_layers import StoredLinear
from tests.fixtures.layouts import table
from tests.fixtures.tiny_hunyuan_image import QWEN_TOKENIZER, MadeHunyuan, make_tiny_hunyuan
from tests.fixtures.tiny_sd import make_tiny_tokenizer
from tests.inference.test_hunyuan_image_pipeline import whole_qwen


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeHunyuan:
    return make_tiny_hunyuan(tmp_path_factory.mktemp("hunyuan"))


def opened(made: MadeHunyuan, **own: object):
    family = HUNYUAN_IMAGE.changed(HunyuanOptions, text_encoder=str(made.text_encoder), byt5=str(made.byt5), **own)
    return family, family.inspect(str(made.path), vae=str(made.vae), tokenizer_cache_dir=str(made.tokenizer_cache_dir))


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a cat", ""),
        ("", ""),
        ("a sign 'SALE' with an apostrophe's quotes", ""),
        ('a sign "SALE"', 'Text "SALE". '),
        ('a sign "" of nothing', 'Text "". '),
        ('\u201ctwo\u201d and \u2018one\u2019 and "zero"', 'Text "zero". Text "one". Text "two". '),
        ('"over\ntwo lines" and "one"', 'Text " and ". '),
        ('"one" and "two" and "', 'Text "one". Text "two". '),
    ],
)
def test_quoted_text(caption: str, expected: str) -> None:
    assert text.glyph_text(caption) == expected


def test_tokens(made: MadeHunyuan) -> None:
    family, checkpoint = opened(made)
    tokenizers = family.load_tokenizers(checkpoint)
    captions = ["a cat", 'a photo of the dog with "SALE"']
    tokens = family.tokenize(tokenizers, captions, max_token_length=None, weighted=False)
    end = tokenizers[0].convert_tokens_to_ids("<|im_end|>")
    for place, caption in enumerate(captions):
        ids = tokens["vlm_ids"][place][: int(tokens["vlm_mask"][place].sum())].tolist()
        assert tokenizers[0].decode(ids) == f"{qwen.SYSTEM}{caption}{qwen.END}" and ids[-1] == end
    assert tokens["byt5_mask"].sum(dim=1).tolist() == [0, len('Text "SALE". ') + 1]
    assert tokens["byt5_ids"][1].tolist() == [byte + 3 for byte in b'Text "SALE". '] + [1]
    long = family.tokenize(tokenizers, ["cat " * 2000 + f'"{"x" * 300}"'], max_token_length=None, weighted=False)
    assert long["vlm_ids"].shape == (1, qwen.START + qwen.LENGTH)
    assert long["byt5_ids"].shape == (1, 128) and long["byt5_ids"][0, -1] == 1
    length = family.caption_length(tokenizers, "cat " * 2000, max_token_length=None, weighted=False)
    assert length.tokens > length.limit == 1024 and length.cut.startswith("cat")


def test_states_are_those_of_the_whole_model(made: MadeHunyuan) -> None:
    """Whose padded batch gives the third-last states; ours has neither padding nor the last layers."""
    family, checkpoint = opened(made)
    tokenizers = family.load_tokenizers(checkpoint)
    encoders = family.load_text_encoders(checkpoint, dtype=torch.float32, device="cpu")
    captions = ["a cat", 'a photo of the dog with "SALE"', ""]
    tokens = family.tokenize(tokenizers, captions, max_token_length=None, weighted=False)
    with torch.no_grad():
        found = family.encode_text(encoders, tokens, clip_skip=None)
        expected = whole_qwen(made)(
            input_ids=tokens["vlm_ids"], attention_mask=tokens["vlm_mask"], output_hidden_states=True
        ).hidden_states[-3][:, qwen.START :]
        glyphs = encoders[1](tokens["byt5_ids"][1:2], attention_mask=tokens["byt5_mask"][1:2]).last_hidden_state
    seen = found["vlm_mask"].bool()
    torch.testing.assert_close(found["vlm_embed"][seen], expected[seen], rtol=0, atol=1e-5)
    assert found["byt5_mask"].any(dim=1).tolist() == [False, True, False]
    torch.testing.assert_close(found["byt5_embed"][1], glyphs[0], rtol=0, atol=1e-5)
    # each caption by itself gives the same bits
    for place, caption in enumerate(captions):
        alone = family.tokenize(tokenizers, [caption], max_token_length=None, weighted=False)
        with torch.no_grad():
            states = family.encode_text(encoders, alone, clip_skip=None)["vlm_embed"][0]
        assert torch.equal(states, found["vlm_embed"][place, : len(states)])
    extras = family.text.extras({name: tensor[1] for name, tensor in found.tensors.items()})
    assert bool(extras["ocr_mask"])


def test_places_and_forms_of_the_text_encoders(made: MadeHunyuan) -> None:
    plain, on_cpu = opened(made)[0], opened(made, fp8_vl=True, text_encoder_cpu=True)[0]
    checkpoint = opened(made)[1]
    encoders = on_cpu.load_text_encoders(checkpoint, dtype=torch.float32, device="cpu")
    assert all(getattr(encoder, STAYS, False) for encoder in encoders)
    assert isinstance(encoders[0].layers[0].self_attn.q_proj, StoredLinear)
    assert not any(isinstance(module, StoredLinear) for module in encoders[1].modules())
    tokens = plain.tokenize(plain.load_tokenizers(checkpoint), ["a cat"], max_token_length=None, weighted=False)
    exact = plain.load_text_encoders(checkpoint, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        states = [plain.encode_text(models, tokens, clip_skip=None)["vlm_embed"] for models in (exact, encoders)]
    difference = (states[0] - states[1]).norm() / states[0].norm()
    assert 0 < difference < 0.1
    half = plain.load_text_encoder(checkpoint, 0, dtype=torch.float16, device="cpu")
    assert half.embed_tokens.weight.dtype == torch.bfloat16  # its states do not fit in float16


def test_published_files_are_those_of_the_tables() -> None:
    config = qwen.infer_config(
        {name.removeprefix("model."): s for name, s in table("qwen25_vl_7b").items() if name.startswith("model.")}
    )
    expected = {"hidden_size": 3584, "num_hidden_layers": 26, "num_attention_heads": 28, "num_key_value_heads": 4}
    assert config.items() >= expected.items()
    with torch.device("meta"):
        model = qwen.build_qwen(config)
    shapes = table("qwen25_vl_7b")
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == {
        name: shapes[f"model.{name}"] for name in model.state_dict()
    }
    from library.architectures.common import t5

    assert t5.infer_t5_config(table("byt5_small_glyph_encoder"))["d_model"] == 1472


def test_another_tokenizer_is_named(made: MadeHunyuan, tmp_path: Path) -> None:
    make_tiny_tokenizer(tmp_path / QWEN_TOKENIZER)
    with pytest.raises(UserError, match=r"not the tokenizer of Qwen2\.5-VL"):
        qwen.load_tokenizer(tmp_path / QWEN_TOKENIZER)
