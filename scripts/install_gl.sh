#!/usr/bin/env bash
# Make sure pictures can be drawn without a screen: install OpenGL where we may, say how where we may not.
set -u
python -c 'from metarobot.render.opengl import backend; backend()' 2>/dev/null && exit 0
packages="libegl1 libopengl0 libgl1-mesa-dri"
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "no OpenGL found: installing $packages"
  { apt-get update -qq && apt-get install -y -qq --no-install-recommends $packages; } >/dev/null || true
fi
python -c 'from metarobot.render.opengl import backend; backend()' 2>/dev/null && exit 0
echo "no OpenGL found: videos are left out; to have them: sudo apt-get install $packages" >&2
