#!/usr/bin/env bash
# Runs the tests: bash tests/run.sh [--all] [pytest's own options and paths]
# --all adds what is marked slow (kill tests, notebooks, every family's parity with PyTorch) and,
# where it exists, the TPU compiler for plan. Real data is found through SRM_DATA_DIR.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. experiments/environment.sh

selection=(-m 'not slow')
extras=(test)
arguments=()
for argument in "$@"; do
  case $argument in
    --all)
      selection=()
      extras+=(notebooks bench)
      [ "$(uname -sm)" != 'Linux x86_64' ] || extras+=(tpu)
      ;;
    *) arguments+=("$argument") ;;
  esac
done
prepare_environment "${extras[@]}"

if [ -z "${SRM_DATA_DIR:-}" ] && [ -d ../shared/data ]; then
  SRM_DATA_DIR=$(cd ../shared/data && pwd)
  export SRM_DATA_DIR
fi
# The whole folder, unless the caller names a file or folder, with or without ::test_name.
paths=(tests)
for argument in ${arguments[@]+"${arguments[@]}"}; do
  [ ! -e "${argument%%::*}" ] || paths=()
done
# Most of the time goes into the compiler, which uses one core. Of the whole suite two processes take a file each, in the
# order of tests/conftest.py; what the caller picks runs in one, where pytest's debugger works.
workers=()
[ ${#arguments[@]} -gt 0 ] || workers=(-n 2 --dist loadfile --no-loadscope-reorder)
exec "$venv_python" -m pytest -q --durations=15 ${workers[@]+"${workers[@]}"} ${selection[@]+"${selection[@]}"} \
  ${arguments[@]+"${arguments[@]}"} ${paths[@]+"${paths[@]}"}
