"""The LoRA scripts of all families from end to end on tiny checkpoints, as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.fixtures.families import Tiny
from tests.fixtures.runs import lora_arguments, make_images, metadata_of, run_script, write_dataset
from tests.fixtures.tiny_sd import make_tiny_sd


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset") / "data.toml", images, dataset="batch_size = 2")


@pytest.mark.every_family
def test_a_whole_run(tmp_path: Path, tiny: Tiny, dataset: Path) -> None:
    """Epoch and step saves, retention, states, samples, logs, metadata: one run shows all of it."""
    family = tiny.family
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# a comment\na cat --w 64 --h 64 --s 2 --d 5 --n dog\nthe dog --w 64 --h 64 --s 2 --d 6\n")
    output = tmp_path / "out"
    done = tiny.run(
        dataset,
        output,
        fresh=True,
        max_train_steps=None,
        max_train_epochs=3,
        save_every_n_epochs=1,
        save_last_n_epochs=1,
        save_every_n_steps=4,
        save_state=True,
        sample_prompts=prompts,
        sample_every_n_epochs=2,
        sample_at_first=True,
        cache_latents_to_disk=True,
        cache_latents=True,
        network_args=family.network_args,
        training_comment="a comment",
        metadata_author="somebody",
    )
    assert done.code == 0, done.text
    # 7 images in three shapes, batches of 2: 2 + 1 + 1 or so steps; read it from the metadata
    final = output / "tiny.safetensors"
    entries = metadata_of(final)
    per_epoch = int(entries["ss_num_batches_per_epoch"])
    assert int(entries["ss_steps"]) == 3 * per_epoch
    assert entries["ss_epoch"] == "3"
    assert entries.items() >= family.metadata.items()
    assert entries["ss_output_name"] == "tiny"
    assert entries["ss_training_comment"] == "a comment"
    given = dict(arg.split("=") for arg in family.network_args)
    assert json.loads(entries["ss_network_args"]) == {**given, "dropout": None}
    assert len(entries["sshs_model_hash"]) == 64 and len(entries["ss_new_sd_model_hash"]) == 64
    assert entries["modelspec.author"] == "somebody"
    tensors = load_file(final)
    assert all(t.dtype == torch.float32 and torch.isfinite(t).all() for t in tensors.values())
    assert any(family.more_modules in name for name in tensors)
    for prefix in family.prefixes:
        ups = [t for name, t in tensors.items() if name.startswith(prefix) and name.endswith("lora_up.weight")]
        assert ups and sum(bool(t.any()) for t in ups) >= len(ups) / 2, f"the adapters of {prefix} were trained"

    # epoch 3 is the final file; epoch 1 went when epoch 2 came
    assert sorted(p.name for p in output.glob("tiny-0*")) == ["tiny-000002-state", "tiny-000002.safetensors"]
    assert metadata_of(output / "tiny-000002.safetensors")["ss_epoch"] == "2"
    step_save = output / "tiny-step00000004.safetensors"
    assert metadata_of(step_save)["ss_epoch"] == str((4 - 1) // per_epoch + 1)
    assert (output / "tiny-state" / "train_state.json").exists()
    samples = sorted(p.name for p in (output / "sample").glob("*.png"))
    assert [n[: len("tiny_e000002_00")] for n in samples if "_e" in n] == ["tiny_e000002_00", "tiny_e000002_01"]
    assert [n[: len("tiny_000000_00")] for n in samples if "_e" not in n] == ["tiny_000000_00", "tiny_000000_01"]
    with Image.open(output / "sample" / samples[0]) as image:
        assert image.size == (64, 64)
        assert "cat" in str(image.info)
    assert list((output / "logs").rglob("events.out.tfevents.*"))
    assert not list(output.rglob("*.tmp")) and not list(output.glob(".*"))


def test_the_console_speaks(tmp_path: Path, tiny: Tiny, dataset: Path) -> None:
    done = tiny.run(dataset, tmp_path)
    assert done.code == 0, done.text
    for word in ("model", "bucket", "steps", "parameters", str(tmp_path)):
        assert word in done.text


@pytest.mark.every_family
@pytest.mark.usefixtures("own_root_logger")
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"mixed_precision": "bf16", "gradient_checkpointing": True, "sdpa": True}, id="bf16"),
        pytest.param({"optimizer_type": "AdamW8bit"}, id="adamw8bit"),
        pytest.param({"optimizer_type": "Adafactor", "max_grad_norm": 0}, id="adafactor"),
        pytest.param(
            {"optimizer_type": "Lion", "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 1}, id="lion"
        ),
        pytest.param({"network_train_unet_only": True, "min_snr_gamma": 5, "unet_lr": 1e-3}, id="unet"),
        pytest.param({"network_train_text_encoder_only": True, "text_encoder_lr": 1e-3}, id="text"),
        pytest.param({"save_model_as": "pt", "save_precision": "fp16"}, id="pt"),
        pytest.param({"scale_weight_norms": 0.1, "multires_noise_iterations": 3, "loss_type": "huber"}, id="norms"),
    ],
)
def test_options_train(tmp_path: Path, tiny: Tiny, dataset: Path, settings: dict[str, object]) -> None:
    check_training(tiny, dataset, tmp_path, **settings)


@pytest.mark.every_family
@pytest.mark.usefixtures("own_root_logger")
def test_options_of_captions_train(tmp_path: Path, tiny: Tiny, dataset: Path) -> None:
    check_training(tiny, dataset, tmp_path, **tiny.family.caption_options)


def check_training(tiny: Tiny, dataset: Path, output: Path, **settings: object) -> None:
    if "network_train_text_encoder_only" in settings and not tiny.family.prefixes[1:]:
        pytest.skip("no text encoder has adapters, if not asked for")
    tiny.train(dataset, output, **settings)
    (weights,) = output.glob("tiny.*")
    tensors = load_file(weights) if weights.suffix == ".safetensors" else torch.load(weights, weights_only=True)
    denoiser, *encoders = (any(name.startswith(prefix) for name in tensors) for prefix in tiny.family.prefixes)
    assert all(trained == ("network_train_unet_only" not in settings) for trained in encoders)
    assert denoiser == ("network_train_text_encoder_only" not in settings)
    if settings.get("save_precision") == "fp16":
        assert {t.dtype for t in tensors.values()} == {torch.float16}


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
def test_layouts_and_versions(tmp_path: Path, dataset: Path, layout: str, v2: bool) -> None:
    name = "model" if layout == "diffusers" else "model.ckpt"
    model = make_tiny_sd(tmp_path / "m" / name, v2=v2, layout=layout, v_prediction=v2)
    done = run_script(
        "train_network.py",
        *lora_arguments(model, dataset, tmp_path / "out", v2=v2, v_parameterization=v2, max_train_steps=1),
    )
    assert done.code == 0, done.text
    entries = metadata_of(tmp_path / "out" / "tiny.safetensors")
    assert entries["ss_base_model_version"] == ("sd_v2_v" if v2 else "sd_v1")
    assert entries["ss_v2"] == str(v2)


def test_network_weights_go_on(tmp_path: Path, tiny: Tiny, dataset: Path) -> None:
    first = tiny.run(dataset, tmp_path / "a")
    assert first.code == 0, first.text
    weights = tmp_path / "a" / "tiny.safetensors"
    second = tiny.run(
        dataset,
        tmp_path / "b",
        network_weights=weights,
        dim_from_weights=True,
        network_dim=None,
        base_weights=[weights],
        base_weights_multiplier=[0.5],
        learning_rate=0.0001,
    )
    assert second.code == 0, second.text
    a, b = load_file(weights), load_file(tmp_path / "b" / "tiny.safetensors")
    assert {n: t.shape for n, t in a.items()} == {n: t.shape for n, t in b.items()}
    name = next(n for n in a if n.startswith(tiny.family.prefixes[0]) and n.endswith("lora_down.weight"))
    assert torch.allclose(a[name], b[name], atol=1e-2) and not torch.equal(a[name], b[name])


def test_the_old_folder_form(tmp_path: Path, tiny: Tiny) -> None:
    make_images(tmp_path / "train" / "3_sks cat", sizes=[(64, 64)] * 2)
    make_images(tmp_path / "reg" / "1_cat", sizes=[(64, 64)] * 3)
    done = tiny.run(
        None,
        tmp_path / "out",
        dataset_config=None,
        train_data_dir=tmp_path / "train",
        reg_data_dir=tmp_path / "reg",
        resolution="64,64",
        caption_extension=".caption",
    )
    assert done.code == 0, done.text
    entries = metadata_of(tmp_path / "out" / "tiny.safetensors")
    assert entries["ss_num_train_images"] == "6"
    assert json.loads(entries["ss_dataset_dirs"]) == {"3_sks cat": {"n_repeats": 3, "img_count": 2}}


@pytest.mark.usefixtures("own_root_logger")
def test_regularization_images_weigh_as_much_as_is_said(tmp_path: Path, sd: Tiny) -> None:
    make_images(tmp_path / "train" / "1_sks cat", sizes=[(64, 64)])
    make_images(tmp_path / "reg" / "1_cat", sizes=[(64, 64)])
    folders = {"train_data_dir": tmp_path / "train", "reg_data_dir": tmp_path / "reg", "resolution": 64}
    weights = []
    for name, weight in (("one", 1.0), ("none", 0.0)):
        sd.train(None, tmp_path / name, dataset_config=None, prior_loss_weight=weight, train_batch_size=2, **folders)
        weights.append(load_file(tmp_path / name / "tiny.safetensors"))
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_config_file_and_command_line(tmp_path: Path, tiny: Tiny, dataset: Path) -> None:
    config = tmp_path / "lora.toml"
    config.write_text(
        "[model]\n"
        + "".join(
            f"{name} = {json.dumps(value if isinstance(value, (bool, int)) else str(value))}\n"
            for name, value in tiny.model.flags.items()
        )
        + f"[anything]\ndataset_config = '{dataset}'\noutput_dir = '{tmp_path}'\noutput_name = 'from_file'\n"
        f"network_module = '{tiny.family.network_module}'\nnetwork_dim = 4\nmax_train_steps = 1\nseed = 3\n"
    )
    done = run_script(tiny.file, "--config_file", config, "--output_name", "from_line")
    assert done.code == 0, done.text
    entries = metadata_of(tmp_path / "from_line.safetensors")
    assert (entries["ss_network_dim"], entries["ss_seed"]) == ("4", "3")


BAD = [
    pytest.param(
        {"pretrained_model_name_or_path": "no/such/model.safetensors"}, ["no/such/model.safetensors"], id="model"
    ),
    pytest.param({"network_module": "networks.lorra"}, ["networks.lorra", 'did you mean "networks.lora"'], id="module"),
    pytest.param(
        {"network_args": ["rank_dropuot=0.1"]}, ["rank_dropuot", 'did you mean "rank_dropout"'], id="network arg"
    ),
    pytest.param({"netwrok_dim": 4}, ["--netwrok_dim", "--network_dim"], id="flag"),
    pytest.param({"optimizer_type": "AdamWW"}, ["AdamWW"], id="optimizer"),
    pytest.param({"optimizer_args": ["weight_decy=0.1"]}, ["weight_decy", "weight_decay"], id="optimizer arg"),
    pytest.param({"lr_scheduler": "cosin"}, ["cosin", "cosine"], id="scheduler"),
    pytest.param({"dataset_config": "no/such.toml"}, ["no/such.toml"], id="dataset file"),
    pytest.param({"resume": "no/such-state"}, ["no/such-state"], id="resume"),
    pytest.param({"network_weights": "no/such.safetensors"}, ["no/such.safetensors"], id="weights"),
    pytest.param(
        {"mixed_precision": "fp16"},
        ["fp16", "bf16"],
        id="fp16 on a cpu",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU"),
    ),
    pytest.param({"offload_param_nvme_path": "x"}, ["offload_param_nvme_path", "use cpu"], id="what cannot be"),
]


def refusal(tiny: Tiny, capsys: pytest.CaptureFixture[str], dataset: Path, output: Path, **settings: object) -> str:
    """The one line that a run ends with, which leaves nothing behind."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        tiny.train(dataset, output, **settings)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in said, said
    assert not list(output.rglob("*.safetensors"))
    return errors[0]


@pytest.mark.every_family
@pytest.mark.usefixtures("own_root_logger")
@pytest.mark.parametrize(("settings", "words"), BAD)
def test_mistakes_are_one_line(
    tmp_path: Path,
    tiny: Tiny,
    dataset: Path,
    capsys: pytest.CaptureFixture[str],
    settings: dict[str, object],
    words: list[str],
) -> None:
    error = refusal(tiny, capsys, dataset, tmp_path / "out", **settings)
    assert all(word in error for word in words), error


@pytest.mark.every_family
@pytest.mark.usefixtures("own_root_logger")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("image_dir = '", "image_dir = '/no/such"), ["/no/such", "image_dir"]),
        (("resolution = 64", "resolutoin = 64"), ["resolutoin", "resolution"]),
        (("caption_extension = '.txt'", "caption_extension = '.caption'"), [".caption"]),
        (("resolution = 64", "resolution = "), ["line"]),
    ],
    ids=["folder", "key", "caption", "syntax"],
)
def test_mistakes_in_the_dataset_file(
    tmp_path: Path,
    tiny: Tiny,
    dataset: Path,
    capsys: pytest.CaptureFixture[str],
    change: tuple[str, str],
    words: list[str],
) -> None:
    wrong = tmp_path / "wrong.toml"
    wrong.write_text(dataset.read_text().replace(*change))
    with pytest.raises(SystemExit) as ended:
        tiny.train(wrong, tmp_path / "out")
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "wrong.toml" in said
    assert all(word in said for word in words), said


def test_a_mistake_on_the_command_line(tmp_path: Path, tiny: Tiny, dataset: Path) -> None:
    """The user sees one line. The others, which would each start Python, are above."""
    done = tiny.run(dataset, tmp_path / "out", netwrok_dim=4)
    assert done.code == 2 and done.err.startswith("error: ") and "Traceback" not in done.text, done.text
    assert not (tmp_path / "out").exists()


def test_v2_of_another_version(tmp_path: Path, sd: Tiny, dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = refusal(sd, capsys, dataset, tmp_path / "out", v2=True)
    assert "--v2" in error and "1.x" in error


def test_a_diverged_run_saves_nothing_more(tmp_path: Path, tiny: Tiny, dataset: Path) -> None:
    done = tiny.run(
        dataset,
        tmp_path,
        learning_rate=1e30,
        max_grad_norm=0,
        max_train_steps=30,
        save_every_n_steps=5,
        save_state=True,
    )
    assert done.code != 0
    assert "diverged" in done.err and "Traceback" not in done.err
    for saved in tmp_path.glob("*.safetensors"):
        assert all(torch.isfinite(t).all() for t in load_file(saved).values()), saved
    assert not (tmp_path / "tiny.safetensors").exists()


def test_wrappers_can_import_the_script(tmp_path: Path, tiny: Tiny, dataset: Path) -> None:
    """GUIs build a namespace from ``setup_parser`` and call ``train`` themselves."""
    program = tmp_path / "wrapper.py"
    words = [str(w) for w in tiny.words(dataset, tmp_path / "out", max_train_steps=1)]
    program.write_text(
        f"import sys\nsys.path.insert(0, '.')\nimport {tiny.family.script} as script\n"
        f"args = script.setup_parser().parse_args({words!r})\n"
        f"script.{tiny.family.trainer}().train(args)\n"
    )
    done = run_script(str(program))
    assert done.code == 0, done.text
    assert (tmp_path / "out" / "tiny.safetensors").exists()


def test_help_is_worth_reading(tiny: Tiny) -> None:
    done = run_script(tiny.file, "--help")
    assert done.code == 0
    assert f"accelerate launch {tiny.file}" in done.out
    assert len(done.out.splitlines()) < 60
    everything = run_script(tiny.file, "--help", "all")
    assert len(everything.out.splitlines()) > 250


def test_a_metadata_file(tmp_path: Path, tiny: Tiny) -> None:
    """The fine-tuning method, by dataset file and by --in_json: the same data and the same weights."""
    folder = make_images(tmp_path / "images", sizes=[(64, 64)] * 3)
    entries = [{"image_path": f"{i}.png", "caption": "a cat", "tags": f"tag{i}, dog"} for i in range(3)]
    (tmp_path / "meta.jsonl").write_text("\n".join(map(json.dumps, entries)))
    (tmp_path / "meta.json").write_text(json.dumps({e["image_path"].removesuffix(".png"): e for e in entries}))
    config = tmp_path / "data.toml"
    config.write_text(
        "[general]\nresolution = 64\nnum_repeats = 2\nshuffle_caption = true\ntoken_warmup_step = 0.5\n[[datasets]]\n"
        f"[[datasets.subsets]]\nimage_dir = '{folder}'\nmetadata_file = '{tmp_path / 'meta.jsonl'}'\n"
    )
    by_flags = {
        "in_json": tmp_path / "meta.json", "train_data_dir": folder, "dataset_repeats": 2, "resolution": 64,
        "shuffle_caption": True, "token_warmup_step": 0.5,
    }  # fmt: skip
    weights, entries_of = [], []
    for name, dataset, more in (("a", config, {}), ("b", None, {"dataset_config": None, **by_flags})):
        settings = {"max_train_steps": 4, "cache_latents": True, **more}
        done = tiny.run(dataset, tmp_path / name, **settings)
        assert done.code == 0, done.text
        weights.append(load_file(tmp_path / name / "tiny.safetensors"))
        entries_of.append(metadata_of(tmp_path / name / "tiny.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    with_file, without = entries_of
    assert with_file["ss_num_train_images"] == without["ss_num_train_images"] == "6"
    assert json.loads(with_file["ss_dataset_dirs"]) == {"meta.jsonl": {"n_repeats": 2, "img_count": 3}}
    assert json.loads(without["ss_dataset_dirs"]) == {"meta.json": {"n_repeats": 2, "img_count": 3}}
    (recorded,) = json.loads(with_file["ss_datasets"])
    assert recorded["is_dreambooth"] is False
    assert recorded["tag_frequency"]["meta.jsonl"]["dog"] == 3


def test_mistakes_in_a_metadata_file(tmp_path: Path, tiny: Tiny) -> None:
    (tmp_path / "meta.jsonl").write_text('{"image_path": "gone.png", "caption": "a cat"}\n{"caption": "a dog"}\n')
    arguments = tiny.words(
        None,
        tmp_path / "out",
        dataset_config=None,
        in_json=tmp_path / "meta.jsonl",
        train_data_dir=tmp_path,
        resolution=64,
    )
    done = run_script(tiny.file, *arguments)
    assert done.code == 2, done.text
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2 and "Traceback" not in done.text
    assert "meta.jsonl: line 1: no image gone.png" in errors[0]
    assert "meta.jsonl: line 2: must be" in errors[1]
