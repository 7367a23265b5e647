#!/usr/bin/env bash
# Put the demo's references in the box: blind and oracle on CheetahDir, as scripts/results.sh CheetahDir trains them.
set -euo pipefail
publish() {  # agent, what it is, steps
  metarobot publish "runs/CheetahDir-$1-0" --out "agents/pretrained/CheetahDir-$1" --summary "$2" \
    --command "metarobot train CheetahDir --agent $1 --steps $3 --seed 0 --threads 1 --out runs/CheetahDir-$1-0"
}
publish blind "CheetahDir, one behaviour for both directions: the lower reference of the demo" 2e6
publish oracle "CheetahDir, shown the direction: the upper reference of the demo" 3e6
