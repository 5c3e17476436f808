"""A published name that graphical programs import: ``add_flux_train_arguments``. See ``library/train_util.py``."""

from __future__ import annotations

import argparse
import dataclasses

from library.architectures.flux.options import FluxModelOptions
from library.config.fields import add_flag
from library.config.flow import FlowOptions


def add_flux_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of FLUX.1 that the parser does not have yet."""
    known = {action.dest for action in parser._actions}
    for group in (FluxModelOptions, FlowOptions):
        for field in dataclasses.fields(group):
            if field.name not in known:
                add_flag(parser, field)
