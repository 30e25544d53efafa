#!/usr/bin/env bash
# The test suite, in the same environment as the quick start. With --oldest, the tests of the core instead, in two environments that it makes:
# the oldest supported transformers, diffusers and others with the pinned PyTorch, and all of them with the oldest PyTorch, too (6 GB each).
# Further options go to pytest.
[ -n "${BASH_VERSION:-}" ] || { echo "error: this script needs bash; run: bash $0" >&2; exit 1; }
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
show_help "$@"
export HF_HUB_OFFLINE=1
export OMP_NUM_THREADS=1 # one thread per worker, one worker per core
if [ "${1:-}" = --oldest ]; then
    shift
    for torch in "" torch; do
        (use_oldest $torch; python -m pytest -n 2 "${OLDEST_TESTS[@]}" "$@")
    done
    exit
fi
use_environment requirements-dev.txt
exec python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@" # in the order of the folders, so that the longest file does not run last
