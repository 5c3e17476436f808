"""Options of the data, for keys that the dataset file does not set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from library.config.dataset_keys import NOT_WITH_CACHED_LATENTS
from library.config.declaration import Declaration, Facts, Finding, error, idle
from library.config.fields import option
from library.config.paths import no_file, no_folder


@dataclass(frozen=True)
class DatasetOptions:
    """Data, unless the dataset file sets it."""

    # a resumed run compares the datasets that result from these and a dataset file
    harmless: ClassVar[bool] = True

    dataset_config: Path | None = option(None, "dataset file, .toml or .json", type=Path)
    train_data_dir: str | None = option(
        None, "folder with sub-folders <repeats>_<class tokens> of images, or with the images of --in_json"
    )
    reg_data_dir: str | None = option(None, "the same for regularization images")
    in_json: str | None = option(None, "metadata file of captions and tags, instead of caption files")
    dataset_repeats: int = option(
        1,
        "how often each image is used in an epoch, with --in_json or a dataset file that does not set it",
        type=int,
        unit="uses an epoch",
        minimum=0,
    )
    dataset_class: str | None = option(None, "import path of a dataset class (package.module.Class)")
    train_batch_size: int = option(
        1, "batch size: images in a batch of each process", type=int, unit="images", minimum=1
    )
    resolution: str | None = option(None, "training size in pixels: a number, or width,height")
    caption_extension: str = option(".caption", "extension of caption files")
    caption_extention: str | None = option(None, "old spelling of --caption_extension; wins over it")
    caption_separator: str = option(",", "what separates the tags of a caption")
    caption_prefix: str | None = option(None, "text before every caption")
    caption_suffix: str | None = option(None, "text after every caption")
    shuffle_caption: bool = option(False, "shuffle a caption's tags each time it is used")
    keep_tokens: int = option(0, "keep this many tags at the front in place", type=int, unit="tags", minimum=0)
    keep_tokens_separator: str = option(
        "", "text in the caption that ends the part kept in place, e.g. |||; wins over --keep_tokens"
    )
    secondary_separator: str | None = option(None, "joins tags that are shuffled and dropped as one, e.g. ;;;")
    enable_wildcard: bool = option(False, "read {a|b} in captions as a choice, and several lines as one choice each")
    caption_dropout_rate: float = option(
        0.0,
        "caption dropout: fraction of uses without a caption, 0 to 1",
        type=float,
        unit="share, 0 to 1",
        minimum=0,
        maximum=1,
    )
    caption_dropout_every_n_epochs: int = option(0, "drop all captions in every n-th epoch", type=int, unit="epochs")
    caption_tag_dropout_rate: float = option(
        0.0, "tag dropout: fraction of tags left out, 0 to 1", type=float, unit="share, 0 to 1", minimum=0, maximum=1
    )
    token_warmup_min: int = option(1, "tags used at the start of the tag warm-up", type=int, unit="tags")
    token_warmup_step: float = option(
        0,
        "steps until all tags are used; below 1, a fraction of the run",
        type=float,
        unit="steps, or share of the run",
    )
    color_aug: bool = option(False, "colour augmentation: change hue and gamma a little each time")
    flip_aug: bool = option(False, "flip half of the uses horizontally")
    face_crop_aug_range: str | None = option(None, "crop around the face: low,high of the enlargement, e.g. 2.0,4.0")
    random_crop: bool = option(False, "crop at a random place instead of the middle")
    alpha_mask: bool = option(False, "masked loss by the image's alpha channel")
    enable_bucket: bool = option(False, "aspect ratio buckets: train each image at the nearest aspect ratio")
    min_bucket_reso: int = option(256, "shortest side of a bucket, pixels", type=int, unit="pixels")
    max_bucket_reso: int = option(1024, "longest side of a bucket, pixels", type=int, unit="pixels")
    bucket_reso_steps: int = option(64, "sides of buckets are multiples of this, pixels", type=int, unit="pixels")
    bucket_no_upscale: bool = option(False, "make buckets from the images' own sizes, and never enlarge")
    resize_interpolation: str | None = option(
        None,
        "how images are resized (area to shrink and lanczos to enlarge, if not given)",
        choices=["lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area"],
    )
    cache_latents: bool = option(False, "encode all images once, before training, and keep the latents in memory")
    cache_latents_to_disk: bool = option(False, "keep them beside the images, for later runs too")
    vae_batch_size: int = option(1, "images encoded at a time", type=int, neutral=(0,), unit="images", minimum=1)
    skip_cache_check: bool = option(False, "use cache files without checking them")
    cache_info: bool = option(False, "remember captions and sizes in metadata_cache.json")
    conditioning_data_dir: str | None = option(
        None, "folder of mask images for --masked_loss, with the names of the images"
    )
    on_bad_image: str = option(
        "stop",
        "unreadable images: name all and stop before training, or warn and skip them",
        choices=["stop", "skip"],
    )
    debug_dataset: bool = option(
        False, "show the training images, in windows or on sheets in <output_dir>/debug_dataset, and exit"
    )
    max_data_loader_n_workers: int = option(
        8,
        "loader worker processes that prepare batches, at most the processor's threads (by default one less); 0 "
        "prepares them in the main process",
        type=int,
        unit="processes",
        minimum=0,
    )
    persistent_data_loader_workers: bool = option(False, "keep these processes between epochs")
    cache_text_encoder_outputs: bool = option(
        False, "encode all captions once, before training, and keep the text encoder's outputs in memory"
    )
    cache_text_encoder_outputs_to_disk: bool = option(False, "keep them beside the images, for later runs too")
    text_encoder_batch_size: int | None = option(
        None,
        "captions encoded at a time (8, if not given)",
        type=int,
        neutral=(0,),
        unit="captions",
        minimum=1,
    )
    text_encoder_cache_variants: int = option(
        1,
        "captions of an image to encode where they change at each use (shuffled, tags dropped, ...)",
        type=int,
        unit="captions an image",
        minimum=1,
    )


def trusting_caches(options: Any) -> Any:
    """Return the options of a run that uses cache files without checking them."""
    return replace(options, dataset=replace(options.dataset, skip_cache_check=True))


# ---- what cannot work ----


def needs_data(o: Any, facts: Facts) -> Iterator[Finding]:
    d = o.dataset
    if d.dataset_config is None and not d.train_data_dir and not d.in_json:
        yield error("no data: name a dataset file with --dataset_config, or a folder with --train_data_dir")


def cached_latents(o: Any, facts: Facts) -> Iterator[Finding]:
    d = o.dataset
    if d.cache_latents or d.cache_latents_to_disk:
        for name in NOT_WITH_CACHED_LATENTS:
            if getattr(d, name):
                yield error(f"--{name}: not with cached latents, which are made once; remove one of them")


def places(o: Any, facts: Facts) -> Iterator[Finding]:
    d = o.dataset
    yield from no_file("dataset_config", d.dataset_config)
    yield from no_file("in_json", d.in_json)
    for name in ("train_data_dir", "reg_data_dir", "conditioning_data_dir"):
        yield from no_folder(name, getattr(d, name))


# ---- what has no effect ----


@idle("train_data_dir", "reg_data_dir", "in_json", reason="beside --dataset_config, which names the data")
def folders_beside_a_dataset_file(o: Any) -> bool:
    return o.dataset.dataset_config is not None


@idle("reg_data_dir", reason="with --in_json: metadata files have no regularization images")
def metadata_files_have_no_regularization(o: Any) -> bool:
    return bool(o.dataset.in_json) and o.dataset.dataset_config is None


@idle("caption_extension", reason="beside its old spelling --caption_extention, which wins")
def old_spelling_wins(o: Any) -> bool:
    return bool(o.dataset.caption_extention)


@idle("skip_cache_check", reason="without --cache_latents_to_disk or --cache_text_encoder_outputs_to_disk")
def no_cache_files(o: Any) -> bool:
    return not (o.dataset.cache_latents_to_disk or o.dataset.cache_text_encoder_outputs_to_disk)


@idle("vae_batch_size", reason="without --cache_latents or --cache_latents_to_disk")
def no_latents_are_cached(o: Any) -> bool:
    return not _caches_latents(o)


@idle(
    "text_encoder_batch_size",
    "text_encoder_cache_variants",
    reason="without --cache_text_encoder_outputs or --cache_text_encoder_outputs_to_disk",
)
def no_texts_are_cached(o: Any) -> bool:
    return not _caches_texts(o)


@idle("highvram", reason="without cached latents or text encoder outputs")
def nothing_is_cached(o: Any) -> bool:
    return not (_caches_latents(o) or _caches_texts(o))


def _caches_latents(o: Any) -> bool:
    return o.dataset.cache_latents or o.dataset.cache_latents_to_disk


def _caches_texts(o: Any) -> bool:
    return o.dataset.cache_text_encoder_outputs or o.dataset.cache_text_encoder_outputs_to_disk


@idle("persistent_data_loader_workers", reason="with --max_data_loader_n_workers 0")
def no_workers(o: Any) -> bool:
    return o.dataset.max_data_loader_n_workers == 0


DECLARATION = Declaration(
    groups={"dataset": DatasetOptions},
    rules=(needs_data, places, cached_latents),
    idle=(
        folders_beside_a_dataset_file,
        metadata_files_have_no_regularization,
        old_spelling_wins,
        no_cache_files,
        no_latents_are_cached,
        no_texts_are_cached,
        nothing_is_cached,
        no_workers,
    ),
    refused={
        "dataset_class": (
            "a class written against the predecessor's inner classes cannot run here, where images, buckets, caches "
            "and random draws are made apart; describe the data with --dataset_config or --in_json"
        ),
    },
)
