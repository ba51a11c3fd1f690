# Sourced by experiments/quickstart.sh, tests/run.sh and experiments/distillation_ablation/run.sh, in the repository's
# root, with `set -euo pipefail`.
#
#   prepare_environment EXTRA...    makes or reuses the virtual environment and sets $venv_python to its interpreter
#   accelerator_extra               prints the extra of setup.py that the machine's accelerator needs, if it has one
#
# PYTHON=/path/to/python chooses the interpreter; SRM_VENV=/path chooses where the environment lives (default .venv).

# In order of preference: JAX 0.12 needs 3.12, and 3.14 comes after the versions that the tests have run on.
supported_versions='3.13 3.12 3.14 3.11'
venv=${SRM_VENV:-.venv}
venv_python=$venv/bin/python

say() { printf 'srm_jax: %s\n' "$*" >&2; }

# Every interpreter that may be of version $1, best known place first. Not all exist, and pyenv's shims may not run.
candidates() {
  type -aP "python$1" python3 python || true
  ls -d "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$1".*/bin/python3 \
    "$HOME"/.local/share/uv/python/cpython-"$1"*/bin/python3 "$HOME"/.local/bin/"python$1" 2>/dev/null || true
}

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true; }

# Debian ships Python without the modules that make an environment.
makes_environments() { "$1" -c 'import ensurepip, venv' 2>/dev/null; }

no_python() {
  if [ -n "$without_venv" ]; then
    say "$without_venv cannot make virtual environments. This command mends it; then run the same script again:"
    say "  sudo apt-get install -y python$(version_of "$without_venv")-venv"
  else
    say 'no Python 3.11 to 3.14 on this machine. This command gets one; then run the same script again:'
    say '  curl -LsSf https://astral.sh/uv/install.sh | sh && ~/.local/bin/uv python install 3.13'
  fi
  exit 1
}

# Sets $base_python to the newest suitable interpreter.
find_python() {
  without_venv=
  if [ -n "${PYTHON:-}" ]; then
    case " $supported_versions " in
      *" $(version_of "$PYTHON") "*) ;;
      *) say "PYTHON=$PYTHON is not a Python of a supported version ($supported_versions)"; exit 1 ;;
    esac
    base_python=$PYTHON
    makes_environments "$PYTHON" || { without_venv=$PYTHON; no_python; }
    return
  fi
  local version
  for version in $supported_versions; do
    while IFS= read -r base_python; do
      [ "$(version_of "$base_python")" = "$version" ] || continue
      makes_environments "$base_python" && return
      without_venv=${without_venv:-$base_python}
    done < <(candidates "$version")
  done
  no_python
}

# Reasoning Gym imports a SAT solver that exists only as C source. Its puzzles of that kind are not used here, so a
# machine without a compiler gets a stand-in that says so when it is called.
install_sat_solver() {
  "$venv_python" -m pip install -q -c experiments/constraints.txt pycosat >"$venv/pycosat.log" 2>&1 && return
  local site
  site=$("$venv_python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  mkdir -p "$site/pycosat-0.6.6.dist-info"
  printf 'Metadata-Version: 2.1\nName: pycosat\nVersion: 0.6.6\n' >"$site/pycosat-0.6.6.dist-info/METADATA"
  printf 'srm_jax\n' >"$site/pycosat-0.6.6.dist-info/INSTALLER"
  printf '%s,,\n' pycosat.py pycosat-0.6.6.dist-info/{METADATA,INSTALLER,RECORD} >"$site/pycosat-0.6.6.dist-info/RECORD"
  cat >"$site/pycosat.py" <<'STAND_IN'
"""Stand-in for pycosat, made where it could not be compiled."""


def itersolve(clauses, *args, **kwargs):
  raise ImportError('pycosat could not be compiled here: install a C compiler and delete the virtual environment')


solve = itersolve
STAND_IN
  say "no C compiler that works: Reasoning Gym's logic-grid puzzles stay out ($venv/pycosat.log)"
}

# pip's words go to a log; a terminal sees the package at hand, anything else one line.
install() {
  local log=$venv/install.log line
  # While this file exists the environment is half made, and the next call starts it afresh.
  : >"$venv/installing"
  rm -f "$venv/installed"
  install_sat_solver
  "$venv_python" -m pip install --no-compile --progress-bar off --disable-pip-version-check \
    -c experiments/constraints.txt -e ".${1:+[$1]}" 2>&1 |
    tee "$log" | while IFS= read -r line; do
      case $line in
        Collecting*|Building*|Installing*) [ ! -t 2 ] || printf '\r\033[K  %.70s' "$line" >&2 ;;
      esac
    done || { say "installing failed; the end of $log:"; tail -n 15 "$log" >&2; exit 1; }
  [ ! -t 2 ] || printf '\r\033[K' >&2
  printf '%s\n%s\n' "$(requirements_hash)" "$1" >"$venv/installed"
  rm -f "$venv/installing"
}

# The root is part of it: an editable install points at the folder that it was made from.
requirements_hash() { { pwd -P; cat setup.py experiments/constraints.txt; } | cksum; }

make_environment() {
  if [ -e "$venv" ] && [ ! -f "$venv/pyvenv.cfg" ] && [ -n "$(ls -A "$venv" 2>/dev/null)" ]; then
    say "$venv exists and is no virtual environment: point SRM_VENV elsewhere, or move it away"
    exit 1
  fi
  find_python
  say "making $venv with $base_python ($("$base_python" -V 2>&1))"
  "$base_python" -m venv --clear "$venv"
}

environment_works() {
  [ ! -e "$venv/installing" ] && "$venv_python" -m pip --version >/dev/null 2>&1 || return 1
  [ -z "${PYTHON:-}" ] || [ "$(version_of "$PYTHON")" = "$(version_of "$venv_python")" ]
}

prepare_environment() {
  local have='' extra wanted
  environment_works || make_environment
  [ ! -f "$venv/installed" ] || have=$(sed -n 2p "$venv/installed")
  wanted=$have
  for extra in "$@"; do
    case ",$wanted," in *",$extra,"*) ;; *) wanted=${wanted:+$wanted,}$extra ;; esac
  done
  if [ -f "$venv/installed" ] && [ "$(cat "$venv/installed")" = "$(requirements_hash; echo "$wanted")" ]; then
    return
  fi
  say "installing into $venv, once; this takes a few minutes${wanted:+ (extras: $wanted)}"
  local started=$SECONDS
  install "$wanted"
  say "installed in $((SECONDS - started)) s"
}

accelerator_extra() {
  if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    echo cuda
  elif [ -e /dev/accel0 ] || { [ -d /dev/vfio ] && grep -qs 0x1ae0 /sys/bus/pci/devices/*.0/vendor; }; then
    echo tpu
  fi
}
