"""A new word trained by the real scripts: only its rows move, files are the published ones, and others read them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.training.kinds.embedding import OBJECT_TEMPLATES, Embedding
from tests.entry.full.test_step import Seen, their_clip, their_unet
from tests.fixtures.families import SD, SDXL
from tests.fixtures.killed import train_killed
from tests.fixtures.runs import logged, make_images, metadata_of, run_script, write_dataset
from tests.fixtures.tiny_sdxl import make_tiny_sdxl
from tests.fixtures.whole import Whole

SCRIPTS = {
    "sd": ("train_textual_inversion", SD),
    "sdxl": ("sdxl_train_textual_inversion", SDXL),
    "xti": ("train_textual_inversion_XTI", SD),
}
WORD = {"token_string": "qux", "init_word": "cat", "num_vectors_per_token": 3, "save_model_as": "safetensors"}


@pytest.fixture(
    scope="module", params=["sd", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sdxl", "xti"))]
)
def word(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    torch.set_num_threads(1)
    script, family = SCRIPTS[request.param]
    return Whole(script, family, family.make(tmp_path_factory.mktemp(request.param)))


@pytest.fixture(scope="module")
def sd_word(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    torch.set_num_threads(1)
    script, family = SCRIPTS["sd"]
    return Whole(script, family, family.make(tmp_path_factory.mktemp("sd_word")))


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    folder = make_images(tmp_path / "images")
    for caption in folder.glob("*.txt"):
        caption.write_text("a photo of qux dog")
    return write_dataset(tmp_path / "data.toml", folder, dataset="batch_size = 2")


def names_of(word: Whole) -> list[str]:
    if word.script.endswith("XTI"):
        return ["IN01", "MID", "OUT02", "OUT03"]
    return ["clip_l", "clip_g"] if word.family is SDXL else ["emb_params"]


def test_a_word_is_trained_and_resumed(tmp_path: Path, word: Whole, dataset: Path) -> None:
    """Killed twice it ends with the bits of a run left alone; samples, averages and validation work as ever."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo of qux --w 64 --h 64 --s 2 --d 1\n")
    options = {
        **WORD, "learning_rate": 0.05, "max_train_steps": 6, "save_every_n_steps": 2, "save_state": True,
        "ema_decay": 0.9, "sample_prompts": prompts, "sample_every_n_steps": 3, "optimizer_args": ["weight_decay=0.1"],
        "output_name": "qux",
    }  # fmt: skip
    word.train(dataset, tmp_path / "alone", **options)
    assert {Image.open(image).size for image in (tmp_path / "alone" / "sample").glob("*.png")} == {(64, 64)}
    again = partial(word.train, dataset, tmp_path / "out", **options)
    train_killed(again, tmp_path / "out", steps=[3, 5], name="qux")
    for name in ("qux", "qux-ema"):
        alone, resumed = (load_file(tmp_path / folder / f"{name}.safetensors") for folder in ("alone", "out"))
        assert list(alone) == sorted(names_of(word)) or set(alone) == set(names_of(word))
        assert all(torch.equal(tensor, resumed[key]) for key, tensor in alone.items())
        assert all(tensor.shape[0] == 3 and tensor.dtype == torch.float32 for tensor in alone.values())
    assert logged(tmp_path / "alone", "lr/text_encoder_1") == pytest.approx([0.05] * 6)
    entries = metadata_of(tmp_path / "alone" / "qux.safetensors")
    assert "/textual-inversion" in entries["modelspec.architecture"]


def test_every_form_is_read_again(tmp_path: Path, word: Whole, dataset: Path) -> None:
    """By --weights, and by gen_img.py; the vectors of --weights come back unchanged with a rate that moves nothing."""
    options = {**WORD, "max_train_steps": 1, "learning_rate": 0.05}
    saved: dict[str, Tensor] = {}
    for form in ("pt", "ckpt", "safetensors"):
        word.train(dataset, tmp_path / form, **{**options, "save_model_as": form, "output_name": None})
        file = tmp_path / form / f"qux.{form}"
        read = load_file(file) if form == "safetensors" else torch.load(file, weights_only=True)
        assert set(read) == set(names_of(word))
        saved = saved or dict(read)
        assert all(torch.equal(tensor, saved[key]) for key, tensor in read.items())
        word.train(
            dataset, tmp_path / f"again_{form}", weights=file, **{**options, "init_word": None, "learning_rate": 1e-30}
        )
        again = load_file(tmp_path / f"again_{form}" / "tiny.safetensors")
        assert all(torch.equal(tensor, saved[key]) for key, tensor in again.items())


@pytest.mark.slow
def test_gen_img_draws_with_it(tmp_path: Path, sd_word: Whole, dataset: Path) -> None:
    sd_word.train(dataset, tmp_path / "out", **WORD, output_name="qux", learning_rate=0.5)
    images = []
    for name, file in (("with", "qux.safetensors"), ("without", None)):
        words: list[Any] = ["--ckpt", sd_word.model.path, "--prompt", "qux --d 1", "--outdir", tmp_path / name]
        words += ["--tokenizer_cache_dir", sd_word.model.tokenizer_cache_dir]  # type: ignore[attr-defined]
        words += ["--W", 64, "--H", 64, "--steps", 2, "--images_per_prompt", 1]
        if file:
            words += ["--textual_inversion_embeddings", tmp_path / "out" / file]
        done = run_script("gen_img.py", *words)
        assert done.code == 0, done.text
        images.append(Image.open(next((tmp_path / name).glob("*.png"))).tobytes())
    assert images[0] != images[1]


def test_a_step_is_that_of_a_plain_loop(
    tmp_path: Path, sd_word: Whole, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With plain SGD at a rate of 1 the rows move by their gradient; the vocabulary has none."""
    from diffusers import DDPMScheduler
    from transformers import CLIPTokenizer

    seen = Seen(monkeypatch)
    descent = {"optimizer_type": "torch.optim.SGD", "learning_rate": 1.0, "max_grad_norm": 0, "max_train_steps": 1}
    sd_word.train(dataset, tmp_path, **WORD, **descent)
    path = sd_word.model.path
    unet, clip = their_unet(path), their_clip(path)
    folder = sd_word.model.tokenizer_cache_dir / "openai_clip-vit-large-patch14"  # type: ignore[attr-defined]
    tokenizer = CLIPTokenizer.from_pretrained(str(folder))
    init = tokenizer("cat", add_special_tokens=False).input_ids
    names = ["quxa", "quxb", "quxc"]
    assert tokenizer.add_tokens(names) == 3
    clip.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    table = clip.get_input_embeddings().weight
    ids = tokenizer.convert_tokens_to_ids(names)
    with torch.no_grad():
        table[ids] = table[[init[i % len(init)] for i in range(3)]].clone()
    before = table.detach()[ids].clone()
    captions = [caption.replace("qux", " ".join(names)) for caption in seen.captions]
    read = tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    schedule = DDPMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    latents, noise, timesteps = seen.latents[0], seen.noise[0], seen.timesteps[0]
    prediction = unet(schedule.add_noise(latents, noise, timesteps), timesteps, clip(read).last_hidden_state).sample
    loss = F.mse_loss(prediction, noise)
    loss.backward()
    assert logged(tmp_path, "loss/current") == pytest.approx([loss.item()], rel=1e-6)
    moved = before - load_file(tmp_path / "tiny.safetensors")["emb_params"]
    assert moved.abs().max() > 1e-5
    torch.testing.assert_close(moved, table.grad[ids], rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_a_step_of_sdxl_is_that_of_a_plain_loop(tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The vectors of both encoders, against diffusers' pipeline of the same folder with added words."""
    from diffusers import DDPMScheduler, StableDiffusionXLPipeline

    made = make_tiny_sdxl(tmp_path / "model", layout="diffusers")
    seen = Seen(monkeypatch)
    descent = {"optimizer_type": "torch.optim.SGD", "learning_rate": 1.0, "max_grad_norm": 0, "max_train_steps": 1}
    Whole("sdxl_train_textual_inversion", SDXL, made).train(dataset, tmp_path / "out", **WORD, **descent)
    pipeline = StableDiffusionXLPipeline.from_pretrained(str(made.path), torch_dtype=torch.float32)
    tables, places, before = {}, {}, {}
    names = ["quxa", "quxb", "quxc"]
    for name, tokenizer, encoder in (
        ("clip_l", pipeline.tokenizer, pipeline.text_encoder), ("clip_g", pipeline.tokenizer_2, pipeline.text_encoder_2)
    ):  # fmt: skip
        init = tokenizer("cat", add_special_tokens=False).input_ids
        assert tokenizer.add_tokens(names) == 3
        encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        tables[name] = encoder.get_input_embeddings().weight
        places[name] = tokenizer.convert_tokens_to_ids(names)
        with torch.no_grad():
            tables[name][places[name]] = tables[name][[init[i % len(init)] for i in range(3)]].clone()
        tables[name].requires_grad_()
        before[name] = tables[name].detach()[places[name]].clone()
    # the tiny tokenizer's end token is not the largest id of the vocabulary
    pipeline.text_encoder_2.text_model.eos_token_id = pipeline.tokenizer_2.eos_token_id
    captions = [caption.replace("qux", " ".join(names)) for caption in seen.captions]
    context, _, pooled, _ = pipeline.encode_prompt(captions, do_classifier_free_guidance=False)
    schedule = DDPMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    latents, noise, timesteps = seen.latents[0], seen.noise[0], seen.timesteps[0]
    height, width = (8 * side for side in latents.shape[-2:])
    sizes = torch.tensor([[*seen.sizes[i], *seen.corners[i], height, width] for i in range(len(captions))])
    prediction = pipeline.unet.requires_grad_(False)(
        schedule.add_noise(latents, noise, timesteps), timesteps, context,
        added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes},
    ).sample  # fmt: skip
    loss = F.mse_loss(prediction, noise)
    loss.backward()
    assert logged(tmp_path / "out", "loss/current") == pytest.approx([loss.item()], rel=1e-6)
    saved = load_file(tmp_path / "out" / "tiny.safetensors")
    assert set(saved) == set(tables)
    for name, tensor in saved.items():
        moved = before[name] - tensor
        assert moved.abs().max() > 1e-6
        torch.testing.assert_close(moved, tables[name].grad[places[name]], rtol=1e-3, atol=1e-6, msg=name)


def test_templates_replace_captions(
    tmp_path: Path, sd_word: Whole, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one in each use, keyed by it; images need no captions."""
    for caption in (tmp_path / "images").glob("*.txt"):
        caption.unlink()
    texts = []
    for name in ("one", "two"):
        seen = Seen(monkeypatch)
        sd_word.train(dataset, tmp_path / name, **WORD, use_object_template=True, max_train_steps=6)
        texts.append(seen.captions[:12])
        monkeypatch.undo()
    assert texts[0] == texts[1] and len(set(texts[0])) > 4
    assert set(texts[0]) <= {template.format("qux") for template in OBJECT_TEMPLATES}


def test_captions_without_the_word_teach_it_nothing(tmp_path: Path, sd_word: Whole, dataset: Path) -> None:
    """Dropped ones and those of regularization images; the loss is that of the images all the same."""
    others = make_images(tmp_path / "others", [(64, 64)] * 2)
    moved = []
    for rate in (1.0, 0.5):
        data = tmp_path / f"{rate}.toml"
        data.write_text(
            dataset.read_text()
            + f"caption_dropout_rate = {rate}\n[[datasets.subsets]]\nimage_dir = '{others}'\nis_reg = true\n"
            "class_tokens = 'dog'\n"
        )
        descent = {"optimizer_type": "torch.optim.SGD", "learning_rate": 1.0, "max_grad_norm": 0, "max_train_steps": 4}
        sd_word.train(data, tmp_path / str(rate), **WORD, **descent, save_every_n_steps=1, prior_loss_weight=0.5)
        assert all(loss > 0 for loss in logged(tmp_path / str(rate), "loss/current"))
        first, last = (
            load_file(tmp_path / str(rate) / f"tiny{step}.safetensors")["emb_params"] for step in ("-step00000001", "")
        )
        moved.append(not torch.equal(first, last))
    assert moved == [False, True]


@pytest.mark.parametrize("count", [1, 20])
def test_captions_that_the_word_makes_too_long_are_named(
    tmp_path: Path, sd_word: Whole, dataset: Path, count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images" / "0.txt").write_text("a " * 60 + "qux a cat")
    options = {**WORD, "num_vectors_per_token": count, "max_train_steps": 1}
    sd_word.train(dataset, tmp_path / "out", **options)
    said = "".join(capsys.readouterr())
    assert ("the captions of 1 image are cut, as the text encoder reads 75 tokens" in said) == (count == 20), said
    assert load_file(tmp_path / "out" / "tiny.safetensors")["emb_params"].shape == (count, 32)
    if count == 20:
        sd_word.train(dataset, tmp_path / "long", **options, max_token_length=150)
        assert "are cut" not in "".join(capsys.readouterr())


@pytest.mark.slow
@pytest.mark.parametrize("token", ["<Cat-Toy>", "Café-猫", "x2024"])
def test_a_word_of_any_letters(tmp_path: Path, sd_word: Whole, dataset: Path, token: str) -> None:
    """It works as captions write it, in a file of its name, and in prompts."""
    for caption in (tmp_path / "images").glob("*.txt"):
        caption.write_text(f"a photo of {token.upper()}, dog", encoding="utf-8")
    options = {**WORD, "token_string": token, "output_name": None, "learning_rate": 0.5}
    sd_word.train(dataset, tmp_path / "out", **options)
    images = []
    for name, more in (
        ("with", ["--textual_inversion_embeddings", tmp_path / "out" / f"{token}.safetensors"]),
        ("not", []),
    ):
        done = run_script(
            "gen_img.py", "--ckpt", sd_word.model.path, "--prompt", f"{token} --d 1", "--outdir", tmp_path / name,
            "--tokenizer_cache_dir", sd_word.model.flags["tokenizer_cache_dir"], "--W", 64, "--H", 64, "--steps", 2,
            "--images_per_prompt", 1, *more,
        )  # fmt: skip
        assert done.code == 0, done.text
        images.append(Image.open(next((tmp_path / name).glob("*.png"))).tobytes())
    assert images[0] != images[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"token_string": None}, "--token_string: name the new word"),
        ({"token_string": "my/cat"}, "--token_string my/cat: must have no / and no"),
        ({"token_string": "qu"}, "--token_string qu: no caption has this word"),  # only as a part of a longer one
        ({"token_string": "dog"}, '--token_string dog: "dog" is a known word already'),
        ({"weights": "LORA"}, "holds 4 words or tensors (lora_0, lora_1, lora_2, ...), not one embedding"),
        ({"token_string": "my cat"}, "--token_string 'my cat': must be one word without spaces"),
        ({"token_string": "cat"}, '--token_string cat: "cat" is a known word already'),
        ({"token_string": "absent"}, "--token_string absent: no caption has this word"),
        ({"init_word": None}, "--init_word: name a known word"),
        ({"num_vectors_per_token": 76}, "--num_vectors_per_token 76: a caption has 75 tokens"),
        ({"num_vectors_per_token": 0}, "--num_vectors_per_token 0: must be at least 1"),
        ({"cache_text_encoder_outputs": True}, "--cache_text_encoder_outputs: not for textual inversion"),
        ({"use_object_template": True, "use_style_template": True}, "exclude each other"),
        ({"weights": "TWO"}, "holds 2 vectors of 32 numbers, needed are 3 of 32; give --num_vectors_per_token 2"),
        ({"weights": "XL"}, "is an embedding for SDXL; give one for this model"),
    ],
)
def test_mistakes(
    tmp_path: Path,
    sd_word: Whole,
    dataset: Path,
    options: dict[str, Any],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if kind := options.get("weights"):
        file = tmp_path / "weights.safetensors"
        tensors = {
            "TWO": {"emb_params": torch.zeros(2, 32)},
            "XL": {"clip_l": torch.zeros(3, 32), "clip_g": torch.zeros(3, 64)},
            "LORA": {f"lora_{n}": torch.zeros(2, 32) for n in range(4)},
        }
        save_file(tensors[kind], file)
        options = {"weights": file}
    if options.get("token_string") == "cat":
        for caption in (tmp_path / "images").glob("*.txt"):
            caption.write_text("a cat")
    with pytest.raises(SystemExit) as ended:
        sd_word.train(dataset, tmp_path / "out", **{**WORD, **options})
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 2 and len(lines) == 1 and words in lines[0], lines


def test_a_default_that_teaches_nothing_is_named(
    tmp_path: Path, sd_word: Whole, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for rate, optimizer, named in ((2e-6, "AdamW", True), (2e-6, "Prodigy", False), (1e-3, "AdamW", False)):
        options = {"learning_rate": rate, "optimizer_type": optimizer, "dry_run": True}
        sd_word.train(dataset, tmp_path / "out", **{**WORD, **options})
        assert ("teaches a word next to nothing; 1e-3 to 5e-3" in capsys.readouterr().err) == named


def test_the_vocabulary_is_no_parameter(tmp_path: Path, sd_word: Whole, dataset: Path) -> None:
    assert Embedding.keeps_copies and not Embedding.records_run
    sd_word.train(dataset, tmp_path, **WORD, dry_run=True)


def test_diffusers_reads_it(tmp_path: Path, dataset: Path) -> None:
    from diffusers import StableDiffusionPipeline

    from tests.fixtures.tiny_sd import make_tiny_sd

    model = make_tiny_sd(tmp_path / "model", layout="diffusers")
    Whole("train_textual_inversion", SD, model).train(dataset, tmp_path / "out", **WORD, output_name="qux")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "model", local_files_only=True)
    pipeline.load_textual_inversion(str(tmp_path / "out" / "qux.safetensors"), token="qux")
    ids = pipeline.tokenizer.convert_tokens_to_ids(["qux", "qux_1", "qux_2"])
    found = pipeline.text_encoder.get_input_embeddings().weight[ids]
    assert torch.equal(found, load_file(tmp_path / "out" / "qux.safetensors")["emb_params"])
