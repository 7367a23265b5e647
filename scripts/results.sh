#!/usr/bin/env bash
# Every learning result of the README: meta-train, then evaluate on held-out tasks beside blind and oracle.
# A stopped run continues where it was. Takes about 100 minutes on 2 cores; results/ holds the reports and plots.
set -euo pipefail
train() {  # family agent steps seed
  local out="runs/$1-$2-$4"
  metarobot train "$1" --agent "$2" --steps "$3" --seed "$4" --out "$out" $([ -e "$out/config.json" ] && echo --resume || true)
}
report() {  # family split, the runs being there
  local seeds
  seeds=$(ls -d runs/"$1"-rl2-*)
  metarobot evaluate $seeds --split "$2" --tasks 40 --episodes "$3" --oracle runs/"$1"-oracle-0 --blind runs/"$1"-blind-0 \
    --controls --json "results/$1-$2.json" --plot "results/$1-$2.png"
}
mkdir -p results
