#!/usr/bin/env bash
# Put agents in the box, as scripts/results.sh trains them: the demo's references, and ProMP on MAML's two benchmarks.
set -euo pipefail
publish() {  # family, agent, steps, what it is
  metarobot publish "runs/$1-$2-0" --out "agents/pretrained/$1-$2" --summary "$4" \
    --command "metarobot train $1 --agent $2 --steps $3 --seed 0 --threads 1 --out runs/$1-$2-0"
}
publish CheetahDir blind 2e6 "CheetahDir, one behaviour for both directions: the lower reference of the demo"
publish CheetahDir oracle 3e6 "CheetahDir, shown the direction: the upper reference of the demo"
publish CheetahDir100 promp 10e6 "CheetahDir100, runs either way after one gradient step on 20 rollouts"
publish CheetahVel100 promp 10e6 "CheetahVel100, finds its speed by one gradient step on 20 rollouts"
