"""BLIP, GIT and vision-language models: tiny ones in the published layouts, run through the real libraries."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from finetune import make_captions, make_captions_by_git, make_captions_by_vlm
from library.captioning import describing
from library.captioning.prompts import Prompt, read_prompt
from library.captioning.review import doubts
from library.captioning.vlm import one_line
from library.captioning.written_words import without_written_words
from library.errors import UserError
from tests.fixtures.file_tools import refused, run_words
from tests.fixtures.tiny_captioners import (
    write_tiny_blip,
    write_tiny_florence,
    write_tiny_git,
    write_tiny_llava,
    write_tiny_qwen,
)

pytestmark = pytest.mark.usefixtures("own_root_logger")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three images, one of them in an inner folder, and one that is torn."""
    folder = tmp_path / "images"
    (folder / "inner").mkdir(parents=True)
    for place, name in enumerate(("one.png", "two.jpg", "inner/three.webp")):
        pixels = np.random.default_rng(place).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return folder


def texts(folder: Path, ending: str = ".caption") -> dict[str, str]:
    return {path.stem: path.read_text() for path in sorted(folder.rglob(f"*{ending}"))}


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_blip(tmp_path_factory.mktemp("blip"))


@pytest.fixture(scope="module")
def git(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_git(tmp_path_factory.mktemp("git"))


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llava(tmp_path_factory.mktemp("llava"))


# ---- BLIP ----


def test_blip(images: Path, blip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (images, "--caption_weights", blip, "--beam_search", "--max_length", 12)
    run_words(make_captions, *words, "--debug")
    out = capsys.readouterr()
    made = texts(images)
    assert made.keys() == {"one", "two"} and all(text.endswith("\n") and text.strip() for text in made.values())
    assert "torn.png" in out.err and "left out" in out.err and "one.png: " in out.out
    # beams give the model's own answer
    from transformers import BlipForConditionalGeneration, BlipProcessor

    model, processor = BlipForConditionalGeneration.from_pretrained(blip), BlipProcessor.from_pretrained(blip)
    pixels = processor.image_processor(Image.open(images / "one.png"), return_tensors="pt")
    tokens = processor.tokenizer("a picture of ", return_tensors="pt")
    made_by_hand = model.eval().generate(
        **pixels, input_ids=tokens["input_ids"], max_length=12, min_length=5, num_beams=1, do_sample=False
    )
    text = processor.decode(made_by_hand[0], skip_special_tokens=True)
    assert text.startswith("[DEC] a picture of ")
    assert made["one"].strip() == text.removeprefix("[DEC] a picture of").strip()


def test_captions_are_kept_and_the_same_again(images: Path, blip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (images, "--caption_weights", blip, "--max_length", 14, "--recursive", "--caption_extention", "txt")
    run_words(make_captions, *words)
    first = texts(images, ".txt")
    assert first.keys() == {"one", "two", "three"}
    (images / "one.txt").write_text("mine\n")
    (images / "two.txt").unlink()
    run_words(make_captions, *words, "--max_data_loader_n_workers", 0)
    assert texts(images, ".txt") == {**first, "one": "mine\n"}  # sampling depends on the seed and the name alone
    assert "1 written, 2 kept" in capsys.readouterr().err
    run_words(make_captions, *words, "--overwrite", "--seed", 7, "--top_p", 1.0)
    again = texts(images, ".txt")
    assert again["one"] != "mine\n" and again != first
    run_words(
        make_captions, *words, "--overwrite", "--beam_search", "--num_beams", 2, "--batch_size", 2, "--min_length", 12
    )
    assert all(len(text.split()) >= 5 for text in texts(images, ".txt").values())


def test_original_weights_of_blip(images: Path, blip: Path, tmp_path: Path) -> None:
    """The published form: names of timm's ViT, ``model`` in a pickle, tied words."""
    from transformers import BlipForConditionalGeneration

    state = BlipForConditionalGeneration.from_pretrained(blip).state_dict()
    original = {}
    for name, tensor in state.items():
        for pattern, new in (
            (r"^vision_model\.embeddings\.class_embedding$", "visual_encoder.cls_token"),
            (r"^vision_model\.embeddings\.position_embedding$", "visual_encoder.pos_embed"),
            (r"^vision_model\.embeddings\.patch_embedding\.", "visual_encoder.patch_embed.proj."),
            (r"^vision_model\.post_layernorm\.", "visual_encoder.norm."),
            (r"^vision_model\.encoder\.layers\.", "visual_encoder.blocks."),
            (r"\.self_attn\.projection\.", ".attn.proj."),
            (r"\.self_attn\.qkv\.", ".attn.qkv."),
            (r"\.layer_norm([12])\.", r".norm\1."),
        ):
            if name.startswith(("vision_model", "visual_encoder")):
                name = re.sub(pattern, new, name)
        original[name] = tensor
    weights = blip / "model_large_caption.pth"  # beside the tokenizer
    torch.save({"model": original}, weights)
    words = ("--beam_search", "--max_length", 12, "--batch_size", 2)
    run_words(make_captions, images, "--caption_weights", blip, *words, "--caption_extension", ".hf")
    run_words(make_captions, images, "--caption_weights", weights, *words)
    assert texts(images) == texts(images, ".hf") != {}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--caption_weights", "https://example.org/other.pth"], "addresses are not read"),
        (["--num_beams", 0], "--num_beams 0"),
        (["--top_p", 0], "--top_p 0"),
        (["--min_length", 80], "--min_length 80"),
        (["--batch_size", 0], "--batch_size 0"),
        (["--caption_extension", "."], "--caption_extension"),
        (["--on_bad_image", "stop", "--batch_size", 8], "torn.png"),
        (["--device", "gpu"], "--device gpu: no such device"),
        (["--caption_weights", "no/such"], "not in the Hub cache, and the Hub cannot be reached"),
        (["--caption_weights", "none"], "no such folder here"),
    ],
)
def test_mistakes(
    images: Path,
    blip: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[object],
    said: str,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert said in refused(capsys, make_captions, images, "--caption_weights", blip, *words)
    assert not texts(images)


def test_other_files_are_refused(images: Path, tmp_path: Path, git: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in (("junk.pth", b"junk"), ("other.pth", None)):
        path = tmp_path / name
        path.write_bytes(content) if content else torch.save({"model": {"a": torch.zeros(1)}}, path)
        (tmp_path / "tokenizer_config.json").write_text("{}")
        error = refused(capsys, make_captions, images, "--caption_weights", path)
        assert "cannot be read" in error or "holds no BLIP" in error
    (tmp_path / "empty").mkdir()
    assert "transformers'" in refused(capsys, make_captions, images, "--caption_weights", tmp_path / "empty")
    assert "no such folder" in refused(capsys, make_captions, tmp_path / "none")
    assert "has no images" in refused(capsys, make_captions, tmp_path / "empty")


def test_a_dry_run_writes_nothing(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (images / "one.caption").write_text("mine")
    run_words(make_captions, images, "--caption_weights", "no/such", "--dry_run")
    text = capsys.readouterr().err
    assert "would describe: " in text and "dry run: 2 images to describe, 1 kept" in text
    assert texts(images) == {"one": "mine"}


def test_two_images_with_one_caption_file(images: Path, blip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (images / "one.jpg").write_bytes((images / "two.jpg").read_bytes())
    run_words(make_captions, images, "--caption_weights", blip, "--max_length", 8)
    assert "share one.caption" in capsys.readouterr().err


# ---- GIT ----


def test_git(images: Path, git: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoProcessor

    run_words(make_captions_by_git, images, "--model_id", git, "--max_length", 9, "--batch_size", 2)
    model, processor = AutoModelForCausalLM.from_pretrained(git).eval(), AutoProcessor.from_pretrained(git)
    pixels = processor(images=Image.open(images / "two.jpg"), return_tensors="pt")["pixel_values"]
    made = model.generate(pixel_values=pixels, max_length=9, do_sample=False)
    expected = processor.batch_decode(made, skip_special_tokens=True)[0].strip()
    assert texts(images)["two"].strip() == expected != ""
    run_words(make_captions_by_git, images, "--model_id", git, "--remove_words", "--overwrite", "--recursive")
    assert texts(images).keys() == {"one", "two", "three"}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("a shirt with the words cat on it", "a shirt on it"),
        ('a man has the word "hello world" on the shirt', "a man"),
        ("a dog with a sign that says stop on it in a park", "a dog in a park"),
        ("a cup that says 'best dad' on it", "a cup"),
        ("a shirt with the number 12 on it", "a shirt"),
        ("a bus with the number 7 on the front", "a bus"),
        ("a bag word sale on it", "a bag"),
        ("a cat on a sofa", "a cat on a sofa"),
        ("a woman and the letters abc is on the wall", "a woman"),
    ],
)
def test_written_words_are_removed(before: str, after: str) -> None:
    assert without_written_words(before) == after


# ---- vision-language models ----


def test_a_conversation(images: Path, llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    (images / "one.tags").write_text("red cat")
    (tmp_path / "prompt.txt").write_text("# prompt.txt\nthe {text} with {name}\n")
    words = (images, "--model_id", llava, "--prompt_file", tmp_path / "prompt.txt", "--max_new_tokens", 6)
    review = tmp_path / "review.html"
    run_words(
        make_captions_by_vlm, *words, "--system_prompt", "a girl", "--batch_size", 2, "--review", review, "--recursive"
    )
    made = texts(images, ".txt")
    model, processor = AutoModelForImageTextToText.from_pretrained(llava).eval(), AutoProcessor.from_pretrained(llava)
    text = "system : a girl user : <image> the red cat with one assistant : "
    inputs = processor(images=Image.open(images / "one.png"), text=text, return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert made["one"].strip() == processor.decode(answer, skip_special_tokens=True).strip() != ""
    page = review.read_text()
    assert made["three"].strip() in page and "one.png" in page and page.count("data:image/jpeg") == 3
    assert "unreadable" in page and "no caption" in page  # torn.png

    # interrupted and continued: the rest alone is made, and the page has all again
    (images / "one.txt").write_text("mine\n")
    (images / "two.txt").unlink()
    run_words(make_captions_by_vlm, *words, "--system_prompt", "a girl", "--review", review, "--recursive")
    assert texts(images, ".txt") == {**made, "one": "mine\n"} and "mine" in review.read_text()


def test_sampling_is_keyed(images: Path, llava: Path) -> None:
    words = (images, "--model_id", llava, "--max_new_tokens", 8, "--temperature", 1.5, "--top_p", 1.0, "--overwrite")
    run_words(make_captions_by_vlm, *words, "--prompt", "the cat")
    first = texts(images, ".txt")
    run_words(make_captions_by_vlm, *words, "--prompt", "the cat", "--precision", "float")
    assert texts(images, ".txt") == first
    run_words(make_captions_by_vlm, *words, "--prompt", "the cat", "--seed", 1)
    assert texts(images, ".txt") != first


def test_a_model_without_conversations(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_tiny_llava(tmp_path / "plain", chat=False)
    run_words(make_captions_by_vlm, images, "--model_id", folder, "--prompt", "<image> a", "--max_new_tokens", 4)
    assert len(texts(images, ".txt")) == 2
    words = (images, "--model_id", folder, "--overwrite")
    assert "--prompt: the model's processor refuses it" in refused(capsys, make_captions_by_vlm, *words)
    assert "has no conversations" in refused(capsys, make_captions_by_vlm, *words, "--system_prompt", "x")


def test_florence(images: Path, tmp_path: Path) -> None:
    """An encoder and a decoder: the answer has no prompt before it."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder, task = write_tiny_florence(tmp_path / "florence"), "<MORE_DETAILED_CAPTION>"
    words = (images, "--model_id", folder, "--prompt", task, "--max_new_tokens", 7)
    run_words(make_captions_by_vlm, *words, "--batch_size", 2)
    model, processor = AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    inputs = processor(images=Image.open(images / "one.png"), text=task, return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=7, do_sample=False)
    assert texts(images, ".txt")["one"].strip() == processor.decode(answer[0], skip_special_tokens=True).strip() != ""


def test_qwen(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its processor of videos, which needs torchvision, is not asked for."""
    folder = write_tiny_qwen(tmp_path / "qwen")
    Image.new("RGB", (90, 30)).save(images / "wide.png")  # of another number of tokens
    words = (images, "--model_id", folder, "--prompt", "the cat", "--max_new_tokens", 6)
    run_words(make_captions_by_vlm, *words)
    alone = texts(images, ".txt")
    assert alone.keys() == {"one", "two", "wide"} and all(text.strip() for text in alone.values())
    run_words(make_captions_by_vlm, *words, "--batch_size", 3, "--overwrite")
    assert texts(images, ".txt") == alone  # padding changes nothing


def test_ctrl_c_keeps_what_is_made(images: Path, llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os
    import signal

    class Stopping(describing.WorkProgress):
        def update(self, done: int, total: int) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(describing, "WorkProgress", Stopping)
    with pytest.raises(SystemExit) as end:
        run_words(make_captions_by_vlm, images, "--model_id", llava, "--max_new_tokens", 4, "--recursive")
    assert end.value.code == 130 and len(texts(images, ".txt")) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prompt", "{nme}"], 'did you mean "name"'),
        (["--prompt", " "], "the prompt is empty"),
        (["--prompt", "a", "--prompt_file", "b"], "exclude each other"),
        (["--prompt_file", "none.txt"], "none.txt: no such file"),
        (["--temperature", -1], "--temperature -1"),
        (["--max_new_tokens", 0], "--max_new_tokens 0"),
        (["--review", "page.txt"], "must end with .html"),
    ],
)
def test_mistakes_of_prompts(images: Path, capsys: pytest.CaptureFixture[str], words: list[object], said: str) -> None:
    assert said in refused(capsys, make_captions_by_vlm, images, "--model_id", "no/such", *words)


def test_a_model_without_eyes(images: Path, blip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(**small, vocab_size=9)).save_pretrained(tmp_path / "llama")
    assert "--model_id" in refused(capsys, make_captions_by_vlm, images, "--model_id", tmp_path / "llama")


def test_fields_of_prompts(tmp_path: Path) -> None:
    image = tmp_path / "cats" / "one.png"
    image.parent.mkdir()
    image.with_suffix(".tags").write_text("a, b\n")
    assert Prompt("{name} in {folder}: {text}", ".tags").of(image) == "one in cats: a, b"
    assert Prompt("[{text}]", ".none").of(image) == "[]"
    assert read_prompt("x", None, ".tags").template == "x"
    with pytest.raises(UserError, match="the prompt is empty"):
        read_prompt("", None, ".tags")
    assert one_line(" a\n\n b  c ") == "a b c"


def test_doubts() -> None:
    paths = [Path(f"{n}.png") for n in range(6)]
    long = "a girl with a red hat who sits on a wide green sofa beside"
    captions = [None, "", "the same", "the same", f"{long} the red cat the red cat.", long]
    found = doubts(dict(zip(paths, captions, strict=True)))
    assert found == {
        paths[0]: ["no caption"],
        paths[1]: ["empty"],
        paths[2]: ["the same for 2 images"],
        paths[3]: ["the same for 2 images"],
        paths[4]: ["repeats itself"],
        paths[5]: ["ends within a sentence; more --max_new_tokens may help"],
    }
