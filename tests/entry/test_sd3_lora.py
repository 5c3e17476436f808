"""LoRA of Stable Diffusion 3: all three text encoders, swapped blocks, files in fp8, files of diffusers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.fixtures.families import SD3, Tiny
from tests.fixtures.runs import logged, make_images, write_dataset
from tests.fixtures.scaled import write_both
from tests.fixtures.tiny_sd3 import SD3FileSizes, make_tiny_sd3
from tools import lora as lora_tool

pytestmark = pytest.mark.usefixtures("own_root_logger")

#: SD3.5 medium with more blocks
DEEP = SD3FileSizes(depth=5, head=16, qk_norm=True, dual=(0, 1))


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "data.toml", make_images(tmp_path / "images", [(64, 64)] * 2))


def assert_equal(one: Path, other: Path) -> None:
    a, b = (load_file(folder / "tiny.safetensors") for folder in (one, other))
    assert a.keys() == b.keys() and not [name for name in a if not torch.equal(a[name], b[name])]


def test_all_three_text_encoders_are_adapted(tmp_path: Path, dataset: Path) -> None:
    """Each with its own learning rate; what was trained is read again and trained on."""
    tiny = Tiny(SD3, SD3.make(tmp_path / "model"))
    rates = [1e-3, 2e-3, 3e-3]
    options = {"network_args": ["train_t5xxl=True"], "text_encoder_lr": rates, "max_train_steps": 2}
    tiny.train(dataset, tmp_path / "out", **options)
    path = tmp_path / "out" / "tiny.safetensors"
    ups = {name: tensor for name, tensor in load_file(path).items() if name.endswith("lora_up.weight")}
    for number, rate in enumerate(rates, start=1):
        own = [tensor for name, tensor in ups.items() if name.startswith(f"lora_te{number}_")]
        assert own and all(tensor.any() for tensor in own), number
        assert logged(tmp_path / "out", f"lr/textencoder {number}") == pytest.approx([rate] * 2)
    more = {**options, "network_args": None, "network_dim": None, "network_alpha": None}
    tiny.train(dataset, tmp_path / "again", **more, network_weights=path, dim_from_weights=True)
    again = load_file(tmp_path / "again" / "tiny.safetensors")
    assert again.keys() == load_file(path).keys()


def test_swapped_blocks_change_no_number(tmp_path: Path, dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = Tiny(SD3, make_tiny_sd3(tmp_path, sizes=DEEP))
    tiny.train(dataset, tmp_path / "plain", gradient_checkpointing=True)
    tiny.train(dataset, tmp_path / "swapped", blocks_to_swap=3)
    assert_equal(tmp_path / "plain", tmp_path / "swapped")
    with pytest.raises(SystemExit):
        tiny.train(dataset, tmp_path, blocks_to_swap=4)
    assert "--blocks_to_swap 4: the model has 5 blocks, of which 3 can be swapped" in capsys.readouterr().err


@pytest.mark.parametrize(
    "apart", [pytest.param(False, id="one file", marks=pytest.mark.slow), pytest.param(True, id="encoders apart")]
)
def test_files_in_fp8_with_scales_are_their_weights(tmp_path: Path, dataset: Path, apart: bool) -> None:
    """Transformer and text encoders, as ComfyUI publishes them; the VAE is never in fp8."""
    made = make_tiny_sd3(tmp_path, apart=apart)
    models = dict.fromkeys(("scaled", "plain"), made)
    for key, path in {"": made.path, **made.apart}.items():
        files = {name: tmp_path / f"{name}_{path.name}" for name in models}
        write_both(
            path,
            files["scaled"],
            files["plain"],
            chosen=lambda name: "blocks." in name or "layers." in name or "block." in name,
        )
        for name, model in models.items():
            own = {"apart": {**model.apart, key: files[name]}} if key else {"path": files[name]}
            models[name] = replace(model, **own)
    for name, model in models.items():
        Tiny(SD3, model).train(dataset, tmp_path / name)
    assert_equal(tmp_path / "scaled", tmp_path / "plain")


def test_files_with_diffusers_names_are_read_after_a_conversion(
    tmp_path: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error of such a file names the command."""
    tiny = Tiny(SD3, make_tiny_sd3(tmp_path))
    own = {"network_train_unet_only": True}
    tiny.train(dataset, tmp_path / "first", **own)
    first, theirs, back = (tmp_path / name for name in ("first/tiny.safetensors", "d.safetensors", "k.safetensors"))

    def convert(source: Path, to: str, target: Path) -> None:
        words = ["convert", source, "--to", to, "--save_to", target]
        lora_tool.main(lora_tool.setup_parser().parse_args([str(word) for word in words]))

    convert(first, "diffusers", theirs)
    more = {**own, "dim_from_weights": True, "network_dim": None, "network_alpha": None}
    capsys.readouterr()
    with pytest.raises(SystemExit):
        tiny.train(dataset, tmp_path / "refused", **more, network_weights=theirs)
    assert f"python tools/lora.py convert {theirs} --to kohya --save_to NEW.safetensors" in capsys.readouterr().err
    convert(theirs, "kohya", back)
    for name, file in (("own", first), ("theirs", back)):
        tiny.train(dataset, tmp_path / name, **more, network_weights=file)
    assert_equal(tmp_path / "own", tmp_path / "theirs")


def test_the_second_of_two_rates_is_for_t5_too(tmp_path: Path, dataset: Path) -> None:
    """As published, for one, two or three rates."""
    tiny = Tiny(SD3, make_tiny_sd3(tmp_path))
    options = {"network_args": ["train_t5xxl=True"], "text_encoder_lr": [1e-3, 2e-3], "max_train_steps": 1}
    tiny.train(dataset, tmp_path / "out", **options)
    found = [logged(tmp_path / "out", f"lr/textencoder {number}") for number in (1, 2, 3)]
    assert found == [[pytest.approx(1e-3)], [pytest.approx(2e-3)], [pytest.approx(2e-3)]]
