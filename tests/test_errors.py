"""Messages for users."""

from __future__ import annotations

import errno
import subprocess
import sys

import pytest
import torch

from library.errors import did_you_mean, exits_on_user_error, known_ending
from tests.fixtures.runs import ROOT, environment


def test_a_suggestion_is_another_word() -> None:
    assert did_you_mean("networks.lor", ["networks.lora"]) == ' (did you mean "networks.lora"?)'
    assert did_you_mean("cat.png", ["cat.png"]) == ""
    assert did_you_mean("cat.png", ["cat.png", "cat.jpg"]) == ' (did you mean "cat.jpg"?)'


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "out of memory (MemoryError); docs/precision"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"), "Tried to allocate 2 GiB.);"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you"), "out of"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory ([Errno 12]"),
        (RuntimeError("can't start new thread"), "out of memory"),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "out of memory (libtorch_cpu.so"),
        (RuntimeError("Failed to import x, look up:\nt.so: failed to map segment from shared object"), "out of memory"),
        (ImportError("cannot import name 'x'"), ""),
        (RuntimeError("[/x/gloo/transport/tcp/pair.cc:537] Connection closed by peer"), "another process of this run"),
        (torch.distributed.DistBackendError("NCCL communicator was aborted"), "another process of this run"),
        (UnicodeEncodeError("utf-8", "\udcc3", 0, 1, "surrogates not allowed"), "set LC_ALL=C.UTF-8 or PYTHONUTF8=1"),
        (RuntimeError("shapes differ"), ""),
        (ValueError("out of memory"), ""),
        (OSError(errno.ENOENT, "No such file"), ""),
    ],
)
def test_endings_that_are_no_fault_of_the_program(error: Exception, words: str) -> None:
    text = known_ending(error)
    assert (words in text) if words else not text
    assert len(text.splitlines()) <= 1


@pytest.mark.parametrize(
    ("error", "code", "words"), [(MemoryError(), 2, "error: out of memory"), (KeyboardInterrupt(), 130, "stopped")]
)
def test_they_end_a_program_in_one_line(
    error: BaseException, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    @exits_on_user_error
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code
    assert capsys.readouterr().err.startswith(words)


@pytest.mark.skipif(sys.platform != "linux", reason="a limit on memory is set as Linux has it")
def test_memory_that_ends_while_packages_are_imported() -> None:
    program = f"""
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_AS, (300_000_000, 300_000_000))  # torch alone takes more
sys.path.insert(0, {str(ROOT)!r})
sys.argv = ["train_network.py", "--pretrained_model_name_or_path", "m", "--train_data_dir", "d", "--output_dir", "o",
            "--network_module", "networks.lora"]
runpy.run_path({str(ROOT / "train_network.py")!r}, run_name="__main__")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and done.stderr.startswith("error: out of memory"), done.stderr
    assert len(done.stderr.splitlines()) == 1
