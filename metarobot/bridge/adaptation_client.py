"""Adaptation between episodes, the controller's end: record rollouts, have a process adapt to them.

The process is ``metarobot.deploy.adaptation_worker``. It needs torch, and may run wherever it can
read the one file and write the other.

The log that it reads (npz) holds

- ``obs`` ``(time, rollout, obs)``, ``action`` ``(time, rollout, act)`` as chosen by the policy,
  before any clip or limit, ``reward``, ``terminated``, ``truncated`` and ``valid``
  ``(time, rollout)``, and ``final_obs`` ``(rollout, obs)``;
- the tensors of the context with which the rollouts were collected: ``context_0``, ...

Its answer (npz) holds the same tensors of the new context, and ``kl``; or ``reason``, why the old
context should stay.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metarobot.bridge.errors import BridgeError
from metarobot.bridge.policy.metadata import PolicyMetadata
from metarobot.bridge.tools.python_command import child_environment, python_command
from metarobot.privacy import without_folders

DEFAULT_KL_BOUND = 60.0
"""Largest KL divergence of an adapted policy from the one it came from: a third above the largest
honest one.

One gradient step on the 20 rollouts of 20 test tasks gives CheetahDir100-promp a divergence of 30
(median) and 45 at most, CheetahVel100-promp one of 11 and 18 at most. After 2 rollouts, from which
an agent learns mostly noise, it is 64 and up to 190, and 24 and up to 44."""
JUDGED_EPISODES = 3
"""Episodes with the new context before it may be found worse than the old one, or as many as are
collected for an adaptation, if these are fewer."""
CLEARLY_WORSE_ERRORS = 2.0
"""Standard errors by which the mean return must have fallen to give the new context up early."""
CONTEXT_PREFIX = "context_"
"""Keys of the context's tensors in both files, with a number behind it."""
KL_KEY = "kl"
REASON_KEY = "reason"
LONGEST_MESSAGE = 200
"""Characters of another process's message that are passed on."""


@dataclass(frozen=True)
class AdaptationResult:
    """A new context, to be used from the next episode on, or why the old one stays."""

    context: dict[str, NDArray[np.float32]] | None
    reason: str
    """Why there is no new context; empty if there is one."""
    kl: float
    """Mean KL divergence of the new policy from the old one on the episodes' states."""
    seconds: float
    """How long the adaptation took."""


class AdaptationClient:
    """Collect episodes with one context, then have the agent adapt to them at once, as in training.

    Call ``step`` in each control step and ``end`` after each episode; when ``ready``, ``start``,
    and then ``poll`` until there is a result. Nothing here waits, except for writing the log: a few
    milliseconds, between two episodes.

    Args:
        meta: Metadata of the policy.
        rollouts: Episodes to collect before each adaptation; 0: as many as in training.
        kl: Largest KL divergence of a new policy from the old one.
        deadline_s: After this time the process is ended and the old context stays.
        run: Run folder of the agent, if it is not at the policy's ``run_path``.
        command: How to start the process, if its Python is not this one.

    Raises:
        BridgeError: the agent does not adapt between episodes, or a number is not positive.
    """

    def __init__(
        self,
        meta: PolicyMetadata,
        *,
        rollouts: int = 0,
        kl: float = DEFAULT_KL_BOUND,
        deadline_s: float = 60.0,
        run: str = "",
        command: Sequence[str] = (),
    ) -> None:
        if meta.adapts != "between":
            raise BridgeError(
                f"agent {meta.agent!r} does not adapt between episodes: it adapts {meta.adapts!r}"
            )
        rollouts = rollouts or meta.trial.rollouts
        for name, value in (("rollouts", rollouts), ("kl", kl), ("deadline_s", deadline_s)):
            # Written as "not >" so that NaN is refused
            if not value > 0:
                raise BridgeError(f"{name} must be above 0, not {value:g}")

        self.meta = meta
        self.rollouts = int(rollouts)
        self.kl = kl
        self.deadline_s = deadline_s
        self.run = run or meta.run_path
        self._command = list(command) or python_command("metarobot.deploy.adaptation_worker")

        # Memory for a whole batch of rollouts, so that a control step only copies
        steps = (meta.trial.horizon, self.rollouts)
        obs_dim = len(meta.observation_names)
        act_dim = len(meta.action.names)
        self._arrays: dict[str, NDArray[Any]] = {
            "obs": np.zeros((*steps, obs_dim), np.float32),
            "action": np.zeros((*steps, act_dim), np.float32),
            "reward": np.zeros(steps, np.float32),
            "terminated": np.zeros(steps, bool),
            "truncated": np.zeros(steps, bool),
            "valid": np.zeros(steps, bool),
        }
        """Time and rollout first, ``(time, rollout, ...)``."""
        self._final_obs = np.zeros((self.rollouts, obs_dim), np.float32)
        self._collected = 0
        self._step = 0

        # What it takes to give up a context that turns out worse than the one before
        self._returns: list[float] = []
        """Returns of the episodes collected."""
        self._returns_before: list[float] = []
        """Returns of the episodes from which the new context came."""
        self._context_before: dict[str, NDArray[np.float32]] = {}
        self._judging = False
        """Whether the context is new, and not known yet to be no worse than the one before."""

        self._process: subprocess.Popen[bytes] | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._started_at = 0.0

    def clear(self) -> None:
        """Discard the episodes collected, at the end of a trial."""
        self._judging = False
        self._discard()

    def _discard(self) -> None:
        self._returns = []
        self._collected = 0
        self._step = 0
        for array in self._arrays.values():
            array[...] = 0
        self._final_obs[...] = 0

    @property
    def collected(self) -> int:
        """Number of episodes collected."""
        return self._collected

    @property
    def ready(self) -> bool:
        """Whether enough episodes are collected to adapt to."""
        return self._collected >= self.rollouts

    @property
    def busy(self) -> bool:
        """Whether the process is at work."""
        return self._process is not None

    def step(self, obs: Any, action: Any, reward: float) -> None:
        """Record a step: observation, action as chosen, and the reward it led to.

        Steps beyond the horizon, and of episodes beyond those needed, are left out.
        """
        if self.ready or self._step >= self.meta.trial.horizon:
            return
        at = self._step, self._collected
        arrays = self._arrays
        arrays["obs"][at] = obs
        arrays["action"][at] = action
        arrays["reward"][at] = reward
        arrays["valid"][at] = True
        self._step += 1

    def end(self, final_obs: Any, *, failed: bool) -> None:
        """End an episode, which led to ``final_obs``; one without any step is not counted."""
        if self.ready or self._step == 0:
            return
        ending = "terminated" if failed else "truncated"
        self._arrays[ending][self._step - 1, self._collected] = True
        self._final_obs[self._collected] = final_obs
        self._returns.append(float(self._arrays["reward"][: self._step, self._collected].sum()))
        self._collected += 1
        self._step = 0

    def drop(self) -> None:
        """Discard the episode that is going on: it was broken off, so its return means nothing."""
        if not self.ready:
            for array in self._arrays.values():
                array[:, self._collected] = 0
        self._step = 0

    def review(self) -> AdaptationResult | None:
        """Return the context to go back to, or None if the new one is not found to be worse.

        To be called between episodes. The new context is worse if the mean return of its episodes
        is below that of the episodes it was made from: clearly, after a few of them, or at all,
        after as many as were collected before. The episodes collected with it are discarded then.
        """
        if not self._judging:
            return None
        new = np.array(self._returns)
        old = np.array(self._returns_before)
        is_complete = len(new) >= self.rollouts
        if not is_complete and len(new) < JUDGED_EPISODES:
            return None

        fall = float(old.mean() - new.mean())
        # standard error of the difference of two means: sqrt(s₁²/n₁ + s₂²/n₂)
        error = float(np.sqrt(old.var() / len(old) + new.var() / len(new)))
        # Written as "not <=" so that NaN counts as worse
        if not fall <= CLEARLY_WORSE_ERRORS * error or (is_complete and fall > 0):
            reason = (
                f"the mean return fell from {old.mean():.1f} to {new.mean():.1f} in {len(new)} "
                "episodes"
            )
            context = self._context_before
            self.clear()
            return AdaptationResult(context, reason, np.nan, 0.0)
        self._judging = not is_complete
        return None

    def start(self, context: Mapping[str, Any]) -> None:
        """Write the log and start the process; the collected episodes are then discarded.

        Raises:
            BridgeError: there are too few episodes, a process is at work already, or it cannot be
                started.
        """
        if self.busy or not self.ready:
            raise BridgeError(
                f"adapting needs {self.rollouts} episodes and one process: "
                f"{self._collected} are there"
            )
        self._scratch = tempfile.TemporaryDirectory(prefix="metarobot-adapting-")
        folder = Path(self._scratch.name)
        log = folder / "log.npz"
        self._answer_path = folder / "out.npz"
        self._errors_path = folder / "errors.txt"

        tensors = {}
        self._wanted: dict[str, tuple[str, tuple[int, ...]]] = {}
        for i, part in enumerate(self.meta.context):
            key = f"{CONTEXT_PREFIX}{i}"
            tensors[key] = np.asarray(context[part.name])
            self._wanted[key] = (part.name, tuple(part.shape))
        write_npz(log, {**self._arrays, "final_obs": self._final_obs, **tensors})

        files = [self.run, str(log), str(self._answer_path)]
        command = [*self._command, *files, "--kl", str(self.kl)]
        self._started_at = time.monotonic()
        try:
            with self._errors_path.open("wb") as errors:
                self._process = subprocess.Popen(  # noqa: S603
                    command,
                    env=child_environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                )
        except OSError as e:
            raise BridgeError(f"adapting cannot start {command[0]}: {e.strerror}") from e
        self._returns_before = self._returns
        self._context_before = {
            part.name: np.array(context[part.name]) for part in self.meta.context
        }
        self.clear()

    def poll(self) -> AdaptationResult | None:
        """Return the result if there is one by now; a process that is late is killed."""
        if self._process is None:
            return None
        seconds = time.monotonic() - self._started_at
        if self._process.poll() is None:
            if seconds < self.deadline_s:
                return None
            self._process.kill()
            late = f"adapting took longer than {self.deadline_s:g} s"
            return self._finish(AdaptationResult(None, late, np.nan, seconds))
        return self._finish(self._read_answer(seconds))

    def stop(self) -> None:
        """Kill the process, if there is one; its answer is lost."""
        if self._process is not None:
            self._process.kill()
            self._finish(AdaptationResult(None, "adapting was stopped", np.nan, 0.0))

    def _finish(self, result: AdaptationResult) -> AdaptationResult:
        """Clean up after a process that has ended or was killed."""
        assert self._process is not None
        assert self._scratch is not None
        self._process.wait()
        self._scratch.cleanup()
        self._process = None
        self._scratch = None
        return result

    def _read_answer(self, seconds: float) -> AdaptationResult:
        assert self._process is not None
        code = self._process.returncode
        if code != 0:
            lines = self._errors_path.read_text(errors="replace").strip().splitlines()
            message = lines[-1].removeprefix("error: ") if lines else f"exit code {code}"
            # The message goes into the log, which may leave this machine
            message = without_folders(message)
            failed = f"adapting failed: {message[:LONGEST_MESSAGE]}"
            return AdaptationResult(None, failed, np.nan, seconds)

        # Whatever is in that file, the robot goes on with the old context: hence "Exception"
        try:
            with np.load(self._answer_path, allow_pickle=False) as archive:
                answer = dict(archive)
            if REASON_KEY in answer:
                return AdaptationResult(None, str(answer[REASON_KEY]), np.nan, seconds)
            return self._validated(answer, seconds)
        except Exception as e:
            message = without_folders(" ".join(str(e).split()))
            garbage = f"adapting wrote garbage: {message[:LONGEST_MESSAGE]}"
            return AdaptationResult(None, garbage, np.nan, seconds)

    def _validated(self, answer: Mapping[str, NDArray[Any]], seconds: float) -> AdaptationResult:
        """Check that all tensors are there, of their shapes, finite, and within the KL bound.

        The worker checks the same; but what drives the robot next is not taken on trust.
        """
        kl = float(answer[KL_KEY])
        context = {}
        for key, (name, shape) in self._wanted.items():
            value = answer[key]
            right_type = value.shape == shape and value.dtype == np.float32
            if not right_type or not np.isfinite(value).all():
                raise ValueError(f"{name} is {value.dtype} of shape {value.shape}, or not finite")
            context[name] = value
        # Written as "not <=" so that NaN is refused
        if not kl <= self.kl:
            raise ValueError(f"a KL divergence of {kl:g}, more than {self.kl:g}")
        self._judging = True
        return AdaptationResult(context, "", kl, seconds)


def write_npz(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write arrays as an npz file, completely or not at all."""
    temporary = path.with_suffix(".part")
    with temporary.open("wb") as file:
        np.savez(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
