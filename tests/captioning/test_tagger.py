"""WD taggers: from files of the published layouts to caption files, with the real onnxruntime and timm."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune import tag_images_by_wd14_tagger as tagger
from library.captioning.tagger import choose, files, model
from library.captioning.tagger.choose import Names, Rules, expanded, parse_replacements
from library.captioning.tagger.labels import Label, read_labels
from library.errors import UserError
from tests.fixtures.file_tools import refused, run_words
from tests.fixtures.tiny_captioners import (
    MAPPING_LABELS,
    WD_LABELS,
    write_mapping_onnx,
    write_wd_labels,
    write_wd_onnx,
    write_wd_timm,
)

pytestmark = pytest.mark.usefixtures("own_root_logger")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """One red and one blue image, and one in a folder."""
    folder = tmp_path / "images"
    (folder / "inner").mkdir(parents=True)
    for name, color in (("red.png", (255, 0, 0)), ("blue.jpg", (0, 0, 255)), ("inner/green.png", (0, 255, 0))):
        Image.new("RGB", (20, 20), color).save(folder / name, quality=100)
    return folder


@pytest.fixture(scope="module")
def wd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wd_onnx(tmp_path_factory.mktemp("wd"))


def tags(folder: Path, ending: str = ".txt") -> dict[str, str]:
    return {path.stem: path.read_text() for path in sorted(folder.rglob(f"*{ending}"))}


# ---- WD, ONNX ----


def test_tags_of_a_wd_tagger(images: Path, wd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_words(tagger, images, "--repo_id", wd, "--onnx", "--recursive", "--frequency_tags", "--debug")
    assert tags(images) == {
        "red": "1girl, red_background, saber_(alter)_(fate)\n",
        "blue": "^_^, blue_background, hatsune_miku\n",
        "green": "long_hair\n",
    }
    out = capsys.readouterr().out
    assert "Tag frequencies:\n1girl: 1\n" in out and "general: 1girl 1.00, red_background 1.00" in out


def test_options_of_tags(images: Path, wd: Path) -> None:
    def one(*words: object) -> str:
        run_words(tagger, images, "--repo_id", wd, "--onnx", "--overwrite", *words)
        return tags(images)["red"].strip()

    assert one("--thresh", 1) == "" and one("--thresh", 1, "--general_threshold", 0.9) == "1girl, red_background"
    assert one("--character_threshold", 1) == "1girl, red_background"
    assert one("--remove_underscore") == "1girl, red background, saber (alter) (fate)"
    assert one("--character_tag_expand") == "1girl, red_background, saber_(alter), fate"
    assert one("--character_tag_expand", "--remove_underscore") == "1girl, red background, saber (alter), fate"
    assert one("--undesired_tags", "1girl, fate", "--character_tag_expand") == "red_background, saber_(alter)"
    assert one("--use_rating_tags").startswith("explicit, 1girl")
    assert one("--use_rating_tags_as_last_tag").endswith(", explicit")
    assert one("--use_rating_tags", "--use_rating_tags_as_last_tag").startswith("explicit, ")
    assert one("--character_tags_first") == "saber_(alter)_(fate), 1girl, red_background"
    assert one("--always_first_tags", "1girl, red_background").startswith("red_background, 1girl, ")
    assert one("--caption_separator", "; ") == "1girl; red_background; saber_(alter)_(fate)"
    assert one("--tag_replacement", "1girl,girl;red_background,red") == "girl, red, saber_(alter)_(fate)"
    assert one("--tag_replacement", "red background,a wall", "--remove_underscore").startswith("1girl, a wall, ")
    assert one("--caption_extention", ".tags") == "1girl, a wall, saber (alter) (fate)"  # of the run before
    assert tags(images, ".tags")["red"] == "1girl, red_background, saber_(alter)_(fate)\n"


def test_a_replacement_of_a_tag_that_is_none(images: Path, wd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_words(tagger, images, "--repo_id", wd, "--tag_replacement", "1grl,girl;1girl,girl")
    assert "the tagger has no tag named 1grl" in capsys.readouterr().err


def test_tags_are_kept_or_added_to(images: Path, wd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (images / "red.txt").write_text("mine,  1girl \n")
    run_words(tagger, images, "--repo_id", wd)
    assert tags(images)["red"] == "mine,  1girl \n" and "1 written, 1 kept" in capsys.readouterr().err
    run_words(tagger, images, "--repo_id", wd, "--append_tags")
    assert tags(images)["red"] == "mine, 1girl, red_background, saber_(alter)_(fate)\n"
    run_words(tagger, images, "--repo_id", wd, "--overwrite", "--batch_size", 2, "--max_data_loader_n_workers", 1)
    assert tags(images)["red"] == "1girl, red_background, saber_(alter)_(fate)\n"


def test_one_file_for_all(images: Path, wd: Path, tmp_path: Path) -> None:
    table, lines = tmp_path / "out" / "tags.json", tmp_path / "tags.jsonl"
    run_words(tagger, images, "--repo_id", wd, "--output_path", table)
    content = json.loads(table.read_text())
    assert content[str(images / "blue.jpg")] == {
        "tags": "^_^, blue_background, hatsune_miku",
        "image_size": [20, 20],
    }
    content[str(images / "blue.jpg")]["tags"] = "mine"
    table.write_text(json.dumps(content))
    run_words(tagger, images, "--repo_id", wd, "--output_path", table, "--recursive")  # the new image alone
    content = json.loads(table.read_text())
    assert content[str(images / "blue.jpg")]["tags"] == "mine" and len(content) == 3
    run_words(tagger, images, "--repo_id", wd, "--output_path", table, "--append_tags")
    assert json.loads(table.read_text())[str(images / "blue.jpg")]["tags"] == "mine, ^_^, blue_background, hatsune_miku"
    for again in ((), ("--overwrite",), ()):
        run_words(tagger, images, "--repo_id", wd, "--output_path", lines, *again)
        rows = [json.loads(line) for line in lines.read_text().splitlines()]
        assert [row["image_path"] for row in rows] == [str(images / "blue.jpg"), str(images / "red.png")]
        assert rows[1]["caption"].startswith("1girl, ") and rows[1]["image_size"] == [20, 20]
    assert not tags(images)


def test_a_fixed_batch_size_and_images_as_the_model_sees_them(images: Path, tmp_path: Path) -> None:
    folder = write_wd_onnx(tmp_path / "fixed", side=8, batch=2)
    run_words(tagger, images, "--repo_id", folder, "--recursive", "--batch_size", 3)
    assert tags(images)["green"] == "long_hair\n" and len(tags(images)) == 3
    pixels = np.zeros((2, 4, 3), np.uint8)
    pixels[..., 0] = 255
    seen = model.square(pixels, 4)
    assert seen.dtype == np.float32 and (seen[0] == 255).all() and (seen[3] == 255).all()  # white above and below
    assert (seen[1:3] == (0, 0, 255)).all()  # BGR
    assert model.square(pixels, 2).shape == (2, 2, 3) and model.square(pixels, 9).shape == (9, 9, 3)


def test_transparency_and_orientation(tmp_path: Path, wd: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(folder / "clear.png")  # white to the tagger
    (folder / "torn.jpg").write_bytes(b"\xff\xd8\xff")
    run_words(tagger, folder, "--repo_id", wd)
    assert set(tags(folder)["clear"].strip().split(", ")) == {name for name, kind in WD_LABELS if kind != 9}


# ---- taggers with a mapping ----


def test_a_tagger_with_a_mapping(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    #         general explicit best worst 1girl red  saber fate meta model artist
    logits = [1.0, 2.0, 3.0, 0.0, 5.0, 0.5, 4.0, 3.5, 2.5, 6.0, -9.0]
    folder = write_mapping_onnx(tmp_path / "owner_name" / "v1", [logit + 1 for logit in logits])  # red has a blue of -1

    def one(*words: object) -> str:
        run_words(
            tagger, images, "--repo_id", "owner/name/v1", "--model_dir", tmp_path, "--onnx", "--overwrite", *words
        )
        return tags(images)["red"].strip()

    assert folder.exists()
    assert one() == "some_model, 1girl, saber_(alter)_(fate), fate, absurdres, red_background"
    assert one(
        "--model_threshold", 1, "--meta_threshold", 0.99, "--artist_threshold", 0.0, "--copyright_threshold", 1
    ) == ("1girl, saber_(alter)_(fate), red_background, some_artist")
    assert one("--character_tags_first").startswith("saber_(alter)_(fate), some_model")
    assert one("--use_rating_tags", "--use_quality_tags").startswith("explicit, best_quality, some_model")
    assert one("--use_rating_tags_as_last_tag", "--use_quality_tags_as_last_tag").endswith("best_quality, explicit")
    assert one("--use_rating_tags", "--use_rating_tags_as_last_tag").endswith("explicit")
    assert one("--tag_replacement", "1girl,girl", "--thresh", 0.99) == "some_model, girl"
    # a fate of its own and of the character's name is one
    assert one("--character_tag_expand") == "some_model, 1girl, saber_(alter), fate, absurdres, red_background"
    # what is below every threshold does not count, ratings neither
    assert one("--thresh", 0.9, "--use_rating_tags").startswith("some_model")


def test_no_quality_tags(images: Path, wd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_words(tagger, images, "--repo_id", wd, "--use_quality_tags")
    assert "has no quality tags" in capsys.readouterr().err


# ---- timm ----


def test_a_tagger_of_timm(images: Path, tmp_path: Path) -> None:
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # no torchvision that is for this torch
        pytest.skip(f"timm: {error}")
    import torch

    folder = write_wd_timm(tmp_path / "timm")
    run_words(tagger, images, "--repo_id", folder, "--thresh", 0.5, "--batch_size", 2)
    net = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    pixels = torch.zeros(1, 3, 32, 32) - 1
    pixels[:, 2] = 1  # red is the last channel
    with torch.inference_mode():
        shares = net(pixels).sigmoid()[0]
    expected = [name for (name, kind), share in zip(WD_LABELS, shares, strict=True) if kind != 9 and share >= 0.5]
    assert tags(images)["red"].strip() == ", ".join(expected) and 0 < len(expected) < 7
    write_wd_onnx(folder)
    run_words(tagger, images, "--repo_id", folder, "--onnx", "--overwrite")  # both forms are there
    assert tags(images)["red"] == "1girl, red_background, saber_(alter)_(fate)\n"


def test_which_form_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_wd_labels(tmp_path)
    for name in ("model.onnx", "model.safetensors", "config.json"):
        (tmp_path / name).touch()
    for installed in (True, False):
        monkeypatch.setattr(files, "timm_is_installed", lambda installed=installed: installed)
        assert files.form_in(tmp_path, onnx=False).is_timm is installed
        assert not files.form_in(tmp_path, onnx=True).is_timm
    (tmp_path / "model.onnx").unlink()
    assert files.form_in(tmp_path, onnx=True) is None and files.form_in(tmp_path, onnx=False).is_timm
    names = {"selected_tags.csv", "model.onnx", "model.safetensors", "config.json", "saved_model.pb"}
    assert files.files_to_get(names, "", onnx=True, timm=True) == ["selected_tags.csv", "model.onnx"]
    assert "config.json" in files.files_to_get(names, "", onnx=False, timm=True)
    inner = {f"v1/{name}" for name in ("tag_mapping.json", "model_optimized.onnx")}
    assert files.files_to_get(inner, "v1", onnx=True, timm=True) == ["v1/tag_mapping.json", "v1/model_optimized.onnx"]
    with pytest.raises(UserError, match="has no tagger in ONNX's or timm's form"):
        files.files_to_get({"selected_tags.csv", "saved_model.pb"}, "", onnx=False, timm=True)


def test_packages_that_are_missing(
    images: Path, wd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    assert "pip install onnxruntime" in refused(capsys, tagger, images, "--repo_id", wd)
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    write_wd_labels(tmp_path)
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).touch()
    assert "pip install timm" in refused(capsys, tagger, images, "--repo_id", tmp_path)


# ---- files from the Hub ----


def test_files_from_the_hub(images: Path, wd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    calls = []

    class Api:
        def model_info(self, repository: str):
            names = ["selected_tags.csv", "model.onnx", "README.md", "variables/variables.index"]
            return type("Info", (), {"siblings": [type("File", (), {"rfilename": name}) for name in names]})

    def download(repository: str, local_dir: Path, allow_patterns: list[str]) -> str:
        calls.append((repository, allow_patterns))
        local_dir.mkdir(parents=True, exist_ok=True)
        for name in ("selected_tags.csv", "model.onnx"):
            (local_dir / name).write_bytes((wd / name).read_bytes())
        return str(local_dir)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    words = (images, "--repo_id", "owner/name", "--model_dir", tmp_path / "models", "--onnx", "--overwrite")
    run_words(tagger, *words)
    assert (tmp_path / "models" / "owner_name" / "model.onnx").exists()
    run_words(tagger, *words)
    assert calls == [("owner/name", ["selected_tags.csv", "model.onnx*"])]
    run_words(tagger, *words, "--force_download")
    (tmp_path / "models" / "owner_name" / "model.onnx").unlink()  # a download that was torn
    run_words(tagger, *words)
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--repo_id", "owner/none"], "the Hub cannot be reached"),
        (["--repo_id", "none"], "no such folder here"),
        (["--caption_separator", " "], "must have more than blanks"),
        (["--thresh", -1], "--thresh -1"),
        (["--meta_threshold", -1], "--meta_threshold -1"),
        (["--tag_replacement", "a,b;c"], '"c" must be two tags'),
        (["--output_path", "."], "is a folder"),
    ],
)
def test_mistakes(
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[object],
    said: str,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert said in refused(capsys, tagger, images, "--model_dir", tmp_path / "models", *words)
    assert not tags(images)


def test_folders_without_a_tagger(images: Path, wd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(folder: Path) -> str:
        return refused(capsys, tagger, images, "--repo_id", folder)

    assert "neither selected_tags.csv nor tag_mapping.json" in said(tmp_path)
    (tmp_path / "selected_tags.csv").write_text("a,b\n1,2\n")
    assert "has no model.onnx, nor model.safetensors and config.json" in said(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"junk")
    assert "must have the columns" in said(tmp_path)
    write_wd_labels(tmp_path)
    assert "onnxruntime cannot load it" in said(tmp_path)
    (tmp_path / "model.onnx").write_bytes((wd / "model.onnx").read_bytes())
    text = (tmp_path / "selected_tags.csv").read_text()
    (tmp_path / "selected_tags.csv").write_text(text + "99,more,0,1\n")
    assert f"has {len(WD_LABELS)} outputs, but selected_tags.csv lists {len(WD_LABELS) + 1}" in said(tmp_path)
    (tmp_path / "selected_tags.csv").write_text(text + "99,more,77,1\n")
    assert "more: is of no category" in said(tmp_path)
    keras = tmp_path / "keras"
    keras.mkdir()
    (keras / "saved_model.pb").touch()
    assert "needs TensorFlow and is not read; give --onnx" in said(keras)
    table = tmp_path / "table.json"
    table.write_text("[1]")
    error = refused(capsys, tagger, images, "--repo_id", wd, "--output_path", table)
    assert 'exists and is not {"image"' in error
    lines = tmp_path / "table.jsonl"
    lines.write_text("no")
    assert "cannot be read" in refused(capsys, tagger, images, "--repo_id", wd, "--output_path", lines)


# ---- names and choices ----


@pytest.mark.parametrize(
    ("name", "tags"),
    [
        ("saber_(alter)_(fate)", ("saber_(alter)", "fate")),
        ("saber (fate)", ("saber", "fate")),
        ("hatsune_miku", ("hatsune_miku",)),
        (":)", (":)",)),
        (";)", (";)",)),
        ("(fate)", ("(fate)",)),
        ("a_()", ("a_()",)),
    ],
)
def test_characters_are_expanded(name: str, tags: tuple[str, ...]) -> None:
    assert expanded(name) == tags


def test_replacements() -> None:
    assert parse_replacements(r"a,b; c\,d , e\;f ;") == {"a": "b", "c,d": "e;f"}
    assert parse_replacements(None) == {}
    names = Names(remove_underscore=True, replacements={"long_hair": "hair", "x": "y"})
    assert names.of(Label("long_hair", "general")) == ("hair",) and names.of(Label("0_0", "general")) == ("0_0",)


def test_the_order_of_characters() -> None:
    labels = [Label("a", "general"), Label("b", "character"), Label("c", "character")]
    thresholds = dict.fromkeys(tagger.CATEGORIES, 0.35)
    rules = Rules(Names(), thresholds, characters_first=True)
    assert choose.choose(labels, [0.9, 0.5, 0.8], rules).tags == ("c", "b", "a")  # as published: the last first
    rules = Rules(Names(), thresholds, characters_first=True, by_probability=True)
    assert choose.choose(labels, [0.9, 0.8, 0.5], rules).tags == ("b", "c", "a")


def test_labels_of_a_mapping(tmp_path: Path) -> None:
    path = tmp_path / "tag_mapping.json"
    path.write_text(
        json.dumps({str(n): {"tag": tag, "category": kind} for n, (tag, kind) in enumerate(MAPPING_LABELS)})
    )
    assert read_labels(path)[2] == Label("best_quality", "quality")
    for text in ("[]", '{"1": {"tag": "a", "category": "General"}}', '{"0": 1}', "{", "{}"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"tag_mapping\.json"):
            read_labels(path)
    path.write_text('{"0": {"tag": "a", "category": "Other"}}')
    with pytest.raises(UserError, match="a: is of no category"):
        read_labels(path)


def test_providers() -> None:
    available = ["CPUExecutionProvider", "CUDAExecutionProvider", "OpenVINOExecutionProvider"]
    assert model.providers(available, None)[0][0] == "OpenVINOExecutionProvider"
    assert model.providers(available[:2], None) == [("CUDAExecutionProvider", {}), "CPUExecutionProvider"]
    assert model.providers(available, "cpu") == model.providers(available[:1], None) == ["CPUExecutionProvider"]
