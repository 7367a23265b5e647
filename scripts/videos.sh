#!/usr/bin/env bash
# Film what videos/ holds, from the runs of scripts/demo.sh and scripts/results.sh.
set -euo pipefail
metarobot render runs/demo --tasks 2 --episodes 2 --out videos/demo.mp4
metarobot render runs/demo --tasks 2 --episodes 2 --size 208 128 --fps 7 --out videos/demo.gif
metarobot render runs/CheetahTerrain-rl2-0 --tasks 3 --episodes 2 --seed 3 --out videos/terrain.mp4
metarobot render runs/CheetahDir100-promp-0 --tasks 2 --episodes 2 --out videos/promp.mp4
metarobot render runs/QuadrupedDamage-rl2-0 --tasks 3 --episodes 2 --seed 0 --out videos/damage.mp4
metarobot render runs/QuadrupedDamage-rl2-0 --tasks 2 --episodes 2 --seed 0 --size 208 128 --fps 10 --out videos/damage.gif
metarobot render runs/QuadrupedMix-rl2-0 --tasks 3 --episodes 2 --seed 1 --out videos/mix.mp4
metarobot render runs/QuadrupedFlat-blind-0 --task command_x=0.8 command_turn=0.0 friction=0.8 --episodes 1 --size 480 320 \
  --out videos/walk.mp4
metarobot render runs/GraspShapes-rl2-0 --split extrapolate --tasks 4 --episodes 2 --out videos/grasp.mp4
metarobot render runs/GraspFragile-rl2-0 --tasks 1 --episodes 3 --seed 47 --out videos/fragile.mp4
metarobot render runs/GraspFragile-rl2-0 --tasks 1 --episodes 3 --seed 47 --size 208 160 --fps 10 --out videos/fragile.gif
cp runs/demo/adaptation.png videos/demo-adaptation.png
