#!/usr/bin/env bash
# Run the tests; makes .venv first if it is not there. Everything needed is installed, nothing is downloaded by a test.
#   bash launch/test.sh             the fast tier (minutes, on a laptop)
#   bash launch/test.sh --slow      the slow tier: real ZeRO-3 ranks, kills, whole stages
#   bash launch/test.sh tests/data  any pytest argument
set -euo pipefail
source "$(dirname "$0")/venv.sh"
export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"

if [ "${1:-}" = --slow ]; then
    exec python -m pytest -m slow "${@:2}"
fi
exec python -m pytest -m "not slow" "$@"
