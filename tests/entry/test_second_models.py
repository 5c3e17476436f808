"""ControlNets, ControlNet-LLLites and words in all that a trainer must do: crashes, processes, NaN, resuming."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from library.training.batch_losses import BatchLosses
from tests.entry import test_crashes
from tests.entry.test_crashes import EVERYTHING, check_full_disk, check_kill
from tests.entry.test_crashes import Whole as Uninterrupted
from tests.fixtures.crashes import Ended, fork_run
from tests.fixtures.families import SD
from tests.fixtures.killed import train_killed
from tests.fixtures.runs import THREE_SHAPES, launch_script, logged, metadata_of
from tests.fixtures.second_models import PARAMETERS, SCRIPTS, data_of, reads_images
from tests.fixtures.whole import Whole


@pytest.fixture(scope="module", params=PARAMETERS)
def script(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return SCRIPTS[request.param].whole(request.param, tmp_path_factory.mktemp(request.param))


# ---- killed, and out of space ----


@dataclass(frozen=True)
class Case(test_crashes.Case):
    """A run of a script with its own copy of the data."""

    script: Whole | None = None

    def train(self, log: str, **more: object) -> Ended:
        assert self.script is not None
        hook = {name: more.pop(name) for name in ("at", "what") if name in more}
        prompts, guide = self.folder / "prompts.txt", self.folder / "guides" / "0.png"
        control = f" --cn {guide}" if reads_images(self.script) else ""
        prompts.write_text(f"a cat --w 64 --h 64 --s 1 --d 1{control}", encoding="utf-8")
        flags = {**EVERYTHING, "network_train_unet_only": None, **more}
        if not reads_images(self.script):
            flags["cache_text_encoder_outputs_to_disk"] = None
        return fork_run(
            lambda: self.script.train(self.folder / "data.toml", self.output, sample_prompts=prompts, **flags),  # type: ignore[union-attr]
            self.folder / f"{log}.log",
            watched=(self.images, self.output),
            **hook,  # type: ignore[arg-type]
        )


def start(tmp_path: Path, script: Whole) -> Case:
    case = Case(script, tmp_path / "case", script)  # type: ignore[arg-type]
    shutil.rmtree(case.folder, ignore_errors=True)
    data_of(script, case.folder)
    return case


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, script: Whole) -> Uninterrupted:
    case = start(tmp_path_factory.mktemp("whole"), script)
    done = case.train("whole")
    assert done.code == 0, done.text
    assert not case.temporary_files()
    return Uninterrupted(done.points, case.results())


def test_killed_within_a_save(tmp_path: Path, script: Whole, uninterrupted: Uninterrupted) -> None:
    points = uninterrupted.points
    check_kill(start(tmp_path, script), uninterrupted, next(i for i, p in enumerate(points) if "step00000002" in p) + 1)


@pytest.mark.slow
def test_killed_and_out_of_space_at_many_write_points(
    tmp_path: Path, script: Whole, uninterrupted: Uninterrupted
) -> None:
    for at in range(0, len(uninterrupted.points) - 3, 5 if script.family is SD else 15):
        check_kill(start(tmp_path, script), uninterrupted, at)
        if uninterrupted.points[at].startswith(("open", "os.mkdir")):
            check_full_disk(start(tmp_path, script), uninterrupted, at)


# ---- several processes ----


@pytest.mark.slow
def test_two_at_batch_1_are_one_at_batch_2(tmp_path: Path, script: Whole) -> None:
    descent = {
        "optimizer_type": "SGD", "optimizer_args": ["momentum=0.9"], "learning_rate": 0.1,
        "max_grad_norm": 1.0, "max_train_steps": 4, "ema_decay": 0.9, "cache_latents": True,
    }  # fmt: skip
    four = ((64, 64),) * 4
    one = data_of(script, tmp_path / "a", sizes=four, batch=2)
    two = data_of(script, tmp_path / "b", sizes=four, batch=1)
    script.train(one, tmp_path / "one", **descent)
    done = launch_script(f"{script.script}.py", 2, *script.words(two, tmp_path / "two", **descent))
    assert [process.code for process in done] == [0, 0], done[0].text + done[1].text
    for name in ("tiny.safetensors", "tiny-ema.safetensors"):
        alone, together = load_file(tmp_path / "one" / name), load_file(tmp_path / "two" / name)
        for key, tensor in alone.items():
            torch.testing.assert_close(together[key], tensor, rtol=0, atol=1e-5)


# ---- not finite ----


def test_a_step_that_is_not_finite_is_not_saved(
    tmp_path: Path, script: Whole, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run stops before the step's weights are saved, and says where."""
    data, calls = data_of(script, tmp_path / "data"), []
    original = BatchLosses.at

    def at(self: BatchLosses, *args: object, **more: object) -> torch.Tensor:
        calls.append(1)
        losses = original(self, *args, **more)  # type: ignore[arg-type]
        return losses * float("nan") if len(calls) == 3 else losses

    monkeypatch.setattr(BatchLosses, "at", at)
    with pytest.raises(SystemExit) as ended:
        script.train(data, tmp_path / "out", max_train_steps=4, save_every_n_steps=1)
    assert ended.value.code not in (0, None)
    assert "step 3" in capsys.readouterr().err
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values())
    assert (tmp_path / "out" / "tiny-step00000002.safetensors").exists()
    assert not (tmp_path / "out" / "tiny.safetensors").exists()


# ---- resume of a resume ----

ANEW = "shuffle_caption = true\ncaption_dropout_rate = 0.3\nflip_aug = true\nrandom_crop = true\ncolor_aug = true\n"
#: lines for every subset, and options
SETS: dict[str, tuple[str, dict[str, object]]] = {
    "pixels": (ANEW, {"lr_scheduler": "cosine", "lr_warmup_steps": 2, "ema_decay": 0.9}),
    "accumulation": ("flip_aug = true", {"gradient_accumulation_steps": 3, "cache_latents": True, "noise_offset": 0.1}),
    "bf16": ("", {"mixed_precision": "bf16", "full_bf16": True, "gradient_checkpointing": True, "cache_latents": True}),
    "no schedule": ("", {"optimizer_type": "AdamWScheduleFree", "cache_latents": True, "loss_type": "huber"}),
    "validation": ("validation_split = 0.3", {"validate_every_n_steps": 1, "save_best": True, "cache_latents": True}),
}


@pytest.mark.parametrize("name", [n if n == "pixels" else pytest.param(n, marks=pytest.mark.slow) for n in SETS])
def test_killed_twice(tmp_path: Path, script: Whole, caplog: pytest.LogCaptureFixture, name: str) -> None:
    """It ends with the bits of a run left alone."""
    subset, options = SETS[name]
    if "ScheduleFree" in str(options):
        pytest.importorskip("schedulefree")
    data = data_of(script, tmp_path / "data", sizes=THREE_SHAPES, subset=subset)
    settings = {**options, "max_train_steps": 9, "save_every_n_steps": 1, "save_state": True}
    script.train(data, tmp_path / "alone", **settings)
    again = partial(script.train, data, tmp_path / "out", **settings)
    train_killed(again, tmp_path / "out", steps=[4, 7])
    names = sorted(path.name for path in (tmp_path / "alone").glob("*.safetensors"))
    assert "tiny.safetensors" in names
    for file in names:
        alone, killed = load_file(tmp_path / "alone" / file), load_file(tmp_path / "out" / file)
        assert alone.keys() == killed.keys()
        assert not [key for key, tensor in alone.items() if not torch.equal(tensor, killed[key])], file
    assert "not exactly" not in caplog.text


# ---- validation, masks, records ----


def test_validation_is_not_felt_and_ends_a_run(tmp_path: Path, script: Whole) -> None:
    """Weights that stand still have equal losses, the first of which is the best."""
    subset = "validation_split = 0.3"
    data = data_of(script, tmp_path / "data", sizes=((64, 64),) * 7, subset=subset)
    common = {"cache_latents": True, "max_train_steps": 5}
    validated = {"validate_every_n_steps": 1, "save_best": True, "save_state": True}
    script.train(data, tmp_path / "plain", **common, validate_every_n_steps=5)
    script.train(data, tmp_path / "validated", **common, **validated)
    plain, with_validation = (load_file(tmp_path / name / "tiny.safetensors") for name in ("plain", "validated"))
    assert all(torch.equal(tensor, with_validation[key]) for key, tensor in plain.items())
    losses = logged(tmp_path / "validated", "loss/validation/step_average")
    assert len(losses) == 5 and len(set(losses)) > 1

    still = {"learning_rate": 1e-30, "early_stopping_patience": 2, "ema_decay": 0.9}
    if script.script == "sdxl_train_control_net":
        still["control_net_lr"] = 1e-30
    script.train(data, tmp_path / "still", **{**common, **validated, **still})
    losses = logged(tmp_path / "still", "loss/validation/step_average")
    assert len(losses) == 3 and len(set(losses)) == 1
    names = {path.stem for path in (tmp_path / "still").glob("*.safetensors")}
    assert {"tiny", "tiny-ema", "tiny-best", "tiny-best-ema"} <= names


def test_nothing_is_learned_where_images_are_transparent(tmp_path: Path, script: Whole) -> None:
    data = data_of(script, tmp_path / "data", subset="flip_aug = true\nalpha_mask = true")
    for path in (tmp_path / "data" / "images").glob("*.png"):
        image = Image.open(path).convert("RGBA")
        image.putalpha(0)
        image.save(path)
    for name, caches in (("pixels", {}), ("cached", {"cache_latents": True})):
        script.train(data, tmp_path / name, **caches, max_train_steps=3)
        assert logged(tmp_path / name, "loss/current") == [0.0] * 3


def test_what_its_files_say(tmp_path: Path, script: Whole) -> None:
    """A model specification with the user's words, and nothing of the training, as other trainers write them."""
    data = data_of(script, tmp_path / "data")
    words = {"metadata_title": "Edges", "metadata_author": "me", "metadata_tags": "a, b"}
    script.train(data, tmp_path / "out", **words, training_comment="unused", max_train_steps=1)
    entries = metadata_of(tmp_path / "out" / "tiny.safetensors")
    assert entries["modelspec.title"] == "Edges" and entries["modelspec.author"] == "me"
    assert entries["modelspec.tags"] == "a, b" and entries["modelspec.sai_model_spec"]
    kind = entries["modelspec.architecture"].rpartition("/")[2]
    assert kind in {"controlnet", "control-net-lllite", "textual-inversion", "textual-inversion-xti"}
    assert not [name for name in entries if name.startswith("ss_")]
