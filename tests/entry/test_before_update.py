"""The hook of networks between gradients and update, in a run of the script."""

from __future__ import annotations

from pathlib import Path

import pytest

from networks.lora import LoraNetwork
from tests.fixtures.runs import lora_arguments, train_here, write_dataset
from tests.fixtures.tiny_sd import MadeCheckpoint


def test_networks_see_their_gradients_before_each_update(
    tmp_path: Path, tiny_sd: MadeCheckpoint, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once a step, whatever is accumulated, and before the update has moved anything."""
    seen = []

    def before_update(network: LoraNetwork) -> None:
        ups = [parameter for name, parameter in network.named_parameters() if "lora_up" in name]
        seen.append((float(ups[0].detach().abs().sum()), all(parameter.grad is not None for parameter in ups)))

    monkeypatch.setattr(LoraNetwork, "before_update", before_update)
    dataset = write_dataset(tmp_path / "data.toml", images)
    options = {"max_train_steps": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2}
    train_here(*lora_arguments(tiny_sd, dataset, tmp_path / "out", **options))
    assert len(seen) == 2 and all(with_gradients for _, with_gradients in seen)
    assert seen[0][0] == 0.0 < seen[1][0]
