#!/usr/bin/env bash
# Logits matching against intermediate matching, and S3, on two tasks with five seeds, a core a task:
#   bash experiments/distillation_ablation/run.sh [--smoke] [--seeds=N] [--workdir=DIR] [--out=FOLDER]
# Ctrl-C and the same command again continue where it stopped. Results go to --out, by default `report` in the workdir;
# those of this folder are made with --out=experiments/distillation_ablation. --smoke runs one study a task with a few
# steps.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. experiments/environment.sh

size=full seeds=5 workdir='' out='' core=0 hasty=()
for argument in "$@"; do
  case $argument in
    --smoke) size=smoke seeds=1 core=-1 hasty=(--hasty) ;;  # any core: one task has twice the arms, and compiles
    --seeds=*) seeds=${argument#*=} ;;
    --workdir=*) workdir=${argument#*=} ;;
    --out=*) out=${argument#*=} ;;
    *) say "unknown argument $argument; there are --smoke, --seeds=N, --workdir=DIR and --out=FOLDER"; exit 2 ;;
  esac
done
workdir=${workdir:-runs/distillation_ablation-$size}
out=${out:-$workdir/report}
prepare_environment
mkdir -p "$workdir"

export JAX_PLATFORMS=cpu
processes=() everything=()
trap 'kill "${processes[@]}" 2>/dev/null || true' EXIT
for task in sums rewriting; do
  these=() studies='distillation_ablation logits_or_hidden'
  [ "$size" = full ] || case $task in
    sums) studies=distillation_ablation ;;
    *) studies=logits_or_hidden ;;
  esac
  for study in $studies; do
    these+=("--config=configs/studies/$study.py:task=$task,size=$size")
  done
  everything+=("${these[@]}")
  "$venv_python" -m experiments.study "${these[@]}" --seeds="$seeds" --workdir="$workdir" --core="$core" \
    ${hasty[@]+"${hasty[@]}"} >>"$workdir/$task.log" &
  processes+=($!)
  [ "$size" = smoke ] || core=$((core + 1))
done
say "stages are listed in $workdir/sums.log and rewriting.log"
failed=0
for process in "${processes[@]}"; do
  wait "$process" || failed=1
done
[ "$failed" = 0 ] || { say "a study stopped; its log says why, and the same command continues"; exit 1; }
"$venv_python" -m experiments.study.report "${everything[@]}" --seeds="$seeds" --workdir="$workdir" --out="$out"
