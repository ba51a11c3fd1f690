#!/usr/bin/env bash
# Runs the tests: bash tests/run.sh [--all] [pytest's own options and paths]
# --all adds what is marked slow (kill tests, notebooks, every family's parity with PyTorch) and, where they exist, the
# TPU compiler for plan and a browser for the HTML pages. Real data is found through SRM_DATA_DIR.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. experiments/environment.sh

# Chromium of Debian's packages, where this user may install it. Without a browser its tests are skipped.
install_browser() {
  if type -P chromium >/dev/null || type -P google-chrome >/dev/null; then return; fi
  if ! type -P apt-get >/dev/null || [ "$(id -u)" != 0 ]; then return; fi
  say 'installing chromium, for the tests of HTML pages'
  local get=(timeout 300 apt-get -o DPkg::Lock::Timeout=60)
  if ! { "${get[@]}" update && DEBIAN_FRONTEND=noninteractive "${get[@]}" install -y --no-install-recommends chromium; } \
    >"$venv/chromium.log" 2>&1; then
    say "no chromium: those tests are skipped ($venv/chromium.log)"
  fi
}

browser=''
selection=(-m 'not slow')
extras=(test)
arguments=()
for argument in "$@"; do
  case $argument in
    --all)
      selection=()
      browser=wanted
      extras+=(notebooks bench)
      [ "$(uname -sm)" != 'Linux x86_64' ] || extras+=(tpu)
      ;;
    *) arguments+=("$argument") ;;
  esac
done
prepare_environment "${extras[@]}"
[ -z "$browser" ] || install_browser

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
