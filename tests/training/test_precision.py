"""Where a run keeps its models."""

from __future__ import annotations

import argparse
from types import SimpleNamespace

import pytest
import torch

from library.config.arguments import TrainNetworkOptions
from library.training.precision import home_of_text_encoders


@pytest.mark.parametrize(
    ("given", "home"),
    [
        ({}, "cuda:0"),
        # an encoder that is trained beside the cached outputs of another is fed on the device
        ({"cache_text_encoder_outputs": True}, "cuda:0"),
        ({"cache_text_encoder_outputs_to_disk": True, "fp8_base": True}, "cuda:0"),
        # until they have become small
        ({"fp8_base": True}, "cpu"),
        ({"fp8_base": True, "fp8_base_unet": True}, "cuda:0"),
    ],
)
def test_text_encoders_are_loaded_where_they_are_used(given: dict[str, object], home: str) -> None:
    options = TrainNetworkOptions.from_args(argparse.Namespace(**given))
    assert home_of_text_encoders(SimpleNamespace(options=options, device=torch.device("cuda:0"))) == home
