"""Freed host memory serves the next step instead of being mapped and zeroed anew."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from library.memory.host_heap import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(10):  # the heap settles: aligned blocks leave small pieces between them at first
    torch.ones(16 << 20)  # 64 MiB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(16 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> int:
    """Page faults of ten tensors of 64 MiB that follow one another."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's heap")
def test_memory_of_freed_tensors_is_used_again():
    assert faults("keep") < faults("default") / 10
