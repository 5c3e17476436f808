"""``--attn_mode`` and ``--split_attn`` in every family: the options reach the model, and the loss stays the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from library.architectures.common import attention
from library.training.loaded import LoadedRun
from library.training.trainer import Trainer
from tests.fixtures.families import Tiny
from tests.fixtures.runs import make_images, write_dataset


@pytest.mark.every_family
def test_every_implementation_gives_the_same_loss(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    losses: dict[str, Tensor] = {}
    rows: list[int] = []

    def fit(self: Trainer, loaded: LoadedRun, interrupt: object) -> int:
        run, denoiser = loaded.run, loaded.models.denoiser
        batch = next(iter(run.data.dataloader(epoch=0, start_batch=0, **loaded.loading)))
        assert len(batch.captions) == 2
        loaded.kind.begin_batch(batch, 0)
        plain = attention._IMPLEMENTATIONS["torch"]
        with monkeypatch.context() as patched, torch.no_grad():
            patched.setitem(
                attention._IMPLEMENTATIONS, "torch", lambda query, *rest: rows.append(len(query)) or plain(query, *rest)
            )
            losses["as asked"] = loaded.losses(batch)
        for backend in ("torch", "math", "flex"):
            run.architecture.set_attention(denoiser, backend)
            with torch.no_grad():
                losses[backend] = loaded.losses(batch)
        raise SystemExit(0)

    monkeypatch.setattr(Trainer, "fit", fit)
    dataset = write_dataset(
        tmp_path / "d.toml", make_images(tmp_path / "images", [(64, 64)] * 2), dataset="batch_size = 2"
    )
    with pytest.raises(SystemExit) as ended:
        tiny.train(dataset, tmp_path / "out", attn_mode="torch", split_attn=True)
    assert ended.value.code == 0, capsys.readouterr().err
    assert rows and set(rows) == {1}  # image by image
    for name in ("torch", "math", "flex"):
        torch.testing.assert_close(losses[name], losses["as asked"], rtol=1e-4, atol=1e-6)


def test_flex_cannot_train_on_a_cpu(tmp_path: Path, sd: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("only without a GPU")
    dataset = write_dataset(tmp_path / "d.toml", make_images(tmp_path / "images"))
    with pytest.raises(SystemExit) as ended:
        sd.train(dataset, tmp_path / "out", attn_mode="flex")
    assert ended.value.code == 2
    assert "--attn_mode flex: has no backward pass on a CPU; use --sdpa" in capsys.readouterr().err
