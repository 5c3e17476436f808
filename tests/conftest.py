"""Shared pytest options: slow tests run only when asked for, gpu tests only where there is one."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator

import pytest

# Two cores are the yardstick: tests that run side by side must not each take every core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# as library/__init__.py sets it: scripts that tests start then have the environment of the fork server
os.environ.setdefault("GOMP_SPINCOUNT", "30000")
# products in float32 have the same bits wherever their operands lie in memory, such as at another place of a mapped file
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

# what starts the tests may ignore signals (nohup, a job of a shell); scripts under test would inherit that
for _number in ("SIGHUP", "SIGINT", "SIGTERM"):
    _signal = getattr(signal, _number, None)
    if _signal is not None and signal.getsignal(_signal) == signal.SIG_IGN:
        signal.signal(_signal, signal.default_int_handler if _number == "SIGINT" else signal.SIG_DFL)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    import torch

    skip_slow = pytest.mark.skip(reason="slow: run with --run-slow")
    skip_gpu = pytest.mark.skip(reason="needs an accelerator")
    for item in items:
        if "slow" in item.keywords and not config.getoption("--run-slow"):
            item.add_marker(skip_slow)
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(skip_gpu)


@pytest.fixture
def own_root_logger() -> Iterator[None]:
    """For tests that set up the console: puts the root logger back as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers = []  # so that basicConfig(force=True) does not close pytest's
    yield
    for handler in root.handlers:
        handler.close()
    root.handlers, root.level = handlers, level
