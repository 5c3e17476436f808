"""ControlNets, ControlNet-LLLites and words beside a denoiser that is kept, computed or placed in another way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from library.memory import block_stream
from library.training import memory_trace
from library.training.loaded import LoadedRun
from library.training.trainer import Trainer
from tests.entry.test_fsdp import of_configuration
from tests.entry.test_memory_trace import allocated
from tests.fixtures.runs import ROOT, launch_script
from tests.fixtures.second_models import PARAMETERS, SCRIPTS, data_of, reads_images
from tests.fixtures.whole import Whole

TWO = ((64, 64),) * 2


@pytest.fixture(scope="module", params=PARAMETERS)
def script(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return SCRIPTS[request.param].whole(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    name = "flux_train_control_net"
    return SCRIPTS[name].whole(name, tmp_path_factory.mktemp(name))


def prompts_of(script: Whole, folder: Path) -> Path:
    control = f" --cn {folder / 'guides' / '0.png'}" if reads_images(script) else ""
    path = folder / "prompts.txt"
    path.write_text(f"a cat --w 64 --h 64 --s 2 --d 5{control}\n", encoding="utf-8")
    return path


def sample(output: Path) -> np.ndarray:
    return np.asarray(Image.open(next((output / "sample").glob("*.png")))).astype(int)


def weights(output: Path) -> dict[str, Tensor]:
    return load_file(output / "tiny.safetensors")


# ---- the same numbers ----


@pytest.mark.parametrize(
    ("settings", "bound"),
    [
        ({"gradient_checkpointing": True}, 1e-6),
        ({"fused_backward_pass": True}, 0.0),
        ({"torch_compile": True, "dynamo_backend": "eager"}, 1e-6),
        ({"mem_eff_attn": True}, 5e-5),
        ({"gradient_accumulation_steps": 2}, 1e-6),
    ],
    ids=["checkpointing", "fused", "compiled", "attention", "accumulation"],
)
def test_what_saves_memory_changes_no_weight(
    tmp_path: Path, script: Whole, settings: dict[str, object], bound: float
) -> None:
    """With sample images and a validation, which are not compiled."""
    halves = int(settings.get("gradient_accumulation_steps", 1))
    descent = {"optimizer_type": "SGD", "learning_rate": 0.1, "max_grad_norm": 0, "max_train_steps": 3}
    if script.script == "sdxl_train_control_net":
        descent["control_net_lr"] = 0.1
    found, images = [], []
    for name, more, batch in (("plain", {}, 2), ("other", settings, 2 // halves)):
        subset = "validation_split = 0.2\n"
        data = data_of(script, tmp_path / name, batch=batch, subset=subset)
        samples = {"sample_prompts": prompts_of(script, tmp_path / name), "sample_every_n_steps": 3}
        script.train(data, tmp_path / name / "out", **descent, **samples, **more, validate_every_n_steps=3)
        found.append(weights(tmp_path / name / "out"))
        images.append(sample(tmp_path / name / "out"))
    plain, other = found
    assert plain.keys() == other.keys()
    for name, tensor in other.items():
        torch.testing.assert_close(tensor, plain[name], rtol=0, atol=bound, msg=lambda text, n=name: f"{n}: {text}")
    assert np.abs(images[0] - images[1]).max() <= 1


# ---- small forms of the denoiser ----

SMALL = {
    "fp8_base": ("in scaled fp8", {"fp8_base": True, "mixed_precision": "bf16"}),
    "fp8_scaled": ("in block-scaled fp8", {"fp8_scaled": True, "mixed_precision": "bf16"}),
    "int8": ("denoiser in int8", {"quantize_base": "int8", "mixed_precision": "bf16", "gradient_checkpointing": True}),
    "nf4": ("denoiser in NF4", {"quantize_base": "nf4", "mixed_precision": "bf16"}),
}


@pytest.mark.parametrize("form", [n if n == "fp8_base" else pytest.param(n, marks=pytest.mark.slow) for n in SMALL])
def test_beside_small_weights(tmp_path: Path, script: Whole, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained in float32, with a sample image, and resumed exactly; a ControlNet starts from the file's weights."""
    title, settings = SMALL[form]
    data = data_of(script, tmp_path)
    samples = {"sample_prompts": prompts_of(script, tmp_path), "sample_every_n_steps": 4}
    settings = {**settings, **samples, "max_train_steps": 4, "save_every_n_steps": 2, "save_state": True}
    script.train(data, tmp_path / "whole", **settings)
    state = tmp_path / "whole" / "tiny-step00000002-state"
    script.train(data, tmp_path / "rest", **settings, resume=state)
    said = "".join(capsys.readouterr())
    assert title in said and "not exactly" not in said
    whole, rest = weights(tmp_path / "whole"), weights(tmp_path / "rest")
    assert all(torch.equal(tensor, rest[name]) for name, tensor in whole.items())
    assert {tensor.dtype for tensor in whole.values()} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in whole.values())
    assert sample(tmp_path / "whole").std() > 0
    start = load_file(tmp_path / "whole" / "tiny-step00000002.safetensors")
    assert any(not torch.equal(tensor, start[name]) for name, tensor in whole.items())


# ---- blocks in host memory ----


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="plain"),
        pytest.param({"fp8_base": True, "mixed_precision": "bf16"}, id="fp8", marks=pytest.mark.slow),
        pytest.param({"torch_compile": True, "dynamo_backend": "eager"}, id="compiled", marks=pytest.mark.slow),
        pytest.param({"full_bf16": True, "mixed_precision": "bf16"}, id="bf16", marks=pytest.mark.slow),
    ],
)
def test_swapped_blocks_change_nothing(
    tmp_path: Path, flux: Whole, monkeypatch: pytest.MonkeyPatch, settings: dict[str, object]
) -> None:
    """With validation and sample images; only blocks of the transformer are swapped, not those of the ControlNet."""
    made: list[block_stream.BlockStream] = []
    real = block_stream.stream_blocks

    def spy(*args: object, **more: object) -> block_stream.BlockStream:
        made.append(real(*args, **more))
        return made[-1]

    monkeypatch.setattr(block_stream, "stream_blocks", spy)
    data = data_of(flux, tmp_path, subset="validation_split = 0.2")
    samples = {"sample_prompts": prompts_of(flux, tmp_path), "sample_every_n_steps": 3, "validate_every_n_steps": 1}
    common = {**samples, **settings, "max_train_steps": 3, "cache_latents": True, "cache_text_encoder_outputs": True}
    flux.train(data, tmp_path / "plain", **common, gradient_checkpointing=True)
    assert not made
    flux.train(data, tmp_path / "swapped", **common, gradient_checkpointing=True, blocks_to_swap=3)
    (stream,) = made
    assert stream.copied > 5
    plain, swapped = weights(tmp_path / "plain"), weights(tmp_path / "swapped")
    assert not [name for name, tensor in plain.items() if not torch.equal(tensor, swapped[name])]
    assert np.array_equal(sample(tmp_path / "plain"), sample(tmp_path / "swapped"))


# ---- weights over two processes ----


@pytest.mark.slow
@pytest.mark.parametrize("way", ["fsdp", "zero"])
def test_two_that_share_out_are_one_with_all(tmp_path: Path, script: Whole, way: str) -> None:
    """FSDP shards the frozen denoiser, and what is trained stays whole; DeepSpeed shards the optimizer's states."""
    env, own = of_configuration(ROOT / "examples" / "accelerate" / "fsdp.yaml"), {}
    if way == "zero":
        pytest.importorskip("deepspeed")
        env, own = {}, {"deepspeed": True, "zero_stage": 2}
    settings = {"optimizer_type": "SGD", "learning_rate": 0.1, "max_train_steps": 3, "sample_every_n_steps": 3}
    settings |= {"optimizer_args": ["momentum=0.9"]}
    settings |= {"cache_latents": True, "ema_decay": 0.9}
    one, two = data_of(script, tmp_path / "a", sizes=TWO, batch=2), data_of(script, tmp_path / "b", sizes=TWO, batch=1)
    script.train(one, tmp_path / "one", **settings, sample_prompts=prompts_of(script, tmp_path / "a"))
    words = script.words(two, tmp_path / "two", **settings, **own, sample_prompts=prompts_of(script, tmp_path / "b"))
    done = launch_script(f"{script.script}.py", 2, *words, env=env)
    assert [process.code for process in done] == [0, 0], done[0].text + done[1].text
    assert ("FSDP, " if way == "fsdp" else "ZeRO stage 2") in done[0].text
    for name in ("tiny.safetensors", "tiny-ema.safetensors"):
        alone, together = load_file(tmp_path / "one" / name), load_file(tmp_path / "two" / name)
        for key, tensor in alone.items():
            torch.testing.assert_close(together[key], tensor, rtol=0, atol=2e-6, msg=lambda text, n=key: f"{n}: {text}")
    assert np.abs(sample(tmp_path / "one") - sample(tmp_path / "two")).max() <= 1


# ---- the plan ----


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_trace_is_what_a_step_allocates(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: Whole, checkpointing: bool
) -> None:
    found: dict[str, int] = {}

    def fit(self: Trainer, loaded: LoadedRun, interrupt: object) -> int:
        run = loaded.run
        traced = memory_trace.trace(run, checkpointing=checkpointing)
        found["traced"], found["gradients"] = traced.worst.peak, traced.worst.gradients
        batch = next(iter(run.data.dataloader(epoch=0, start_batch=0, **loaded.loading)))
        loaded.kind.begin_batch(batch, 0)

        def step() -> None:
            loaded.losses(batch).mean().backward()
            for module in loaded.kind.modules():
                module.zero_grad()

        step()  # whatever is made once
        found["real"] = allocated(step)
        found["trained"] = sum(p.nbytes for m in loaded.kind.modules() for p in m.parameters() if p.requires_grad)
        raise SystemExit(0)

    monkeypatch.setattr(Trainer, "fit", fit)
    data = data_of(script, tmp_path / "data", sizes=TWO)
    with pytest.raises(SystemExit):
        script.train(data, tmp_path, cache_latents=True, gradient_checkpointing=checkpointing, sdpa=True)
    # on a CPU the weight gradient of a convolution takes copies of its operands, which are not traced; with
    # checkpointing little else is there at that moment
    copies = checkpointing and script.script.endswith("control_net")
    assert (0.7 if copies else 0.9) * found["real"] <= found["traced"] <= 1.1 * found["real"], found
    assert 0 < found["gradients"] <= found["trained"]


def test_a_run_follows_its_plan(tmp_path: Path, script: Whole, capsys: pytest.CaptureFixture[str]) -> None:
    data = data_of(script, tmp_path / "data", sizes=TWO)
    script.train(data, tmp_path / "out", memory_plan="1000", cache_latents=True, max_train_steps=1)
    assert "chosen: nothing more, about" in "".join(capsys.readouterr())
    assert weights(tmp_path / "out")
