#!/usr/bin/env bash
# Put agents in the box, as scripts/results.sh trains them: the demo's references, ProMP on MAML's two benchmarks, the
# quadruped's and the arm's.
set -euo pipefail
publish() {  # family, agent, steps, what it is
  metarobot publish "runs/$1-$2-0" --out "agents/pretrained/$1-$2" --summary "$4" \
    --command "metarobot train $1 --agent $2 --steps $3 --seed 0 --threads 1 --out runs/$1-$2-0"
}
publish CheetahDir blind 2e6 "CheetahDir, one behaviour for both directions: the lower reference of the demo"
publish CheetahDir oracle 3e6 "CheetahDir, shown the direction: the upper reference of the demo"
publish CheetahDir100 promp 10e6 "CheetahDir100, runs either way after one gradient step on 20 rollouts"
publish CheetahVel100 promp 10e6 "CheetahVel100, finds its speed by one gradient step on 20 rollouts"

walk="--epochs 5 --minibatches 8 --gamma 0.98"
begun="$walk --init runs/QuadrupedFlat-blind-0 --lr 5e-4 --std 0.45"
walker() {  # family, agent, steps, settings, what it is, more arguments of metarobot publish
  metarobot publish "runs/$1-$2-0" --out "agents/pretrained/$1-$2" --summary "$5" \
    --command "metarobot train $1 --agent $2 --steps $3 --seed 0 --threads 1 $4 --out runs/$1-$2-0" "${@:6}"
}
walker QuadrupedFlat blind 4e6 "$walk --worlds 64 --episodes 1 --std 0.8" "QuadrupedFlat, trots as commanded up to 1 m/s"
for family in ${QUADRUPEDS:-QuadrupedFlat QuadrupedDamage QuadrupedMix QuadrupedTerrain}; do
  case $family in
    QuadrupedDamage) few=4e6 blind=4e6 many=5e6 ;;
    QuadrupedMix) few=5e6 blind=4e6 many=5e6 ;;
    QuadrupedFlat) few=1.5e6 many=1.5e6 ;;
    *) few=3e6 blind=3e6 many=3e6 ;;
  esac
  walker $family rl2-oracle $few "$begun --worlds 32" "$family, shown the task: the upper reference"
  [ $family = QuadrupedFlat ] || walker $family blind $blind "$begun --worlds 64 --episodes 1" "$family, one behaviour for all tasks: the lower reference"
  walker $family rl2 $many "$begun --worlds 32" "$family, adapts while it walks" --report "results/$family-test.json"
done

bold="--epochs 5 --minibatches 8 --gamma 0.98 --worlds 64"
taught="--epochs 12 --minibatches 8 --gamma 0.98 --worlds 64 --lr 5e-4 --std 0.12 --teach 15 --kl-stop 0.5"
walker GraspShapes blind 1.2e6 "$bold --episodes 1 --std 0.6" "GraspShapes, lifts whatever fits into its hand" --report results/GraspShapes-blind-extrapolate.json
walker GraspFragile blind 6e5 "$taught --episodes 1 --init runs/GraspFragile-begin-0" "GraspFragile, one force for all things: the lower reference"
walker GraspShapes rl2 3e5 "$bold --episodes 2 --lr 3e-4 --std 0.15 --init runs/GraspShapes-blind-0" "GraspShapes, lifts what it never met" --report results/GraspShapes-extrapolate.json
walker GraspShapes rl2-oracle 3e5 "$bold --episodes 2 --lr 3e-4 --std 0.15 --init runs/GraspShapes-blind-0" "GraspShapes, shown the object: the upper reference"
taught+=" --episodes 3 --init runs/GraspFragile-begin-0"
walker GraspFragile rl2-oracle 2e6 "$taught" "GraspFragile, shown weight, friction and fragility: the upper reference (stopped after 0.87 M of 2 M steps)"
walker GraspFragile rl2 3e6 "$taught" "GraspFragile, finds the force between dropping and crushing within three tries" --report results/GraspFragile-test.json
metarobot publish runs/Placement-imitation-0 --out agents/pretrained/Placement-imitation \
  --summary "Placement, puts classes it never saw in their places after one demonstration of each" \
  --command "metarobot train Placement --agent imitation --demos demos/placement --steps 10e6 --seed 0 --threads 1 --out runs/Placement-imitation-0" \
  --report results/Placement-shots.json
