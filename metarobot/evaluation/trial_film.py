"""Videos of trials: an agent plays tasks, one row a task, its episodes side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from metarobot.env.base import Env, StepResult
from metarobot.env.factory import make_env
from metarobot.learning.agent_interface import Agent
from metarobot.render.camera import Camera, snapshot_state
from metarobot.render.film import (
    GIF_FPS,
    LARGEST_MP4_FPS,
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


class _EpisodeRecorder:
    """Records the first rollout of each task while ``collect`` plays."""

    def __init__(self, tasks: int, episodes: int, rollouts: int) -> None:
        self.rollouts = rollouts
        self.recordings = [[Recording() for _ in range(episodes)] for _ in range(tasks)]
        """Recording of each episode of each task, ``recordings[task][episode]``."""

    def __call__(self, episode: int, env: Env, step: StepResult) -> None:
        for task, recordings in enumerate(self.recordings):
            recording = recordings[episode]
            if recording.over:
                continue
            world = task * self.rollouts
            failed = bool(step.terminated[world])
            recording.over = failed or bool(step.truncated[world])

            # An environment may have reset the world already: its last picture is shown on.
            if recording.over and recording.states:
                state = recording.states[-1]
            else:
                state = snapshot_state(env, world)
            recording.states.append(state)

            earned = recording.returns[-1] if recording.returns else 0.0
            recording.returns.append(earned + float(step.reward[world]))
            values = [
                _format_readout(name, float(value[world])) for name, value in env.readout.items()
            ]
            recording.readouts.append("   ".join(values))
            if failed:
                faulted = bool(step.faulted[world])
                recording.failure = "physics broke down" if faulted else "failed"


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
    sim: str = "cpu",
    device: str = "cpu",
) -> Path:
    """Play a trial in each task and write it as one video in real time.

    Only an agent that needs its exploration noise to adapt acts with it.

    Args:
        agent: Who plays; a module is moved to the environment's device.
        family: What is simulated.
        tasks: One row of the video each.
        out: Video to write, .mp4 or .gif.
        episodes: Episodes of each task, side by side.
        seed: Seed of the starts.
        rollouts: Worlds of each task that the agent adapts to; the first is shown.
        title: Heading of the video; family and agent if None.
        size: Width and height of one panel, pixels.
        fps: Frames a second; the control rate (mp4, at most 30) or 12.5 (gif) if None.
        progress: Whether to show a progress bar.
        sim: Simulator, ``cpu`` or ``warp``.
        device: Where Warp simulates, ``cpu`` or ``cuda``.

    Raises:
        VideoError: An unknown suffix, a folder that cannot be written, or no OpenGL. Nothing is
            left behind.
    """
    out = Path(out)
    check_output(out)
    if fps is not None and not fps > 0:
        raise VideoError(f"fps must be positive, not {fps:g}")

    with Camera(family, *size) as camera:
        # Play the trials and keep their states; pictures are drawn afterwards.
        worlds = [task for task in tasks for _ in range(rollouts)]
        env = make_env(family, worlds, sim=sim, device=device, seed=seed)
        if isinstance(agent, torch.nn.Module):
            agent.to(env.device)
        env.record_readout = True
        shown_tasks = env.tasks[::rollouts]
        recorder = _EpisodeRecorder(len(shown_tasks), episodes, rollouts)
        collect(
            agent,
            env,
            shown_tasks,
            episodes=episodes,
            seed=seed,
            rollouts=rollouts,
            explore=agent.explores,
            watch=recorder,
        )
        recordings = recorder.recordings

        if fps is None:
            fps = GIF_FPS if out.suffix == ".gif" else min(env.control_hz, LARGEST_MP4_FPS)
        if not title:
            title = f"{family.name}  ·  {type(agent).__name__.removesuffix('Agent')}"
        layout = FrameLayout(title, _task_rows(family, shown_tasks, recordings), episodes, size)
        steps = frame_steps(recordings, env.control_hz, fps)
        frames = (
            compose_frame(camera, layout, family, shown_tasks, recordings, step) for step in steps
        )
        write_video(
            out,
            with_progress(frames, len(steps), out.name, progress),
            fps,
            (layout.width, layout.height),
        )
    return out


def _format_readout(name: str, value: float) -> str:
    """Put a readout's value between its name and its unit: ``speed m/s`` -> ``speed 1.5 m/s``."""
    words, _, unit = name.rpartition(" ")
    if not words:
        return f"{name} {format_number(value)}"
    return f"{words} {format_number(value)} {unit}"


def _task_rows(
    family: Family, tasks: Sequence[Task], recordings: Sequence[Sequence[Recording]]
) -> list[TaskRow]:
    """Return each task in words, and the range of its running returns over all episodes."""
    rows = []
    for task, episodes in zip(tasks, recordings, strict=True):
        returns = [value for recording in episodes for value in recording.returns]
        rows.append(TaskRow(family.space.describe_task(task), min(returns), max(returns)))
    return rows
