"""ControlNets, ControlNet-LLLites and layered words in all that a trainer must do: crashes, processes, NaN."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library.training.batch_losses import BatchLosses
from tests.entry import test_crashes
from tests.entry.test_crashes import EVERYTHING, check_full_disk, check_kill
from tests.entry.test_crashes import Whole as Uninterrupted
from tests.fixtures.crashes import Ended, fork_run
from tests.fixtures.families import SD
from tests.fixtures.guides import make_pairs
from tests.fixtures.runs import launch_script
from tests.fixtures.whole import Whole

#: script -> its own options
SCRIPTS: dict[str, dict[str, object]] = {
    "train_control_net": {},
    "train_control_net_lllite": {"cond_emb_dim": 4, "network_dim": 8},
    "train_textual_inversion_XTI": {
        "token_string": "qux", "init_word": "cat", "use_object_template": True, "save_model_as": "safetensors",
    },
}  # fmt: skip


def reads_images(script: str) -> bool:
    return "control" in script


@pytest.fixture(scope="module", params=["train_control_net_lllite", *(
    pytest.param(name, marks=pytest.mark.slow) for name in SCRIPTS if name != "train_control_net_lllite"
)])  # fmt: skip
def script(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    torch.set_num_threads(1)
    return Whole(request.param, SD, SD.make(tmp_path_factory.mktemp(request.param)))


def data_of(script: Whole, folder: Path, *, batch: int = 2) -> Path:
    """Pairs, or images alone for what reads none."""
    folder.mkdir(parents=True, exist_ok=True)
    path = make_pairs(folder, sizes=((64, 64),) * 5)
    text = path.read_text(encoding="utf-8").replace("batch_size = 2", f"batch_size = {batch}")
    if not reads_images(script.script):
        text = "\n".join(line for line in text.splitlines() if not line.startswith("conditioning_data_dir"))
    path.write_text(text, encoding="utf-8")
    return path


# ---- killed, and out of space ----


@dataclass(frozen=True)
class Case(test_crashes.Case):
    """A run of a script with its own copy of the data."""

    script: Whole | None = None

    def train(self, log: str, **more: object) -> Ended:
        assert self.script is not None
        hook = {name: more.pop(name) for name in ("at", "what") if name in more}
        prompts, guide = self.folder / "prompts.txt", self.folder / "guides" / "0.png"
        control = f" --cn {guide}" if reads_images(self.script.script) else ""
        prompts.write_text(f"a cat --w 64 --h 64 --s 1 --d 1{control}", encoding="utf-8")
        flags = {**EVERYTHING, **SCRIPTS[self.script.script], "network_train_unet_only": None, **more}
        if not reads_images(self.script.script):
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
    for at in range(0, len(uninterrupted.points) - 3, 5):
        check_kill(start(tmp_path, script), uninterrupted, at)
        if uninterrupted.points[at].startswith(("open", "os.mkdir")):
            check_full_disk(start(tmp_path, script), uninterrupted, at)


# ---- several processes ----


@pytest.mark.slow
def test_two_at_batch_1_are_one_at_batch_2(tmp_path: Path, script: Whole) -> None:
    descent = {
        **SCRIPTS[script.script], "optimizer_type": "SGD", "optimizer_args": ["momentum=0.9"], "learning_rate": 0.1,
        "max_grad_norm": 1.0, "max_train_steps": 4, "ema_decay": 0.9, "cache_latents": True,
    }  # fmt: skip
    one, two = data_of(script, tmp_path / "a", batch=2), data_of(script, tmp_path / "b", batch=1)
    (tmp_path / "a" / "images" / "4.png").unlink()
    (tmp_path / "b" / "images" / "4.png").unlink()
    for folder in ("a", "b"):
        (tmp_path / folder / "guides" / "4.png").unlink()
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
        script.train(data, tmp_path / "out", **SCRIPTS[script.script], max_train_steps=4, save_every_n_steps=1)
    assert ended.value.code not in (0, None)
    assert "step 3" in capsys.readouterr().err
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values())
    assert (tmp_path / "out" / "tiny-step00000002.safetensors").exists()
    assert not (tmp_path / "out" / "tiny.safetensors").exists()
