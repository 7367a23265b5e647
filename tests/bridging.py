"""A small robot of two joints, with a policy and a layout in numpy, for tests of the controller."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from metarobot.bridge.loop_timing import SteppedClock
from metarobot.bridge.policy.metadata import FORMAT, HASH_KEY, PolicyMetadata, content_digest

JOINTS = ("hip", "knee")
LIMIT = {"low": -1.0, "high": 1.0, "velocity": 10.0, "torque": 20.0}
ABOUT: dict[str, Any] = {
    "format": FORMAT,
    "kind": "metarobot-policy",
    "sha256": "0" * 64,
    "agent": "rl2",
    "family": "TwoJoints",
    "run_path": "",
    "joint_names": list(JOINTS),
    "joint_stiffness": [40.0, 40.0],
    "joint_damping": [1.0, 1.0],
    "default_joint_pos": [0.2, -0.4],
    "action_scale": [0.25, 0.25],
    "observation_names": [*(f"{j}.pos" for j in JOINTS), *(f"{j}.vel" for j in JOINTS)],
    "command_names": [],
    "control_hz": 50.0,
    "trial": {"horizon": 10, "episodes": 2},
    "inputs": [{"name": "obs", "shape": [1, 4]}],
    "outputs": [{"name": "actions", "shape": [1, 2]}],
    "context": [],
    "action": {"names": ["hip_action", "knee_action"], "low": [-4.0, -4.0], "high": [4.0, 4.0]},
    "limits": dict.fromkeys(JOINTS, LIMIT),
    "layout": "legged",
    "reward": None,
    "adapts": "acting",
    "explores": False,
    "noise": 0,
}


def sealed(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a policy.json with the hash that belongs to it."""
    return {**data, HASH_KEY: content_digest(data)}


def meta(**changes: Any) -> PolicyMetadata:
    """Return the metadata of a policy for two joints."""
    return replace(PolicyMetadata.parse(ABOUT), **changes)


class WavePolicy:
    """A policy that swings both joints, and records its inputs.

    Args:
        about: Metadata.
        act: Chooses the action instead, from the policy and the observation.
    """

    def __init__(
        self,
        about: PolicyMetadata | None = None,
        act: Callable[["WavePolicy", Any], Any] | None = None,
    ) -> None:
        self.meta = meta() if about is None else about
        self.chosen = np.zeros(len(self.meta.action.names), np.float32)
        self.inputs: list[tuple[Any, float, bool]] = []
        """Observation, reward and done of each step."""
        self.trials = 0
        self.contexts: list[Mapping[str, Any]] = []
        """Contexts that were set."""
        self._act = act

    def begin(self) -> None:
        self.trials += 1

    def act(self, obs: Any, reward: float, done: bool, noise: Any = None) -> Any:
        self.inputs.append((np.array(obs), reward, done))
        if self._act is not None:
            return self._act(self, obs)
        self.chosen[:] = np.sin(0.3 * len(self.inputs)) + obs[:2]
        return np.clip(self.chosen, self.meta.action.low, self.meta.action.high)

    def set_context(self, context: Mapping[str, Any]) -> None:
        self.contexts.append(context)

    def context(self) -> Mapping[str, Any]:
        return {"weights": np.zeros(3, np.float32)}


class PlainLayout:
    """A layout without odometry: it observes readings, and rewards the first joint's angle."""

    def __init__(self, about: PolicyMetadata) -> None:
        self.meta = about
        self.pairs: list[list[tuple[float, float]]] = []
        """Episode -> numbers of the two readings of each reward."""

    def needed(self) -> tuple[str, ...]:
        return self.meta.observation_names

    def begin(self) -> None:
        self.pairs.append([])

    def observe(self, reading: Any, last_action: Any) -> Any:
        return np.array([reading[key] for key in self.meta.observation_names], np.float32)

    def targets(self, action: Any) -> dict[str, float]:
        pose = np.array(self.meta.default_joint_pos) + np.array(self.meta.action_scale) * action
        names = [f"{joint}.pos" for joint in self.meta.joint_names]
        return dict(zip(names, pose.tolist(), strict=True))

    def reward(self, before: Any, after: Any, action: Any, last_action: Any) -> float:
        self.pairs[-1].append((before["seq"], after["seq"]))
        return float(after[f"{JOINTS[0]}.pos"])

    def ended(self, reading: Any) -> bool:
        return reading.get("terminated", 0.0) > 0.5


class RecordingRobot:
    """A robot of two joints that follow their targets; it records all that reaches it.

    Args:
        about: Metadata of the policy.
        clock: Clock of the readings' stamps.
        spoil: May change a reading, given its number, before it goes out; or raise.
    """

    name = "recorder"
    identity = "recorder"
    guarded = False

    def __init__(
        self,
        about: PolicyMetadata,
        clock: Any = None,
        spoil: Callable[[int, dict[str, float]], Any] | None = None,
    ) -> None:
        self.meta = about
        self.clock = SteppedClock() if clock is None else clock
        self.spoil = spoil
        self.pos = np.array([0.6, 0.5])
        self.vel = np.zeros(2)
        self.reads = 0
        self.damps: list[float] = []
        """Times of damping."""
        self.connected = False
        self.commands: list[tuple[float, dict[str, float], dict[str, float]]] = []
        """Time, command, and the reading that went out last."""
        self.order: list[str] = []
        """``command``, ``damp`` and ``restart``, in the order in which they came."""
        self.reading: dict[str, float] = {}

    def connect(self) -> None:
        self.connected = True

    def disconnect(self) -> None:
        self.connected = False

    def get_observation(self) -> dict[str, float]:
        self.reads += 1
        # The robot's clock is far ahead of the controller's, as it may be
        reading = {"stamp": self.clock.now() + 1000.0, "seq": float(self.reads)}
        for i, joint in enumerate(JOINTS):
            reading[f"{joint}.pos"] = float(self.pos[i])
            reading[f"{joint}.vel"] = float(self.vel[i])
            reading[f"{joint}.tau"] = 0.0
        if self.spoil is not None:
            reading = self.spoil(self.reads, dict(reading))
        self.reading = reading
        return reading

    def send_action(self, action: Mapping[str, float]) -> dict[str, float]:
        self.commands.append((self.clock.now(), dict(action), self.reading))
        self.order.append("command")
        target = np.array([action[f"{joint}.pos"] for joint in JOINTS])
        self.vel = (target - self.pos) * 5.0
        self.pos = self.pos + self.vel / self.meta.control_hz
        return dict(action)

    def damp(self) -> None:
        self.damps.append(self.clock.now())
        self.order.append("damp")


class RestartingRobot(RecordingRobot):
    """A recording robot that can put itself where an episode begins."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.restarts: list[int] = []
        """Episodes of the restarts."""

    def restart(self, episode: int) -> None:
        self.restarts.append(episode)
        self.order.append("restart")
        self.pos = np.array([0.2, -0.4])
        self.vel = np.zeros(2)


class Slider:
    """A robot of a ``direct`` policy, made by its name ``bridging:Slider``: its readings are sines.

    Args:
        about: Metadata of the policy.
        lacks: Name of an observation that its readings do not have.
        twice: A second setting, for tests of unknown ones.
    """

    name = "slider"
    identity = "slider"
    guarded = False

    def __init__(self, about: Any, *, lacks: str = "", twice: bool = False) -> None:
        self.about = about
        self.lacks = lacks
        self.count = 0

    def connect(self) -> None:
        pass

    def get_observation(self) -> dict[str, float]:
        self.count += 1
        names = [name for name in self.about.observation_names if name != self.lacks]
        values = {name: math.sin(self.count + i) for i, name in enumerate(names)}
        return values | {"stamp": time.monotonic(), "seq": float(self.count), "reward": 1.0}

    def send_action(self, action: Mapping[str, float]) -> dict[str, float]:
        return dict(action)

    def damp(self) -> None:
        pass

    def disconnect(self) -> None:
        pass
