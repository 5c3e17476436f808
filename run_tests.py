"""Makes .venv where it is missing and runs the tests; arguments go to pytest.

python run_tests.py --run-slow tests/data

``tools/environment.py`` lists the environment variables that change what is installed. NEWEST=1 tests the newest
releases of all packages in an environment of their own, .venv-newest.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from tools.environment import ROOT, set_up


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _, words = parser.parse_known_args()
    if os.environ.get("NEWEST", "") not in ("", "0"):
        os.environ.setdefault("VENV", ".venv-newest")
    python = set_up("requirements-dev.txt")
    # one worker for each core; each keeps to one thread (tests/conftest.py), and takes over from one that has more to
    # do
    words = ["-q", "-n", "auto", "--dist", "worksteal", *words]
    return subprocess.run([str(python), "-m", "pytest", *words], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
