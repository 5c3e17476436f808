"""Options of FLUX.1 and Chroma, apart from a run."""

from __future__ import annotations

import pytest

from library.architectures.flux import FLUX
from library.training.kinds.adapter_options import NetworkOptions


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], False),
        (["train_t5xxl=True"], True),
        (["train_t5xxl = on"], True),
        (["train_t5xxl=yes", "split_qkv=False"], True),
        (["train_t5xxl=True", "train_t5xxl=False"], False),
        (["train_t5xxl=maybe"], False),
    ],
)
def test_t5_is_adapted_where_the_network_module_reads_so(words: list[str], expected: bool) -> None:
    assert FLUX.adapted_encoders(NetworkOptions(network_args=words)) == (True, expected)
