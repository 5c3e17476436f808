"""The places and dtypes in which a run keeps its models."""

from __future__ import annotations

import argparse

import pytest

from library.architectures.sd import SD
from library.training.kinds.adapter_options import TrainNetworkOptions
from library.training.memory import _forms
from library.training.text_caching import caches_texts


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({}, set()),
        # an encoder that is trained beside the cached outputs of another is small, and fed on the device
        ({"cache_text_encoder_outputs_to_disk": True, "fp8_base": True}, {"denoiser"}),
        ({"fp8_base": True}, {"denoiser", "text_encoder_1"}),
        ({"fp8_base": True, "fp8_base_unet": True}, {"denoiser"}),
        ({"fp8_base_unet": True}, {"denoiser"}),
    ],
)
def test_parts_in_fp8(given: dict[str, object], parts: set[str]) -> None:
    options = TrainNetworkOptions.from_args(argparse.Namespace(**given))
    forms = _forms(options.training, SD, ["text_encoder_1"], caches=caches_texts(options.dataset))
    assert forms == dict.fromkeys(parts, "fp8")
