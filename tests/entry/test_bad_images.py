"""Images that cannot be read, as a user meets them: all named before training, or left out."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open

from tests.fixtures.runs import lora_arguments, make_images, run_script, write_dataset
from tests.fixtures.tiny_sd import MadeCheckpoint


def test_they_stop_the_run_or_are_left_out(tmp_path: Path, tiny_sd: MadeCheckpoint) -> None:
    images = make_images(tmp_path / "images")  # seven
    (images / "1.png").write_bytes((images / "1.png").read_bytes()[:-40])
    (images / "4.png").write_text("<html>not found</html>")
    dataset = write_dataset(tmp_path / "data.toml", images, general="cache_info = true")

    stopped = run_script("train_network.py", *lora_arguments(tiny_sd, dataset, tmp_path / "out"))
    assert stopped.code == 2
    assert "Traceback" not in stopped.text
    lines = [line for line in stopped.err.splitlines() if line.startswith("error: ")]
    assert [Path(line.split(": ")[1]).name for line in lines] == ["1.png", "4.png"]
    assert not list(tmp_path.glob("out/*.safetensors"))

    flags = lora_arguments(tiny_sd, dataset, tmp_path / "out", on_bad_image="skip", max_train_steps=1)
    trained = run_script("train_network.py", *flags)
    assert trained.code == 0, trained.text
    assert trained.text.count("left out (--on_bad_image skip)") == 2
    with safe_open(tmp_path / "out" / "tiny.safetensors", framework="pt") as file:
        assert file.metadata()["ss_num_train_images"] == "5"
