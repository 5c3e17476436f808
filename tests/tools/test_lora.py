"""tools/lora.py: the commands, and what diff and show say, against float64."""

from __future__ import annotations

import csv

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from library.architectures.sd import SD
from networks import lora, oft
from tests.fixtures.adapted import randomize
from tests.fixtures.file_tools import saved
from tests.fixtures.tiny_flux_files import tiny_lora, tiny_state
from tests.fixtures.tiny_sd import make_tiny_sd
from tests.networks.test_merge_lora import products
from tools import lora as tool

pytestmark = pytest.mark.usefixtures("own_root_logger")


def run(*words: object) -> int:
    return tool.main(tool.setup_parser().parse_args([str(word) for word in words]))


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        run(*words)
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error:"))
    return line


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny checkpoint, two LoRAs, a DoRA and an OFT for it."""
    folder = tmp_path_factory.mktemp("files")
    made = make_tiny_sd(folder / "model.safetensors")
    cache = str(made.tokenizer_cache_dir)
    found = SD.inspect(str(made.path), v2=False, v_parameterization=False, vae=None, tokenizer_cache_dir=cache)
    text = SD.load_text_encoders(found, dtype=torch.float32, device="cpu")
    unet = SD.load_denoiser(found, dtype=torch.float32, device="cpu")
    for name, std, args in (("a", 0.1, {}), ("b", 0.2, {"conv_dim": "2"}), ("dora", 0.1, {"dora": "True"})):
        network = randomize(lora.create_network(1.0, 4, 2.0, None, text, unet, **args), std)
        network.save_weights(folder / f"{name}.safetensors", None, {"ss_network_module": "networks.lora"})
    rotated = randomize(oft.create_network(1.0, 2, 0.01, None, [], unet), 0.1)
    rotated.save_weights(folder / "oft.safetensors", None, {"ss_base_model_version": "sd_v1"})
    return folder


def test_show_sums_up_a_file(files, capsys):
    run("show", files / "b.safetensors", files / "oft.safetensors", "--metadata")
    out = capsys.readouterr().out
    for words in (
        "b.safetensors: Stable Diffusion 1.x, kohya names,", "U-Net: ", "text encoder: 12 modules", "kinds: LoRA",
        "ranks: 4 (", "alphas: 2", "dtypes: float32", "ss_network_module: networks.lora", "kinds: OFT", "2 blocks",
    ):  # fmt: skip
        assert words in out, words


def test_diff_is_what_the_changes_say(files, tmp_path, capsys):
    one, other = files / "a.safetensors", files / "b.safetensors"
    run("diff", one, other, "--csv", tmp_path / "d.csv", "--plot", tmp_path / "d.png", "--rows", 3)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[4].startswith("... and ") and lines[5].startswith("all ")
    first, second = (products(load_file(file)) for file in (one, other))
    with (tmp_path / "d.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["module"] for row in rows} == first.keys() | second.keys()
    for row in rows:
        a, b = first.get(row["module"]), second[row["module"]]
        assert float(row["second"]) == pytest.approx(float(b.norm()))
        if a is None:
            assert float(row["first"]) == 0 and row["cosine"] == ""
        else:
            assert float(row["apart"]) == pytest.approx(float((a - b).norm()))
            assert float(row["cosine"]) == pytest.approx(float((a * b).sum() / a.norm() / b.norm()))
    whole = sum(float(change.square().sum()) for change in first.values()) ** 0.5
    assert f"{whole:.4g} and" in lines[5]
    assert Image.open(tmp_path / "d.png").size == (1200, 640)
    run("diff", one, one)
    assert "0 apart, cosine 1.0000" in capsys.readouterr().out


def test_diff_of_what_depends_on_the_model(files, capsys):
    dora = files / "dora.safetensors"
    assert "name it with --model" in refusal(capsys, "diff", dora, files / "a.safetensors")
    run("diff", dora, dora, "--model", files / "model.safetensors")
    assert "cosine 1.0000" in capsys.readouterr().out
    run("diff", files / "oft.safetensors", dora, "--model", files / "model.safetensors")
    assert "all " in capsys.readouterr().out


def test_merge_resize_extract_and_convert(files, tmp_path):
    one, other, model = (files / f"{name}.safetensors" for name in ("a", "b", "model"))
    run("merge", one, other, "--ratios", 1, -0.5, "--concat", "--save_to", tmp_path / "sum.safetensors")
    changes = [products(load_file(file)) for file in (one, other)]
    for name, change in products(load_file(tmp_path / "sum.safetensors")).items():
        expected = changes[0].get(name, 0) - 0.5 * changes[1][name]
        torch.testing.assert_close(change, expected, atol=1e-6, rtol=1e-5)
    run("merge", one, "--into", model, "--save_to", tmp_path / "merged.safetensors")
    run(
        "extract", model, tmp_path / "merged.safetensors", "--rank", 4, "--min_diff", 0,
        "--save_to", tmp_path / "found.safetensors",
    )  # fmt: skip
    found = products(load_file(tmp_path / "found.safetensors"))
    for name, change in changes[0].items():
        torch.testing.assert_close(found[name], change, atol=1e-5, rtol=1e-4)
    run("resize", one, "--rank", 2, "--save_to", tmp_path / "small.safetensors", "--precision", "bf16")
    small = load_file(tmp_path / "small.safetensors")
    assert {t.shape[0] for key, t in small.items() if "lora_down" in key} == {2}
    run("convert", one, "--to", "diffusers", "--family", "sd", "--save_to", tmp_path / "d.safetensors")
    assert all(key.startswith(("unet.", "text_encoder.")) for key in load_file(tmp_path / "d.safetensors"))
    assert run("convert", one, "--to", "kohya", "--family", "sd", "--save_to", tmp_path / "k.safetensors") == 1


def test_it_is_the_same_for_other_families(tmp_path, capsys):
    flux = tiny_state("flux1_dev")
    model = saved(tmp_path / "flux.safetensors", {key: t.bfloat16() for key, t in flux.items()})
    file = saved(tmp_path / "l.safetensors", tiny_lora("lora_flux_unet_only", [flux]))
    run("show", file)
    assert "FLUX.1, kohya names, 26 modules" in capsys.readouterr().out
    run("merge", file, "--into", model, "--save_to", tmp_path / "merged.safetensors")
    assert {t.dtype for t in load_file(tmp_path / "merged.safetensors").values()} == {torch.bfloat16}
    run("extract", model, tmp_path / "merged.safetensors", "--rank", 4, "--save_to", tmp_path / "found.safetensors")
    run("diff", file, tmp_path / "found.safetensors", "--rows", 1)
    cosine = float(capsys.readouterr().out.strip().rpartition(" ")[2])
    assert cosine > 0.99  # what bf16 rounds away


def test_mistakes_are_one_line(files, tmp_path, capsys):
    one, out = files / "a.safetensors", tmp_path / "out.safetensors"
    assert "--rank 0" in refusal(capsys, "merge", one, "--rank", 0, "--save_to", out)
    assert "leave them out" in refusal(
        capsys, "merge", one, "--into", files / "model.safetensors", "--rank", 2, "--save_to", out
    )
    assert "exists already; give another name, or --overwrite" in refusal(
        capsys, "resize", one, "--rank", 2, "--save_to", one
    )
    assert "files that are read" in refusal(capsys, "merge", one, one, "--save_to", one, "--overwrite")
    assert "files that are read" in refusal(capsys, "resize", one, "--rank", 2, "--save_to", one, "--overwrite")
    assert "--rank 0" in refusal(capsys, "resize", one, "--rank", 0, "--save_to", out)
    assert "--method and" in refusal(capsys, "resize", one, "--rank", 2, "--method", "sv_fro", "--save_to", out)
    models = (files / "model.safetensors", files / "model.safetensors")
    assert "--conv_rank 0" in refusal(capsys, "extract", *models, "--rank", 2, "--conv_rank", 0, "--save_to", out)
    assert "the two models are both" in refusal(capsys, "extract", *models, "--rank", 2, "--save_to", out)
    assert "--ratios: 2 numbers for 1 files" in refusal(capsys, "merge", one, "--ratios", 1, 2, "--save_to", out)
    assert "--rows 0" in refusal(capsys, "diff", one, one, "--rows", 0)
    assert "must end with .png" in refusal(capsys, "diff", one, one, "--plot", tmp_path / "a.jpg")
    assert "no such file" in refusal(capsys, "show", tmp_path / "none.safetensors")
    assert not out.exists()
