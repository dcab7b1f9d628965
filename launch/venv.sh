# Sourced by the scripts beside it: makes .venv with everything installed if it is not there, and puts it first on PATH.
#   PYTHON           the interpreter to use (3.11 or newer)
#   MEGAPRIOR_TORCH  the PyTorch release (default: the one that everything here was tested on)

cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "megaprior: error: Python 3.11 or newer is needed; name one with PYTHON=/path/to/python3" >&2
    return 2
}

# Without a GPU the CPU build is enough (200 MB instead of several GB): from a local wheel folder or mirror if one has
# it, else from PyTorch's own index. On a GPU machine the default build is the CUDA one.
install_torch() {
    local release=${MEGAPRIOR_TORCH:-2.13.0} pip=(.venv.new/bin/python -m pip install --quiet)
    if command -v nvidia-smi >/dev/null; then
        "${pip[@]}" "torch==$release"
    else
        "${pip[@]}" "torch==$release+cpu" 2>/dev/null ||
            "${pip[@]}" "torch==$release" --retries 0 --timeout 20 --index-url https://download.pytorch.org/whl/cpu 2>/dev/null ||
            "${pip[@]}" "torch==$release"
    fi
}

make_venv() {
    local python
    python=$(find_python) || return
    echo "== making .venv with $("$python" --version) (once, a few minutes) ==" >&2
    rm -rf .venv.new
    "$python" -m venv .venv.new
    .venv.new/bin/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel
    install_torch
    DS_BUILD_OPS=0 .venv.new/bin/python -m pip install --quiet --editable ".[dev]"
    # A folder that exists is a finished one: console scripts name the interpreter by path, so they are rewritten last.
    mv .venv.new .venv
    grep -rlI --null "\.venv\.new" .venv/bin .venv/pyvenv.cfg | xargs -0 sed -i "s#\.venv\.new#.venv#g"
}

if [ ! -x .venv/bin/megaprior ]; then
    make_venv
fi
# First on PATH, so that ninja and the compilers' caches are this environment's and no other's.
export PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(python -c 'import os; print(len(os.sched_getaffinity(0)))')}"
