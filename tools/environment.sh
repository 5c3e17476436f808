# Sourced by quickstart.sh and run_tests.sh.

# Prints the interpreter that PYTHON names, or the first Python 3.10 or newer.
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
