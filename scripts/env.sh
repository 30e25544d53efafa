# Sourced by quickstart.sh and test.sh: goes to the project's folder and puts a Python environment with the given requirements
# file on PATH. Uses the virtual environment that is active, or makes .venv. Installs only what changed since the last time.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "error: $*" >&2
    exit 1
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
    local requirements=$1 wanted stamp python
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
        echo "== Installing $requirements into $VIRTUAL_ENV (some minutes the first time)"
        python -m pip install --quiet --disable-pip-version-check -r "$requirements" || fail "the packages could not be installed"
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
