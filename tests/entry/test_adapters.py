"""The trainer with all that our adapters can, with averages, and with a third party's network module."""

from __future__ import annotations

import importlib
import json
import math
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library.training.network_module import parse_network_args
from tests.fixtures.families import Tiny
from tests.fixtures.runs import ROOT, logged, lora_arguments, metadata_of, run_script, train_here, write_dataset
from tests.fixtures.tiny_sd import MadeCheckpoint


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    return write_dataset(folder / "data.toml", images, general="flip_aug = true", dataset="batch_size = 2")


def assert_same(one: Path, other: Path) -> None:
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]


EXTRAS = {
    "network_args": [
        "dora=True", "rs_lora=True", "conv_dim=2", "network_reg_dims=attn2=3", "up_lr_weight=cosine+.25",
        "loraplus_unet_lr_ratio=4", "network_reg_lrs=mlp=2e-4,ff_net=3e-3", "rank_dropout=0.1",
    ],
    "text_encoder_lr": [5e-4],
    "scale_weight_norms": 1.0,
    "ema_decay": 0.7,
    "max_train_steps": 4,
    "save_every_n_steps": 2,
    "save_last_n_steps": 2,
    "save_last_n_steps_state": 10,
    "save_state": True,
}  # fmt: skip


def test_the_extras_of_our_lora_and_averages_resume_exactly(
    tmp_path: Path, tiny_sd: MadeCheckpoint, dataset: Path
) -> None:
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    train_here(*lora_arguments(tiny_sd, dataset, whole, **EXTRAS))
    final, average = whole / "tiny.safetensors", whole / "tiny-ema.safetensors"
    entries = metadata_of(average)
    assert entries["ss_ema_decay"] == "0.7" and "ss_ema_decay" not in metadata_of(final)
    assert json.loads(entries["ss_network_args"])["dora"] == "True"
    assert json.loads(entries["ss_network_args"])["rs_lora"] == "True"
    tensors, averages = load_file(final), load_file(average)
    assert tensors.keys() == averages.keys()
    assert any(not torch.equal(tensors[name], averages[name]) for name in tensors)
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_q"
    assert tensors[f"{name}.lora_down.weight"].shape[0] == 3
    assert float(tensors[f"{name}.alpha"]) == pytest.approx(3**0.5)
    assert tensors[f"{name}.dora_scale"].shape == (1, tensors[f"{name}.lora_down.weight"].shape[1])

    train_here(
        *lora_arguments(tiny_sd, dataset, rest, **EXTRAS, resume=whole / "tiny-step00000002-state"),
    )
    assert_same(rest / "tiny.safetensors", final)
    assert_same(rest / "tiny-ema.safetensors", average)


PLUG_IN = '''
"""A third party's network: it shifts each attention query. It speaks the oldest form of the protocol and no more."""
import torch
from safetensors.torch import load_file, save_file

class Shift(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.shift = torch.nn.Parameter(torch.zeros(module.out_features))
        self.module = [module]

    def hook(self):
        own = self.module[0].forward
        self.module[0].forward = lambda x: own(x) + self.shift

class ShiftNetwork(torch.nn.Module):
    def __init__(self, unet):
        super().__init__()
        for name, module in unet.named_modules():
            if name.endswith("to_q"):
                self.add_module("shift_" + name.replace(".", "_"), Shift(module))

    def apply_to(self, text_encoder, unet, apply_text_encoder=True, apply_unet=True):
        for shift in self.children():
            shift.hook()

    def prepare_optimizer_params(self, text_encoder_lr, unet_lr):
        group = {"params": list(self.parameters())}
        return [group if unet_lr is None else {**group, "lr": unet_lr}]

    def prepare_grad_etc(self, text_encoder, unet):
        self.requires_grad_(True)

    def on_epoch_start(self, text_encoder, unet):
        self.train()

    def get_trainable_params(self):
        return self.parameters()

    def load_weights(self, file):
        return self.load_state_dict(load_file(file))

    def save_weights(self, file, dtype, metadata):
        save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, file, metadata)

def create_network(multiplier, network_dim, network_alpha, vae, text_encoder, unet, **kwargs):
    assert (multiplier, network_dim, network_alpha, kwargs) == (1.0, 3, 2.0, {"words": "a=b", "dropout": 0.25})
    return ShiftNetwork(unet)
'''


@pytest.fixture
def plug_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, object]]:
    (tmp_path / "shift_network.py").write_text(PLUG_IN)
    monkeypatch.syspath_prepend(tmp_path)
    yield {
        "network_module": "shift_network",
        "network_dim": 3,
        "network_alpha": 2,
        "network_dropout": 0.25,
        "network_args": ["words=a=b"],
        "network_train_unet_only": True,
    }
    sys.modules.pop("shift_network", None)


def test_a_network_module_of_anyone_s(
    tmp_path: Path, tiny_sd: MadeCheckpoint, dataset: Path, plug_in: dict[str, object]
) -> None:
    more = {"max_train_steps": 4, "save_every_n_steps": 2, "save_state": True, "gradient_checkpointing": True}
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    train_here(*lora_arguments(tiny_sd, dataset, whole, **plug_in, **more))
    weights = load_file(whole / "tiny.safetensors")
    assert weights and all(name.startswith("shift_") and tensor.any() for name, tensor in weights.items())
    assert metadata_of(whole / "tiny.safetensors")["ss_network_module"] == "shift_network"
    state = whole / "tiny-step00000002-state"
    train_here(*lora_arguments(tiny_sd, dataset, rest, **plug_in, **more, resume=state))
    assert_same(rest / "tiny.safetensors", whole / "tiny.safetensors")


def test_its_failure_in_the_forward_pass_is_one_line(
    tmp_path: Path,
    tiny_sd: MadeCheckpoint,
    dataset: Path,
    plug_in: dict[str, object],
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = tmp_path / "shift_network.py"
    source.write_text(PLUG_IN.replace("+ self.shift", "+ torch.cat([self.shift, self.shift])"))
    with pytest.raises(SystemExit) as ended:
        train_here(*lora_arguments(tiny_sd, dataset, tmp_path / "out", **plug_in))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 2 and "shift_network: it failed during training: RuntimeError: The size of" in line
    assert "shift_network.py:" in line


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"scale_weight_norms": 1.0}, "--scale_weight_norms: networks of shift_network cannot do it"),
        ({"base_weights": ["a.safetensors"]}, "--base_weights: shift_network has no create_network_from_weights"),
    ],
)
def test_what_it_cannot_do_is_said(
    tmp_path: Path,
    tiny_sd: MadeCheckpoint,
    dataset: Path,
    plug_in: dict[str, object],
    capsys: pytest.CaptureFixture[str],
    settings: dict[str, object],
    said: str,
) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"")
    if "base_weights" in settings:
        settings = {"base_weights": [tmp_path / "a.safetensors"]}
    with pytest.raises(SystemExit, match="2"):
        train_here(*lora_arguments(tiny_sd, dataset, tmp_path / "out", **plug_in, **settings))
    assert said in capsys.readouterr().err


# ---- LoRA-FA, DyLoRA, OFT ----

#: flags of each kind, what its files hold and what has moved away from zero in them
FAMILY = {
    "lora_fa": (
        {"network_dim": 4, "network_args": ["conv_dim=2", "rank_dropout=0.1"], "scale_weight_norms": 1.0},
        ".lora_up.weight",
    ),
    "dylora": (
        {
            "network_dim": 4,
            "network_args": ["unit=2", "conv_dim=4", "loraplus_unet_lr_ratio=4"],
            "network_dropout": 0.1,
            "scale_weight_norms": 1.0,
            "gradient_accumulation_steps": 2,
        },
        ".lora_up.weight",
    ),
    "oft": (
        {
            "network_dim": 4,
            "network_alpha": 1e-2,
            "network_args": ["enable_all_linear=True", "enable_conv=True", "module_dropout=0.1"],
        },
        ".oft_blocks",
    ),
}


def family_arguments(kind: str, model: MadeCheckpoint, dataset: Path, output: Path, **more: object) -> list[object]:
    flags = {
        "network_module": f"networks.{kind}",
        "max_train_steps": 4,
        "save_every_n_steps": 2,
        "save_state": True,
        "ema_decay": 0.7,
        "validation_split": 0.4,
        "validate_every_n_steps": 2,
        "gradient_checkpointing": True,
        **FAMILY[kind][0],
        **more,
    }
    return lora_arguments(model, dataset, output, **flags)


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        (kind, family) if (kind, family) == ("dylora", "sd") else pytest.param(kind, family, marks=pytest.mark.slow)
        for kind in FAMILY
        for family in ("sd", "sdxl")
    ],
)
def test_the_family_trains_saves_draws_and_resumes_exactly(
    tmp_path: Path, request: pytest.FixtureRequest, images: Path, kind: str, family: str
) -> None:
    model = request.getfixturevalue(f"tiny_{family}")
    script = "train_network" if family == "sd" else "sdxl_train_network"
    dataset = write_dataset(tmp_path / "data.toml", images, dataset="batch_size = 2")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("cat --w 64 --h 64 --s 1 --d 1\n")
    drawn = {"sample_prompts": prompts, "sample_every_n_steps": 4}
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    train_here(*family_arguments(kind, model, dataset, whole, **drawn), script=script)
    final, average = whole / "tiny.safetensors", whole / "tiny-ema.safetensors"
    assert len(list((whole / "sample").glob("*.png"))) == 1
    assert all(math.isfinite(loss) for loss in logged(whole, "loss/validation/step_average"))
    metadata = metadata_of(final)
    assert metadata["ss_network_module"] == f"networks.{kind}" and metadata["ss_network_dim"] == "4"
    tensors, ending = load_file(final), FAMILY[kind][1]
    moved = {name for name, tensor in tensors.items() if name.endswith(ending) and tensor.any()}
    prefixes = {name.partition("_text")[0].partition("_unet")[0] for name in moved}
    texts = {"sd": {"lora_te"}, "sdxl": {"lora_te1", "lora_te2"}}[family]
    assert prefixes == ({"oft"} if kind == "oft" else {"lora", *texts})
    if kind == "lora_fa":
        halfway = load_file(whole / "tiny-step00000002.safetensors")
        frozen = [name for name in tensors if name.endswith(".lora_down.weight")]
        assert frozen and all(torch.equal(tensors[name], halfway[name]) for name in frozen)

    resumed = family_arguments(kind, model, dataset, rest, resume=whole / "tiny-step00000002-state", **drawn)
    train_here(*resumed, script=script)
    assert_same(rest / "tiny.safetensors", final)
    assert_same(rest / "tiny-ema.safetensors", average)


@pytest.mark.parametrize("kind", FAMILY)
def test_the_family_is_planned_and_starts_from_files(
    tmp_path: Path, tiny_sd: MadeCheckpoint, images: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """``--dry_run`` makes the very network, on shapes alone, and looks at every file; it writes nothing."""
    from library.architectures.sd import SD
    from networks import dylora, lora_fa, oft

    module = {"lora_fa": lora_fa, "dylora": dylora, "oft": oft}[kind]
    checkpoint = SD.inspect(
        str(tiny_sd.path),
        v2=False,
        v_parameterization=False,
        vae=None,
        tokenizer_cache_dir=str(tiny_sd.tokenizer_cache_dir),
    )
    encoders = SD.load_text_encoders(checkpoint, dtype=torch.float32, device="cpu")
    denoiser = SD.load_denoiser(checkpoint, dtype=torch.float32, device="cpu")
    start = tmp_path / "start.safetensors"
    network = module.create_network(1.0, 2, 0.5, None, encoders[0], denoiser)
    network.save_weights(start, None, {})
    count = sum(parameter.numel() for parameter in network.parameters())

    dataset = write_dataset(tmp_path / "data.toml", images)
    more = {"network_weights": start, "dim_from_weights": True, "network_args": None, "scale_weight_norms": None}
    plan = {"dry_run": True, "ema_decay": None, "validation_split": None, "validate_every_n_steps": None}
    more |= {"network_dim": None, "network_alpha": None, **plan}
    train_here(*family_arguments(kind, tiny_sd, dataset, tmp_path / "out", **more))
    said = "".join(capsys.readouterr())
    assert f"{count:,}" in said
    assert not (tmp_path / "out" / "tiny.safetensors").exists()

    train_here(*family_arguments(kind, tiny_sd, dataset, tmp_path / "out", explain=True))
    assert f"networks.{kind}" in "".join(capsys.readouterr())


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILY)
def test_the_family_goes_on_from_files_and_on_merged_ones(
    tmp_path: Path, tiny_sd: MadeCheckpoint, images: Path, kind: str
) -> None:
    dataset = write_dataset(tmp_path / "data.toml", images)
    plain = {"validation_split": None, "validate_every_n_steps": None, "ema_decay": None, "save_state": None}
    train_here(*family_arguments(kind, tiny_sd, dataset, tmp_path / "a", **plain))
    start = tmp_path / "a" / "tiny.safetensors"
    dropouts = [word for word in FAMILY[kind][0]["network_args"] if word.startswith(("unit", "rank", "module"))]
    takes = {"network_weights": start, "dim_from_weights": True, "network_args": dropouts}
    merges = {"base_weights": [start], "base_weights_multiplier": [0.5]}
    unmoved = {"learning_rate": 1e-12, "scale_weight_norms": None}
    train_here(*family_arguments(kind, tiny_sd, dataset, tmp_path / "b", **{**plain, **takes, **merges, **unmoved}))
    one, other = load_file(start), load_file(tmp_path / "b" / "tiny.safetensors")
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("oft", {"scale_weight_norms": 1.0}, "--scale_weight_norms: networks.oft rotates weights"),
        ("oft", {"network_dropout": 0.1}, "--network_dropout: networks.oft cannot do it"),
        ("lora_fa", {"network_args": ["loraplus_lr_ratio=16"]}, "loraplus_lr_ratio: networks.lora_fa cannot do it"),
        ("dyLoRA", {}, 'no such module (did you mean "networks.dylora"?)'),
    ],
)
def test_what_the_family_cannot_do_is_said(
    tmp_path: Path,
    tiny_sd: MadeCheckpoint,
    dataset: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    settings: dict[str, object],
    said: str,
) -> None:
    flags = {"network_module": f"networks.{kind}", "network_alpha": 0.01, "dry_run": True, **settings}
    with pytest.raises(SystemExit, match="2"):
        train_here(*lora_arguments(tiny_sd, dataset, tmp_path / "out", **flags))
    assert said in capsys.readouterr().err


# ---- the page's commands ----

PAGE = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^--network_module (networks\..*)$", PAGE, re.MULTILINE)
ARGUMENTS = re.findall(r"^--network_args (.*)$", PAGE, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("command", [*COMMANDS, *(f"networks.lora --network_args {words}" for words in ARGUMENTS)])
def test_commands_of_the_page(tmp_path: Path, tiny: Tiny, dataset: Path, command: str) -> None:
    if tiny.family.network_module != "networks.lora":
        pytest.skip("the family has network modules of its own")
    words = ["--network_module", *shlex.split(command)]
    flags = {"network_module": None, "network_dim": None, "max_train_steps": 1}
    train_here(*tiny.words(dataset, tmp_path, **flags), *words, script=tiny.family.script)
    assert metadata_of(tmp_path / "tiny.safetensors")["ss_network_module"] == words[1]
    if words[1] == "networks.dylora" and "conv_dim=16" not in words:
        (line,) = re.findall(r"^python networks/(extract_lora_from_dylora\.py .*)$", PAGE, re.MULTILINE)
        script, *rest = line.replace("my_", f"{tmp_path}/my_").split()
        (tmp_path / "tiny.safetensors").rename(tmp_path / "my_dylora.safetensors")
        assert run_script(f"networks/{script}", *rest).code == 0
        assert sorted(path.name for path in tmp_path.glob("my_lora*")) == [
            f"my_lora-{rank:04d}.safetensors" for rank in (4, 8, 12, 16)
        ]


def test_the_page_has_a_command_for_each_of_our_modules() -> None:
    assert {command.split()[0] for command in COMMANDS} == {"networks.lora", *(f"networks.{kind}" for kind in FAMILY)}
    for command in COMMANDS:
        module, _, rest = command.partition(" ")
        arguments = shlex.split(rest.partition("--network_args")[2])
        importlib.import_module(module).check_network_args(parse_network_args(arguments))
