"""Updates of whole models: fused in each form, 8-bit and paged optimizers, Adafactor, averages; resumed exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from library.optim.pieces import Pieces
from tests.fixtures.families import FAMILIES, Tiny
from tests.fixtures.runs import lora_arguments, make_images, train_here, write_dataset

SCRIPTS = {
    "sd": "fine_tune",
    "sdxl": "sdxl_train",
    "flux": "flux_train",
    "sd3": "sd3_train",
    "lumina": "lumina_train",
    "hunyuan_image": "hunyuan_image_train",
}
#: a warm-up, so that a stale learning rate shows; clipping off, as a fused update never sees all gradients
USUAL = {
    "learning_rate": 1e-3,
    "lr_scheduler": "constant_with_warmup",
    "lr_warmup_steps": 5,
    "max_grad_norm": 0,
    "max_train_steps": 8,
    "cache_latents": True,
}
HALF = {"full_bf16": True, "mixed_precision": "bf16"}
ADAFACTOR = {"optimizer_type": "Adafactor", "optimizer_args": ["relative_step=False"]}
FORMS = {
    "one by one": {"fused_backward_pass": True},
    "groups": {"fused_optimizer_groups": 3},
    "blocks": {"blockwise_fused_optimizers": True},
}
#: name -> options that both runs have, and the form of the fused one
PAIRS: dict[str, tuple[dict[str, object], str]] = {
    "AdamW, groups": ({"ema_decay": 0.9}, "groups"),
    "AdamW, blocks": ({}, "blocks"),
    "AdamW, one by one, accumulation": ({"gradient_accumulation_steps": 2}, "one by one"),
    "bf16, blocks": (HALF, "blocks"),
    "bf16 Adafactor, one by one": ({**HALF, **ADAFACTOR}, "one by one"),
    "AdamW8bit, groups": ({"optimizer_type": "AdamW8bit"}, "groups"),
    "PagedAdamW8bit, one by one": ({"optimizer_type": "PagedAdamW8bit"}, "one by one"),
    "AdamWScheduleFree, blocks": ({"optimizer_type": "AdamWScheduleFree", "lr_scheduler": "constant"}, "blocks"),
    "text encoder, one by one": ({"train_text_encoder": True, "learning_rate_te": 1e-4}, "one by one"),
}
FAST = ("AdamW, groups", "AdamW, blocks", "bf16 Adafactor, one by one")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    images = make_images(folder / "images")
    return write_dataset(folder / "data.toml", images, dataset="batch_size = 2", subset="num_repeats = 3")


def train(tiny: Tiny, dataset: Path, output: Path, **options: object) -> Path:
    """Run the family's script for whole models; returns the final file."""
    settings: dict[str, object] = {**USUAL, **options}
    if settings["lr_scheduler"] == "constant":
        settings["lr_warmup_steps"] = None
    words = lora_arguments(tiny.model, dataset, output, **settings, network_module=None, network_dim=None)
    train_here(*words, script=SCRIPTS[tiny.family.name])
    return output / "tiny.safetensors"


def assert_same(one: Path, other: Path) -> None:
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in PAIRS])
def test_a_fused_run_is_the_plain_run(tmp_path: Path, sd: Tiny, dataset: Path, name: str) -> None:
    """Bit for bit, and when it is killed in the middle too."""
    options, form = PAIRS[name]
    plain = train(sd, dataset, tmp_path / "plain", **options)
    saving = {"save_every_n_steps": 3, "save_state": True}
    fused = train(sd, dataset, tmp_path / "fused", **options, **FORMS[form], **saving)
    assert_same(plain, fused)
    if "ema_decay" in options:
        assert_same(tmp_path / "plain" / "tiny-ema.safetensors", tmp_path / "fused" / "tiny-ema.safetensors")
    state = tmp_path / "fused" / "tiny-step00000003-state"
    assert_same(plain, train(sd, dataset, tmp_path / "rest", **options, **FORMS[form], resume=state))
    before = load_file(sd.model.path)
    changed = [key for key, tensor in load_file(plain).items() if not torch.equal(tensor.float(), before[key].float())]
    assert any("diffusion_model" in key for key in changed)
    assert any("cond_stage_model" in key for key in changed) is ("text encoder" in name)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sdxl", "flux", "sd3", "lumina", "hunyuan_image"])
@pytest.mark.parametrize("form", ["groups", "blocks"])
def test_of_every_family(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, family: str, form: str) -> None:
    tiny = Tiny(FAMILIES[family], FAMILIES[family].make(tmp_path_factory.mktemp(family)))
    dataset = write_dataset(tmp_path / "data.toml", make_images(tmp_path / "images"), dataset="batch_size = 2")
    options = {**HALF, **ADAFACTOR, "max_train_steps": 4}
    plain = train(tiny, dataset, tmp_path / "plain", **options)
    assert_same(plain, train(tiny, dataset, tmp_path / "fused", **options, **FORMS[form]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_grad_norm": 1.0}, "cannot be clipped as a whole; add --max_grad_norm 0"),
        ({"optimizer_type": "Prodigy", "learning_rate": 1.0}, "Prodigy does not update every parameter by itself"),
        ({"fused_backward_pass": True}, "exclude each other"),
        (
            {
                "blockwise_fused_optimizers": None,
                "deepspeed": True,
                "train_text_encoder": True,
                "stop_text_encoder_training": 2,
            },
            "--stop_text_encoder_training 2: not with DeepSpeed",
        ),
    ],
)
def test_what_needs_all_gradients_is_refused(
    tmp_path: Path,
    sd: Tiny,
    dataset: Path,
    capsys: pytest.CaptureFixture[str],
    options: dict[str, object],
    words: str,
) -> None:
    if options.get("optimizer_type") == "Prodigy":
        pytest.importorskip("prodigyopt")
    with pytest.raises(SystemExit) as ended:
        train(sd, dataset, tmp_path, **{"blockwise_fused_optimizers": True, **options})
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_gradients_never_exist_all_at_once(
    tmp_path: Path, sd: Tiny, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The update of a part finds only gradients of this part, and of parts that are not complete."""
    largest: dict[str, int] = {}
    original = Pieces.update
    for form, options in FORMS.items():
        counts: list[int] = []

        def update(self: Pieces, parameters: list[nn.Parameter], counts: list[int] = counts) -> None:
            if len(self._group_of) > 100:  # not the trial before the run
                counts.append(sum(p.grad is not None for p in self._group_of))
            original(self, parameters)

        with monkeypatch.context() as patch:
            patch.setattr(Pieces, "update", update)
            train(sd, dataset, tmp_path / form, **options, max_train_steps=1)
        largest[form] = max(counts)
    total = len([key for key in load_file(sd.model.path) if "diffusion_model" in key])
    assert largest["one by one"] == 1
    assert 1 < largest["blocks"] < 0.8 * total and 1 < largest["groups"] < 0.8 * total
