"""The prompts of a run's sample images, which may be edited during training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection

from library.config.console import quiet
from library.errors import UserError
from library.inference.prompt_line import SamplePrompt

logger = logging.getLogger(__name__)

Prompts = tuple[SamplePrompt, ...]


class SamplePrompts:
    """The prompts, read from their file at each sampling.

    Args:
        prompts: prompts that were checked at the start.
        read: reads the file and checks it against the model; raises UserError.
        texts_of: texts of a prompt to encode.
        encoded: usable texts, if the text encoders are no longer loaded; ``None``: any.
    """

    def __init__(
        self,
        prompts: Prompts,
        read: Callable[[], Prompts],
        *,
        texts_of: Callable[[SamplePrompt], Collection[str]],
        encoded: Collection[str] | None,
    ) -> None:
        self._prompts = prompts
        self._in_file = prompts
        self._read = read
        self._texts_of = texts_of
        self._encoded = encoded
        self._problem = ""

    def current(self) -> Prompts:
        """Return the prompts of the file; if it can no longer be read, the previous ones, with a warning."""
        try:
            with quiet(logging.WARNING):  # its warnings were shown before, unless it has changed
                found = self._read()
            if found != self._in_file:
                found = self._read()
                self._in_file = found
                self._prompts = self._usable(found) or self._prompts
                logger.info("sample prompts: edited, %d are used from now on", len(self._prompts))
        except UserError as error:
            if str(error) != self._problem:
                logger.warning("%s; sample images keep the prompts before", error)
            self._problem = str(error)
        else:
            self._problem = ""
        return self._prompts

    def _usable(self, prompts: Prompts) -> Prompts:
        if self._encoded is None:
            return prompts
        usable = tuple(p for p in prompts if set(self._texts_of(p)) <= set(self._encoded))
        for prompt in prompts:
            if prompt not in usable:
                logger.warning(
                    'sample prompt "%s": left out, as its text is new and the text encoders are not loaded with '
                    "--cache_text_encoder_outputs",
                    prompt.prompt,
                )
        return usable
