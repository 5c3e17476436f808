"""The stages of a run after its setup: make caches, load models, and build everything that trains them."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from library.architectures.part import DENOISER, VAE, text_encoder_name
from library.config.arguments import DatasetOptions
from library.data import describe
from library.data.validation_data import ValidationData
from library.files.gathering import is_sharded
from library.interrupt import Interrupt
from library.lazy_imports import without_collection
from library.memory.host import use_host_kernels
from library.memory.plan import MemoryPlan
from library.optim.schedulers import scheduler_name
from library.optim.update import Update
from library.training import precision
from library.training.batch_losses import BatchLosses
from library.training.caching import CacheJob, cache_latents
from library.training.caption_encoder import CaptionEncoder
from library.training.kinds.base import Kind, ParameterGroup
from library.training.loaded import LoadedRun
from library.training.memory import check_swapping, memory_plan
from library.training.metadata import HashedFile, RunRecord, fixed_entries
from library.training.models import Models, load_on_meta
from library.training.outputs import check_space, own_files
from library.training.previews import PreviewGenerator, current_prompts, encode_prompts, generate_options
from library.training.resume import TrainState, choice_of, load_state, name_changes
from library.training.run import Cached, Run
from library.training.saving import Saver, save_dtype
from library.training.settings import loss_settings, noise_settings, update_settings
from library.training.sharding import load_denoiser, shard_denoiser
from library.training.state_weights import stream_weights
from library.training.text_caching import Tokenize, cache_texts, caches_texts, warn_of_cut
from library.training.validation import TIMESTEPS, Validation
from library.training.zero import zero_of

logger = logging.getLogger(__name__)


def make_kind(run: Run) -> Kind:
    """Return a fresh object of the run's kind."""
    return run.kind(
        run.architecture,
        run.options,
        run.checked.checkpoint,
        seed=run.checked.seed,
        sharded=run.sharding is not None,
    )


def models_on_meta(run: Run) -> Models:
    """Return the run's models without weights.

    Raises:
        UserError: headers that lack tensors, or whose shapes do not fit.
    """
    with without_collection(freeze=None):  # the classes of the models are imported now
        return load_on_meta(
            run.architecture,
            run.checked.checkpoint,
            dtype=run.weight_dtype,
            vae_dtype=precision.vae_dtype(run.options.model, run.weight_dtype),
            attention=run.architecture.attention(run.options.training),
            split_attention=run.options.training.split_attn,
            cached=run.cached_encoders,
        )


def make_caches(run: Run, interrupt: Interrupt) -> Cached:
    """Make or read the caches of latents and texts; afterwards the VAE is kept only if it is still needed.

    Mismatches with the model are found first.

    Raises:
        UserError: see ``Kind.check_models``, ``cache_latents`` and ``cache_texts``.
    """
    architecture, options, prompts = run.architecture, run.options, run.checked.prompts
    kind = make_kind(run)
    caches = run.caches_latents or caches_texts(options.dataset)
    if caches or architecture.blocks_to_swap:
        models = models_on_meta(run)
        check_swapping(run, models)
        if caches:
            kind.check_models(models)
    job = CacheJob(
        architecture=architecture,
        checkpoint=run.checked.checkpoint,
        data=run.data,
        options=options,
        accelerator=run.accelerator,
        weight_dtype=run.weight_dtype,
        interrupt=interrupt,
    )
    vae = None
    if run.caches_latents:
        plan = memory_plan(run, kind)
        vae = cache_latents(job, keep_vae=plan[VAE].home != "none")
        if vae is not None:
            plan.rest(VAE, vae)
            job.release_memory()
    encoded = None
    if caches_texts(options.dataset):
        encode = None
        if prompts:
            how = generate_options(options, device=run.device, dtype=run.weight_dtype)
            encode = partial(encode_prompts, architecture, prompts, how)
        encoded = cache_texts(job, encode, in_part=not all(run.cached_encoders))
    # only now: a VAE that encodes in each step has no use for the device's memory while captions are encoded
    return Cached(vae if run.caches_latents else job.load_vae(), encoded or {})


def load_run(run: Run, cached: Cached) -> LoadedRun:
    """Load the models, build the trained modules, and resume.

    Raises:
        UserError: the trained modules do not fit the models, or a state does not fit the run.
    """
    kind = make_kind(run)
    plan = memory_plan(run, kind)
    models = _load_models(run, cached, kind, plan)
    options = run.options
    groups = kind.attach(models)
    if run.accelerator.is_main_process and not caches_texts(options.dataset):
        warn_of_cut(run.data, run.architecture, models.tokenizers, options.model)  # with the tokens of new words
    blocks = run.architecture.compiled_blocks
    # after everything that reads or changes whole weights: merging, and creating adapters
    if run.sharding is not None:
        dtype = plan[DENOISER].dtype if plan[DENOISER].trained else None
        shard_denoiser(models.denoiser, blocks, run.sharding, run.device, groups, dtype)
    blocks_of = run.architecture.block_lists
    # trained blocks have their places before the optimizer is made, which must not move them
    swaps_trained = plan[DENOISER].trained and plan[DENOISER].swapped > 0
    settle = plan.place(DENOISER, models.denoiser, blocks_of(models.denoiser)) if swaps_trained else None
    update = _update(run, kind, groups, settle)
    width = save_dtype(options.output)
    check_space(run.names.directory, sum(p.numel() * (width or p.dtype).itemsize for p in update.trained))
    record = _record(run, kind)
    if settle is None:
        plan.place(DENOISER, models.denoiser, blocks_of(models.denoiser))
    precision.set_cuda_switches(options.training)
    precision.compile_denoiser(models.denoiser, blocks, options.training)
    losses = batch_losses(run, models, kind)
    saver = _saver(run, kind, update, record)
    loading = batch_preparation(run, models)
    loaded = LoadedRun(
        run=run,
        models=models,
        kind=kind,
        update=update,
        losses=losses,
        saver=saver,
        previews=_previews(run, models, kind, cached),
        prompts=current_prompts(
            run.checked.prompts,
            options,
            run.architecture,
            run.objective,
            reads_images=run.kind.takes_images,
            encoded=cached.prompts if any(run.cached_encoders) else None,
        ),
        loading=loading,
        validation=validation_of(run, models, kind, losses, saver, loading) if run.data.validation_datasets else None,
    )
    _resume(loaded)
    return loaded


def _load_models(run: Run, cached: Cached, kind: Kind, plan: MemoryPlan) -> Models:
    """Load the models in their final numbers: changed by the kind, in a small form if asked for."""
    architecture, checkpoint, training = run.architecture, run.checked.checkpoint, run.options.training
    tokenizers = architecture.load_tokenizers(checkpoint)
    names = [text_encoder_name(number) for number in range(1, len(run.cached_encoders) + 1)]
    text_encoders = [
        architecture.load_text_encoder(checkpoint, index, dtype=plan[name].dtype, device=plan.loads_on(name))
        for index, name in enumerate(names)
    ]
    denoiser = load_denoiser(
        architecture,
        checkpoint,
        dtype=plan[DENOISER].dtype,
        home=plan.loads_on(DENOISER),
        sharded=run.sharding is not None,
        trained=plan[DENOISER].trained,
    )
    architecture.set_attention(denoiser, architecture.attention(training), split=training.split_attn)
    if run.device.type == "cpu":
        use_host_kernels(denoiser, convolutions=run.sharding is None)
    if training.gradient_checkpointing or plan[DENOISER].swapped:
        architecture.enable_gradient_checkpointing(denoiser, text_encoders)
    models = Models(tokenizers, text_encoders, denoiser, cached.vae, run.cached_encoders)
    kind.change_models(models, dtype=run.weight_dtype, device=run.device)
    for name in names:
        plan.store(name, models.part(name))
    plan.store(DENOISER, denoiser, architecture.block_lists(denoiser))
    return models


def _update(run: Run, kind: Kind, groups: Sequence[ParameterGroup], settle: Callable[[], None] | None = None) -> Update:
    """Make the optimizer and everything around it.

    Args:
        settle: see ``MemoryPlan.place``; the trained modules then have their places already.
    """
    options, accelerator, checked = run.options, run.accelerator, run.checked
    if accelerator.is_main_process:
        kind.try_saving(run.names.final(), save_dtype(options.output))
    for module in kind.modules():
        # evaluation_mode: placed and saved by the accelerator, but not wrapped for data parallelism: adapters work
        # inside the frozen model's forward, see gradient_exchange.py
        placed = settle is not None or any(is_sharded(p) for p in module.parameters())
        accelerator.prepare_model(module, device_placement=not placed, evaluation_mode=True)
    if not kind.keeps_copies:
        stream_weights(accelerator)
    kind.set_training(True)
    flag = kind.fused_flag(options)
    return Update(
        accelerator,
        checked.optimizer,
        [group.settings for group in groups],
        checked.learning_rate_schedule,
        update_settings(
            options,
            seed=checked.seed,
            total_steps=run.plan.total_steps,
            zero=zero_of(options.training, accelerator),
            keeps_copies=kind.keeps_copies,
        ),
        names=[group.name for group in groups],
        averaged={name: p for module in kind.modules() for name, p in module.named_parameters() if p.requires_grad},
        fused=kind.fused_parts([p for group in groups for p in group.parameters]) if flag else None,
        fused_flag=flag or "",
        before_update=kind.before_update,
        settle=settle,
    )


def batch_losses(run: Run, models: Models, kind: Kind) -> BatchLosses:
    """Return the losses of a run's batches."""
    captions = CaptionEncoder(
        run.architecture,
        models.encoding,
        device=run.device,
        clip_skip=run.options.model.clip_skip,
        trains=lambda: kind.trains_text,
    )
    return BatchLosses(
        run.architecture,
        kind,
        models,
        captions,
        run.objective.to(run.device),
        noise=noise_settings(run.options),
        loss=loss_settings(run.options),
        dtype=next(models.denoiser.parameters()).dtype if DENOISER in kind.needs() else run.weight_dtype,
        autocast=run.accelerator.autocast,
        activations=partial(precision.activations, run.options.training),
    )


def _saver(run: Run, kind: Kind, update: Update, record: RunRecord) -> Saver:
    def run_state() -> TrainState:
        origin = run.plan.origin
        return TrainState(
            *(0, 0),  # the saver gives the position
            seed=run.checked.seed,
            fingerprint=run.fingerprint,
            origin_step=origin.step,
            origin_epoch=origin.epoch,
        )

    return Saver(
        run.accelerator,
        kind,
        update,
        record,
        run.options.output,
        uploads=run.uploads,
        files_beside=partial(kind.files_beside, run.architecture, run.options),
        run_state=run_state,
        written=own_files(run.checked.resumed, run.checked.state_folder, run.names),
    )


def validation_of(
    run: Run, models: Models, kind: Kind, losses: BatchLosses, saver: Saver, loading: Mapping[str, Any]
) -> Validation:
    """Return the validations of a run that holds out images."""
    options = run.options.validation
    # input perturbation is for training, like dropout
    noise = replace(noise_settings(run.options), ip_gamma=None)
    data = ValidationData(
        run.data,
        max_batches=options.max_validation_steps,
        rank=run.accelerator.process_index,
        world_size=run.accelerator.num_processes,
        equal_counts=run.sharding is not None,
    )
    return Validation(
        run.accelerator,
        models,
        kind,
        losses,
        saver,
        options,
        data=data,
        plan=run.plan,
        noise=noise,
        levels=run.objective.levels(noise.timesteps, TIMESTEPS),
        best_file=run.names.best(),
        loading=loading,
    )


def _previews(run: Run, models: Models, kind: Kind, cached: Cached) -> PreviewGenerator:
    return PreviewGenerator(
        run.architecture,
        models,
        kind.modules(),
        run.objective,
        run.checked.info,
        run.options,
        device=run.device,
        dtype=run.weight_dtype,
        prompts=cached.prompts,
        of_features=kind.features(),
    )


def batch_preparation(run: Run, models: Models) -> dict[str, Any]:
    """Return the preparation of batches, for training and for validation."""
    model, dataset = run.options.model, run.options.dataset
    return {
        "tokenize": Tokenize(run.architecture, models.tokenizers, model.max_token_length, model.weighted_captions),
        "num_workers": _loader_processes(dataset.max_data_loader_n_workers),
        "pin_memory": run.device.type == "cuda",
        "persistent": dataset.persistent_data_loader_workers,
    }


def _loader_processes(given: int) -> int:
    """Return the number of loader workers: at most the processor's threads, by default one less."""
    threads = os.cpu_count() or 1
    return min(given, max(1, threads - 1) if given == DatasetOptions.max_data_loader_n_workers else threads)


def _record(run: Run, kind: Kind) -> RunRecord:
    options, checked = run.options, run.checked
    common: dict[str, Any] = {
        "options": options,
        "architecture": run.architecture,
        "info": checked.info,
        "modelspec_suffix": kind.modelspec_suffix,
        "minimum": kind.minimum_metadata,
    }
    if not kind.records_run:
        return RunRecord(**common)
    fixed = fixed_entries(
        options,
        run.architecture,
        checked.info,
        # identifies the session only; not part of the run's reproducible randomness
        session_id=random.SystemRandom().randint(0, 2**32),
        started_at=run.started_at,
        seed=checked.seed,
        num_epochs=run.plan.num_epochs,
        total_steps=run.plan.total_steps,
        optimizer_name=checked.optimizer.metadata_name,
        scheduler_name=scheduler_name(checked.optimizer, checked.learning_rate_schedule),
        kind=kind.metadata(),
        data=describe.metadata(
            run.data,
            from_file=options.dataset.dataset_config is not None,
            world_size=run.accelerator.num_processes,
            gradient_accumulation_steps=options.training.gradient_accumulation_steps,
        ),
    )
    vae = options.model.vae
    return RunRecord(
        **common,
        fixed=fixed,
        model_file=HashedFile.of(options.model.source),
        vae_file=HashedFile.of(vae) if vae else None,
    )


def _resume(loaded: LoadedRun) -> None:
    run = loaded.run
    resumed, folder = run.checked.resumed, run.checked.state_folder
    if resumed is None or folder is None:
        return
    sharded = bool(loaded.update.shards)
    load_state(run.accelerator, folder, starts_from=loaded.kind.starts_from, sharded=sharded)
    name_changes(resumed, run.fingerprint)  # of a state that fits: to one of another run they would be no news
    loaded.update.follow_options(choice_of(resumed, run.checked.optimizer) or run.checked.optimizer)
    if loaded.validation is not None:
        loaded.validation.restore(resumed)
    logger.info("resumed at step %d of %d", run.start_step, run.plan.total_steps)
