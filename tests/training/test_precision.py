"""Where a run keeps its models."""

from __future__ import annotations

import argparse

import pytest

from library.training.kinds.adapter_options import TrainNetworkOptions
from library.training.precision import Fp8Parts


@pytest.mark.parametrize(
    ("given", "waits"),
    [
        ({}, False),
        # an encoder that is trained beside the cached outputs of another is fed on the device
        ({"cache_text_encoder_outputs": True}, False),
        ({"cache_text_encoder_outputs_to_disk": True, "fp8_base": True}, False),
        # until they have become small
        ({"fp8_base": True}, True),
        ({"fp8_base": True, "fp8_base_unet": True}, False),
    ],
)
def test_text_encoders_wait_on_the_host_for_their_fp8_form(given: dict[str, object], waits: bool) -> None:
    options = TrainNetworkOptions.from_args(argparse.Namespace(**given))
    assert Fp8Parts.of(options).text_encoders is waits
