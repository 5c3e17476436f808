"""No tool writes over a file that it reads: not by its name, through a link, or inside a folder that it reads."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from diffusers import UNet2DConditionModel
from PIL import Image

from library.errors import UserError
from library.files.streamed import check_target
from library.inference.latent_upscaler import LatentUpscaler
from tests.fixtures.control import random_controlnet, save_original
from tests.fixtures.file_tools import TOOLS, saved
from tests.fixtures.tiny_flux_files import tiny_lora, tiny_state, write_diffusers_folder
from tests.fixtures.tiny_sd import make_tiny_sd
from tests.fixtures.tiny_sd3 import make_tiny_sd3

pytestmark = pytest.mark.usefixtures("own_root_logger")

#: tools that write no file
READERS = {"check_lora_weights.py", "lora_diffusers.py", "lora_interrogator.py", "show_metadata.py"}
#: a tool, and a command whose target is a file that it reads
COMMANDS = (
    "networks/convert_anima_lora_to_comfy.py lora.safetensors lora.safetensors",
    "networks/convert_flux_lora.py --src sd-scripts --dst ai-toolkit --src_path lora.safetensors --dst_path lora.safetensors",
    "networks/convert_hunyuan_image_lora_to_comfy.py lora.safetensors lora.safetensors",
    "networks/convert_lora.py --model lora.safetensors --to diffusers --save_to lora.safetensors",
    "networks/extract_lora_from_dylora.py --model x-0004.safetensors --save_to x.safetensors --unit 4",
    "networks/extract_lora_from_models.py --model_org sd.safetensors --model_tuned sd2.safetensors --save_to sd2.safetensors",
    "networks/flux_extract_lora.py --model_org flux.safetensors --model_tuned flux2.safetensors --save_to flux2.safetensors",
    "networks/flux_merge_lora.py --models lora.safetensors lora2.safetensors --save_to lora2.safetensors",
    "networks/flux_merge_lora.py --flux_model flux.safetensors --models lora.safetensors --save_to flux.safetensors",
    "networks/merge_lora.py --sd_model sd.safetensors --models lora.safetensors --save_to sd.safetensors",
    "networks/merge_lora_old.py --models lora.safetensors lora2.safetensors --save_to lora.safetensors",
    "networks/resize_lora.py --model lora.safetensors --new_rank 2 --save_to lora.safetensors",
    "networks/sdxl_merge_lora.py --models lora.safetensors lora2.safetensors --save_to lora.safetensors",
    "networks/svd_merge_lora.py --models lora.safetensors lora2.safetensors --save_to link.safetensors",
    "tools/convert_diffusers20_original_sd.py --fp16 sd.safetensors sd.safetensors",
    "tools/convert_diffusers20_original_sd.py --fp16 folder folder/unet/diffusion_pytorch_model.safetensors",
    "tools/convert_diffusers_to_flux.py --diffusers_path pipeline --save_to pipeline/transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
    "tools/lora.py convert lora.safetensors --to diffusers --save_to link.safetensors --overwrite",
    "tools/lora.py extract flux.safetensors flux2.safetensors --rank 2 --save_to flux.safetensors --overwrite",
    "tools/lora.py merge lora.safetensors --into flux.safetensors --save_to flux.safetensors --overwrite",
    "tools/lora.py merge lora.safetensors lora2.safetensors --save_to link.safetensors --overwrite",
    "tools/lora.py resize lora.safetensors --rank 2 --save_to link.safetensors --overwrite",
    "tools/merge_models.py --models sd.safetensors sd2.safetensors --output sd2.safetensors",
    "tools/merge_models.py --models folder sd.safetensors --output folder/unet/diffusion_pytorch_model.safetensors",
    "tools/merge_sd3_safetensors.py --dit sd3.safetensors --output sd3.safetensors",
    "tools/original_control_net.py control.safetensors --model sd.safetensors --save_to sd.safetensors --overwrite",
    "tools/canny.py --input a.png --output a.png",
    "tools/latent_upscaler.py --vae_path folder --weights upscaler.safetensors --image_pattern a*.png --output_dir .",
    "tools/resize_images_to_resolution.py images images",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sources")
    sd = make_tiny_sd(place / "sd.safetensors").path
    (place / "sd2.safetensors").write_bytes(sd.read_bytes())
    make_tiny_sd(place / "folder", layout="diffusers")
    (place / "sd3.safetensors").write_bytes(make_tiny_sd3(place / "of_sd3").path.read_bytes())
    flux = tiny_state("flux1_dev")
    for name in ("flux", "flux2"):
        saved(place / f"{name}.safetensors", flux)
    for name in ("lora", "lora2", "x-0004"):
        saved(place / f"{name}.safetensors", tiny_lora("lora_flux_unet_only", [flux]))
    (place / "link.safetensors").symlink_to(place / "lora.safetensors")
    write_diffusers_folder(place / "flux.safetensors", place / "pipeline")
    unet = UNet2DConditionModel.from_pretrained(place / "folder" / "unet")
    save_original(random_controlnet(unet), place / "control.safetensors", prefix="control_model.")
    saved(place / "upscaler.safetensors", LatentUpscaler(4, 2).state_dict())
    (place / "images").mkdir()
    for name in ("a.png", "a_upscaled.png", "images/a.png"):
        Image.new("RGB", (16, 16)).save(place / name)
    return place


def test_every_tool_that_writes_is_here() -> None:
    tools = {Path(tool).name for tool in TOOLS} - READERS
    assert tools <= {Path(command.split()[0]).name for command in COMMANDS}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.partition(" -")[0][:60])
def test_what_is_read_stays(
    folder: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    script, *words = command.split()
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    with pytest.raises(SystemExit) as end:
        module.main(module.setup_parser().parse_args(words))
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "error:" in said and any(
        words in said for words in ("files that are read", "would replace", "is the folder of the images")
    ), said
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_new_file_in_a_folder_that_is_read_is_no_source(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"1")
    check_target(tmp_path / "new.safetensors", "--save_to", sources=[tmp_path])
    with pytest.raises(UserError, match="is one of the files that are read"):
        check_target(tmp_path / "model.safetensors", "--save_to", sources=[tmp_path])
