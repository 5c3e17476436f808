"""Published names of outputs, and which older ones retention removes."""

from pathlib import Path

import pytest

from library.training.checkpoints import OutputNames, SavePolicy, remove_outdated

OUT = Path("out")


def policy(**given: object) -> SavePolicy:
    fields = dict.fromkeys(SavePolicy.__dataclass_fields__)
    fields.update(save_state=False, save_state_on_train_end=False)
    return SavePolicy(**{**fields, **given})


def test_names_with_an_output_name() -> None:
    names = OutputNames(OUT, "cat", "safetensors")
    assert names.final() == OUT / "cat.safetensors"
    assert names.epoch(3) == OUT / "cat-000003.safetensors"
    assert names.step(250) == OUT / "cat-step00000250.safetensors"
    assert names.final_state() == OUT / "cat-state"
    assert names.epoch_state(3) == OUT / "cat-000003-state"
    assert names.step_state(250) == OUT / "cat-step00000250-state"


def test_names_without_an_output_name() -> None:
    names = OutputNames(OUT, None, "ckpt")
    assert names.final() == OUT / "last.ckpt"
    assert names.epoch(3) == OUT / "epoch-000003.ckpt"
    assert names.step(250) == OUT / "at-step00000250.ckpt"
    assert names.epoch_state(3) == OUT / "epoch-000003-state"


def test_the_last_epoch_is_the_final_file() -> None:
    assert [e for e in range(1, 7) if policy(every_n_epochs=2).saves_after_epoch(e, 6)] == [2, 4]


@pytest.mark.parametrize(("epochs", "ratio", "every"), [(10, 5, 2), (10, 3, 3), (3, 5, 1)])
def test_ratio(epochs: int, ratio: int, every: int) -> None:
    assert SavePolicy.every_from_ratio(epochs, ratio) == every


def test_epoch_retention_counts_files() -> None:
    kept = policy(every_n_epochs=2, last_n_epochs=2)
    assert [kept.epoch_to_remove(epoch) for epoch in (2, 4, 6, 8)] == [None, None, 2, 4]
    assert kept.epoch_state_to_remove(6) == 2
    assert policy(every_n_epochs=2, last_n_epochs=2, last_n_epochs_state=1).epoch_state_to_remove(6) == 4
    assert policy(every_n_epochs=2).epoch_to_remove(6) is None


def test_step_retention_counts_steps() -> None:
    kept = policy(every_n_steps=10, last_n_steps=20)
    # at step 50, what is older than step 30 goes: 20 is the newest of those
    assert [kept.step_to_remove(step) for step in (10, 20, 30, 40, 50)] == [None, None, None, 10, 20]


def test_removing_a_file_a_folder_and_nothing(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"x")
    folder = tmp_path / "a-state"
    folder.mkdir()
    (folder / "train_state.json").write_bytes(b"x")
    for path in (file, folder, tmp_path / "absent"):
        remove_outdated(path)
        assert not path.exists()
