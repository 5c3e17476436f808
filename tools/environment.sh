# Sourced by quickstart.sh and run_tests.sh, and by hand before training on the CPU: `source tools/environment.sh`.

# Let glibc use freed memory again, up to 512 MB of it, instead of handing every activation back to the system and
# faulting in zeroed pages for the next (benchmarks/RESULTS.md). Other C libraries ignore this.
export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-1073741824}"
export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-536870912}"

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
