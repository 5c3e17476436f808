"""Run taggers: WD v2 and v3 and taggers with a mapping, by onnxruntime or, of timm's form, by timm."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from library.captioning.hub_models import device_for
from library.captioning.tagger.labels import CSV, MAPPING, Label, read_labels
from library.data.image_io import resize
from library.errors import UserError

logger = logging.getLogger(__name__)

#: pixels a side, for models that do not say it
_SIDE = 448

#: what onnxruntime can compute with, best first; the CPU follows each
_PROVIDERS: tuple[tuple[str, dict[str, str]], ...] = (
    ("OpenVINOExecutionProvider", {"device_type": "GPU", "precision": "FP32"}),
    ("CUDAExecutionProvider", {}),
    ("ROCMExecutionProvider", {}),
    ("MIGraphXExecutionProvider", {}),
    ("DmlExecutionProvider", {}),
    ("CoreMLExecutionProvider", {}),
)


@dataclass(frozen=True)
class Form:
    """The files of a tagger in its folder."""

    folder: Path
    weights: Path
    labels: Path

    @property
    def is_mapping(self) -> bool:
        return self.labels.name == MAPPING

    @property
    def is_timm(self) -> bool:
        return self.weights.suffix == ".safetensors"


#: weight files by label file, in the order in which they are taken
ONNX_FILES = {CSV: "model.onnx", MAPPING: "model_optimized.onnx"}
TIMM_FILES = ("model.safetensors", "config.json")


class Tagger(Protocol):
    """A model that gives the probability of each of its labels."""

    labels: list[Label]
    side: int  # pixels of its square input
    is_mapping: bool

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Return (B, labels) for float32 (B, side, side, 3) BGR of 0 to 255."""
        ...


def square(pixels: np.ndarray, side: int) -> np.ndarray:
    """Return uint8 (H, W, 3) RGB as float32 (side, side, 3) BGR, in the middle of a white square."""
    height, width = pixels.shape[:2]
    longest = max(height, width)
    padded = np.full((longest, longest, 3), 255, np.uint8)
    top, left = (longest - height) // 2, (longest - width) // 2
    padded[top : top + height, left : left + width] = pixels
    if longest != side:
        padded = resize(padded, (side, side), "area" if longest > side else "lanczos")
    return padded[:, :, ::-1].astype(np.float32)


def open_tagger(form: Form, device: str | None) -> Tagger:
    """Load a tagger.

    Raises:
        UserError: a package is missing; files that do not fit.
    """
    return TimmTagger(form, device) if form.is_timm else OnnxTagger(form, device)


class OnnxTagger:
    """A tagger that onnxruntime runs."""

    def __init__(self, form: Form, device: str | None) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise UserError(
                "taggers in ONNX's form need a package: pip install onnxruntime (on a GPU: onnxruntime-gpu)"
            ) from None
        self.labels = read_labels(form.labels)
        self.is_mapping = form.is_mapping
        try:
            self._session = onnxruntime.InferenceSession(
                str(form.weights), providers=providers(onnxruntime.get_available_providers(), device)
            )
        except Exception as error:  # its errors have no common kind
            raise UserError(f"{form.weights}: onnxruntime cannot load it ({str(error)[:300]})") from None
        (entry,) = self._session.get_inputs()
        self._input = entry.name
        batch, *sizes = entry.shape
        self._batch = batch if isinstance(batch, int) and batch > 0 else None
        given = [size for size in sizes if isinstance(size, int) and size > 4]
        self.side = given[0] if given else _SIDE
        outputs = self._session.get_outputs()[0].shape[-1]
        _check_count(outputs, self.labels, form)
        logger.info("tagger: %s, %s", form.weights, self._session.get_providers()[0])

    def __call__(self, images: np.ndarray) -> np.ndarray:
        if self.is_mapping:
            images = images.transpose(0, 3, 1, 2) / 127.5 - 1  # (B, 3, side, side)
        step = self._batch or len(images)
        parts = [self._run(images[start : start + step], step) for start in range(0, len(images), step)]
        made = np.concatenate(parts)
        return 1 / (1 + np.exp(-made.astype(np.float64))) if self.is_mapping else made

    def _run(self, images: np.ndarray, count: int) -> np.ndarray:
        """Run at most ``count`` images, in a batch of exactly that many where the model wants it."""
        filled = images
        if self._batch and len(images) < count:
            filled = np.concatenate([images, np.zeros((count - len(images), *images.shape[1:]), images.dtype)])
        (made,) = self._session.run(None, {self._input: np.ascontiguousarray(filled, np.float32)})[:1]
        return made[: len(images)]


def providers(available: Sequence[str], device: str | None) -> list[Any]:
    """Return what onnxruntime shall compute with: the best there is, and the CPU behind it."""
    best = [] if device == "cpu" else [(name, how) for name, how in _PROVIDERS if name in available][:1]
    return [*best, "CPUExecutionProvider"]


class TimmTagger:
    """A tagger whose weights timm loads (the safetensors of the WD v3 taggers)."""

    def __init__(self, form: Form, device: str | None) -> None:
        try:
            import timm
        except (ImportError, RuntimeError) as error:  # the latter of a torchvision that is for another torch
            raise UserError(
                f"taggers in timm's form need packages: pip install timm ({error}); or give --onnx"
            ) from None
        import torch

        from library.memory.placing import move

        self.labels = read_labels(form.labels)
        self.is_mapping = False
        self._device = device_for(device)
        try:
            model = timm.create_model(f"local-dir:{form.folder.absolute()}", pretrained=True)
        except Exception as error:  # many kinds, by what is wrong with the files
            raise UserError(f"{form.folder}: timm cannot load it ({str(error).splitlines()[0][:300]})") from None
        _check_count(model.num_classes, self.labels, form)
        self._model = move(model.eval(), self._device)
        config = model.pretrained_cfg
        self.side = int(config["input_size"][-1])
        self._mean, self._std = (
            torch.tensor(config[name], device=self._device)[:, None, None] * 255 for name in ("mean", "std")
        )
        logger.info("tagger: %s by timm, %s", form.weights, self._device)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        import torch

        pixels = torch.from_numpy(np.ascontiguousarray(images)).to(self._device).permute(0, 3, 1, 2)  # (B, 3, H, W)
        with torch.inference_mode():
            return self._model((pixels - self._mean) / self._std).sigmoid().cpu().numpy()


def _check_count(outputs: Any, labels: Sequence[Label], form: Form) -> None:
    if isinstance(outputs, int) and outputs != len(labels):
        raise UserError(f"{form.weights}: has {outputs} outputs, but {form.labels.name} lists {len(labels)} tags")


def timm_is_installed() -> bool:
    """Whether timm can be imported; a failed import of it is remembered by nothing."""
    try:
        import timm  # noqa: F401
    except (ImportError, RuntimeError):
        for name in [name for name in sys.modules if name == "timm" or name.startswith("timm.")]:
            del sys.modules[name]
        return False
    return True
