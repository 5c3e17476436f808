"""A network and a new word in one run (pivotal tuning): both are trained, saved, resumed and used to generate."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.fixtures.families import FLUX, SD, SDXL, Tiny
from tests.fixtures.killed import train_killed
from tests.fixtures.runs import logged, make_images, metadata_of, run_script, write_dataset

WORD = {
    "train_embedding": "qux", "embedding_init_word": "cat", "embedding_vectors": 2, "embedding_lr": 0.05,
    "learning_rate": 1e-2,
}  # fmt: skip


@pytest.fixture(scope="module", params=["sd", pytest.param("sdxl", marks=pytest.mark.slow)])
def pivotal(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    torch.set_num_threads(1)
    family = {"sd": SD, "sdxl": SDXL}[request.param]
    return Tiny(family, family.make(tmp_path_factory.mktemp(request.param)))


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    folder = make_images(tmp_path / "images", sizes=((64, 64), (64, 64), (64, 64)))
    for caption in folder.glob("*.txt"):
        caption.write_text("a photo of qux dog")
    return write_dataset(tmp_path / "data.toml", folder, dataset="batch_size = 2")


def test_both_are_trained_and_resumed(tmp_path: Path, pivotal: Tiny, dataset: Path) -> None:
    """Killed and resumed the run ends with the bits of one left alone; retention removes both files of a save."""
    options = {
        **WORD, "max_train_steps": 5, "save_every_n_steps": 1, "save_last_n_steps": 2, "save_state": True,
        "ema_decay": 0.9,
    }  # fmt: skip
    pivotal.train(dataset, tmp_path / "alone", **options)
    train_killed(partial(pivotal.train, dataset, tmp_path / "out", **options), tmp_path / "out", steps=[3])
    for name in ("tiny", "tiny_qux", "tiny-ema", "tiny-ema_qux"):
        alone, resumed = (load_file(tmp_path / folder / f"{name}.safetensors") for folder in ("alone", "out"))
        assert alone and all(torch.equal(tensor, resumed[key]) for key, tensor in alone.items())
    word = load_file(tmp_path / "alone" / "tiny_qux.safetensors")
    assert set(word) == ({"clip_l", "clip_g"} if pivotal.family is SDXL else {"emb_params"})
    assert all(len(tensor) == 2 for tensor in word.values())
    first = load_file(tmp_path / "alone" / "tiny-step00000003_qux.safetensors")
    assert all(not torch.equal(first[name], tensor) for name, tensor in word.items())
    steps = {path.name for path in (tmp_path / "alone").glob("tiny-step*_qux.safetensors")}
    assert steps == {f"tiny-step0000000{n}{ema}_qux.safetensors" for n in (3, 4, 5) for ema in ("", "-ema")}
    assert logged(tmp_path / "alone", "lr/text_encoder_1") == pytest.approx([0.05] * 5)
    assert metadata_of(tmp_path / "alone" / "tiny.safetensors")["ss_train_embedding"] == "qux"


def test_one_bundle(tmp_path: Path, pivotal: Tiny, dataset: Path) -> None:
    """The same numbers in one file, by the names that ComfyUI and A1111 read; it continues, and generates."""
    options = {**WORD, "max_train_steps": 2}
    pivotal.train(dataset, tmp_path / "two", **options)
    pivotal.train(dataset, tmp_path / "one", **options, bundle_embedding=True)
    assert [path.name for path in (tmp_path / "one").glob("*.safetensors")] == ["tiny.safetensors"]
    assert not list((tmp_path / "one").glob(".*.tmp"))
    bundle = load_file(tmp_path / "one" / "tiny.safetensors")
    network, word = (load_file(tmp_path / "two" / f"{name}.safetensors") for name in ("tiny", "tiny_qux"))
    names = {name: f"bundle_emb.qux.{name.replace('emb_params', 'string_to_param.*')}" for name in word}
    assert set(bundle) == {*network, *names.values()}
    assert all(torch.equal(bundle[name], tensor) for name, tensor in network.items())
    assert all(torch.equal(bundle[names[name]], tensor) for name, tensor in word.items())

    file = tmp_path / "one" / "tiny.safetensors"
    start = {"network_weights": file, "embedding_weights": file, "embedding_init_word": None}
    pivotal.train(dataset, tmp_path / "again", **{**options, **start, "learning_rate": 1e-30, "embedding_lr": 1e-30})
    again = load_file(tmp_path / "again" / "tiny_qux.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in word.items())

    if pivotal.family is SD:
        assert generated(tmp_path / "with", pivotal, file, 1) != generated(tmp_path / "off", pivotal, file, 0)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_diffusers_reads_both_files(tmp_path: Path, dataset: Path) -> None:
    from diffusers import StableDiffusionPipeline

    from tests.fixtures.tiny_sd import make_tiny_sd

    model = make_tiny_sd(tmp_path / "model", layout="diffusers")
    Tiny(SD, model).train(dataset, tmp_path / "out", **{**WORD, "learning_rate": 0.2}, max_train_steps=3)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "model", local_files_only=True)

    def drawn() -> Any:
        return pipeline(
            "a photo of qux", num_inference_steps=2, width=64, height=64, generator=torch.Generator().manual_seed(1),
            output_type="np",
        ).images[0]  # fmt: skip

    base = drawn()
    pipeline.load_textual_inversion(str(tmp_path / "out" / "tiny_qux.safetensors"), token="qux")
    ids = pipeline.tokenizer.convert_tokens_to_ids(["qux", "qux_1"])
    vectors = load_file(tmp_path / "out" / "tiny_qux.safetensors")["emb_params"]
    assert torch.equal(pipeline.text_encoder.get_input_embeddings().weight[ids], vectors)
    with_word = drawn()
    pipeline.load_lora_weights(str(tmp_path / "out" / "tiny.safetensors"))
    assert abs(with_word - base).max() > 0 and abs(drawn() - with_word).max() > 0


def generated(folder: Path, pivotal: Tiny, network: Path, strength: float) -> bytes:
    done = run_script(
        "gen_img.py",
        *("--ckpt", pivotal.model.path, "--tokenizer_cache_dir", pivotal.model.flags["tokenizer_cache_dir"]),
        *("--prompt", "qux --d 1", "--outdir", folder, "--W", 64, "--H", 64, "--steps", 2, "--images_per_prompt", 1),
        *("--network_module", "networks.lora", "--network_weights", network, "--network_mul", strength),
    )
    assert done.code == 0 and 'embedding "qux" of' in done.text, done.text
    return Image.open(next(folder.glob("*.png"))).tobytes()


def test_with_the_networks_of_the_denoiser_alone(tmp_path: Path, pivotal: Tiny, dataset: Path) -> None:
    pivotal.train(dataset, tmp_path / "out", **WORD, network_train_unet_only=True, gradient_checkpointing=True)
    network = load_file(tmp_path / "out" / "tiny.safetensors")
    assert network and all(name.startswith("lora_unet_") for name in network)
    pivotal.train(dataset, tmp_path / "dry", **WORD, dry_run=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"train_embedding": "my cat"}, "--train_embedding 'my cat': must be one word"),
        ({"train_embedding": "cat"}, '--train_embedding cat: "cat" is a known word already'),
        ({"train_embedding": "absent"}, "--train_embedding absent: no caption has this word"),
        ({"embedding_init_word": None}, "--embedding_init_word: name a known word"),
        ({"embedding_vectors": 76}, "--embedding_vectors 76: a caption has 75 tokens"),
        ({"cache_text_encoder_outputs": True}, "--cache_text_encoder_outputs: not with --train_embedding"),
    ],
)
def test_mistakes(
    tmp_path: Path,
    pivotal: Tiny,
    dataset: Path,
    options: dict[str, Any],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if options.get("train_embedding") == "cat":
        for caption in (tmp_path / "images").glob("*.txt"):
            caption.write_text("a cat")
    with pytest.raises(SystemExit) as ended:
        pivotal.train(dataset, tmp_path / "out", **{**WORD, **options})
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 2 and len(lines) == 1 and words in lines[0], lines


@pytest.mark.slow
def test_a_model_with_t5_has_no_words(tmp_path: Path, dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flux = Tiny(FLUX, FLUX.make(tmp_path / "flux"))
    with pytest.raises(SystemExit):
        flux.train(dataset, tmp_path / "out", **WORD)
    assert "--train_embedding: this model does not read captions with CLIP alone" in capsys.readouterr().err
