"""``--network_module lycoris.kohya`` with the real package: trains, saves, resumes, reloads, merges, draws."""

from __future__ import annotations

import json
import re
import shlex
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from library.architectures.conditioning import SampleFacts
from library.config.arguments import with_groups
from library.errors import UserError
from library.inference.networks import apply_networks, choose_networks
from library.training.caching import inspect_model
from library.training.kinds.adapter_options import TrainNetworkOptions
from networks.third_party import FULL_PRESET, refuse_wrong_merge, text_argument
from tests.fixtures.families import Tiny
from tests.fixtures.runs import ROOT, metadata_of, write_dataset

pytest.importorskip("lycoris")
pytest.importorskip("lycoris.kohya")

#: network args of each kind, and a tensor that its files hold
KINDS = {
    "lora": (["algo=lora", "conv_dim=2", f"preset={ROOT / 'examples' / 'lycoris' / 'full.toml'}"], ".lora_down.weight"),
    "dora": (["algo=lora", "dora_wd=True", "preset=attn-mlp"], ".dora_scale"),
    "loha": (["algo=loha", "preset=attn-mlp"], ".hada_w1_a"),
    "lokr": (["algo=lokr", "factor=4", "preset=attn-mlp"], ".lokr_w1"),
    "diag-oft": (["algo=diag-oft", "preset=attn-mlp"], ".oft_blocks"),
    "boft": (["algo=boft", "preset=attn-mlp"], ".oft_blocks"),
}


def models_of(tiny: Tiny) -> SimpleNamespace:
    """The bare models of a checkpoint, as ``gen_img.py`` holds them."""
    kind = with_groups(TrainNetworkOptions, tiny.family.architecture.declaration.groups)
    options = kind.from_args(Namespace(**tiny.model.flags))
    architecture = tiny.family.architecture.configured(options)
    checkpoint = inspect_model(architecture, options.model)
    architecture = architecture.for_model(checkpoint)
    settings = {"dtype": torch.float32, "device": "cpu"}
    return SimpleNamespace(
        architecture=architecture,
        tokenizers=architecture.load_tokenizers(checkpoint),
        text_encoders=architecture.load_text_encoders(checkpoint, **settings),
        denoiser=architecture.load_denoiser(checkpoint, **settings),
        vae=None,
    )


def outputs(models: SimpleNamespace) -> torch.Tensor:
    """Return the denoiser's outputs for noise and a caption."""
    architecture = models.architecture
    noise = torch.randn(1, architecture.latent.channels, 8, 8, generator=torch.Generator().manual_seed(0))
    tokens = architecture.tokenize(models.tokenizers, ["a cat"], max_token_length=None, weighted=False)
    size = torch.tensor([[64, 64]])
    with torch.no_grad():
        conditioning = architecture.encode_text(models.text_encoders, tokens, clip_skip=None)
        conditioning = architecture.condition(conditioning, SampleFacts(size, 0 * size, size), None)
        return architecture.predict(models.denoiser, noise, torch.tensor([300.0]), conditioning)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset") / "data.toml", images)


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_resumes_reloads_and_draws(tmp_path: Path, tiny: Tiny, dataset: Path, kind: str) -> None:
    network_args, tensor = KINDS[kind]
    if kind == "boft" and tiny.family.network_module != "networks.lora":
        pytest.skip("BOFT cuts widths into powers of two, which those of q, k and v in one layer are not")
    if kind == "lora" and tiny.family.network_module != "networks.lora":
        network_args = ["algo=lora", "preset=attn-mlp"]  # the other preset names modules of U-Nets
    whole, rest, more = tmp_path / "whole", tmp_path / "rest", tmp_path / "more"
    options = {
        "network_module": "lycoris.kohya",
        "network_dim": 4,
        "network_alpha": 2,
        "network_args": network_args,
        "learning_rate": 1e-2,
        "max_train_steps": 4,
        "save_every_n_steps": 2,
        "save_state": True,
        "ema_decay": 0.5,
    }
    tiny.train(dataset, whole, **options)
    file = whole / "tiny.safetensors"
    weights = load_file(file)
    assert any(name.endswith(tensor) for name in weights), sorted(weights)[:6]
    assert metadata_of(file)["ss_network_module"] == "lycoris.kohya"
    tiny.train(dataset, rest, **options, resume=whole / "tiny-step00000002-state")
    for name in ("tiny.safetensors", "tiny-ema.safetensors"):
        again, first = load_file(rest / name), load_file(whole / name)
        assert again.keys() == first.keys()
        assert all(torch.equal(again[key], first[key]) for key in first), name
    for prefix in tiny.family.prefixes:
        assert any(name.startswith(prefix) for name in weights), "names as in other files"
    # from its weights, and beside itself as part of the base model
    merges = kind not in ("loha", "lokr")
    start = {"network_weights": file, "base_weights": [file] if merges else None, "ema_decay": None}
    tiny.train(dataset, more, **{**options, **start, "max_train_steps": 1})
    assert load_file(more / "tiny.safetensors").keys() == weights.keys()

    (choice,) = choose_networks(["lycoris.kohya"], [str(file)], None, None)
    plain = outputs(models_of(tiny))
    settings = {"dtype": torch.float32, "device": torch.device("cpu")}
    models = models_of(tiny)
    (network,) = apply_networks([choice], models, merge=False, **settings)
    applied = outputs(models)
    assert not torch.allclose(applied, plain, atol=1e-4)
    if kind != "dora":  # whose strength 0 is not the plain model
        network.set_multiplier(0.0)
        torch.testing.assert_close(outputs(models), plain, atol=1e-5, rtol=1e-4)
    models = models_of(tiny)
    if merges:
        apply_networks([choice], models, merge=True, **settings)
        torch.testing.assert_close(outputs(models), applied, atol=1e-4, rtol=1e-3)
    else:
        with pytest.raises(UserError, match="correctly only where alpha is the rank"):
            apply_networks([choice], models, merge=True, **settings)


@pytest.mark.parametrize("on_output", [True, False])
def test_our_lora_reads_its_doras(tmp_path: Path, tiny: Tiny, on_output: bool) -> None:
    from lycoris.kohya import create_network

    if tiny.family.network_module != "networks.lora":
        pytest.skip("the preset names modules of U-Nets")
    preset = tmp_path / "preset.toml"
    preset.write_text(
        "enable_conv = true\nunet_target_module = ['Transformer2DModel', 'ResnetBlock2D']\nunet_target_name = []\n"
        "text_encoder_target_module = ['CLIPAttention', 'CLIPMLP']\ntext_encoder_target_name = []\n"
    )
    models = models_of(tiny)
    text = text_argument(models.text_encoders)
    more = {"algo": "lora", "conv_dim": 2, "dora_wd": True, "wd_on_output": on_output, "preset": str(preset)}
    network = create_network(1.0, 4, 2.0, None, text, models.denoiser, **more)
    network.apply_to(text, models.denoiser, True, True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    network.eval()
    theirs = outputs(models)
    network.save_weights(str(tmp_path / "x.safetensors"), None, {})

    (choice,) = choose_networks(["networks.lora"], [str(tmp_path / "x.safetensors")], None, None)
    for merge in (False, True):
        models = models_of(tiny)
        apply_networks([choice], models, merge=merge, dtype=torch.float32, device=torch.device("cpu"))
        torch.testing.assert_close(outputs(models), theirs, atol=2e-5, rtol=1e-4)


#: the commands of docs/adapters.md
COMMANDS = [
    shlex.split(command)
    for command in re.findall(
        r"^--network_module lycoris\.kohya (.*)$",
        (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8").replace("\\\n", " "),
        re.MULTILINE,
    )
]


def of_command(words: list[str], name: str) -> list[str]:
    """The values of a flag."""
    if f"--{name}" not in words:
        return []
    rest = words[words.index(f"--{name}") + 1 :]
    return rest[: next((i for i, word in enumerate(rest) if word.startswith("--")), len(rest))]


@pytest.mark.slow
@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: of_command(words, "network_args")[0])
def test_commands_of_the_page(
    tmp_path: Path, tiny: Tiny, dataset: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if tiny.family.architecture.denoiser_target.blocks is None:
        pytest.skip("the page is on U-Nets")
    monkeypatch.chdir(ROOT)  # where its presets are
    options = {"network_module": "lycoris.kohya", "max_train_steps": 1, "network_dim": of_command(words, "network_dim")}
    options |= {name: of_command(words, name) or None for name in ("network_alpha", "network_args")}
    tiny.train(dataset, tmp_path, **options, dry_run=True)
    assert not list(tmp_path.glob("*.safetensors"))
    tiny.train(dataset, tmp_path, **options)
    assert load_file(tmp_path / "tiny.safetensors")


@pytest.mark.slow
def test_blocks_of_the_page_s_sizes_fit_the_published_widths() -> None:
    from diffusers import UNet2DConditionModel
    from lycoris.kohya import create_network

    sized = [words for words in COMMANDS if "oft" in of_command(words, "network_args")[0]]
    assert len(sized) == 2
    wide = {"cross_attention_dim": 2048, "block_out_channels": (320, 640, 1280)}
    kinds = {"down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2)}
    kinds["up_block_types"] = (*("CrossAttnUpBlock2D",) * 2, "UpBlock2D")
    with torch.device("meta"):
        models = [UNet2DConditionModel(cross_attention_dim=768), UNet2DConditionModel(**wide, **kinds)]
        for words in sized:
            args = dict(word.split("=", 1) for word in of_command(words, "network_args"))
            for unet in models:
                network = create_network(1.0, int(of_command(words, "network_dim")[0]), 1.0, None, [], unet, **args)
                assert len(network.unet_loras) > 100


def test_a_dry_run_of_what_reads_the_weights_it_adapts(
    tmp_path: Path, tiny: Tiny, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"network_module": "lycoris.kohya", "network_args": ["algo=lora", "dora_wd=True", "preset=attn-mlp"]}
    tiny.train(dataset, tmp_path, **options, dry_run=True)
    assert "all checks passed" in capsys.readouterr().out


def test_a_failing_module_is_one_line(
    tmp_path: Path, tiny: Tiny, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"network_module": "lycoris.kohya", "network_args": ["algo=lokr", "preset=no-such"]}
    with pytest.raises(SystemExit, match="2"):
        tiny.train(dataset, tmp_path, **options)
    assert "error: --network_module lycoris.kohya: it could not make a network" in capsys.readouterr().err


def test_a_merge_at_another_strength_is_refused(tmp_path: Path, tiny: Tiny) -> None:
    with pytest.raises(UserError, match="at strength 1 only, not at 0.5"):
        refuse_wrong_merge("lycoris.kohya", None, {}, 0.5)
    refuse_wrong_merge("networks.lora", None, {}, 0.5)


def test_its_default_preset_is_replaced_where_it_fails(
    tmp_path: Path, tiny: Tiny, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """LyCORIS 4.1's names a module of Stable Diffusion 1.x twice; ``algo=full`` takes weights in channels_last."""
    if tiny.family.network_module != "networks.lora":
        pytest.skip("a fault with U-Nets")
    options = {"network_module": "lycoris.kohya", "network_args": ["algo=full"], "save_state": True}
    tiny.train(dataset, tmp_path, **options, max_train_steps=1)
    said = capsys.readouterr().err
    weights = load_file(tmp_path / "tiny.safetensors")
    assert any(name.endswith(".diff") and tensor.dim() == 4 for name, tensor in weights.items())
    if "fails with its default preset" in said:
        assert "preset=examples/lycoris/full.toml is used" in " ".join(said.split())
        assert json.loads(metadata_of(tmp_path / "tiny.safetensors")["ss_network_args"])["preset"] == FULL_PRESET
    tiny.train(dataset, tmp_path / "more", **options, max_train_steps=2, resume=tmp_path / "tiny-state")
    assert not list(tmp_path.glob(".trial-*"))


def test_what_does_not_resume_is_said_at_the_start(
    tmp_path: Path, tiny: Tiny, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """LyCORIS' DyLoRA saves its blocks joined and does not take them back."""
    args = ["algo=dylora", "block_size=2", "preset=attn-mlp"]
    options = {"network_module": "lycoris.kohya", "network_dim": 4, "network_args": args}
    tiny.train(dataset, tmp_path, **options, max_train_steps=1, save_state=True)
    assert "do not take back their own state" in " ".join(capsys.readouterr().err.split())
    for flags in ({}, {"dry_run": True}, {"cache_latents": True}):
        with pytest.raises(SystemExit, match="2"):
            tiny.train(
                dataset, tmp_path / "more", **options, max_train_steps=2, resume=tmp_path / "tiny-state", **flags
            )
        said = " ".join(capsys.readouterr().err.split())
        assert "error: --resume: networks of lycoris.kohya with these --network_args cannot be resumed" in said
