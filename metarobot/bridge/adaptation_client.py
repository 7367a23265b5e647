"""Adaptation between episodes, the controller's end: logs rollouts, has a process adapt to them,
takes the outcome.

The process is ``metarobot.deploy.adaptation_worker``; it needs torch, and may run anywhere the two
files can be. The log holds ``obs`` ``(time, rollout, obs)``, ``action`` as chosen, before any clip
or limit, ``reward``, ``terminated``, ``truncated`` and ``valid`` ``(time, rollout)``, ``final_obs``
``(rollout, obs)``, and the tensors of the context as ``context_0``, ... The answer holds these
tensors adapted, and ``kl``; or ``reason``, why there is nothing to adopt.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metarobot.bridge.errors import BridgeError
from metarobot.bridge.policy.metadata import Meta

FAR = 100.0
"""Largest KL divergence of an adapted policy from the one it came from. After 20 rollouts, one step
of ProMP's agents in the box goes 5 to 50 far, and helps; after a single rollout, from which it
learns mostly noise, up to 340."""
CONTEXT, KL, REASON = "context_", "kl", "reason"
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Outcome:
    """What came of an adaptation: a context to adopt at an episode boundary, or why the old one
    stays.
    """

    context: dict[str, NDArray[np.float32]] | None
    reason: str
    """Why there is none; empty if there is one."""
    kl: float
    """Mean KL divergence of the new policy from the old one on the episodes' states."""
    seconds: float


class Adaptation:
    """Collects so many episodes with one context, then has the agent adapt to them all at once, as
    in training.

    ``begin`` each episode, ``step`` at each control step, ``end`` it; when ``ready``, ``start``,
    and ``poll`` until there is an outcome. Nothing here waits, but for writing the log (a few
    milliseconds, between episodes).
    """

    def __init__(
        self,
        meta: Meta,
        *,
        rollouts: int = 0,
        kl: float = FAR,
        deadline_s: float = 60.0,
        run: str = "",
        command: Sequence[str] = (sys.executable, "-m", "metarobot.deploy.adaptation_worker"),
    ) -> None:
        """Set up; ``rollouts`` as in training if 0.

        ``run`` is for a run that is not at the policy's ``run_path``, ``command`` for a torch that
        lives elsewhere.
        """
        if meta.adapts != "between":
            raise BridgeError(
                f"agent {meta.agent!r} does not adapt between episodes: it adapts {meta.adapts!r}"
            )
        rollouts = rollouts or meta.trial.rollouts
        for name, value in (("rollouts", rollouts), ("kl", kl), ("deadline_s", deadline_s)):
            if not value > 0:
                raise BridgeError(f"{name} must be above 0, not {value:g}")
        self.meta, self.rollouts, self.kl, self.deadline_s = meta, int(rollouts), kl, deadline_s
        self.run, self._command = run or meta.run_path, list(command)
        horizon, obs, act = meta.trial.horizon, len(meta.observation_names), len(meta.action.names)
        self._in_time = {
            "obs": np.zeros((horizon, self.rollouts, obs), np.float32),
            "action": np.zeros((horizon, self.rollouts, act), np.float32),
            "reward": np.zeros((horizon, self.rollouts), np.float32),
            **{
                k: np.zeros((horizon, self.rollouts), bool)
                for k in ("terminated", "truncated", "valid")
            },
        }
        self._final_obs = np.zeros((self.rollouts, obs), np.float32)
        self._process: subprocess.Popen[bytes] | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self.clear()

    def clear(self) -> None:
        """Forget the episodes collected."""
        self._lived = self._step = 0
        for array in (*self._in_time.values(), self._final_obs):
            array[...] = 0

    @property
    def lived(self) -> int:
        """Episodes collected."""
        return self._lived

    @property
    def ready(self) -> bool:
        """Whether there are enough episodes to adapt to."""
        return self._lived >= self.rollouts

    @property
    def busy(self) -> bool:
        """Whether the process is at work."""
        return self._process is not None

    def step(self, obs: Any, action: Any, reward: float) -> None:
        """Write down a step: what was seen, chosen, and earned by it; what is beyond the horizon is
        left out.
        """
        t, i, log = self._step, self._lived, self._in_time
        if self.ready or t >= self.meta.trial.horizon:
            return
        log["obs"][t, i], log["action"][t, i], log["reward"][t, i], log["valid"][t, i] = (
            obs,
            action,
            reward,
            True,
        )
        self._step = t + 1

    def end(self, final_obs: Any, *, failed: bool) -> None:
        """End an episode, which led to ``final_obs``; one that was stopped before it began counts
        for nothing.
        """
        if self.ready or not self._step:
            return
        self._in_time["terminated" if failed else "truncated"][self._step - 1, self._lived] = True
        self._final_obs[self._lived] = final_obs
        self._lived, self._step = self._lived + 1, 0

    def drop(self) -> None:
        """Leave out the episode under way: it was broken off from outside, and its return says
        nothing.
        """
        if not self.ready:
            for array in self._in_time.values():
                array[:, self._lived] = 0
        self._step = 0

    def start(self, context: Mapping[str, Any]) -> None:
        """Write the log and start the process; the episodes are forgotten, the next ones belong to
        the next time.
        """
        if self.busy or not self.ready:
            raise BridgeError(
                f"adapting needs {self.rollouts} episodes and one process: {self._lived} are there"
            )
        self._scratch = tempfile.TemporaryDirectory(prefix="metarobot-adapting-")
        log, self._out = (Path(self._scratch.name) / name for name in ("log.npz", "out.npz"))
        parts = {
            f"{CONTEXT}{i}": np.asarray(context[p.name]) for i, p in enumerate(self.meta.context)
        }
        self._shapes = {f"{CONTEXT}{i}": (p.name, p.shape) for i, p in enumerate(self.meta.context)}
        write(log, {**self._in_time, "final_obs": self._final_obs, **parts})
        command = [*self._command, self.run, str(log), str(self._out), "--kl", str(self.kl)]
        nothing = subprocess.DEVNULL
        self._began = time.monotonic()
        self._errors = log.with_name("errors.txt")
        try:
            with self._errors.open("wb") as errors:
                self._process = subprocess.Popen(
                    command, stdin=nothing, stdout=nothing, stderr=errors
                )
        except OSError as e:
            raise BridgeError(f"adapting cannot start {command[0]}: {e.strerror}") from e
        self.clear()

    def poll(self) -> Outcome | None:
        """Return the outcome if there is one by now; a process that is late is ended."""
        if self._process is None:
            return None
        seconds = time.monotonic() - self._began
        if self._process.poll() is None:
            if seconds < self.deadline_s:
                return None
            self._process.kill()
            return self._close(
                Outcome(None, f"adapting took longer than {self.deadline_s:g} s", np.nan, seconds)
            )
        return self._close(self._read(seconds))

    def stop(self) -> None:
        """End the process, if there is one; what it would have said is lost."""
        if self._process is not None:
            self._process.kill()
            self._close(Outcome(None, "adapting was stopped", np.nan, 0.0))

    def _close(self, outcome: Outcome) -> Outcome:
        assert self._process is not None and self._scratch is not None  # noqa: PT018
        self._process.wait()
        self._scratch.cleanup()
        self._process = self._scratch = None
        return outcome

    def _read(self, seconds: float) -> Outcome:
        """Believe an answer that is whole: all tensors, of their shapes, finite, and within the
        bound.
        """
        assert self._process is not None
        if (code := self._process.returncode) != 0:
            errors = self._errors.read_text(errors="replace").strip().splitlines()
            said = (errors or [f"exit code {code}"])[-1]
            return Outcome(
                None, f"adapting failed: {said.removeprefix('error: ')[:200]}", np.nan, seconds
            )
        try:
            with np.load(self._out, allow_pickle=False) as archive:
                answer: Arrays = dict(archive)
            if REASON in answer:
                return Outcome(None, str(answer[REASON]), np.nan, seconds)
            return self._checked(answer, seconds)
        except Exception as e:  # whatever is in that file, the robot goes on
            return Outcome(
                None, f"adapting wrote garbage: {' '.join(str(e).split())[:200]}", np.nan, seconds
            )

    def _checked(self, answer: Arrays, seconds: float) -> Outcome:
        context, kl = {}, float(answer[KL])
        for key, (name, shape) in self._shapes.items():
            value = answer[key]
            if (
                value.shape != tuple(shape)
                or value.dtype != np.float32
                or not np.isfinite(value).all()
            ):
                raise ValueError(f"{name} is {value.dtype} of shape {value.shape}, or not finite")
            context[name] = value
        if not kl <= self.kl:
            raise ValueError(f"a KL divergence of {kl:g}, more than {self.kl:g}")
        return Outcome(context, "", kl, seconds)


def write(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write arrays as an npz file, whole or not at all."""
    temporary = path.with_suffix(".part")
    with temporary.open("wb") as file:
        np.savez(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
