# Sourced by the other shell scripts. It changes to the project's folder; `use_environment` puts a Python environment with a
# requirements file's packages on PATH: the active virtual environment, or .venv, which it makes. It installs only what changed.

SCRIPT=$(readlink -f "$0" 2>/dev/null || echo "$0")
unset CDPATH # with it, cd could enter another folder of the same name
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "error: $*" >&2
    exit 1
}

# show_help ARGUMENTS...: where --help or -h is among them, print the comment at the top of the script, and exit
show_help() {
    local argument
    for argument in "$@"; do
        case "$argument" in
        -h | --help)
            sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$SCRIPT"
            exit 0
            ;;
        esac
    done
}

find_python() {
    local name
    for name in python3 python3.13 python3.12 python3.11 python; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    fail "Python 3.11 or newer is needed and was not found"
}

use_environment() {
    local requirements=$1 pinned=()
    if [ -n "${VIRTUAL_ENV:-}" ] && [ ! -x "$VIRTUAL_ENV/bin/python" ]; then
        echo "== VIRTUAL_ENV names $VIRTUAL_ENV, where no Python environment is; using .venv instead" >&2
        unset VIRTUAL_ENV
    fi
    if [ -z "${VIRTUAL_ENV:-}" ]; then
        make_environment .venv
    fi
    export PATH="$VIRTUAL_ENV/bin:$PATH"
    # An environment of the user's with PyTorch keeps its releases, if they are within the bounds of requirements.txt.
    if [ "$VIRTUAL_ENV" = "$PWD/.venv" ] || ! python -c 'import importlib.metadata as m; m.version("torch")' 2>/dev/null; then
        pinned=(-c constraints.txt)
    fi
    python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "$VIRTUAL_ENV has a Python older than 3.11"
    install_packages "$requirements" -r "$requirements" "${pinned[@]}"
}

# use_oldest [torch]: an environment with the oldest supported releases, which are the lower bounds in requirements.txt; of PyTorch with
# `torch` only, else the pinned release
use_oldest() {
    local folder=.venv-oldest newest='^torch(vision)?[>=]=' tools
    [ "${1:-}" = torch ] && folder=.venv-oldest-torch newest='^$'
    make_environment "$folder"
    export PATH="$VIRTUAL_ENV/bin:$PATH"
    {
        sed -nE "/$newest/d; s/^([A-Za-z0-9_-]+)>=([0-9.]+).*/\1==\2/p" requirements.txt
        grep -E "$newest" constraints.txt || true
    } >"$folder/oldest.txt"
    mapfile -t tools < <(sed -nE 's/^(pytest[^ ]*).*/\1/p' requirements-dev.txt)
    install_packages "the oldest releases" -r requirements.txt -c "$folder/oldest.txt" "${tools[@]}"
}

# make_environment FOLDER: a virtual environment there, which becomes the active one
make_environment() {
    local python
    if [ ! -x "$1/bin/python" ]; then
        python=$(find_python) || exit 1
        echo "== Making $1 with $("$python" --version)"
        "$python" -m venv "$1" || fail "the virtual environment $1 could not be made"
    fi
    VIRTUAL_ENV=$PWD/$1
    export VIRTUAL_ENV
}

# install_packages NAME ARGUMENTS...: pip install, unless the requirements files are those of its last call
install_packages() {
    local name=$1 wanted stamp quiet
    shift
    wanted=$(cat requirements*.txt constraints.txt | cksum)
    stamp="$VIRTUAL_ENV/.des-${name// /-}"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "== Installing $name into $VIRTUAL_ENV: about 6.5 GB with PyTorch's CUDA libraries the first time, in some minutes"
        quiet=(--quiet)
        [ -t 1 ] && quiet=() # a terminal shows pip's progress
        python -m pip install "${quiet[@]}" --disable-pip-version-check "$@" || fail "the packages could not be installed"
        echo "$wanted" >"$stamp"
    fi
}

use_browser() { # for the tests of pages, which are skipped where there is none
    if ! command -v chromium >/dev/null && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
        echo "== Installing chromium and chromium-driver"
        apt-get update -qq >/dev/null || true # the lists that are there may do
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium chromium-driver >/dev/null ||
            fail "Chromium could not be installed"
    fi
}

# The tests that also run with the oldest releases: the reference cases, codebook, losses, checkpoints, training, generation and families.
OLDEST_TESTS=(tests/training/test_golden.py tests/training/test_codebook.py tests/training/test_losses.py tests/training/test_train_des.py
    tests/training/test_t5.py tests/models tests/data/test_sampling.py tests/generation/test_generate_families.py)
