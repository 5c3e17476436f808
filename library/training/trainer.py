"""Every run: ``setup -> cache -> load -> fit -> finish``.

A *kind* defines what is trained and saved, an *architecture* how its model works; neither knows the other's cases.
``train`` turns the namespace into frozen dataclasses on its first line; nothing deeper sees ``args``.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from typing import ClassVar

from library.architectures.base import Architecture
from library.config.arguments import RunOptions, hide_secrets, script_parser, with_groups
from library.config.config_file import origins_of
from library.config.console import quiet
from library.config.declaration import joined
from library.config.explain import print_explanation
from library.data.conditioning import Role
from library.errors import UserError, exits_on_user_error
from library.interrupt import Interrupt
from library.lazy_imports import without_collection
from library.training.debug_dataset import show_dataset
from library.training.dry_run import dry_run
from library.training.kinds.base import Kind, RunSubject
from library.training.loaded import LoadedRun
from library.training.loading import load_run, make_caches
from library.training.loop import run_loop
from library.training.outputs import claimed_output
from library.training.processes import finalizing
from library.training.replay import replay
from library.training.run import Cached, Run
from library.training.run_hooks import RunHooks
from library.training.setup import images_as, set_up
from library.training.summary import summary

logger = logging.getLogger(__name__)


class Trainer:
    """Trains one kind of thing on one family of models.

    An entry script subclasses it with its ``architecture`` and ``kind``; ``Trainer(architecture, kind)`` is the same.
    """

    architecture: Architecture
    kind: ClassVar[type[Kind]]

    def __init__(self, architecture: Architecture | None = None, kind: type[Kind] | None = None) -> None:
        self.architecture = architecture if architecture is not None else type(self).architecture
        self._kind = kind if kind is not None else type(self).kind

    # ---- the command line ----

    @classmethod
    def parser(cls) -> argparse.ArgumentParser:
        """Return the full parser of a script for this kind and family."""
        return script_parser(
            cls.__doc__, cls.kind.options_class, joined(cls.kind.declaration, cls.architecture.declaration)
        )

    @classmethod
    def joined_options(cls) -> type[RunOptions]:
        """Return the class of all options of the script: the kind's, and the family's own."""
        return with_groups(cls.kind.options_class, RunSubject(cls.kind, cls.architecture).declaration.groups)

    # ---- the story ----

    @exits_on_user_error
    def train(self, args: argparse.Namespace) -> None:
        """Run the whole training.

        Raises:
            SystemExit: code 2 after a user's error; 130 or 143 after Ctrl-C or SIGTERM, when everything is saved.
        """
        subject = RunSubject(self._kind, self.architecture)
        options = with_groups(self._kind.options_class, subject.declaration.groups).from_args(args)
        hide_secrets(options, sys.argv)
        if options.config.replay:
            return replay(options, self.setup, lambda run, interrupt: self.load(run, self.cache(run, interrupt)))
        if options.config.explain:
            return print_explanation(options, origins_of(args), subject.declaration)
        if options.dataset.debug_dataset:
            return show_dataset(options, self.architecture.configured(options), self._images_as(options))
        with Interrupt() as interrupt:
            if options.training.memory_plan is not None:
                from library.training.memory_choice import planned

                with quiet(logging.WARNING):  # the setup with the chosen options says it all
                    run = self.setup(options)
                options = planned(run)
            run = self.setup(options)
            with finalizing(run.accelerator):
                if options.config.dry_run:
                    with without_collection():
                        return dry_run(run)
                with claimed_output(run), contextlib.closing(run.uploads):
                    loaded = self.load(run, self.cache(run, interrupt))
                    steps = self.fit(loaded, interrupt)
                    self.finish(loaded, steps)

    def setup(self, options: RunOptions) -> Run:
        """Check everything, scan the data, and set up the run; no weights are loaded yet."""
        with without_collection(freeze=None):
            return set_up(self.architecture.configured(options), self._kind.for_options(options), options)

    def cache(self, run: Run, interrupt: Interrupt) -> Cached:
        """Make or read the caches; afterwards the VAE is kept only if it is still needed."""
        return make_caches(run, interrupt)

    def load(self, run: Run, cached: Cached) -> LoadedRun:
        """Load the models, build the trained modules, and resume."""
        return load_run(run, cached)

    def fit(self, loaded: LoadedRun, interrupt: Interrupt) -> int:
        """Train, save and generate samples until the last step or the first interrupt; returns the steps done."""
        run = loaded.run
        hooks = RunHooks(loaded, _summary(loaded), interrupt.check)
        try:
            hooks.prepare()
            if interrupt.requested and run.accelerator.num_processes == 1:
                logger.warning("stopped before the first step; there is nothing to save")
                raise SystemExit(interrupt.exit_code)
            hooks.start()
            steps = run_loop(
                run.plan,
                start_step=run.start_step,
                seed=run.checked.seed,
                accelerator=run.accelerator,
                update=loaded.update,
                hooks=hooks,
                interrupt=interrupt,
                on_nan=run.options.training.on_nan,
                keeps_copies=loaded.kind.keeps_copies,
            )
        except Exception as error:
            if not (fault := loaded.kind.fault_of(error)):
                raise
            logger.debug("the whole traceback:", exc_info=error)
            raise UserError(f"{fault}; --console_log_level DEBUG shows all of it") from error
        finally:
            hooks.close()
        if steps < run.plan.total_steps and not hooks.is_over():
            raise SystemExit(interrupt.exit_code)
        return steps

    def finish(self, loaded: LoadedRun, steps: int) -> None:
        """Save the final weights and, if asked for, the final state."""
        run, saver = loaded.run, loaded.saver
        epochs = run.plan.epochs_begun(steps)
        saver.save_weights(run.names.final(), step=steps, epoch=epochs)
        if run.policy.save_state or run.policy.save_state_on_train_end:
            place, best = run.names.final_state(), loaded.best
            saver.save_state(place, step=steps, epoch=epochs, losses=[], validation=best)
        if run.accelerator.is_main_process:
            logger.info("finished: %d steps, model saved as %s", steps, run.names.final())

    def _images_as(self, options: RunOptions) -> Role:
        return images_as(self.architecture.configured(options), self._kind)


def _summary(loaded: LoadedRun) -> list[tuple[str, str]]:
    update = loaded.update
    return summary(loaded.run, loaded.kind, loaded.models.denoiser, update.trained, update.optimizer)
