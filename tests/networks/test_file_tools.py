"""The tools for adapter and model files as programs: help, exit codes, and one another's files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library.architectures.common.joined_layout import join
from library.architectures.flux.diffusers_layout import diffusers_plan
from library.files.safetensors_io import read_header
from tests.fixtures.file_tools import ROOT, TOOLS, saved, words_of
from tests.fixtures.tiny_flux_files import delta, tiny_lora, tiny_shapes, tiny_state

#: runs scripts one after another as programs, which saves importing torch for each
RUNNER = """
import json, runpy, sys
path, codes = sys.path[:], []
for script, *words in json.load(sys.stdin):
    sys.path[:], sys.argv = path, [script, *words]
    try:
        runpy.run_path(script, run_name="__main__")
        codes.append(0)
    except SystemExit as end:
        codes.append(end.code or 0)
print(json.dumps(codes))
"""


@pytest.mark.parametrize("tool", TOOLS)
def test_help_comes_at_once_from_any_folder(tool, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('loading torch takes seconds')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "120"}
    command = [sys.executable, str(ROOT / tool), "--help"]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    first, _, rest = run.stdout.partition("\n\noptions:\n")
    assert first.startswith(f"usage: {Path(tool).name}") and f"python {tool} " in rest  # a command to begin with
    assert all(len(line) <= 120 for line in run.stdout.splitlines())


def test_the_programs_work_on_each_others_files(tmp_path):
    flux, plan = tiny_state("flux1_dev", dtype=torch.bfloat16), diffusers_plan(tiny_shapes("flux1_dev"))
    diffusers = {name: join(plan, name, flux.__getitem__).contiguous() for name in plan}
    (tmp_path / "transformer").mkdir()
    saved(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors", diffusers)
    lora = tiny_lora("lora_flux_unet_only", [flux])
    saved(tmp_path / "lora.safetensors", lora, {"ss_network_module": "networks.dylora", "ss_network_dim": "4"})
    steps = [
        ("tools/convert_diffusers_to_flux.py", {"diffusers_path": ".", "save_to": "flux.safetensors"}),
        ("networks/convert_flux_lora.py", {
            "src": "sd-scripts", "dst": "ai-toolkit", "src_path": "lora.safetensors", "dst_path": "toolkit.safetensors",
        }),
        ("networks/flux_merge_lora.py", {
            "flux_model": "flux.safetensors", "models": "toolkit.safetensors", "save_to": "merged.safetensors",
            "mem_eff_load_save": True,
        }),
        ("networks/flux_extract_lora.py", {
            "model_org": "transformer", "model_tuned": "merged.safetensors", "save_to": "found.safetensors", "dim": 4,
            "clamp_quantile": 1, "save_precision": "bf16",
        }),
        ("networks/convert_lora.py", {"model": "found.safetensors", "save_to": "found", "to": "peft"}),
        ("networks/convert_lora.py", {"model": "found.safetensors", "save_to": "x.safetensors", "to": "kohya"}),
        ("networks/extract_lora_from_dylora.py", {"model": "lora.safetensors", "save_to": "d.safetensors", "unit": 2}),
        ("networks/flux_merge_lora.py", {"models": "gone.safetensors", "save_to": "x.safetensors"}),
    ]  # fmt: skip
    commands = [[str(ROOT / script), *words_of(**options)] for script, options in steps]
    run = subprocess.run(
        [sys.executable, "-c", RUNNER], input=json.dumps(commands), cwd=tmp_path, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == [0, 0, 0, 0, 0, 1, 0, 2], run.stderr
    for said in (
        "FLUX.1 dev, 112 tensors in 84", "26 of 84 tensors are changed", "flux-1-dev, 26 modules, rank 4",
        "already has kohya's", "saved rank 2", "error: gone.safetensors: no such file",
    ):  # fmt: skip
        assert said in run.stderr
    assert read_header(tmp_path / "flux.safetensors").tensors["img_in.weight"].dtype == "BF16"
    found = {name: tensor.float() for name, tensor in load_file(tmp_path / "found.safetensors").items()}
    for name in {key.partition(".")[0] for key in lora}:
        torch.testing.assert_close(delta(found, name), delta(lora, name), atol=2e-3, rtol=2e-2)
    assert (tmp_path / "found" / "transformer" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "x.safetensors").exists() and (tmp_path / "d-0004.safetensors").is_file()
