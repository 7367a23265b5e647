#!/usr/bin/env bash
# Measure all that is claimed of a GPU: correctness, speed, memory, a profile, and trained agents.
# It works for at most MINUTES and is then called again: finished pieces are left alone, and a
# training continues.
# Exit code 0: all is done; 3: call again; 1: all was tried, and the pieces in OUT/failed failed.
#
#   scripts/gpu_report.sh [--device cuda] [--out gpu-report] [--minutes 9] [--small]
#
# --small runs the whole of it at tiny sizes, as a test: scripts/gpu_report.sh --device cpu --small
set -euo pipefail
device=cuda out=gpu-report minutes=9 small=
while [ $# -gt 0 ]; do
  case $1 in
    --device | --out | --minutes) declare "${1#--}=$2" && shift 2 ;;
    --small) small=yes && shift ;;
    *) echo "error: no option $1; there are: --device, --out, --minutes, --small" >&2 && exit 2 ;;
  esac
done
if [ $device != cpu ]; then
  python -c "from metarobot.sim.warp import warp_device; warp_device('$device')" 2>/dev/null ||
    { echo "error: Warp finds no device $device here; there is: cpu" >&2 && exit 2; }
fi
until=$((SECONDS + minutes * 60))
mkdir -p "$out"/{done,failed,logs,runs}
rm -f "$out"/failed/*
export METAROBOT_WARP_DEVICE=$device

# Run one piece of the report: its name, then a command, whose output goes to the piece's log.
piece() {
  local name=$1 left=$((until - SECONDS)) code=0
  shift
  [ ! -e "$out/done/$name" ] || return 0
  [ $left -gt 20 ] || again
  echo "$name …"
  timeout -s INT -k 60 $left "$@" >>"$out/logs/$name.log" 2>&1 || code=$?
  case $code in
    0) touch "$out/done/$name" ;;
    124 | 130 | 137) again ;;
    *) tail -n 1 "$out/logs/$name.log" | tee "$out/failed/$name" ;;
  esac
}

# Stop here: whoever called starts the script again.
again() {
  echo "the time is up; call again to go on" && exit 3
}

# Train as one piece: the run's name, then the arguments of metarobot train.
train() {
  local name=$1 run="$out/runs/$1" more=()
  shift
  [ ! -e "$run/config.json" ] || more=(--resume)
  piece "train-$name" metarobot train "$@" --sim warp --device $device --out "$run" "${more[@]}"
}

# Sizes: those of the claims, or tiny ones, with a cheetah in the quadruped's place.
if [ -z "$small" ]; then
  cheetah=CheetahVel quadruped=QuadrupedFlat damage=QuadrupedDamage maml=CheetahVel100
  worlds=8192 most=1048576 seconds=20 tests=("" CheetahVel QuadrupedFlat GraspFragile AntDir)
  speed=(--worlds 8192 --minibatches 16 --epochs 5 --steps 30e6)
  tasks=(--worlds 800 --rollouts 20 --width 64 --steps 3e6)
  same=(--worlds 2048 --minibatches 16 --steps 8e6)
  many=(--worlds 4096 --minibatches 64 --epochs 5)
  far=(--steps 120e6) walk=(--steps 150e6) adapt=(--steps 150e6)
else
  cheetah=CheetahVel100 quadruped=CheetahDir100 damage=CheetahDir100 maml=CheetahDir100
  worlds=4 most=8 seconds=0.1 tests=("")
  speed=(--worlds 4 --minibatches 2 --epochs 1 --episodes 1 --width 8 --steps 400)
  tasks=(--worlds 4 --rollouts 2 --width 8 --steps 800)
  same=("${speed[@]}") many=(--worlds 4 --minibatches 2 --epochs 1 --episodes 1 --width 8)
  far=(--steps 400) walk=(--steps 400) adapt=(--steps 400)
fi

# Correctness, on the device.
for name in "${tests[@]}"; do
  piece "test-warp-${name:-fast}" \
    python -m pytest -q tests/sim/test_warp.py ${name:+-m slow -k "moves and $name"}
done
piece test-recurrence python -m pytest -q tests/env/test_device.py -k recurrence

# Speed and memory.
for family in $cheetah $quadruped; do
  piece "bench-$family" metarobot bench sim $family --sim warp --device $device \
    --worlds $worlds --seconds $seconds --json "$out/bench-$family.json"
  piece "memory-$family" metarobot bench memory $family --sim warp --device $device --worlds $most \
    --json "$out/memory-$family.json"
  train "speed-$family" $family --agent rl2 "${speed[@]}"
done
train "speed-maml" $maml --agent maml "${tasks[@]}"
for run in a b; do train "same-$run" $cheetah --agent rl2 "${same[@]}"; done
piece profile python scripts/profile_training.py $cheetah --device $device \
  --out "$out/profile.json" -- "${speed[@]}"

# Agents: settings for thousands of worlds are those of 64 with more, and larger, minibatches.
train cheetah $cheetah --agent rl2 "${many[@]}" "${far[@]}"
train walker $quadruped --agent blind "${many[@]}" --gamma 0.98 --episodes 1 --std 0.8 "${walk[@]}"
begun=() && [ -n "$small" ] || begun=(--init "$out/runs/walker" --lr 5e-4 --std 0.45)
train damage $damage --agent rl2 "${many[@]}" --gamma 0.98 "${begun[@]}" "${adapt[@]}"

python scripts/gpu_tables.py "$out"
[ -z "$(ls "$out/failed")" ] || { echo "failed: $(ls "$out/failed" | tr '\n' ' ')" && exit 1; }
echo "all done: $out/report.md"
