"""Whole models whose trained weights are sharded by FSDP: the run of one process, and files of whole weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.entry.test_fsdp import of_configuration, samples
from tests.entry.test_resume import assert_same_weights
from tests.fixtures.runs import ROOT, Finished, launch_script, logged, make_images, write_dataset
from tests.fixtures.whole import Whole

#: what a step changes is the gradient, and a little of the ones before
DESCENT = {
    "optimizer_type": "SGD",
    "optimizer_args": ["momentum=0.9"],
    "learning_rate": 0.1,
    "max_grad_norm": 0.5,
    "max_train_steps": 3,
}


@pytest.fixture(scope="module")
def fsdp() -> dict[str, str]:
    return of_configuration(ROOT / "examples" / "accelerate" / "fsdp.yaml")


def launch(whole: Whole, env: dict[str, str], dataset: Path, output: Path, **more: object) -> list[Finished]:
    """Two processes, which must end well."""
    done = launch_script(whole.script + ".py", 2, *whole.words(dataset, output, **more), env=env)
    assert [process.code for process in done] == [0, 0], done[0].text + done[1].text
    return done


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], base: dict[str, Tensor], atol: float = 1e-6) -> None:
    """The same tensors, and what was trained moved by far more than they may differ."""
    assert one.keys() == other.keys()
    moved = 0.0
    for name, tensor in other.items():
        torch.testing.assert_close(one[name], tensor, rtol=0, atol=atol, msg=lambda text, n=name: f"{n}: {text}")
        if name in base:
            moved = max(moved, float((tensor.float() - base[name].float()).abs().max()))
    assert moved > 1000 * atol


def datasets(folder: Path, count: int, more: str = "") -> tuple[Path, Path]:
    """Datasets of the same images at batch size 1 and 2."""
    images = make_images(folder / "images", sizes=[(64, 64)] * count)
    one, two = (
        write_dataset(folder / f"{size}.toml", images, dataset=f"batch_size = {size}\n{more}") for size in (1, 2)
    )
    return one, two


@pytest.mark.slow
def test_two_that_share_the_weights_are_one(tmp_path: Path, train_db: Whole, fsdp: dict[str, str]) -> None:
    """A denoiser in pieces, a text encoder that stops, averages, validations, images, and a state of whole tensors."""
    single, pairs = datasets(tmp_path, 5, "validation_split = 0.6")
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --s 1 --d 1\n")
    settings = {
        **DESCENT,
        "stop_text_encoder_training": 2,
        "ema_decay": 0.5,
        "validate_every_n_steps": 2,
        "sample_prompts": tmp_path / "prompts.txt",
        "sample_at_first": True,
        "sample_every_n_steps": 2,
        "save_state_on_train_end": True,
    }
    train_db.train(pairs, tmp_path / "one", **settings)
    done = launch(train_db, fsdp, single, tmp_path / "two", **settings)
    assert "trained parameters in each process's device memory" in done[0].text
    base = load_file(train_db.model.path)
    for name in ("tiny", "tiny-ema"):
        together, alone = (load_file(tmp_path / folder / f"{name}.safetensors") for folder in ("two", "one"))
        assert_close(together, alone, base)
        vae = [key for key in base if key.startswith("first_stage_model.")]
        assert vae and all(torch.equal(together[key], base[key]) for key in vae)
    for key in ("loss/current", "norm/grad_norm", "loss/validation/step_average"):
        both, alone_ = logged(tmp_path / "two", key), logged(tmp_path / "one", key)
        assert alone_ and both == pytest.approx(alone_, abs=5e-6)
    assert len(samples(tmp_path / "two")) == len(samples(tmp_path / "one")) == 2
    for file in ("model.safetensors", "ema.safetensors"):
        together, alone = (load_file(tmp_path / folder / "tiny-state" / file) for folder in ("two", "one"))
        assert {n: t.shape for n, t in together.items()} == {n: t.shape for n, t in alone.items()}
    states = [
        torch.load(tmp_path / folder / "tiny-state" / "optimizer.bin", weights_only=True)["state"]
        for folder in ("two", "one")
    ]
    assert states[0].keys() == states[1].keys() and states[0]
    for number, state in states[1].items():
        torch.testing.assert_close(states[0][number]["momentum_buffer"], state["momentum_buffer"], rtol=0, atol=1e-5)


#: what is kept between steps, in every form that needs more than the weights
HARD = {
    "max_train_steps": 4,
    "save_every_n_steps": 2,
    "save_state": True,
    "gradient_accumulation_steps": 2,
    "gradient_checkpointing": True,
    "ema_decay": 0.9,
    "cache_latents": True,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 1,
}


@pytest.mark.slow
@pytest.mark.parametrize("half", [False, True])
def test_resumes_exactly(tmp_path: Path, train_db: Whole, fsdp: dict[str, str], half: bool) -> None:
    """Sharded again, to the same bits; and from the same state without FSDP, to the same weights within rounding."""
    single, _ = datasets(tmp_path, 8)
    settings: dict[str, object] = {**HARD, "train_text_encoder": None}
    if half:  # whose rounding is drawn
        settings |= {"full_bf16": True, "mixed_precision": "bf16"}
    launch(train_db, fsdp, single, tmp_path / "whole", **settings)
    state = tmp_path / "whole" / "tiny-step00000002-state"
    rest = launch(train_db, fsdp, single, tmp_path / "rest", **settings, resume=state)
    assert "not exactly" not in rest[0].text
    for name in ("tiny.safetensors", "tiny-ema.safetensors"):
        assert_same_weights(tmp_path / "rest" / name, tmp_path / "whole" / name)
    if half:
        weights = load_file(tmp_path / "whole" / "tiny.safetensors")
        assert {t.dtype for n, t in weights.items() if n.startswith("model.diffusion_model.")} == {torch.bfloat16}
        return
    launch(train_db, {}, single, tmp_path / "plain", **settings, resume=state)
    launch(train_db, {}, single, tmp_path / "alone", **settings)
    back = launch(train_db, fsdp, single, tmp_path / "back", **settings, resume=tmp_path / "alone" / state.name)
    assert "sharding: FSDP" in back[0].text
    base = load_file(train_db.model.path)
    for one, other in (("plain", "rest"), ("back", "alone")):
        found, expected = (load_file(tmp_path / folder / "tiny.safetensors") for folder in (one, other))
        far, moved, count = 0, 0, 0
        for name, tensor in expected.items():
            far += int(((found[name].float() - tensor.float()).abs() > 1e-4).sum())
            moved += int(((tensor.float() - base[name].float()).abs() > 1e-4).sum())
            count += tensor.numel()
        # gradients near 0 differ in sign, which Adam makes as large as all others
        assert far < 1e-3 * moved and moved > 0.1 * count, (one, far, moved, count)


@pytest.mark.slow
def test_every_family(tmp_path: Path, whole: Whole, fsdp: dict[str, str]) -> None:
    """No family needs a line of its own for it."""
    single, pairs = datasets(tmp_path, 2)
    settings = {**DESCENT, "gradient_checkpointing": True}
    whole.train(pairs, tmp_path / "one", **settings)
    launch(whole, fsdp, single, tmp_path / "two", **settings)
    together, alone = (load_file(tmp_path / folder / "tiny.safetensors") for folder in ("two", "one"))
    assert_close(together, alone, load_file(whole.model.path))


@pytest.mark.slow
def test_forms_and_bad_steps(tmp_path: Path, fine_tune: Whole, fsdp: dict[str, str]) -> None:
    """A Diffusers folder and a pickle hold what a safetensors file does; a step of NaN is one for all processes."""
    single, _ = datasets(tmp_path, 2)
    forms = {"safetensors": "tiny.safetensors", "ckpt": "tiny.ckpt", "diffusers_safetensors": "tiny"}
    for form in forms:
        launch(fine_tune, fsdp, single, tmp_path / form, **DESCENT, save_model_as=form)
    expected = load_file(tmp_path / "safetensors" / forms["safetensors"])
    pickled = torch.load(tmp_path / "ckpt" / forms["ckpt"], weights_only=True)["state_dict"]
    assert pickled.keys() == expected.keys()
    assert all(torch.equal(tensor, pickled[name]) for name, tensor in expected.items())
    folder = tmp_path / "diffusers_safetensors" / forms["diffusers_safetensors"]
    (unet,) = (folder / "unet").glob("*.safetensors")
    ours = [t for n, t in expected.items() if n.startswith("model.diffusion_model.")]
    assert sum(t.numel() for t in load_file(unet).values()) == sum(t.numel() for t in ours)

    diverging = {"optimizer_type": "SGD", "learning_rate": 1e30, "max_grad_norm": 0, "max_train_steps": 6}
    ended = launch_script("fine_tune.py", 2, *fine_tune.words(single, tmp_path / "nan", **diverging), env=fsdp)
    assert [process.code for process in ended] == [2, 2], ended[0].text + ended[1].text
    assert "training has diverged" in ended[0].text and "Traceback" not in ended[0].text + ended[1].text
    # back to the snapshot of the start, until there are too many in a row
    words = fine_tune.words(single, tmp_path / "back", **{**diverging, "max_train_steps": 3}, on_nan="rollback")
    done = launch_script("fine_tune.py", 2, *words, env=fsdp)
    assert [process.code for process in done] == [0, 0], done[0].text + done[1].text
    assert "went back to those after step 0" in done[0].text


#: what cannot work with trained weights in pieces: options, and what is said
REFUSED = [
    ({"optimizer_type": "Adafactor"}, "--optimizer_type Adafactor: FSDP gives it parts of each weight"),
    ({"fused_backward_pass": True, "max_grad_norm": 0}, "--fused_backward_pass: "),
    ({"fused_optimizer_groups": 2, "max_grad_norm": 0}, "--fused_optimizer_groups: not with several processes"),
    ({"torch_compile": True}, "--torch_compile: not with FSDP"),
    ({"deepspeed": True}, "--deepspeed: not with FSDP"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("options", "said"), REFUSED)
def test_what_cannot_work_is_one_line(
    tmp_path: Path, fine_tune: Whole, fsdp: dict[str, str], options: dict[str, object], said: str
) -> None:
    single, _ = datasets(tmp_path, 2)
    ended = launch_script("fine_tune.py", 2, *fine_tune.words(single, tmp_path / "out", **options), env=fsdp)
    assert [process.code for process in ended] == [2, 2], ended[0].text
    assert said in ended[0].err and "Traceback" not in ended[0].text


@pytest.mark.slow
def test_uneven_parts_and_another_number_of_processes(tmp_path: Path, fine_tune: Whole, fsdp: dict[str, str]) -> None:
    """Three processes, modules that stay whole, and blocks that stay gathered until their backward pass."""
    images = make_images(tmp_path / "images", sizes=[(64, 64)] * 6)
    single, triples = (
        write_dataset(tmp_path / f"{size}.toml", images, dataset=f"batch_size = {size}") for size in (1, 3)
    )
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --s 1 --d 1\n")
    settings = {
        **DESCENT,
        "ema_decay": 0.5,
        "sample_prompts": tmp_path / "prompts.txt",
        "sample_every_n_steps": 1,
        "save_every_n_steps": 2,
        "save_state": True,
    }
    fine_tune.train(triples, tmp_path / "one", **settings)
    env = {
        **fsdp,
        "FSDP_RESHARD_AFTER_FORWARD": "false",
        "FSDP_IGNORED_MODULES": r"down_blocks\.0\.resnets\.0|conv_out",
    }
    state = tmp_path / "three" / "tiny-step00000002-state"
    for folder, count, own, more in (
        ("three", 3, env, {}),
        ("again", 3, env, {"resume": state}),
        ("two", 2, fsdp, {"resume": state}),
    ):
        words = fine_tune.words(single, tmp_path / folder, **settings, **more)
        done = launch_script("fine_tune.py", count, *words, env=own)
        assert [process.code for process in done] == [0] * count, done[0].text
    base = load_file(fine_tune.model.path)
    for name in ("tiny.safetensors", "tiny-ema.safetensors"):
        assert_close(load_file(tmp_path / "three" / name), load_file(tmp_path / "one" / name), base)
        assert_same_weights(tmp_path / "again" / name, tmp_path / "three" / name)
