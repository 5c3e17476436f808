#!/usr/bin/env bash
# run_tests.py with the first Python 3.10 or newer that is found
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source tools/environment.sh
exec "$(find_python)" run_tests.py "$@"
