"""Whole models trained by the real scripts: what is learned, what stays, and what a resumed run ends with."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from library.training.kinds.full_options import nothing_to_stop
from tests.fixtures.killed import train_killed
from tests.fixtures.runs import logged, metadata_of
from tests.fixtures.whole import Whole

ADAFACTOR = {"optimizer_type": "Adafactor", "optimizer_args": ["relative_step=False", "scale_parameter=False"]}


def weights(folder: Path, name: str = "tiny") -> dict[str, Tensor]:
    return load_file(folder / f"{name}.safetensors")


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Names of tensors that are not the same bits any more."""
    assert before.keys() == after.keys()
    return {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}


def test_killed_twice(tmp_path: Path, whole: Whole, dataset: Path) -> None:
    """A run that is killed twice ends with the bits of one that was left alone."""
    options = {
        "max_train_steps": 6, "lr_scheduler": "cosine", "lr_warmup_steps": 2, "save_every_n_steps": 2,
        "save_state": True, "ema_decay": 0.9, "cache_latents": True,
    }  # fmt: skip
    if whole.script == "train_db":
        options["stop_text_encoder_training"] = 3
    whole.train(dataset, tmp_path / "alone", **options)
    again = partial(whole.train, dataset, tmp_path / "out", **options)
    train_killed(again, tmp_path / "out", steps=[3, 5])
    for name in ("tiny", "tiny-ema", "tiny-step00000004"):
        assert not changed(weights(tmp_path / "alone", name), weights(tmp_path / "out", name)), name
    assert changed(weights(tmp_path / "out"), weights(tmp_path / "out", "tiny-ema"))


def test_what_is_saved_and_recorded(tmp_path: Path, whole: Whole, dataset: Path) -> None:
    """Untouched parts are the file's own bits; the metadata is that of a whole model."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 2 --d 1\n")
    sampled = {"sample_prompts": prompts, "sample_every_n_steps": 1, "mixed_precision": "bf16"}
    whole.train(dataset, tmp_path, **sampled, gradient_checkpointing=True, save_precision="float")
    found, before = weights(tmp_path), load_file(whole.model.path)
    if not whole.family.architecture.has_own_encoders:  # which are files of their own, wherever they were before
        before = {name: tensor for name, tensor in before.items() if not name.startswith("text_encoders.")}
    moved = changed(before, found)
    parts = {name.split(".")[0] for name in moved}
    denoiser = whole.family.denoiser
    assert moved and all(name.startswith((denoiser, "cond_stage_model.")) for name in moved)
    if denoiser:
        assert parts == {"model", "cond_stage_model"} if whole.script == "train_db" else {"model"}
    entries = metadata_of(tmp_path / "tiny.safetensors")
    architecture = whole.family.metadata["modelspec.architecture"].removesuffix("/lora")
    assert entries["modelspec.architecture"] == architecture
    assert entries["modelspec.title"] == "tiny"
    assert not [name for name in entries if name.startswith("ss_")]
    assert len(logged(tmp_path, "loss/current")) == 2 and logged(tmp_path, "lr/unet") == pytest.approx([1e-3] * 2)
    assert {Image.open(image).size for image in (tmp_path / "sample").glob("*.png")} == {(64, 64)}


HALF = {"full_bf16": True, "mixed_precision": "bf16"}


@pytest.mark.parametrize("option", ["fused_backward_pass", "fused_optimizer_groups", "blockwise_fused_optimizers"])
def test_a_fused_update_is_the_plain_one(tmp_path: Path, flux_train: Whole, dataset: Path, option: str) -> None:
    options = {"max_train_steps": 8, "max_grad_norm": 0, "lr_scheduler": "cosine", "lr_warmup_steps": 3}
    value = 3 if option == "fused_optimizer_groups" else True
    flux_train.train(dataset, tmp_path / "plain", **options)
    flux_train.train(dataset, tmp_path / "fused", **options, **{option: value})
    assert not changed(weights(tmp_path / "plain"), weights(tmp_path / "fused"))
    flux_train.train(dataset, tmp_path / "half", **options, **{option: value}, **ADAFACTOR, **HALF)
    assert {tensor.dtype for tensor in weights(tmp_path / "half").values()} == {torch.bfloat16}


def test_the_text_encoder_stops(tmp_path: Path, train_db: Whole, dataset: Path) -> None:
    """From its last step on it keeps its bits, weight decay and momenta included; the U-Net goes on."""
    options = {"stop_text_encoder_training": 2, "max_train_steps": 5, "save_every_n_steps": 2, "learning_rate_te": 1e-2}
    train_db.train(dataset, tmp_path, **options)
    assert logged(tmp_path, "lr/text_encoder1")[0] == pytest.approx(1e-2)
    before, then, end = load_file(train_db.model.path), weights(tmp_path, "tiny-step00000002"), weights(tmp_path)
    assert any(name.startswith("cond_stage_model.") for name in changed(before, then))
    assert all(name.startswith("model.diffusion_model.") for name in changed(then, end))
    train_db.train(dataset, tmp_path / "never", stop_text_encoder_training=-1)
    assert all(name.startswith("model.") for name in changed(before, weights(tmp_path / "never")))


def test_zero_is_the_wish_that_no_text_encoder_is_trained() -> None:
    """It is no option without effect, but one above 0 is, where none is trained."""
    for stop, trained, idle in (
        (0, False, False),
        (-1, False, False),
        (None, False, False),
        (5, False, True),
        (5, True, False),
    ):
        options = SimpleNamespace(full=SimpleNamespace(train_text_encoder=trained, stop_text_encoder_training=stop))
        assert bool(nothing_to_stop.applies(options)) is idle


def test_learning_rates_of_blocks(tmp_path: Path, sdxl_train: Whole, dataset: Path) -> None:
    """A block with 0 keeps its bits; so does a text encoder with 0, and what the model never uses of the other."""
    rates = ["0"] * 23
    rates[0] = rates[1] = rates[11] = "1e-3"
    options = {
        "block_lr": ",".join(rates), "train_text_encoder": True, "learning_rate_te1": 1e-3, "learning_rate_te2": 0,
        "optimizer_args": ["weight_decay=0.1"], "save_precision": "float",
    }  # fmt: skip
    sdxl_train.train(dataset, tmp_path, **options)
    moved = changed(load_file(sdxl_train.model.path), weights(tmp_path))
    denoiser = {".".join(name.split(".")[2:4]) for name in moved if name.startswith("model.")}
    blocks = {name for name in denoiser if not name.startswith(("time_embed", "label_emb"))}
    assert blocks == {"input_blocks.0", "middle_block.1"} and denoiser - blocks
    text = [name for name in moved if name.startswith("conditioner.")]
    assert text and all(name.startswith("conditioner.embedders.0.") for name in text)
    assert not any("final_layer_norm" in name or ".layers.1." in name for name in text)
    assert logged(tmp_path, "lr/block0") and logged(tmp_path, "lr/text_encoder1")
    assert not logged(tmp_path, "lr/block2") and not logged(tmp_path, "lr/text_encoder2")


def test_the_first_blocks_may_be_frozen(tmp_path: Path, sdxl_train: Whole, dataset: Path) -> None:
    """The inputs of the first trained block then need no gradient, with which torch's group norm on the CPU crashed."""
    rates = ["0"] * 12 + ["1e-3"] * 11
    sdxl_train.train(dataset, tmp_path, block_lr=",".join(rates), save_precision="float")
    moved = changed(load_file(sdxl_train.model.path), weights(tmp_path))
    assert moved and not any(".input_blocks." in name for name in moved)


def test_half_precision(tmp_path: Path, fine_tune: Whole, dataset: Path) -> None:
    """Mixed precision keeps float32 master weights; --full_bf16 does not."""
    fine_tune.train(dataset, tmp_path / "mixed", mixed_precision="bf16", learning_rate=1e-5)
    mixed = weights(tmp_path / "mixed")
    moved = changed(load_file(fine_tune.model.path), mixed)
    assert moved and all(mixed[name].dtype == torch.float32 for name in moved)
    fine_tune.train(dataset, tmp_path / "half", **HALF, **ADAFACTOR, max_grad_norm=0)
    half = weights(tmp_path / "half")
    unet = {half[name].dtype for name in half if name.startswith("model.diffusion_model.")}
    rest = {half[name].dtype for name in half if not name.startswith("model.diffusion_model.")}
    assert (unet, rest) == ({torch.bfloat16}, {torch.float32})


def test_folders_and_metadata_files(tmp_path: Path, fine_tune: Whole, train_db: Whole, images: Path) -> None:
    """The old forms of data: a metadata file, and folders of repeats and class tokens."""
    import json
    import shutil

    captions = {str(images / f"{index}.png"): {"caption": "a cat"} for index in range(7)}
    file = tmp_path / "meta.json"
    file.write_text(json.dumps(captions))
    size = {"resolution": 64, "enable_bucket": True, "min_bucket_reso": 32, "max_bucket_reso": 128}
    fine_tune.train(None, tmp_path / "json", in_json=file, train_data_dir=images, **size)
    for kind in ("own", "reg"):
        shutil.copytree(images, tmp_path / kind / "2_a dog")
    folders = {"train_data_dir": tmp_path / "own", "reg_data_dir": tmp_path / "reg", "prior_loss_weight": 0.5}
    train_db.train(None, tmp_path / "folders", **folders, **size, caption_extension=".txt")
    assert weights(tmp_path / "json") and weights(tmp_path / "folders")


@pytest.mark.parametrize(
    ("script", "options", "words"),
    [
        ("sdxl_train", {"block_lr": "1e-4,1e-4"}, "--block_lr 1e-4,1e-4: 2 numbers; write 23 numbers"),
        ("fine_tune", {"block_lr": ",".join(["1"] * 23)}, "--block_lr: this model's denoiser has no numbered blocks"),
        ("fine_tune", {"save_model_as": "ckpt", "use_safetensors": True}, "exclude each other"),
        ("flux_train", {"train_text_encoder": True}, "--train_text_encoder: the text encoders of this model are files"),
        *(
            pytest.param(
                script,
                {"learning_rate_te1": 1e-5, "strict": True},
                "--learning_rate_te1 has no effect with this model, whose text encoders are files of their own",
                id=f"{script} text encoders",
            )
            for script in ("flux_train", "lumina_train", "hunyuan_image_train")
        ),
        ("flux_train", {"save_model_as": "diffusers"}, "--save_model_as diffusers: this model is saved as safetensors"),
        (
            "train_db",
            {"cache_text_encoder_outputs": True},
            "--cache_text_encoder_outputs: not while a text encoder is trained",
        ),
        ("fine_tune", {"learning_rate": 0}, "nothing to train"),
        (
            "fine_tune",
            {"on_nan": "skip", "blockwise_fused_optimizers": True, "max_grad_norm": 0},
            "--blockwise_fused_optimizers: not with --on_nan skip",
        ),
        ("fine_tune", {"fused_optimizer_groups": 2}, "--fused_optimizer_groups: the gradient cannot be clipped"),
        (
            "fine_tune",
            {"fused_optimizer_groups": 2, "fused_backward_pass": True, "max_grad_norm": 0},
            "--fused_backward_pass and --fused_optimizer_groups exclude each other",
        ),
    ],
)
def test_mistakes(
    tmp_path: Path,
    dataset: Path,
    script: str,
    options: dict[str, object],
    words: str,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        request.getfixturevalue(script).train(dataset, tmp_path, **options)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 2 and len(lines) == 1 and words in lines[0], lines


def test_the_base_model_is_not_saved_over(tmp_path: Path, fine_tune: Whole, dataset: Path) -> None:
    path = fine_tune.model.path
    before = path.read_bytes()
    with pytest.raises(SystemExit):
        fine_tune.train(dataset, path.parent, output_name=path.stem)
    assert path.read_bytes() == before
