"""Validation in real runs: training does not feel it, resuming does not lose it, and it ends runs and keeps weights."""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.fixtures.families import SD, Family, Tiny
from tests.fixtures.runs import PATIENCE, ROOT, environment, make_images, metadata_of, run_script

#: changes weights by less than any loss can show
STILL = 1e-30

PROGRAM = """
import importlib, json, sys
sys.path.insert(0, {root!r})
from library.config.config_file import read_args

for name, script, trainer, words in json.load(open({plan!r})):
    print("RUN", name, flush=True)
    sys.stderr.write("RUN " + name + "\\n")
    code = 0
    try:
        module = importlib.import_module(script)
        getattr(module, trainer)().train(read_args(module.setup_parser(), words))
    except SystemExit as end:
        code = end.code or 0
    print("CODE", code, flush=True)
"""


@dataclass(frozen=True)
class Ended:
    code: int
    err: str
    output: Path

    def curve(self, key: str) -> dict[int, float]:
        """A tracker's metrics by its axis."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        found = {}
        for events in (self.output / "logs").rglob("events.out.tfevents.*"):
            log = EventAccumulator(str(events)).Reload()
            if key in log.Tags()["scalars"]:
                found |= {scalar.step: scalar.value for scalar in log.Scalars(key)}
        return found


def run_all(folder: Path, plan: dict[str, tuple[Family, list[object]]]) -> dict[str, Ended]:
    """Several runs one after the other in one process, which takes a fraction of the time; outputs by name."""
    rows = [(name, f.script, f.trainer, [str(w) for w in words]) for name, (f, words) in plan.items()]
    (folder / "plan.json").write_text(json.dumps(rows))
    (folder / "program.py").write_text(PROGRAM.format(root=str(ROOT), plan=str(folder / "plan.json")))
    done = run_script(str(folder / "program.py"))
    codes = [int(line.split()[1]) for line in done.out.splitlines() if line.startswith("CODE")]
    assert len(codes) == len(plan), done.text
    texts = done.err.split("RUN ")[1:]
    return {name: Ended(code, text, folder / name) for name, code, text in zip(plan, codes, texts, strict=True)}


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path)


def assert_same(one: Path, other: Path) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny) -> Path:
    # a folder for each family, as runs of the same names go there
    folder = tmp_path_factory.mktemp(f"validation_{tiny.family.name}")
    make_images(folder / "train")
    make_images(folder / "val", sizes=[(64, 64), (96, 40), (70, 64)])
    general = "[general]\nresolution = 64\nenable_bucket = true\nmin_bucket_reso = 32\nmax_bucket_reso = 128\n"
    general += "bucket_reso_steps = 32\nbatch_size = 2\ncaption_extension = '.txt'\nshuffle_caption = true\n"
    train = f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{folder / 'train'}'\nflip_aug = true\n"
    # another strength of the adapter in validation than in training, which must not stay set
    val = "[[datasets]]\nvalidation_split = 1\nnetwork_multiplier = 0.5\n"
    val += f"[[datasets.subsets]]\nimage_dir = '{folder / 'val'}'\n"
    (folder / "without.toml").write_text(general + train)
    (folder / "with.toml").write_text(general + train + val)
    (folder / "split.toml").write_text("validation_split = 0.3\n".join(general.partition("[general]\n")[1:]) + train)
    return folder


def command_of_the_page(output: Path) -> list[object]:
    """The arguments of the first command in docs/validation.md, with another output."""
    page = (ROOT / "docs" / "validation.md").read_text(encoding="utf-8")
    command = re.search(r"```bash\npython (.*?)```", page, re.DOTALL)[1].replace("\\\n", "")
    script, *arguments = shlex.split(command)
    assert script == "train_network.py"
    arguments[arguments.index("--output_dir") + 1] = str(output)
    return list(arguments)


@pytest.fixture(scope="module")
def ended(folder: Path, tiny: Tiny) -> dict[str, Ended]:
    def words(name: str, dataset: str, **settings: object) -> tuple[Family, list[object]]:
        return tiny.family, tiny.words(folder / dataset, folder / name, **settings)

    hard = {
        "max_train_steps": 7, "network_dropout": 0.3, "network_args": ["module_dropout=0.1"], "cache_latents": True,
        "gradient_checkpointing": True, "ip_noise_gamma": 0.1, "noise_offset": 0.05,
    }  # fmt: skip
    free = {"max_train_steps": 4, "optimizer_type": "AdamWScheduleFree", "learning_rate": 1e-2}
    validated = {"validate_every_n_steps": 2, "save_best": True}
    still = {
        "max_train_steps": 20, "learning_rate": STILL, "validate_every_n_steps": 1, "early_stopping_patience": 2,
        "save_best": True, "save_state": True, "save_every_n_steps": 2,
    }  # fmt: skip
    page = command_of_the_page(folder / "page")
    state = folder / "still" / "tiny-step00000002-state"
    return run_all(
        folder,
        {
            "plain": words("plain", "without.toml", **hard),
            "validated": words("validated", "with.toml", **hard, **validated),
            "again": words(
                "again",
                "with.toml",
                max_train_steps=1,
                learning_rate=STILL,
                noise_offset=0.05,
                cache_latents=True,
                validate_every_n_steps=1,
                network_weights=folder / "validated" / "tiny-best.safetensors",
            ),
            "free": words("free", "without.toml", **free),
            "free_validated": words("free_validated", "with.toml", **free, **validated),
            "still": words("still", "split.toml", **still, save_state_on_train_end=True),
            "resumed": words("resumed", "split.toml", **still, resume=state),
            "spent": words("spent", "split.toml", **still, resume=folder / "still" / "tiny-state"),
            "idle": words("idle", "without.toml", max_train_steps=1, validate_every_n_steps=1, validation_seed=3),
            "refused": words("refused", "without.toml", save_best=True),
            "page": (SD, [*page, "--max_train_steps", 4, "--max_data_loader_n_workers", 0]),
        },
    )


@pytest.mark.parametrize("name", ["plain", "free"])
def test_training_does_not_feel_it(ended: dict[str, Ended], name: str) -> None:
    plain, validated = ended[name], ended["validated" if name == "plain" else "free_validated"]
    assert plain.code == validated.code == 0, validated.err
    assert_same(plain.output / "tiny.safetensors", validated.output / "tiny.safetensors")
    assert plain.curve("loss/current") == validated.curve("loss/current")
    assert not plain.curve("loss/validation/step_average")


def test_figures_are_recorded(ended: dict[str, Ended]) -> None:
    run = ended["validated"]
    steps_per_epoch = int(metadata_of(run.output / "tiny.safetensors")["ss_num_batches_per_epoch"])
    by_step = run.curve("loss/validation/step_average")
    assert list(by_step) == [2, 4, 6, 7]
    assert all(0 < loss < 10 and math.isfinite(loss) for loss in by_step.values())
    assert len(set(by_step.values())) == 4  # the weights move
    by_epoch = run.curve("loss/validation/epoch_average")
    assert list(by_epoch) == list(run.curve("loss/epoch_average")) == list(range(1, 7 // steps_per_epoch + 1))
    average = run.curve("loss/average")
    for step, difference in run.curve("loss/validation/step_divergence").items():
        assert difference == pytest.approx(by_step[step] - average[step], abs=1e-5)
    assert "validation after step 2: loss " in run.err and "on 3 images" in run.err
    assert "latents: 10 encoded" in run.err


def test_the_best_weights_are_kept(ended: dict[str, Ended]) -> None:
    run = ended["validated"]
    losses = run.curve("loss/validation/step_average")
    spe = int(metadata_of(run.output / "tiny.safetensors")["ss_num_batches_per_epoch"])
    losses |= {epoch * spe: loss for epoch, loss in run.curve("loss/validation/epoch_average").items()}
    entries = metadata_of(run.output / "tiny-best.safetensors")
    assert int(entries["ss_steps"]) == min(losses, key=losses.__getitem__)
    # another run, which has no dropout, finds the same loss with them: it was off, and the noise is the images' own
    assert ended["again"].code == 0, ended["again"].err
    again = ended["again"].curve("loss/validation/step_average")
    assert again[1] == pytest.approx(min(losses.values()), rel=1e-6)
    assert again[1] != pytest.approx(sorted(losses.values())[1], rel=1e-6)
    assert entries["ss_num_validation_images"] == "3"
    assert entries["ss_validate_every_n_steps"] == "2"


def test_losses_of_equal_weights_are_equal_and_end_the_run(ended: dict[str, Ended]) -> None:
    """Three validations: the first is the best, two more are no better."""
    run = ended["still"]
    assert run.code == 0, run.err
    losses = run.curve("loss/validation/step_average")
    assert list(losses) == [1, 2, 3] and len(set(losses.values())) == 1
    assert "stopped early after step 3" in run.err and "--early_stopping_patience" in run.err
    assert metadata_of(run.output / "tiny.safetensors")["ss_steps"] == "3"
    assert metadata_of(run.output / "tiny-best.safetensors")["ss_steps"] == "1"
    state = json.loads((run.output / "tiny-state" / "train_state.json").read_text())
    assert (state["current_step"], state["validation"]["misses"], state["validation"]["step"]) == (3, 2, 1)


def test_a_resumed_run_knows_the_best(ended: dict[str, Ended]) -> None:
    run, whole = ended["resumed"], ended["still"]
    assert run.code == 0, run.err
    losses = run.curve("loss/validation/step_average")
    assert losses == {3: whole.curve("loss/validation/step_average")[3]}
    assert "stopped early after step 3" in run.err
    assert_same(run.output / "tiny.safetensors", whole.output / "tiny.safetensors")
    assert not (run.output / "tiny-best.safetensors").exists()
    assert "--save_best: " in run.err and "tiny-best.safetensors is not there" in run.err
    assert "not exactly" not in run.err  # the same images are kept
    spent = ended["spent"]
    assert spent.code == 2 and "--early_stopping_patience 2: the state of --resume has seen 2" in spent.err


def test_settings_that_do_nothing_are_named(ended: dict[str, Ended]) -> None:
    idle, refused = ended["idle"], ended["refused"]
    assert idle.code == 0
    assert "--validation_seed and --validate_every_n_steps have no effect without validation images" in idle.err
    assert refused.code == 2
    (line,) = [line for line in refused.err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: --save_best: cannot work without validation images")


def test_first_command_of_the_page(ended: dict[str, Ended]) -> None:
    run = ended["page"]
    assert run.code == 0, run.err
    assert "validation after step 4: loss" in run.err and "on 2 images" in run.err
    assert (run.output / "quickstart_lora-best.safetensors").exists()


@pytest.mark.slow
def test_processes_agree(folder: Path, tiny: Tiny, tmp_path: Path) -> None:
    """Two processes measure what one does, also when the seed is drawn."""
    losses = {}
    for count in (1, 2):
        output = tmp_path / str(count)
        words = tiny.words(folder / "split.toml", output, learning_rate=STILL, validate_every_n_steps=1,
            validation_seed=5, seed=None if count == 2 else 1,
        )  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count),
             str(ROOT / tiny.file), *map(str, words)],
            capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE, check=False,
            env={**environment(), "ACCELERATE_USE_CPU": "true"},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        losses[count] = Ended(0, done.stderr, output).curve("loss/validation/step_average")
    assert losses[1].keys() == losses[2].keys() == {1, 2}
    for step in (1, 2):
        assert losses[1][step] == pytest.approx(losses[2][step], rel=1e-6)
