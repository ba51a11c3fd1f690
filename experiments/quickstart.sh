#!/usr/bin/env bash
# Makes a small reasoning model and says what each step was worth:
#   bash experiments/quickstart.sh [--smoke] [--task=gsm8k]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. experiments/environment.sh
prepare_environment $(accelerator_extra)
exec "$venv_python" -m experiments.quickstart "$@"
