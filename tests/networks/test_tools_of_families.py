"""The tools for adapters with files of every family of transformers: results of a trained file against float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.files.safetensors_io import read_header
from networks.files.families import family_named
from tests.fixtures.families import FAMILIES, Tiny
from tests.fixtures.runs import make_images, metadata_of, write_dataset
from tools import lora as tool

pytestmark = pytest.mark.usefixtures("own_root_logger")

RANK, ALPHA, RATIO = 4, 2.0, 0.7
#: family -> its title, and the prefix of the denoiser's names in the model's file
TRANSFORMERS = {
    "sd3": ("Stable Diffusion 3", "model.diffusion_model."),
    "lumina": ("Lumina-Image 2.0", ""),
    "hunyuan_image": ("HunyuanImage-2.1", ""),
}


def run(*words: object) -> int:
    return tool.main(tool.setup_parser().parse_args([str(word) for word in words])) or 0


class Trained:
    """A family's tiny model, and a LoRA that was trained on its denoiser and then filled with random numbers."""

    def __init__(self, name: str, folder: Path) -> None:
        family = FAMILIES[name]
        self.family = name
        self.title, self.prefix = TRANSFORMERS[name]
        self.architecture = family.metadata["modelspec.architecture"].removesuffix("/lora")
        tiny = Tiny(family, family.make(folder))
        dataset = write_dataset(folder / "data.toml", make_images(folder / "images", ((64, 64),)))
        # as a published command line trains it
        more = {"network_dim": RANK, "network_alpha": ALPHA, "max_train_steps": 1, "network_train_unet_only": True}
        tiny.train(dataset, folder / "out", **more)
        (file,) = (folder / "out").glob("*.safetensors")
        generator = torch.Generator().manual_seed(0)
        tensors = {
            key: tensor if key.endswith(".alpha") else torch.randn(tensor.shape, generator=generator) * 0.1
            for key, tensor in load_file(file).items()
        }
        self.lora, self.model = folder / "lora.safetensors", tiny.model.path
        save_file(tensors, self.lora, metadata_of(file))
        self.tensors = {key: tensor.double() for key, tensor in tensors.items()}

    def changes(self, tensors: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Each module's change of its weight, in float64."""
        tensors = tensors or self.tensors
        names = {key.partition(".")[0] for key in tensors}
        return {
            name: tensors[f"{name}.alpha"].double()
            / tensors[f"{name}.lora_down.weight"].shape[0]
            * tensors[f"{name}.lora_up.weight"].double()
            @ tensors[f"{name}.lora_down.weight"].double()
            for name in names
        }

    def key_of(self) -> dict[str, str]:
        """The published names of modules in LoRA files -> those of the weights in the model's file."""
        keys = (key for key in read_header(self.model).tensors if key.startswith(self.prefix))
        return {
            "lora_unet_" + key.removeprefix(self.prefix).removesuffix(".weight").replace(".", "_"): key
            for key in keys
            if key.endswith(".weight")
        }


@pytest.fixture(scope="module", params=TRANSFORMERS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(request.param, tmp_path_factory.mktemp(request.param))


def test_show(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    run("show", trained.lora)
    out = capsys.readouterr().out
    assert f"{trained.title}, kohya names, {len(trained.changes())} modules" in out and "ranks: 4" in out


def test_merge_and_extract(trained: Trained, tmp_path: Path) -> None:
    merged, found = tmp_path / "merged.safetensors", tmp_path / "found.safetensors"
    run("merge", trained.lora, "--ratios", RATIO, "--into", trained.model, "--save_to", merged)
    before, after, keys = load_file(trained.model), load_file(merged), trained.key_of()
    changes = trained.changes()
    assert after.keys() == before.keys() and changes.keys() <= keys.keys()
    expected = {keys[name]: change for name, change in changes.items()}
    for key, tensor in before.items():
        change = expected.get(key)
        if change is None:
            assert torch.equal(after[key], tensor), key
        else:
            torch.testing.assert_close(after[key].double(), tensor.double() + RATIO * change, atol=1e-5, rtol=1e-5)
    assert metadata_of(merged)["modelspec.architecture"] == trained.architecture

    run("extract", trained.model, merged, "--rank", RANK, "--save_to", found, "--min_diff", 0)
    extracted = trained.changes(load_file(found))
    for name, change in changes.items():
        torch.testing.assert_close(extracted[name], RATIO * change, atol=1e-5, rtol=1e-4)


def test_merge_with_each_other_and_resize(trained: Trained, tmp_path: Path) -> None:
    both, small = tmp_path / "both.safetensors", tmp_path / "small.safetensors"
    run("merge", trained.lora, trained.lora, "--ratios", 1, -0.25, "--concat", "--save_to", both)
    for name, change in trained.changes(load_file(both)).items():
        torch.testing.assert_close(change, 0.75 * trained.changes()[name], atol=1e-6, rtol=1e-5)
    run("resize", trained.lora, "--rank", 2, "--save_to", small)
    resized = trained.changes(load_file(small))
    for name, change in trained.changes().items():
        least = torch.linalg.svdvals(change)[2:].norm()
        assert float((resized[name] - change).norm()) == pytest.approx(float(least), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("to", ["diffusers", "peft", "comfyui"])
def test_convert_there_and_back(trained: Trained, tmp_path: Path, to: str) -> None:
    if to in family_named(trained.family).unwritten:
        with pytest.raises(SystemExit):
            run("convert", trained.lora, "--to", to, "--save_to", tmp_path / "there.safetensors")
        return
    there, back = tmp_path / ("there" if to == "peft" else "there.safetensors"), tmp_path / "back.safetensors"
    run("convert", trained.lora, "--to", to, "--save_to", there)
    run("convert", there, "--to", "kohya", "--save_to", back)
    changes = trained.changes(load_file(back))
    assert changes.keys() == trained.changes().keys()
    for name, change in trained.changes().items():
        torch.testing.assert_close(changes[name], change, atol=1e-6, rtol=1e-5)


def test_diff(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    run("diff", trained.lora, trained.lora, "--rows", 1)
    assert "0 apart, cosine 1.0000" in capsys.readouterr().out
