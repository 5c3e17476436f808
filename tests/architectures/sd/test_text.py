"""Windows of tokens, skipped layers, weights: against direct calls of transformers and torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from library.architectures.common import clip_text
from library.architectures.conditioning import CaptionLength
from library.architectures.sd import SD, text
from library.errors import UserError
from tests.fixtures.tiny_sd import make_tiny_sd, make_tiny_tokenizer

START, END = 523, 524
CAT, DOG, PHOTO = 518, 0, 521


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, object]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {v2: text.load_tokenizer(make_tiny_tokenizer(root / str(v2), v2=v2), v2=v2) for v2 in (False, True)}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, tuple[Path, nn.Module]]:
    root = tmp_path_factory.mktemp("models")
    found = {}
    for v2 in (False, True):
        made = make_tiny_sd(root / f"{v2}.safetensors", v2=v2)
        checkpoint = SD.inspect(
            str(made.path), v2=v2, v_parameterization=False, vae=None, tokenizer_cache_dir=str(made.tokenizer_cache_dir)
        )
        found[v2] = made.path, SD.load_text_encoders(checkpoint, dtype=torch.float32, device="cpu")[0]
    return found


def ids_of(tokenizers, captions: list[str], *, v2: bool = False, length: int | None = None) -> Tensor:
    return SD.tokenize([tokenizers[v2]], captions, max_token_length=length, weighted=False)["input_ids"]


@pytest.mark.parametrize("v2", [False, True])
def test_short_captions_are_what_the_tokenizer_makes_of_them(tokenizers, v2: bool) -> None:
    captions = ["a photo of the cat", "", "cat " * 100]
    expected = tokenizers[v2](captions, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    ids = ids_of(tokenizers, captions, v2=v2)
    assert ids.shape == (3, 1, 77) and ids.dtype == torch.int64
    assert torch.equal(ids[:, 0], expected.input_ids)


@pytest.mark.parametrize(("v2", "padding"), [(False, END), (True, 0)])
def test_long_captions_fill_windows(tokenizers, v2: bool, padding: int) -> None:
    ids = ids_of(tokenizers, ["cat " * 80 + "photo"], v2=v2, length=225)
    cat, photo = tokenizers[v2]("cat photo", add_special_tokens=False).input_ids
    assert ids.shape == (1, 3, 77)
    assert ids[0, 0].tolist() == [START] + [cat] * 75 + [END]
    assert ids[0, 1].tolist() == [START] + [cat] * 5 + [photo, END] + [padding] * 69
    assert ids[0, 2].tolist() == [START, END] + [padding] * 75
    assert ids_of(tokenizers, ["cat " * 400], v2=v2, length=150).shape == (1, 2, 77)


def test_a_window_is_never_split_into_one_more(tokenizers) -> None:
    ids = ids_of(tokenizers, ["cat " * 150], length=150)
    assert ids[0, :, -1].tolist() == [END, END]
    assert (ids[0, :, 1:-1] == ids[0, 0, 1]).all()


def clip_oracle(path: Path, ids: Tensor, layers: int) -> Tensor:
    """transformers' own model, built with ``layers`` layers from the file's tensors."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=600, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=1,
        hidden_act="quick_gelu", bos_token_id=START, eos_token_id=END,
    )  # fmt: skip
    model = CLIPTextModel(config).eval()
    root = "cond_stage_model.transformer.text_model."
    tensors = {k.removeprefix(root): t for k, t in load_file(path).items() if k.startswith(root)}
    model.load_state_dict({k: tensors[k] for k in model.state_dict()})
    return model(ids).last_hidden_state


def openclip_oracle(path: Path, ids: Tensor, layers: int) -> Tensor:
    """OpenCLIP's text transformer with torch's own attention, straight from the file's tensors."""
    root = "cond_stage_model.model."
    w = {k.removeprefix(root): t for k, t in load_file(path).items() if k.startswith(root)}
    width = w["positional_embedding"].shape[1]
    x = w["token_embedding.weight"][ids] + w["positional_embedding"]  # (B, 77, D)
    causal = torch.full((77, 77), float("-inf")).triu(1)
    for layer in range(layers):
        b = {k.removeprefix(f"transformer.resblocks.{layer}."): t for k, t in w.items()}
        attention = nn.MultiheadAttention(width, 1, batch_first=True)
        attention.load_state_dict({k.removeprefix("attn."): t for k, t in b.items() if k.startswith("attn.")})
        y = F.layer_norm(x, (width,), b["ln_1.weight"], b["ln_1.bias"])
        x = x + attention(y, y, y, attn_mask=causal, need_weights=False)[0]
        y = F.layer_norm(x, (width,), b["ln_2.weight"], b["ln_2.bias"])
        y = F.gelu(F.linear(y, b["mlp.c_fc.weight"], b["mlp.c_fc.bias"]))
        x = x + F.linear(y, b["mlp.c_proj.weight"], b["mlp.c_proj.bias"])
    return F.layer_norm(x, (width,), w["ln_final.weight"], w["ln_final.bias"])


@pytest.mark.parametrize(("clip_skip", "layers"), [(None, 2), (1, 2), (2, 1)])
@pytest.mark.parametrize("v2", [False, True])
def test_skipped_layers_still_get_the_final_norm(tokenizers, encoders, v2: bool, clip_skip, layers: int) -> None:
    path, encoder = encoders[v2]
    ids = ids_of(tokenizers, ["a photo of the cat", "dog"], v2=v2)
    with torch.no_grad():
        context = SD.encode_text([encoder], {"input_ids": ids}, clip_skip=clip_skip)["context"]
        # an OpenCLIP file holds three blocks here, of which the model takes two
        expected = (openclip_oracle if v2 else clip_oracle)(path, ids[:, 0], layers)
    torch.testing.assert_close(context, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("v2", [False, True])
def test_windows_are_encoded_apart_and_joined(tokenizers, encoders, v2: bool) -> None:
    _, encoder = encoders[v2]
    ids = ids_of(tokenizers, ["cat " * 90, "dog"], v2=v2, length=225)
    with torch.no_grad():
        context = SD.encode_text([encoder], {"input_ids": ids}, clip_skip=None)["context"]
        windows = [encoder(ids[:, i]).last_hidden_state for i in range(3)]
    assert context.shape == (2, 227, 32)
    torch.testing.assert_close(context[:, 0], windows[0][:, 0])
    for i in range(3):
        torch.testing.assert_close(context[:, 1 + 75 * i : 76 + 75 * i], windows[i][:, 1:76])
    torch.testing.assert_close(context[:, -1], windows[2][:, -1])


def test_weights_lie_on_their_tokens(tokenizers) -> None:
    tokens = SD.tokenize([tokenizers[False]], ["a (cat:1.5) of [dog]", "photo"], max_token_length=None, weighted=True)
    plain = SD.tokenize([tokenizers[False]], ["a cat of dog", "photo"], max_token_length=None, weighted=False)
    assert torch.equal(tokens["input_ids"], plain["input_ids"])
    assert tokens["weights"].shape == (2, 1, 77)
    assert tokens["weights"][0, 0, :6].tolist() == pytest.approx([1, 1, 1.5, 1, 1 / 1.1, 1])
    assert (tokens["weights"][0, 0, 5:] == 1).all() and (tokens["weights"][1] == 1).all()


def test_weights_scale_states_and_keep_the_mean(tokenizers, encoders) -> None:
    _, encoder = encoders[False]
    with torch.no_grad():
        tokens = SD.tokenize([tokenizers[False]], ["a (cat:1.5) dog", "a dog"], max_token_length=150, weighted=True)
        weighted = SD.encode_text([encoder], tokens, clip_skip=None)["context"]
        plain = SD.encode_text([encoder], {"input_ids": tokens["input_ids"]}, clip_skip=None)["context"]
    torch.testing.assert_close(weighted.mean(dim=(1, 2)), plain.mean(dim=(1, 2)))
    assert torch.equal(weighted[1], plain[1])
    ratio = weighted[0] / plain[0]
    torch.testing.assert_close(ratio[2] / ratio[1], torch.full((32,), 1.5))


def test_gradient_checkpointing_gives_the_same_gradients(tokenizers, tmp_path: Path) -> None:
    made = make_tiny_sd(tmp_path / "model.safetensors")
    checkpoint = SD.inspect(
        str(made.path), v2=False, v_parameterization=False, vae=None, tokenizer_cache_dir=str(made.tokenizer_cache_dir)
    )
    tokens = SD.tokenize([tokenizers[False]], ["a photo of the cat"], max_token_length=None, weighted=False)
    gradients, calls = [], []
    for checkpointing in (False, True):
        encoder = SD.load_text_encoders(checkpoint, dtype=torch.float32, device="cpu")[0]
        unet = SD.load_denoiser(checkpoint, dtype=torch.float32, device="cpu")
        if checkpointing:
            SD.enable_gradient_checkpointing(unet, [encoder])
        scale = nn.Parameter(torch.ones(()))  # stands for an adapter: the base weights stay frozen
        linear = encoder.encoder.layers[0].self_attn.q_proj
        frozen = linear.forward
        linear.forward = lambda x, frozen=frozen, scale=scale: frozen(x) * scale
        counted = []
        encoder.encoder.layers[0].layer_norm1.register_forward_pre_hook(lambda *_, counted=counted: counted.append(1))
        context = SD.encode_text([encoder], tokens, clip_skip=2)["context"]
        context.square().sum().backward()
        gradients.append(scale.grad)
        calls.append(len(counted))
    torch.testing.assert_close(gradients[0], gradients[1])
    assert calls == [1, 2]


@pytest.mark.parametrize("length", [None, 150])
@pytest.mark.parametrize("weighted", [False, True])
def test_what_is_cut_off_a_caption(tokenizers, length: int | None, weighted: bool) -> None:
    limit = length or 75

    def measure(caption: str) -> CaptionLength:
        return SD.caption_length([tokenizers[False]], caption, max_token_length=length, weighted=weighted)

    assert measure("a photo of the Cat") == CaptionLength(5, limit, "")
    assert measure("cat " * limit) == CaptionLength(limit, limit, "")
    long = "cat " * (limit - 1) + "dog Dog, the  end é"
    found = measure(long)
    assert found.limit == limit and found.tokens > limit and found.cut == "Dog, the  end é"
    if weighted:
        assert measure("(" + "cat " * limit + ":1.2) [the] dog").cut == "the dog"
    # what is kept makes the very tokens that the model is given
    kept = long.removesuffix(found.cut)
    tokens = [SD.tokenize([tokenizers[False]], [c], max_token_length=length, weighted=weighted) for c in (long, kept)]
    assert torch.equal(tokens[0]["input_ids"], tokens[1]["input_ids"])


def test_tokenizers_of_a_folder(tmp_path: Path) -> None:
    folder = make_tiny_tokenizer(tmp_path / "model" / "tokenizer")
    for place in (folder, folder.parent):
        (tokenizer,) = SD.tokenizers_in(place, v2=True)
        assert tokenizer.pad_token == clip_text.OPENCLIP_PADDING
    with pytest.raises(UserError, match="--tokenizer .*vocab.json"):
        SD.tokenizers_in(tmp_path, v2=False)
