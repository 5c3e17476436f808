"""Messages for users."""

from __future__ import annotations

import errno

import pytest
import torch

from library.errors import did_you_mean, exits_on_user_error, known_ending


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
