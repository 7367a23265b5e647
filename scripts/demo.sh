#!/usr/bin/env bash
# The main job, from end to end: meta-train, measure on held-out tasks beside blind and oracle, plot, film.
set -euo pipefail
out=${1:-runs/demo}
resume=$([ -e "$out/config.json" ] && echo --resume || true)
metarobot train CheetahDir --agent rl2 --steps 4.5e6 --seed 0 --out "$out" $resume
metarobot evaluate "$out" --split test --tasks 40 --episodes 2 --oracle CheetahDir-oracle --blind CheetahDir-blind \
  --controls --json "$out/evaluation.json" --plot "$out/adaptation.png"
metarobot plot "$out" --out "$out/learning.png"
if python -c 'from metarobot.render.opengl import backend; backend()' 2>/dev/null; then
  metarobot render "$out" --tasks 2 --episodes 2 --out "$out/adaptation.mp4"
fi
echo "look at: $out/adaptation.mp4  $out/adaptation.png  $out/learning.png"
