"""Model and data options without effect, as far as the dataset file does not matter; the rest is in ``by_dataset``."""

from __future__ import annotations

from library.config.arguments import TrainNetworkOptions
from library.config.no_effect.declare import idle


@idle("no_half_vae", reason="without --mixed_precision fp16 or bf16: the VAE is in float32 anyway")
def vae_in_float32_anyway(o: TrainNetworkOptions) -> bool:
    return o.training.mixed_precision == "no"


@idle("train_data_dir", "reg_data_dir", "in_json", reason="beside --dataset_config, which names the data")
def folders_beside_a_dataset_file(o: TrainNetworkOptions) -> bool:
    return o.dataset.dataset_config is not None


@idle("reg_data_dir", reason="with --in_json: metadata files have no regularization images")
def metadata_files_have_no_regularization(o: TrainNetworkOptions) -> bool:
    return bool(o.dataset.in_json) and o.dataset.dataset_config is None


@idle("caption_extension", reason="beside its old spelling --caption_extention, which wins")
def old_spelling_wins(o: TrainNetworkOptions) -> bool:
    return bool(o.dataset.caption_extention)


@idle("skip_cache_check", reason="without --cache_latents_to_disk or --cache_text_encoder_outputs_to_disk")
def no_cache_files(o: TrainNetworkOptions) -> bool:
    return not (o.dataset.cache_latents_to_disk or o.dataset.cache_text_encoder_outputs_to_disk)


@idle("vae_batch_size", reason="without --cache_latents or --cache_latents_to_disk")
def no_latents_are_cached(o: TrainNetworkOptions) -> bool:
    return not _caches_latents(o)


@idle(
    "text_encoder_batch_size",
    "text_encoder_cache_variants",
    reason="without --cache_text_encoder_outputs or --cache_text_encoder_outputs_to_disk",
)
def no_texts_are_cached(o: TrainNetworkOptions) -> bool:
    return not _caches_texts(o)


@idle("highvram", reason="without cached latents or text encoder outputs")
def nothing_is_cached(o: TrainNetworkOptions) -> bool:
    return not (_caches_latents(o) or _caches_texts(o))


def _caches_latents(o: TrainNetworkOptions) -> bool:
    return o.dataset.cache_latents or o.dataset.cache_latents_to_disk


def _caches_texts(o: TrainNetworkOptions) -> bool:
    return o.dataset.cache_text_encoder_outputs or o.dataset.cache_text_encoder_outputs_to_disk


@idle("persistent_data_loader_workers", reason="with --max_data_loader_n_workers 0")
def no_workers(o: TrainNetworkOptions) -> bool:
    return o.dataset.max_data_loader_n_workers == 0


@idle("lowram", reason="in this version: weights are streamed to the device in any case")
def loading_is_streamed(o: TrainNetworkOptions) -> bool:
    return True
