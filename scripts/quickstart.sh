#!/usr/bin/env bash
# Runs the whole experiment on a laptop: trains DES on the demo's tiny Stable Diffusion, and compares the images before and after.
# Takes about five minutes on two cores after installation. Further options go to demo/experiment.py.
[ -n "${BASH_VERSION:-}" ] || { echo "error: this script needs bash; run: bash $0" >&2; exit 1; }
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
show_help "$@"
use_environment requirements.txt
export HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore
exec python demo/experiment.py --out results/quickstart --limit 66 "$@"
