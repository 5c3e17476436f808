#!/usr/bin/env bash
# Makes .venv if needed and runs the tests; arguments go to pytest, e.g. ./run_tests.sh --run-slow tests/data
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source tools/environment.sh
setup_environment requirements-dev.txt
# one worker per core; each keeps to one thread (tests/conftest.py), and takes over from one that has more to do
exec "$VENV/bin/python" -m pytest -q -n auto --dist worksteal "$@"
