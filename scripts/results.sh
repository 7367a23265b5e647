#!/usr/bin/env bash
# Every learning result of the README: meta-train, then evaluate on held-out tasks beside blind and oracle.
# A stopped run continues where it was, a finished one is left alone. results/ holds reports, plots and logs.
#
#   scripts/results.sh [JOB ...]      CheetahVel, CheetahDir, CheetahTerrain, memories, gradients, posterior, quadruped,
#                                    grasp, prototype, placement, compare, bench; default: all
set -euo pipefail
mkdir -p results

train() {  # run, then the arguments of metarobot train
  local out="runs/$1"
  shift
  metarobot train "$@" --threads 1 --out "$out" $([ -e "$out/config.json" ] && echo --resume || true)
}

report() {  # family, split, runs
  local family=$1 split=$2
  shift 2
  metarobot evaluate "$@" --split "$split" --tasks "${TASKS:-40}" --episodes "${EPISODES:-2}" --oracle "runs/$family-${ORACLE:-oracle}-0" \
    --blind "runs/$family-blind-0" --controls --json "results/$family-$split.json" --plot "results/$family-$split.png"
}

CheetahVel() {
  for seed in 0 1 2; do train "CheetahVel-rl2-$seed" CheetahVel --agent rl2 --steps 6.5e6 --seed $seed; done
  train CheetahVel-oracle-0 CheetahVel --agent oracle --steps 3e6
  train CheetahVel-blind-0 CheetahVel --agent blind --steps 2e6
  for split in test extrapolate; do report CheetahVel $split runs/CheetahVel-rl2-{0,1,2}; done
  metarobot plot runs/CheetahVel-rl2-{0,1,2} --reach -75 -50 --out results/CheetahVel-learning.png
}

CheetahDir() {
  train CheetahDir-rl2-0 CheetahDir --agent rl2 --steps 4e6
  train CheetahDir-oracle-0 CheetahDir --agent oracle --steps 3e6
  train CheetahDir-blind-0 CheetahDir --agent blind --steps 2e6
  report CheetahDir test runs/CheetahDir-rl2-0
}

CheetahTerrain() {
  train CheetahTerrain-rl2-0 CheetahTerrain --agent rl2 --steps 10e6 --epochs 8
  train CheetahTerrain-oracle-0 CheetahTerrain --agent oracle --steps 6e6
  train CheetahTerrain-blind-0 CheetahTerrain --agent blind --steps 3e6
  for split in test interpolate extrapolate; do report CheetahTerrain $split runs/CheetahTerrain-rl2-0; done
}

# the three memories, compared at equal wall time
memories() {
  train memory-linear CheetahVel --memory linear --steps 1.6e6
  train memory-gru CheetahVel --memory gru --steps 1e6
  train memory-lstm CheetahVel --memory lstm --steps 1e6
  metarobot plot runs/memory-{linear,gru,lstm} --at 60 120 --out results/memories.png
}

# agents that adapt by gradient steps: MAML's two benchmarks, beside fine-tuning with the same rollouts and steps
gradients() {
  for family in CheetahDir100 CheetahVel100; do
    for seed in 0 1; do train "$family-promp-$seed" $family --agent promp --steps 10e6 --seed $seed; done
    train "$family-maml-0" $family --agent maml --steps 10e6
    train "$family-oracle-0" $family --agent oracle --steps 3e6
    train "$family-blind-0" $family --agent blind --steps 10e6
    adapt $family promp --finetune "runs/$family-blind-0" --controls -- "runs/$family-promp-0" "runs/$family-promp-1"
    metarobot evaluate runs/$family-promp-{0,1} --tasks 40 --episodes 2 --quiet --json "results/$family-promp-quiet.json"
    adapt $family maml -- "runs/$family-maml-0"
    metarobot plot runs/$family-promp-{0,1} "runs/$family-maml-0" --out "results/$family-learning.png"
  done
  metarobot sinusoid --out results/sinusoid.png --json results/sinusoid.json
}

adapt() {  # family, agent, more arguments of metarobot evaluate: return after 0, 1, 2, 3 episodes
  local family=$1 agent=$2
  shift 2
  metarobot evaluate --tasks 40 --episodes "${EPISODES:-4}" --oracle "runs/$family-oracle-0" --blind "runs/$family-blind-0" \
    --json "results/$family-$agent.json" --plot "results/$family-$agent.png" "$@"
}

# agents that infer a Gaussian over tasks: what they earn, how it tightens, and whether their beliefs are calibrated
posterior() {
  train CheetahVel-varibad-0 CheetahVel --agent varibad --steps 6.5e6 --save-every 10
  EPISODES=3 adapt CheetahVel varibad --controls -- runs/CheetahVel-varibad-0
  train CheetahVel-pearl-0 CheetahVel --agent pearl --steps 3e6 --gradient-steps 500 --save-every 5
  EPISODES=3 adapt CheetahVel pearl --controls -- runs/CheetahVel-pearl-0
}

# The Go2: a flat walker first, then everything else begins as it walks. With a mesh model in GO2_MJCF, the transfer to it.
quadruped() {
  local walk=(--epochs 5 --minibatches 8 --gamma 0.98) single=(--worlds 64 --episodes 1)
  train QuadrupedFlat-blind-0 QuadrupedFlat --agent blind --steps 4e6 "${walk[@]}" "${single[@]}" --std 0.8
  walk+=(--init runs/QuadrupedFlat-blind-0 --lr 5e-4 --std 0.45)
  single+=("${walk[@]}")
  train QuadrupedDamage-blind-0 QuadrupedDamage --agent blind --steps 4e6 "${single[@]}"
  train QuadrupedDamage-oracle-0 QuadrupedDamage --agent oracle --steps 4e6 "${single[@]}"
  train QuadrupedDamage-rl2-oracle-0 QuadrupedDamage --agent rl2-oracle --steps 4e6 "${walk[@]}" --worlds 32
  train QuadrupedDamage-rl2-0 QuadrupedDamage --agent rl2 --steps 5e6 "${walk[@]}" --worlds 32
  train QuadrupedMix-blind-0 QuadrupedMix --agent blind --steps 4e6 "${single[@]}"
  train QuadrupedTerrain-blind-0 QuadrupedTerrain --agent blind --steps 3e6 "${single[@]}"
  for agent in rl2-oracle rl2; do
    train QuadrupedFlat-$agent-0 QuadrupedFlat --agent $agent --steps 1.5e6 "${walk[@]}" --worlds 32
    train QuadrupedMix-$agent-0 QuadrupedMix --agent $agent --steps 5e6 "${walk[@]}" --worlds 32
    train QuadrupedTerrain-$agent-0 QuadrupedTerrain --agent $agent --steps 3e6 "${walk[@]}" --worlds 32
  done
  for family in QuadrupedFlat QuadrupedDamage QuadrupedMix QuadrupedTerrain; do
    # robots differ in what can be earned: many tasks, or the intervals are wide
    for split in test extrapolate; do
      case $family-$split in QuadrupedMix-test) tasks=1600 ;; *) tasks=400 ;; esac
      TASKS=$tasks ORACLE=rl2-oracle report $family $split "runs/$family-rl2-0"
    done
    metarobot plot runs/$family-{rl2,rl2-oracle,blind}-0 --out "results/$family-learning.png"
  done
  [ -z "${GO2_MJCF:-}" ] || python scripts/transfer.py --robot "$GO2_MJCF" --agent runs/QuadrupedFlat-blind-0 \
    --json results/transfer.json
}

# The arm: an agent that grasps anything firmly first, one that holds back where things break; as those the others begin.
grasp() {
  local usual=(--epochs 5 --minibatches 8 --gamma 0.98 --worlds 64)
  local taught=(--epochs 12 --minibatches 8 --gamma 0.98 --worlds 64 --lr 5e-4 --std 0.12 --teach 15 --kl-stop 0.5)
  train GraspShapes-blind-0 GraspShapes --agent blind --steps 1.2e6 "${usual[@]}" --episodes 1 --std 0.6
  for agent in rl2-oracle rl2; do
    train GraspShapes-$agent-0 GraspShapes --agent $agent --steps 3e5 "${usual[@]}" --episodes 2 --lr 3e-4 --std 0.15 \
      --init runs/GraspShapes-blind-0
  done
  train GraspFragile-begin-0 GraspFragile --agent blind --steps 1.2e6 "${usual[@]}" --episodes 1 --lr 5e-4 --std 0.5 \
    --init runs/GraspShapes-blind-0
  train GraspFragile-blind-0 GraspFragile --agent blind --steps 6e5 "${taught[@]}" --episodes 1 --init runs/GraspFragile-begin-0
  train GraspFragile-rl2-oracle-0 GraspFragile --agent rl2-oracle --steps 2e6 "${taught[@]}" --episodes 3 \
    --init runs/GraspFragile-begin-0
  grep -qs '"steps": 3000000' runs/GraspFragile-rl2-0/config.json || train GraspFragile-rl2-0 GraspFragile --agent rl2 \
    --steps 2e6 "${taught[@]}" --episodes 3 --init runs/GraspFragile-begin-0
  # a run that is through may go on, its schedules taken up where they now stand
  train GraspFragile-rl2-0 GraspFragile --agent rl2 --steps 3e6 "${taught[@]}" --episodes 3 --init runs/GraspFragile-begin-0
  for split in test extrapolate; do
    metarobot evaluate runs/GraspShapes-blind-0 --split $split --tasks 200 --episodes 1 \
      --json "results/GraspShapes-blind-$split.json"
  done
  # other models of the arm: MuJoCo Menagerie's, and one with a Robotiq 2F-85
  for model in "${PANDA_MJCF:+panda=$PANDA_MJCF}" "${ROBOTIQ_MJCF:+robotiq=$ROBOTIQ_MJCF}"; do
    [ -z "$model" ] || metarobot evaluate runs/GraspShapes-blind-0 --robot "${model#*=}" --tasks 100 --episodes 1 \
      --json "results/GraspShapes-blind-${model%%=*}.json"
  done
  TASKS=200 ORACLE=rl2-oracle report GraspShapes extrapolate runs/GraspShapes-rl2-0
  for split in test extrapolate; do EPISODES=3 TASKS=400 ORACLE=rl2-oracle report GraspFragile $split runs/GraspFragile-rl2-0; done
  metarobot plot runs/GraspFragile-{rl2,rl2-oracle,blind}-0 --out results/GraspFragile-learning.png
}

# An agent that recognises tasks by likeness: what it earns, and what it takes held-out tasks for
prototype() {
  train CheetahVel-prototype-0 CheetahVel --agent prototype --steps 6e6
  for split in test extrapolate; do
    metarobot evaluate runs/CheetahVel-prototype-0 --split $split --tasks 40 --oracle runs/CheetahVel-oracle-0 \
      --blind runs/CheetahVel-blind-0 --controls --json "results/CheetahVel-prototype-$split.json" \
      --plot "results/CheetahVel-prototype-$split.png"
    metarobot recognise runs/CheetahVel-prototype-0 --split $split --json "results/CheetahVel-likeness-$split.json" \
      --plot "results/CheetahVel-likeness-$split.png"
  done
  metarobot recognise runs/CheetahVel-prototype-0 --even --json results/CheetahVel-likeness-even.json
}

# Putting things in their place from demonstrations, classes never seen in training
placement() {
  [ -e demos/placement ] || metarobot record Placement --tasks 500 --shots 2 --jitter 0.1 --out demos/placement
  [ -e demos/shown ] || metarobot record PlacementShown --tasks 250 --shots 2 --jitter 0.1 --out demos/shown
  [ -e demos/unseen ] || metarobot record Placement --split extrapolate --tasks 100 --shots 5 --jitter 0.1 --out demos/unseen
  train Placement-imitation-0 Placement --agent imitation --demos demos/placement --steps 10e6
  train PlacementShown-imitation-0 PlacementShown --agent imitation --demos demos/shown --steps 12e6 --inner-steps 0 --guess 0
  metarobot shots runs/Placement-imitation-0 --demos demos/unseen --shots 1 5 --reference runs/PlacementShown-imitation-0 \
    --json results/Placement-shots.json
}

# The approaches to meta-learning beside SB3's PPO and both references, one table a family; on CheetahTerrain at equal steps.
# promp, which brings fine-tuning of the blind policy with it, sb3:recurrentppo and sb3:sac can be added.
# every agent: on CheetahVel with the steps given above, then on both families with 1 M each
compare() {
  local all=(rl2 varibad pearl prototype sb3:ppo sb3:sac sb3:recurrentppo blind oracle) usual=(--threads 1 --episodes 3 --steps 1e6)
  metarobot compare CheetahVel --agents "${all[@]}" promp "${usual[@]}" --results results --set rl2.steps=6.5e6 varibad.steps=6.5e6 \
    promp.steps=6.5e6 pearl.steps=3e6 pearl.gradient_steps=500 prototype.steps=6e6 sb3:ppo.steps=2e6 blind.steps=2e6 oracle.steps=3e6
  metarobot compare CheetahVel --agents "${all[@]}" "${usual[@]}" --out runs/equal --reuse runs --results results/equal
  metarobot compare CheetahTerrain --agents "${all[@]}" promp "${usual[@]}" --out runs/equal --results results/equal \
    --set rl2.epochs=8 varibad.epochs=8
  metarobot recognise runs/equal/CheetahTerrain-prototype-0 --json results/CheetahTerrain-likeness-test.json \
    --plot results/CheetahTerrain-likeness-test.png
}

bench() {
  metarobot bench sim CheetahVel --worlds 512 --seconds 20 --json results/bench.json
  for family in QuadrupedFlat QuadrupedTerrain; do
    metarobot bench sim $family --worlds 512 --seconds 25 --json "results/bench-$family.json"
  done
  metarobot bench sim GraspShapes --worlds 1024 --seconds 25 --json results/bench-GraspShapes.json
  metarobot bench maml --seconds 60 --json results/bench-maml.json
  metarobot bench pearl --seconds 60 --json results/bench-pearl.json
  metarobot bench agents CheetahVel --seconds 60 --json results/bench-agents.json
}

for job in "${@:-CheetahVel CheetahDir CheetahTerrain memories gradients posterior quadruped grasp prototype placement compare bench}"; do
  for name in $job; do $name; done
done
