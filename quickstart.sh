#!/usr/bin/env bash
# quickstart.py with the first Python 3.10 or newer that is found
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source tools/environment.sh
exec "$(find_python)" quickstart.py "$@"
