#!/bin/sh
# Creates or updates a virtual environment with ConvT5 in it, editable, and with the smallest
# PyTorch that suits the machine. It lives beside cpu.txt because its main decision is when
# cpu.txt applies. Run it through `make setup`, or by hand:
#
#   sh constraints/install.sh VENV EXTRAS [REQUIREMENT ...]
#   sh constraints/install.sh .venv torch,train,dev
#
# PYTHON names the interpreter; UV_TORCH_BACKEND (cpu, cu128, ...) overrides the choice of PyTorch.
set -euf

usage="usage: sh constraints/install.sh VENV EXTRAS [REQUIREMENT ...]"
venv=${1:?$usage}
extras=${2:?$usage}
shift 2
root=$(cd "$(dirname "$0")/.." && pwd)

fail() {
    echo "install.sh: $*" >&2
    exit 1
}

# --- the environment ---------------------------------------------------------------------------
supported() { # whether the interpreter $1 runs and is one that pyproject.toml allows
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null
}

if ! supported "$venv/bin/python"; then
    candidates=${PYTHON:-python3 python3.13 python3.12 python3.11}
    for python in $candidates; do
        supported "$python" && break
        python=
    done
    [ -n "$python" ] || fail "no Python 3.11, 3.12 or 3.13 found (tried: $candidates)." \
        "Install one, or name it: make setup PYTHON=/path/to/python"
    [ -e "$venv/pyvenv.cfg" ] || [ -z "$(ls -A "$venv" 2>/dev/null)" ] ||
        fail "$venv is neither empty nor a virtual environment. Choose another: make setup VENV=..."
    "$python" -m venv --clear "$venv"
fi
python=$venv/bin/python
"$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null

uv=$(command -v uv || true)
if [ -z "$uv" ]; then
    uv=$venv/bin/uv
    [ -x "$uv" ] || "$python" -m pip install --quiet --disable-pip-version-check uv
fi

# --- what pip is told about this machine, for uv, which does not read pip's settings -------------
pip_settings=$("$python" -m pip config list 2>/dev/null || true)

pip_setting() { # the values of $1, those of the PIP_ variables before those of configuration files
    printf '%s\n' "$pip_settings" |
        sed -nE "s/^(:env:|global|install)\.$1='(.*)'\$/\2/p" | sed 's/\\n/ /g'
}

index=${UV_DEFAULT_INDEX:-$(pip_setting index-url | head -n 1)}
[ -z "$index" ] || export UV_DEFAULT_INDEX="$index"

certificates=${SSL_CERT_FILE:-$(pip_setting cert | head -n 1)}
[ -z "$certificates" ] || export SSL_CERT_FILE="$certificates"

find_links=
for place in $(echo "${UV_FIND_LINKS:-}" | tr ',' ' ') $(pip_setting find-links); do
    case $place in
        file://*) [ -e "${place#file://}" ] || continue ;;
        *://*) ;;
        *) [ -e "$place" ] || continue ;; # a missing folder stops uv, though not pip
    esac
    find_links=${find_links:+$find_links,}$place
done
export UV_FIND_LINKS="$find_links"

# --- which PyTorch -----------------------------------------------------------------------------
resolves() { # whether uv finds what the requirements file $1 asks for, under the options $2 ...
    "$uv" pip compile --quiet --no-deps --python "$python" "$@" >/dev/null 2>&1
}

has_nvidia_gpu() {
    [ -e /proc/driver/nvidia/version ] || nvidia-smi -L >/dev/null 2>&1
}

if [ -n "${UV_TORCH_BACKEND:-}" ]; then
    echo "PyTorch: the build for UV_TORCH_BACKEND=$UV_TORCH_BACKEND"
elif ! has_nvidia_gpu && resolves "$root/constraints/cpu.txt" --no-index; then
    echo "PyTorch: the CPU build from a find-links location"
    set -- "$@" --constraint "$root/constraints/cpu.txt"
elif echo torch | UV_HTTP_TIMEOUT=5 UV_HTTP_RETRIES=0 resolves - --torch-backend=auto; then
    echo "PyTorch: the build that uv chooses for this machine"
    export UV_TORCH_BACKEND=auto
else
    echo "PyTorch: the package index's default build (on Linux several GB, CUDA included)"
fi

"$uv" pip install --python "$python" --editable "$root[$extras]" "$@"
