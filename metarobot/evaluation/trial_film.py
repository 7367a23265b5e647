"""Films of trials: an agent plays tasks, its episodes side by side."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from metarobot.env.base import Env, StepResult
from metarobot.learning.agent_interface import Agent
from metarobot.render.camera import Camera, snapshot_state
from metarobot.render.film import (
    GIF_FPS,
    MOST_FPS,
    Recording,
    check_output,
    compose_frame,
    frame_steps,
    with_progress,
    write_video,
)
from metarobot.render.frame_layout import FrameLayout, TaskRow, format_number
from metarobot.render.opengl import VideoError
from metarobot.tasks.family import Family
from metarobot.tasks.space import Task
from metarobot.training.collect import collect


class _Recorder:
    """Watches the first rollout of each task: ``takes[task][episode]``."""

    def __init__(self, tasks: int, episodes: int, rollouts: int) -> None:
        self.rollouts = rollouts
        self.takes = [[Recording() for _ in range(episodes)] for _ in range(tasks)]

    def __call__(self, k: int, env: Env, step: StepResult) -> None:
        for task, episodes in enumerate(self.takes):
            world = task * self.rollouts
            take = episodes[k]
            if take.over:
                continue
            take.over = bool(step.terminated[world] | step.truncated[world])
            # The world of an episode that has ended shows the next one already.
            take.states.append(
                take.states[-1] if take.over and take.states else snapshot_state(env, world)
            )
            take.returns.append(
                float(step.reward[world]) + (take.returns[-1] if take.returns else 0.0)
            )
            take.readouts.append(
                "   ".join(_say(name, float(v[world])) for name, v in env.readout.items())
            )
            if bool(step.terminated[world]):
                take.mishap = "physics broke down" if bool(step.faulted[world]) else "failed"


def film(
    agent: Agent,
    family: Family,
    tasks: Sequence[Task],
    *,
    out: Path,
    episodes: int,
    seed: int,
    rollouts: int = 1,
    title: str | None = None,
    size: tuple[int, int] = (320, 240),
    fps: float | None = None,
    progress: bool = True,
) -> Path:
    """Live a trial in each task and write it as one video: a row a task, a column an episode.

    Only an agent that cannot adapt without exploration noise acts with it; of the ``rollouts`` it
    adapts to, the first is shown. ``size`` is one panel's; ``fps`` defaults to the control rate
    (mp4, at most 30) or 12.5 (gif); always in real time. Raises ``VideoError`` for an unknown
    suffix, a folder that cannot be written, or no OpenGL; leaves no half a file.
    """
    out = Path(out)
    check_output(out)
    if fps is not None and not fps > 0:
        raise VideoError(f"fps must be positive, not {fps:g}")
    with Camera(family, *size) as camera:
        env = Env(family, [task for task in tasks for _ in range(rollouts)], seed=seed)
        env.record_readout = True
        shown = env.tasks[::rollouts]
        recorder = _Recorder(len(shown), episodes, rollouts)
        live = partial(
            collect, episodes=episodes, seed=seed, rollouts=rollouts, explore=agent.explores
        )
        live(agent, env, shown, watch=recorder)
        rate = fps or (GIF_FPS if out.suffix == ".gif" else min(env.control_hz, MOST_FPS))
        heading = title or f"{family.name}  ·  {type(agent).__name__.removesuffix('Agent')}"
        sheet = FrameLayout(heading, _rows(family, shown, recorder.takes), episodes, size)
        moments = frame_steps(recorder.takes, env.control_hz, rate)
        frames = (compose_frame(camera, sheet, family, shown, recorder.takes, t) for t in moments)
        write_video(
            out,
            with_progress(frames, len(moments), out.name, progress),
            rate,
            (sheet.width, sheet.height),
        )
    return out


def _say(name: str, value: float) -> str:
    """Put a readout's value between its name and its unit."""
    words, _, unit = name.rpartition(" ")
    return f"{words} {format_number(value)} {unit}" if words else f"{name} {format_number(value)}"


def _rows(
    family: Family, tasks: Sequence[Task], takes: Sequence[Sequence[Recording]]
) -> list[TaskRow]:
    returns = [[r for take in row for r in take.returns] for row in takes]
    return [
        TaskRow(family.space.say(t), min(r), max(r)) for t, r in zip(tasks, returns, strict=True)
    ]
