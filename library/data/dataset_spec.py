"""The content of a checked dataset file: datasets and their subsets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from library.data.buckets import BucketRules
from library.data.captions import CaptionRules


@dataclass(frozen=True)
class SubsetSpec:
    """One folder of images, or the images of one metadata file."""

    where: str  # for messages: "data.toml: [[datasets]] 1 > [[datasets.subsets]] 2"
    image_dir: Path | None  # may be missing beside a metadata file that holds full paths
    num_repeats: int
    is_reg: bool
    class_tokens: str | None
    caption_extension: str
    captions: CaptionRules
    flip_aug: bool
    random_crop: bool
    face_crop_range: tuple[float, float] | None  # lowest and highest ratio of crop to face
    color_aug: bool
    alpha_mask: bool
    conditioning_dir: Path | None  # mask or conditioning images, with the names of the images
    resize_interpolation: str | None
    custom_attributes: Mapping[str, Any] = field(default_factory=dict)
    metadata_file: Path | None = None  # captions and tags of the fine-tuning method, instead of caption files
    cache_info: bool = False  # remember sizes and captions in the folder
    on_bad_image: str = "stop"  # or "skip"
    validation_split: float = 0.0  # fraction of held-out images, 0 to 1

    @property
    def source(self) -> Path:
        """Return the source of captions: the metadata file, else the folder."""
        source = self.metadata_file or self.image_dir
        assert source is not None  # one of them is always given
        return source


@dataclass(frozen=True)
class DatasetSpec:
    """Subsets that share resolution, buckets and batch size."""

    buckets: BucketRules
    batch_size: int
    network_multiplier: float
    resize_interpolation: str | None
    subsets: tuple[SubsetSpec, ...]
    validation_seed: int | None = None  # of the choice of held-out images and of their noise; the run's, if None

    @property
    def is_dreambooth(self) -> bool:
        """Whether captions come from caption files or folders' names; else from metadata files."""
        return all(subset.metadata_file is None for subset in self.subsets)


@dataclass(frozen=True)
class DatasetConfig:
    source: str  # the file's name, or "command line"
    datasets: tuple[DatasetSpec, ...]

    @property
    def validates(self) -> bool:
        """Whether any images are held out for validation."""
        return any(subset.validation_split > 0 for dataset in self.datasets for subset in dataset.subsets)
