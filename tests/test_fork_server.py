"""Scripts that are forked behave as those that start in a process of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.fixtures.fork_server import needs_fresh
from tests.fixtures.runs import ROOT, Finished, environment, run_script, start_script

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is nothing to fork here")

PROGRAM = """
import atexit, os, sys
print(__name__, __file__, sys.argv[1:], sys.path[0], os.getcwd(), os.environ.get("COLOUR"))
print("to stderr", file=sys.stderr)
print(sys.stdin.read(), [name for name in ("library", "networks", "tests") if name in sys.modules])
atexit.register(print, "at the end")
{end}
"""

ENDS = {
    "end": "",
    "exit code": "sys.exit(3)",
    "exit text": "sys.exit('in vain')",
    "exception": "raise ValueError('wrong')",
    "_exit": "sys.stdout.flush(); os._exit(4)",
    "killed": "import signal; os.kill(os.getpid(), signal.SIGKILL)",
    "interrupted": "raise KeyboardInterrupt",
    "thread": "import threading, time; threading.Thread(target=lambda: (time.sleep(0.2), print('late'))).start()",
}


@pytest.fixture
def program(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "program.py"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def both(path: Path, *arguments: str, env: Mapping[str, str]) -> list[Finished]:
    return [run_script(str(path), *arguments, env=env, fresh=fresh) for fresh in (False, True)]


@pytest.mark.parametrize("end", ENDS)
def test_a_script_ends_as_in_a_fresh_process(program: Callable[[str], Path], end: str) -> None:
    forked, fresh = both(program(PROGRAM.format(end=ENDS[end])), "a", "b c", env={"COLOUR": "green"})
    assert (forked.code, forked.out) == (fresh.code, fresh.out) and "'b c'" in forked.out
    # tracebacks begin with the frames that lead to the script
    assert forked.err.splitlines()[:1] == fresh.err.splitlines()[:1] == ["to stderr"]
    assert forked.err.splitlines()[-1] == fresh.err.splitlines()[-1]


def test_the_packages_are_imported_and_nothing_of_ours_is(program: Callable[[str], Path]) -> None:
    path = program(
        "import os, random, sys, threading\nimport numpy\n"
        "print('torch' in sys.modules, 'diffusers' in sys.modules, threading.active_count())\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('library', 'networks')])\n"
        "print(random.random(), numpy.random.rand())\n"
    )
    first, second = (run_script(str(path)).out.splitlines() for _ in range(2))
    assert first[:2] == second[:2] == ["True True 1", "[]"]
    # what is not seeded is as random as in a fresh process
    assert not set(first[2].split()) & set(second[2].split())


def test_it_is_forked_unless_something_is_read_once(program: Callable[[str], Path]) -> None:
    path = program("import sys\nprint('torch' in sys.modules, sys.stdout.encoding)\n")
    assert run_script(str(path), env={"RANK": "1"}).out == "True utf-8\n"
    assert run_script(str(path), env={"PYTHONIOENCODING": "latin-1"}).out == "False iso8859-1\n"
    assert run_script(str(path), fresh=True).out == "False utf-8\n"
    here = environment()
    assert not needs_fresh({**here, "WORLD_SIZE": "2"}, here)
    assert needs_fresh({**here, "HF_HOME": "elsewhere"}, here)
    assert needs_fresh({name: value for name, value in here.items() if name != "OMP_NUM_THREADS"}, here)


def test_one_that_hangs_is_ended(program: Callable[[str], Path], tmp_path: Path) -> None:
    path = program(f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)\n")
    with pytest.raises(subprocess.TimeoutExpired):
        run_script(str(path), timeout=2)
    assert_ends(int((tmp_path / "pid").read_text()))


def test_the_server_and_its_scripts_end_with_the_tests(program: Callable[[str], Path], tmp_path: Path) -> None:
    path = program(f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getppid()))\ntime.sleep(60)\n")
    tests = (
        "import os, sys, time\nfrom pathlib import Path\nfrom tests.fixtures.runs import start_script\n"
        f"script = start_script({str(path)!r})\n"
        f"while not Path({str(tmp_path / 'pid')!r}).exists(): time.sleep(0.05)\n"
        "print(script.pid, flush=True)\nos.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", tests], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL
    for process in (int(done.stdout), int((tmp_path / "pid").read_text())):
        assert_ends(process)


def assert_ends(process: int) -> None:
    """Assert that a process ends within ten seconds, be it one that nobody waits for."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        state = Path(f"/proc/{process}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail(f"process {process} is still there")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_signals_reach_the_script(program: Callable[[str], Path], number: int) -> None:
    path = program("import time\nprint('ready')\ntime.sleep(60)\n")
    process = start_script(str(path))
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    assert process.poll() is None
    process.send_signal(number)
    text, _ = process.communicate(timeout=30)
    assert process.returncode == -number and ("KeyboardInterrupt" in text) == (number == signal.SIGINT)
    process.kill()  # nothing happens to one that has ended
