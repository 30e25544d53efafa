#!/usr/bin/env bash
# The test suite, in the same environment as the quick start. Further options go to pytest.
[ -n "${BASH_VERSION:-}" ] || { echo "error: this script needs bash; run: bash $0" >&2; exit 1; }
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
show_help "$@"
use_environment requirements-dev.txt
export HF_HUB_OFFLINE=1
export OMP_NUM_THREADS=1 # one thread per worker, one worker per core
exec python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@" # in the order of the folders, so that the longest file does not run last
