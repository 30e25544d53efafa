#!/usr/bin/env bash
# The test suite, in the same environment as the quick start. Further options go to pytest.
[ -n "${BASH_VERSION:-}" ] || { echo "error: this script needs bash; run: bash $0" >&2; exit 1; }
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
show_help "$@"
use_environment requirements-dev.txt
export HF_HUB_OFFLINE=1
export OMP_NUM_THREADS=1 # a worker a core
exec python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@" # in order of the folders: the longest file is not the last
