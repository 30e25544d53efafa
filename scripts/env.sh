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
    local requirements=$1 wanted stamp python quiet
    if [ -n "${VIRTUAL_ENV:-}" ] && [ ! -x "$VIRTUAL_ENV/bin/python" ]; then
        echo "== VIRTUAL_ENV names $VIRTUAL_ENV, where no Python environment is; using .venv instead" >&2
        unset VIRTUAL_ENV
    fi
    if [ -z "${VIRTUAL_ENV:-}" ]; then
        if [ ! -x .venv/bin/python ]; then
            python=$(find_python) || exit 1
            echo "== Making .venv with $("$python" --version)"
            "$python" -m venv .venv || fail "the virtual environment .venv could not be made"
        fi
        VIRTUAL_ENV=$PWD/.venv
        export VIRTUAL_ENV
    fi
    export PATH="$VIRTUAL_ENV/bin:$PATH"
    python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "$VIRTUAL_ENV has a Python older than 3.11"
    wanted=$(cat requirements*.txt | cksum)
    stamp="$VIRTUAL_ENV/.des-$requirements"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "== Installing $requirements into $VIRTUAL_ENV: about 6.5 GB with PyTorch's CUDA libraries the first time, in some minutes"
        quiet=(--quiet)
        [ -t 1 ] && quiet=() # a terminal shows pip's progress
        python -m pip install "${quiet[@]}" --disable-pip-version-check -r "$requirements" || fail "the packages could not be installed"
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
