#!/usr/bin/env bash
# The demo's references in the box: blind and oracle on CheetahDir, the demo's number of steps each.
set -euo pipefail
for agent in blind oracle; do
  command="metarobot train CheetahDir --agent $agent --steps 3.5e6 --seed 0 --out runs/dir-$agent"
  [ -e "runs/dir-$agent/config.json" ] && resume=--resume || resume=
  $command $resume
  metarobot publish "runs/dir-$agent" --out "agents/pretrained/CheetahDir-$agent" --command "$command" \
    --summary "CheetahDir's $agent reference, PPO $([ $agent = oracle ] && echo 'shown the task' || echo 'without memory')"
done
