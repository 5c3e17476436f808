# Sourced by quickstart.sh and run_tests.sh: makes .venv and installs what is missing.
#
# Overrides:
#   PYTHON           the interpreter that makes .venv (3.10 or newer)
#   VENV             where the environment lies (default: .venv)
#   TORCH_VERSION    the torch release to install where none is (default below)
#   TORCH_INDEX_URL  the package index to take torch from, e.g. one with CUDA or CPU builds

TORCH_VERSION="${TORCH_VERSION:-2.13.0}"
VENV="${VENV:-.venv}"

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python3.10 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.10 or newer found; install one, or name it: PYTHON=/path/to/python $0" >&2
    return 1
}

has_gpu() {
    command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU
}

install_torch() {
    local index=()
    [ -n "${TORCH_INDEX_URL:-}" ] && index=(--index-url "$TORCH_INDEX_URL")
    if ! has_gpu; then
        # the CPU build is a tenth of the size; not every index has one
        "$VENV/bin/python" -m pip install --quiet "${index[@]}" "torch==$TORCH_VERSION+cpu" 2>/dev/null && return
    fi
    "$VENV/bin/python" -m pip install --quiet "${index[@]}" "torch==$TORCH_VERSION"
}

# setup_environment REQUIREMENTS_FILE
setup_environment() {
    local python requirements="$1" stamp
    if [ ! -x "$VENV/bin/python" ]; then
        python="$(find_python)" || return 1
        echo "making $VENV with $("$python" --version 2>&1)"
        "$python" -m venv "$VENV" || return 1
    fi
    if ! "$VENV/bin/python" -c 'import torch' >/dev/null 2>&1; then
        echo "installing torch $TORCH_VERSION"
        install_torch || return 1
    fi
    stamp="$VENV/.installed-$(cat requirements.txt "$requirements" | cksum | cut -d' ' -f1)"
    if [ ! -e "$stamp" ]; then
        echo "installing $requirements"
        "$VENV/bin/python" -m pip install --quiet -r "$requirements" || return 1
        touch "$stamp"
    fi
}
