"""Speed and memory: what an environment and an agent reach, beside what they could reach."""

from metarobot._moved import moved_names

__getattr__ = moved_names(__name__, "metarobot.bench.cpu_speed")
