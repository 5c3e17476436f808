"""Tools that work on images: edges, smaller copies, faces."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.data.augment import face_in_name
from library.data.face_crops import Crop, Face, cut_out, scale_for, upright
from library.data.image_io import opencv, read_image, resize
from tests.fixtures.file_tools import refused, run_words
from tests.fixtures.tiny_yunet import write_tiny_yunet
from tools import canny, detect_face_rotate, resize_images_to_resolution

pytestmark = pytest.mark.usefixtures("own_root_logger")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images, one of them lying on its side, a caption, and a file that is no image."""
    place = tmp_path / "images"
    (place / "inner").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (600, 1200, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(place / "wide.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels[:, :300]).save(place / "turned.JPG", exif=exif)
    (place / "wide.txt").write_text("a cat")
    (place / "notes.md").write_text("notes")
    return place


# ---- edges ----


def test_edges(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_words(canny, "--input", folder / "wide.png", "--output", tmp_path / "edges.jpg", "--thres1", 100)
    cv2 = opencv()
    grey = cv2.cvtColor(read_image(folder / "wide.png"), cv2.COLOR_RGB2GRAY)
    run_words(canny, "--input", folder, "--output", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["turned.png", "wide.png"]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "wide.png")), cv2.Canny(grey, 32, 224))
    assert Image.open(tmp_path / "out" / "turned.png").size == (600, 300)  # upright
    assert Image.open(tmp_path / "edges.jpg").size == (1200, 600)
    assert "--input: name the image" in refused(capsys, canny, "--output", "x.png")
    assert "--thres1 -1" in refused(capsys, canny, "--input", folder, "--output", "x", "--thres1", -1)
    assert "notes.md: not an image" in refused(capsys, canny, "--input", folder / "notes.md", "--output", "x.png")
    assert "must end with" in refused(capsys, canny, "--input", folder / "wide.png", "--output", tmp_path / "x")
    assert "--input absent: no such file or folder" in refused(capsys, canny, "--input", "absent", "--output", "x")
    (folder / "bad.png").write_text("no image")
    assert "bad.png: not an image" in refused(capsys, canny, "--input", folder, "--output", tmp_path / "rest")
    assert sorted(path.name for path in (tmp_path / "rest").iterdir()) == ["turned.png", "wide.png"]
    same = ("--input", folder / "wide.png", "--output", folder / "wide.png")
    assert "would replace its source" in refused(capsys, canny, *same)


# ---- smaller copies ----


def test_copies_in_smaller_resolutions(tmp_path: Path, folder: Path) -> None:
    out = tmp_path / "small"
    words = ("--max_resolution", "300x300,512x512", "--divisible_by", 16, "--save_as_png", "--copy_associated_files")
    run_words(resize_images_to_resolution, folder, out, *words)
    sizes = {path.name: Image.open(path).size for path in out.glob("*.png")}
    # 1200 x 600 at an area of 300 x 300 is 424 x 212, and the middle of it 416 x 208
    assert sizes["wide+300x300.png"] == (416, 208)
    assert sizes["wide+512x512.png"] == (720, 352)
    assert sizes["turned+512x512.png"] == (592, 288)  # its 600 x 300 pixels are fewer: cut alone
    assert (out / "wide.txt").read_text() == (out / "wide+300x300.txt").read_text() == "a cat"
    assert (out / "notes.md").exists() and not (out / "turned+300x300.txt").exists()
    whole = resize(read_image(folder / "wide.png"), (724, 362), None)
    assert np.array_equal(read_image(out / "wide+512x512.png"), whole[5:357, 2:722])


def test_copies_as_jpeg(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "small"
    for method in ("area", "cubic", "lanczos4", "nearest", "linear", "box"):
        run_words(resize_images_to_resolution, folder, out, "--max_resolution", "128x128", "--interpolation", method)
        assert Image.open(out / "wide+128x128.jpg").size == (181, 90)
    (folder / "torn.png").write_bytes(b"\x89PNG")
    error = refused(capsys, resize_images_to_resolution, folder, out, "--max_resolution", "64x64")
    assert "torn.png" in error and (out / "wide+64x64.jpg").exists() and (out / "turned+64x64.jpg").exists()
    assert '"64" is no resolution' in refused(
        capsys, resize_images_to_resolution, folder, out, "--max_resolution", "64"
    )
    assert "is the folder of the images" in refused(capsys, resize_images_to_resolution, folder, folder)
    (folder / "wide.webp").write_bytes((folder / "wide.png").read_bytes())
    assert "several images are named wide" in refused(capsys, resize_images_to_resolution, folder, out)


# ---- faces ----


def test_a_leaning_face_is_turned_upright() -> None:
    pixels = np.zeros((200, 200, 3), np.uint8)
    pixels[110:114, 120:124] = 255  # an eye, lower than the other by 45 degrees as seen from the middle
    turned = upright(pixels, Face(100, 90, 40, 40, angle=45.0))
    y, x = np.argwhere(turned[..., 0] > 128).mean(0)
    assert abs(y - 90) < 2 and abs(x - (100 + math.hypot(22, 22))) < 2


@pytest.mark.parametrize(
    ("face_side", "fit", "scale"),
    [(None, False, 1.0), (None, True, 0.5), (10, False, 0.5), (80, False, 2.0)],
)
def test_scale_before_the_crop(face_side: int | None, fit: bool, scale: float) -> None:
    face = Face(200, 100, 40, 30)
    assert scale_for((400, 200), (100, 100), face, face_side=face_side, fit=fit) == scale
    assert scale_for((50, 200), (100, 100), face, face_side=None, fit=False) == 2  # enlarged to cover the crop


def test_a_crop_stays_in_the_image() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (200, 400, 3), dtype=np.uint8)
    cut, place = cut_out(pixels, Face(390, 20, 40, 30), Crop(size=(100, 60)))
    assert np.array_equal(cut, pixels[:60, 300:400]) and (place.x, place.y) == (90, 20)
    cut, place = cut_out(pixels, Face(200, 100, 40, 30), Crop(ratio=(2.0, 1.5)))
    assert np.array_equal(cut, pixels[70:130, 160:240]) and (place.x, place.y) == (40, 30)
    cut, place = cut_out(pixels, Face(200, 100, 40, 30), Crop(size=(50, 50), fit=True))
    assert cut.shape == (50, 50, 3) and (place.x, place.y, place.width) == (25, 25, 10)


@pytest.fixture(scope="module")
def yunet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_yunet(tmp_path_factory.mktemp("yunet") / "tiny.onnx")


def test_faces_are_found_and_cut(tmp_path: Path, yunet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "images", tmp_path / "faces"
    source.mkdir()
    pixels = np.zeros((320, 320, 3), np.uint8)
    pixels[64:96, 64:96, 0] = pixels[224:256, 192:224, 0] = 255  # red cells, which the tiny network takes for faces
    Image.fromarray(pixels).save(source / "two.png")
    Image.fromarray(pixels[:, :, ::-1]).save(source / "blue.png")
    words = ("--src_dir", source, "--dst_dir", out, "--face_model", yunet)
    run_words(detect_face_rotate, *words)
    (path,) = out.iterdir()
    assert path.name in ("two_0064_0064_0064_0064.png", "two_0192_0224_0064_0064.png")
    assert "no face in blue.png" in capsys.readouterr().err
    run_words(detect_face_rotate, *words, "--multiple_faces", "--crop_ratio", "2,1.5", "--rotate", "--debug")
    cut = sorted(path for path in out.iterdir() if Image.open(path).size == (128, 96))
    assert len(cut) == 2 and cut[0].name.startswith("two_00_") and cut[1].name.startswith("two_01_")
    assert all(face_in_name(path, (128, 96)) is not None for path in cut)
    assert (read_image(cut[0]) == (255, 0, 255)).all(-1).any()  # the box of --debug
    before = len(list(out.iterdir()))
    run_words(detect_face_rotate, *words, "--min_size", 65)
    run_words(detect_face_rotate, *words, "--max_size", 64)
    assert len(list(out.iterdir())) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--resize_fit", "--resize_face_size", 9, "--crop_size", "8,8"],
            "--resize_fit and --resize_face_size exclude",
        ),
        (["--crop_ratio", "1,1", "--resize_face_size", 9], "--crop_ratio and --resize_face_size exclude"),
        (["--resize_fit"], "need --crop_size"),
        (["--crop_size", "8"], "write two numbers"),
        (["--min_size", 0], "--min_size 0: must be at least 1"),
        (["--face_model", "none.onnx"], "none.onnx: no such file"),
        ([], "--face_model opencv/face_detection_yunet: no such file or folder here, not in the Hub cache"),
    ],
)
def test_mistakes(
    tmp_path: Path,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[object],
    said: str,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    error = refused(capsys, detect_face_rotate, "--src_dir", folder, "--dst_dir", tmp_path / "out", *words)
    assert said in error and not (tmp_path / "out").exists()


def test_another_network_is_refused(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.onnx").write_bytes(b"nothing")
    words = ("--src_dir", folder, "--dst_dir", tmp_path / "out", "--face_model", tmp_path / "other.onnx")
    assert "not a network of OpenCV's FaceDetectorYN" in refused(capsys, detect_face_rotate, *words)
