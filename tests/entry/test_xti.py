"""A word with vectors for each layer of the U-Net (XTI), trained and used to generate by the real scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.entry.full.test_step import Seen, their_clip, their_unet
from tests.fixtures.families import SD
from tests.fixtures.runs import logged, make_images, run_script, write_dataset
from tests.fixtures.tiny_sd import make_tiny_sd
from tests.fixtures.whole import Whole

WORD = {"token_string": "qux", "init_word": "cat", "num_vectors_per_token": 2, "save_model_as": "safetensors"}
LAYERS = ["IN01", "MID", "OUT02", "OUT03"]  # of the tiny U-Net, in the order in which they run


@pytest.fixture(scope="module")
def xti(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    torch.set_num_threads(1)
    return Whole("train_textual_inversion_XTI", SD, SD.make(tmp_path_factory.mktemp("xti")))


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    folder = make_images(tmp_path / "images", sizes=((64, 64), (64, 64)))
    for caption in folder.glob("*.txt"):
        caption.write_text("a photo of qux dog")
    return write_dataset(tmp_path / "data.toml", folder, dataset="batch_size = 2")


def context_by_layer(unet: nn.Module, contexts: dict[str, Tensor]) -> None:
    """Let each cross-attention of a diffusers U-Net read its own text, by its processor."""
    paths = [
        "down_blocks.0.attentions.0",
        "mid_block.attentions.0",
        "up_blocks.1.attentions.0",
        "up_blocks.1.attentions.1",
    ]
    for name, path in zip(LAYERS, paths, strict=True):
        attention = unet.get_submodule(f"{path}.transformer_blocks.0.attn2")
        inner = attention.processor

        def processor(attn: Any, hidden: Tensor, *_: Any, inner: Any = inner, name: str = name, **__: Any) -> Tensor:
            return inner(attn, hidden, encoder_hidden_states=contexts[name])

        attention.set_processor(processor)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_is_that_of_a_plain_loop(
    tmp_path: Path, xti: Whole, dataset: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    from diffusers import DDPMScheduler
    from transformers import CLIPTokenizer

    seen = Seen(monkeypatch)
    descent = {"optimizer_type": "torch.optim.SGD", "learning_rate": 1.0, "max_grad_norm": 0, "max_train_steps": 1}
    xti.train(dataset, tmp_path, **WORD, **descent, gradient_checkpointing=checkpointing)
    path = xti.model.path
    unet, clip = their_unet(path), their_clip(path)
    folder = xti.model.tokenizer_cache_dir / "openai_clip-vit-large-patch14"  # type: ignore[attr-defined]
    tokenizer = CLIPTokenizer.from_pretrained(str(folder))
    init = tokenizer("cat", add_special_tokens=False).input_ids
    names = {layer: [f"qux{'ab'[i]}{number}q" for i in range(2)] for number, layer in enumerate(LAYERS)}
    assert tokenizer.add_tokens([name for layer in LAYERS for name in names[layer]]) == 8
    clip.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    table = clip.get_input_embeddings().weight
    ids = {layer: tokenizer.convert_tokens_to_ids(names[layer]) for layer in LAYERS}
    with torch.no_grad():
        for layer in LAYERS:
            table[ids[layer]] = table[[init[i % len(init)] for i in range(2)]].clone()
    before = table.detach().clone()
    contexts = {}
    for layer in LAYERS:
        captions = [caption.replace("qux", " ".join(names[layer])) for caption in seen.captions]
        read = tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        contexts[layer] = clip(read).last_hidden_state
    context_by_layer(unet, contexts)
    schedule = DDPMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    latents, noise, timesteps = seen.latents[0], seen.noise[0], seen.timesteps[0]
    prediction = unet(schedule.add_noise(latents, noise, timesteps), timesteps, contexts["MID"]).sample
    loss = F.mse_loss(prediction, noise)
    loss.backward()
    assert logged(tmp_path, "loss/current") == pytest.approx([loss.item()], rel=1e-6)
    saved = load_file(tmp_path / "tiny.safetensors")
    assert set(saved) == set(LAYERS)
    for layer in LAYERS:
        moved = before[ids[layer]] - saved[layer]
        assert moved.abs().max() > 1e-6
        torch.testing.assert_close(moved, table.grad[ids[layer]], rtol=1e-3, atol=1e-6)


def test_gen_img_generates_with_it(tmp_path: Path, xti: Whole, dataset: Path) -> None:
    """Each layer's vectors matter; a file with the same vectors in all layers is a plain embedding."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("qux --w 64 --h 64 --s 2 --d 1\n")
    xti.train(dataset, tmp_path / "out", **WORD, output_name="qux", learning_rate=0.5, sample_prompts=prompts,
              sample_every_n_steps=2)  # fmt: skip
    assert len(list((tmp_path / "out" / "sample").glob("*.png"))) == 1
    trained = load_file(tmp_path / "out" / "qux.safetensors")
    files = {"trained": trained, "same": dict.fromkeys(LAYERS, trained["MID"])}
    for name, tensors in files.items():
        (tmp_path / name).mkdir()
        save_file({layer: tensor.clone() for layer, tensor in tensors.items()}, tmp_path / name / "qux.safetensors")
    (tmp_path / "plain").mkdir()
    save_file({"emb_params": trained["MID"]}, tmp_path / "plain" / "qux.safetensors")
    images = {}
    for name in ("trained", "same", "plain"):
        flag = "--textual_inversion_embeddings" if name == "plain" else "--XTI_embeddings"
        done = run_script(
            "gen_img.py",
            *("--ckpt", xti.model.path, "--tokenizer_cache_dir", xti.model.flags["tokenizer_cache_dir"]),
            *("--prompt", "qux --d 1 --n a dog", "--outdir", tmp_path / name / "images", "--W", 64, "--H", 64),
            *("--steps", 2, "--images_per_prompt", 1, flag, tmp_path / name / "qux.safetensors"),
        )
        assert done.code == 0, done.text
        images[name] = Image.open(next((tmp_path / name / "images").glob("*.png"))).tobytes()
    assert images["same"] == images["plain"] != images["trained"]


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"emb_params": (2, 32)}, "holds no vectors for each layer (IN01 to OUT11); give a file of XTI"),
        (dict.fromkeys(LAYERS, (3, 32)), "holds 3 vectors of 32 numbers, needed are 2 of 32"),
        (dict.fromkeys(LAYERS[:3], (2, 32)), "has other layers than the model (OUT03)"),
    ],
)
def test_weights_that_do_not_fit(
    tmp_path: Path,
    xti: Whole,
    dataset: Path,
    capsys: pytest.CaptureFixture[str],
    tensors: dict[str, tuple[int, ...]],
    words: str,
) -> None:
    file = tmp_path / "start.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, file)
    with pytest.raises(SystemExit):
        xti.train(dataset, tmp_path / "out", **{**WORD, "init_word": None}, weights=file)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert words in line


def test_the_published_layers() -> None:
    from library.architectures.common.ldm_unet import build_unet, text_layers
    from tests.fixtures.tiny_sd import diffusers_configs, full_sizes

    with torch.device("meta"):
        layers = text_layers(build_unet(diffusers_configs(full_sizes(v2=False))["unet"]))
    published = "IN01 IN02 IN04 IN05 IN07 IN08 MID OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 OUT11"
    assert list(layers) == published.split() and all(len(modules) == 1 for modules in layers.values())


@pytest.mark.slow
def test_v2_is_trained(tmp_path: Path, dataset: Path) -> None:
    model = make_tiny_sd(tmp_path / "model" / "tiny.safetensors", v2=True)
    word = Whole("train_textual_inversion_XTI", SD, model)
    word.train(dataset, tmp_path / "out", **WORD, v2=True)
    assert set(load_file(tmp_path / "out" / "tiny.safetensors")) == set(LAYERS)
