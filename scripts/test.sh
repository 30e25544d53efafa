#!/usr/bin/env bash
# The test suite, in the same environment as the quick start. Further options go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
use_environment requirements-dev.txt
export HF_HUB_OFFLINE=1
exec python -m pytest "$@"
