"""A small robot of two joints, and real numpy code at the places of a policy, a layout and a
robot."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from metarobot.bridge.errors import BridgeError
from metarobot.bridge.loop_timing import SteppedClock
from metarobot.bridge.policy.metadata import PolicyMetadata

JOINTS = ("hip", "knee")
LIMIT = {"low": -1.0, "high": 1.0, "velocity": 10.0, "torque": 20.0}
ABOUT: dict[str, Any] = {
    "format": 1,
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


def meta(**changes: Any) -> PolicyMetadata:
    """The metadata of a policy for two joints."""
    return replace(PolicyMetadata.parse(ABOUT), **changes)


class Wave:
    """A policy that swings both joints, and writes down what it was told."""

    def __init__(
        self, about: PolicyMetadata | None = None, act: Callable[["Wave", Any], Any] | None = None
    ) -> None:
        self.meta = meta() if about is None else about
        self.chosen = np.zeros(len(self.meta.action.names), np.float32)
        self.told: list[tuple[Any, float, bool]] = []
        self.trials, self.adopted, self._act = 0, [], act

    def begin(self) -> None:
        self.trials += 1

    def act(self, obs: Any, reward: float, done: bool, noise: Any = None) -> Any:
        self.told.append((np.array(obs), reward, done))
        if self._act is not None:
            return self._act(self, obs)
        self.chosen[:] = np.sin(0.3 * len(self.told)) + obs[:2]
        return np.clip(self.chosen, self.meta.action.low, self.meta.action.high)

    def set_context(self, context: Mapping[str, Any]) -> None:
        self.adopted.append(context)

    def context(self) -> Mapping[str, Any]:
        return {"weights": np.zeros(3, np.float32)}


class Plain:
    """A layout without odometry: the readings themselves, and the first joint's angle as reward."""

    def __init__(self, about: PolicyMetadata) -> None:
        self.meta, self.pairs = about, []

    def needed(self) -> tuple[str, ...]:
        return self.meta.observation_names

    def begin(self) -> None:
        self.pairs.append([])

    def observe(self, reading: Any, last_action: Any) -> Any:
        return np.array([reading[k] for k in self.meta.observation_names], np.float32)

    def targets(self, action: Any) -> dict[str, float]:
        pose = np.array(self.meta.default_joint_pos) + np.array(self.meta.action_scale) * action
        return dict(zip([f"{j}.pos" for j in self.meta.joint_names], pose.tolist(), strict=True))

    def reward(self, before: Any, after: Any, action: Any, last_action: Any) -> float:
        self.pairs[-1].append((before["seq"], after["seq"]))
        return float(after[f"{JOINTS[0]}.pos"])

    def ended(self, reading: Any) -> bool:
        return reading.get("terminated", 0.0) > 0.5


class Recorder:
    """A robot of two joints that follow their targets, on a clock of the test's; writes down all
    that reaches it.

    ``spoil`` may change a reading before it goes out, or raise.
    """

    name, identity, guarded = "recorder", "recorder", False

    def __init__(
        self,
        about: PolicyMetadata,
        clock: Any = None,
        spoil: Callable[[int, dict[str, float]], Any] | None = None,
    ):
        self.meta, self.clock = about, SteppedClock() if clock is None else clock
        self.spoil = spoil
        self.pos, self.vel = np.array([0.6, 0.5]), np.zeros(2)
        self.reads, self.damps, self.connected = 0, [], False
        self.commands: list[tuple[float, dict[str, float], dict[str, float]]] = []
        """When, what, and the reading that went out last."""
        self.order: list[str] = []
        self.reading: dict[str, float] = {}
        self.heard = 0.0
        """When the last good reading went out."""

    def connect(self) -> None:
        self.connected = True

    def disconnect(self) -> None:
        self.connected = False

    def get_observation(self) -> dict[str, float]:
        self.reads += 1
        now = self.clock.now()
        reading = {"stamp": now + 1000.0, "seq": float(self.reads)}
        for i, j in enumerate(JOINTS):
            reading |= {
                f"{j}.pos": float(self.pos[i]),
                f"{j}.vel": float(self.vel[i]),
                f"{j}.tau": 0.0,
            }
        spoiled = reading if self.spoil is None else self.spoil(self.reads, dict(reading))
        if spoiled == reading:
            self.heard = now
        self.reading = spoiled
        return spoiled

    def send_action(self, action: Mapping[str, float]) -> dict[str, float]:
        if self.order[-1:] == ["lost"]:
            raise BridgeError("the link is lost")
        self.commands.append((self.clock.now(), dict(action), self.reading))
        self.order.append("command")
        target = np.array([action[f"{j}.pos"] for j in JOINTS])
        self.vel = (target - self.pos) * 5.0
        self.pos = self.pos + self.vel / self.meta.control_hz
        return dict(action)

    def damp(self) -> None:
        self.damps.append(self.clock.now())
        self.order.append("damp")


class Restarting(Recorder):
    """The same, and it can put itself where an episode begins."""

    def __init__(self, *a: Any, **k: Any) -> None:
        super().__init__(*a, **k)
        self.restarts: list[int] = []

    def restart(self, episode: int) -> None:
        self.restarts.append(episode)
        self.order.append("restart")
        self.pos, self.vel = np.array([0.2, -0.4]), np.zeros(2)


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
