"""Pictures of worlds and videos of trials: episodes of a task side by side, so that adaptation is seen."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import imageio_ffmpeg
import mujoco
import numpy as np
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from metarobot.agent import Agent
from metarobot.collect import collect
from metarobot.env import Env, Family, Step, TaskModels
from metarobot.overlay import Panel, Row, Sheet, number
from metarobot.studio import Pixels, Stage, VideoError, backend, dress
from metarobot.tasks import Task
from metarobot.types import Floats

__all__ = ["SUFFIXES", "Camera", "VideoError", "film"]

_GIF_FILTER = (
    "split[a][b];[a]palettegen=stats_mode=diff[p];[b][p]paletteuse=dither=bayer:bayer_scale=5:diff_mode=rectangle"
)
SUFFIXES: Mapping[str, tuple[str, ...]] = {
    ".mp4": ("-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "21", "-preset", "medium", "-movflags", "+faststart"),
    ".gif": ("-vf", f"scale='min(960,iw)':-2:flags=lanczos,{_GIF_FILTER}", "-loop", "0"),
}
"""Kinds of file that can be written -> how ffmpeg is told to."""
_GIF_FPS, _MOST_FPS, _HOLD_S, _STAGES = 12.5, 30.0, 1.2, 32
_MARK = (0.86, 0.1, 0.12, 1.0)
_STATE = mujoco.mjtState.mjSTATE_INTEGRATION.value


class Camera:
    """Takes pictures of a family's worlds from the side, each in the look of its own task, following the robot.

    Raises ``VideoError`` if there is no OpenGL here. Models are compiled once a task and kept.
    """

    def __init__(self, family: Family, width: int = 320, height: int = 240) -> None:
        backend()
        self.width, self.height = width, height
        self._family = family
        self._maker = TaskModels(family, visual=True, dress=dress)
        self._stages: dict[tuple[float, ...], Stage] = {}
        self._looks: dict[Hashable, tuple[float, Floats]] = {}

    def frame(self, env: Env, world: int) -> Pixels:
        """Take a picture of one world as it is now, ``(height, width, 3)`` uint8."""
        return self.picture(env.tasks[world], snap(env, world), key=world)

    def picture(self, task: Task, state: Floats, key: Hashable = None) -> Pixels:
        """Take a picture of a state (``snap``); states of one ``key`` are one take, over which the camera glides."""
        stage = self._stage(task)
        stage.load(state)
        return stage.draw(self._glide(stage, key))

    def _stage(self, task: Task) -> Stage:
        values = self._maker.key(task)
        if values not in self._stages:
            if len(self._stages) >= _STAGES:
                self.close()
            model = self._maker.compile(task)
            _mark(model, self._family.marked(task.as_dict()))
            self._stages[values] = Stage(model, self.width, self.height, self._family.view)
        return self._stages[values]

    def _glide(self, stage: Stage, key: Hashable) -> Floats:
        """Follow with a lag of 0.2 s, at most a quarter of the robot, along the floor and 0.8 s in height.

        Cuts where time runs back.
        """
        time, goal = float(stage.data.time), stage.look()
        past, look = self._looks.get(key, (time, goal))
        if time < past or float(np.linalg.norm(goal - look)) > 2 * stage.radius:
            past, look = time, goal
        share = 1 - np.exp(-(time - past) / np.array([0.2, 0.2, 0.8]))
        look = look + share * (goal - look)
        look[:2] = goal[:2] - np.clip(goal[:2] - look[:2], -stage.radius / 4, stage.radius / 4)
        self._looks[key] = (time, look)
        return np.asarray(look)

    def close(self) -> None:
        """Free the pictures' memory; the next picture takes it anew."""
        for stage in self._stages.values():
            stage.close()
        self._stages.clear()

    def __enter__(self) -> Camera:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _mark(model: mujoco.MjModel, bodies: Iterable[str]) -> None:
    """Paint the shapes of bodies red."""
    names = [model.body(b).name for b in range(model.nbody)]
    geoms = np.isin(model.geom_bodyid, [names.index(b) for b in bodies if b in names])
    model.geom_matid[geoms], model.geom_rgba[geoms] = -1, _MARK


def snap(env: Env, world: int) -> Floats:
    """Copy all that a picture of one world depends on: a small vector, so that a trial is kept without its pixels."""
    model, data = env.sim.snapshot(world)
    state = np.empty(mujoco.mj_stateSize(model, _STATE))
    mujoco.mj_getState(model, data, state, _STATE)
    return state


@dataclass
class Take:
    """One episode of one world as it was lived, a step an element."""

    states: list[Floats] = field(default_factory=list)
    returns: list[float] = field(default_factory=list)
    readouts: list[str] = field(default_factory=list)
    over: bool = False
    mishap: str = ""


class _Recorder:
    """Watches the first rollout of each task: ``takes[task][episode]``."""

    def __init__(self, tasks: int, episodes: int, rollouts: int) -> None:
        self.rollouts = rollouts
        self.takes = [[Take() for _ in range(episodes)] for _ in range(tasks)]

    def __call__(self, k: int, env: Env, step: Step) -> None:
        for task, episodes in enumerate(self.takes):
            world = task * self.rollouts
            take = episodes[k]
            if take.over:
                continue
            take.over = bool(step.terminated[world] | step.truncated[world])
            # The world of an episode that has ended shows the next one already.
            take.states.append(take.states[-1] if take.over and take.states else snap(env, world))
            take.returns.append(float(step.reward[world]) + (take.returns[-1] if take.returns else 0.0))
            take.readouts.append("   ".join(_say(name, float(v[world])) for name, v in env.readout.items()))
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

    Only an agent that cannot adapt without exploration noise acts with it; of the ``rollouts`` it adapts to, the first
    is shown. ``size`` is one panel's; ``fps`` defaults to the control rate (mp4, at most 30) or 12.5 (gif); always in
    real time. Raises ``VideoError`` for an unknown suffix, a folder that cannot be written, or no OpenGL; leaves no
    half a file.
    """
    out = Path(out)
    _check(out)
    if fps is not None and not fps > 0:
        raise VideoError(f"fps must be positive, not {fps:g}")
    with Camera(family, *size) as camera:
        env = Env(family, [task for task in tasks for _ in range(rollouts)], seed=seed)
        env.watched = True
        shown = env.tasks[::rollouts]
        recorder = _Recorder(len(shown), episodes, rollouts)
        live = partial(collect, episodes=episodes, seed=seed, rollouts=rollouts, explore=agent.explores)
        live(agent, env, shown, watch=recorder)
        rate = fps or (_GIF_FPS if out.suffix == ".gif" else min(env.control_hz, _MOST_FPS))
        heading = title or f"{family.name}  ·  {type(agent).__name__.removesuffix('Agent')}"
        sheet = Sheet(heading, _rows(family, shown, recorder.takes), episodes, size)
        moments = _moments(recorder.takes, env.control_hz, rate)
        frames = (_frame(camera, sheet, family, shown, recorder.takes, t) for t in moments)
        _write(out, _watched(frames, len(moments), out.name, progress), rate, (sheet.width, sheet.height))
    return out


def _say(name: str, value: float) -> str:
    """Put a readout's value between its name and its unit."""
    words, _, unit = name.rpartition(" ")
    return f"{words} {number(value)} {unit}" if words else f"{name} {number(value)}"


def _rows(family: Family, tasks: Sequence[Task], takes: Sequence[Sequence[Take]]) -> list[Row]:
    returns = [[r for take in row for r in take.returns] for row in takes]
    return [Row(family.space.say(t), min(r), max(r)) for t, r in zip(tasks, returns, strict=True)]


def _moments(takes: Sequence[Sequence[Take]], control_hz: float, fps: float) -> list[int]:
    """Return the step that each frame of the video shows, the last one held for a moment."""
    steps = max(len(take.states) for row in takes for take in row)
    played = max(1, round(steps / control_hz * fps))
    return [min(round(i * control_hz / fps), steps - 1) for i in range(played)] + [steps - 1] * round(_HOLD_S * fps)


def _frame(
    camera: Camera, sheet: Sheet, family: Family, tasks: Sequence[Task], takes: Sequence[Sequence[Take]], t: int
) -> Pixels:
    rows = []
    for i, (task, row) in enumerate(zip(tasks, takes, strict=True)):
        panels = []
        for k, take in enumerate(row):
            now = min(t, len(take.states) - 1)
            picture = camera.picture(task, take.states[now], key=(i, k))
            mishap = take.mishap if now == len(take.states) - 1 else ""
            panels.append(Panel(picture, f"episode {k + 1}", take.returns[: now + 1], take.readouts[now], mishap))
        rows.append(panels)
    return sheet.frame(rows, family.horizon)


def _watched(frames: Iterator[Pixels], total: int, name: str, progress: bool) -> Iterator[Pixels]:
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}")
    with Progress(*columns, TimeRemainingColumn(), disable=not progress) as bar:
        yield from bar.track(frames, total=total, description=f"rendering {name}")


def _check(out: Path) -> None:
    if out.suffix not in SUFFIXES:
        raise VideoError(f"cannot write a video as {out.name!r}: its suffix must be one of {', '.join(SUFFIXES)}")
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise VideoError(f"cannot write into the folder {out.parent}")


def _write(out: Path, frames: Iterator[Pixels], fps: float, size: tuple[int, int]) -> None:
    """Pipe frames through ffmpeg into a file beside ``out``, and rename it only when it is whole."""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{out.stem}-", suffix=out.suffix, dir=out.parent)
    except OSError as e:
        raise VideoError(f"cannot write into the folder {out.parent}: {e.strerror}") from e
    os.close(handle)
    try:
        _encode(name, frames, fps, size)
        os.chmod(name, 0o644)
        os.replace(name, out)
    except OSError as e:
        raise VideoError(f"cannot write {out}: {e.strerror}") from e
    finally:
        Path(name).unlink(missing_ok=True)


def _encode(name: str, frames: Iterator[Pixels], fps: float, size: tuple[int, int]) -> None:
    source = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{size[0]}x{size[1]}", "-r", f"{fps:g}", "-i", "-")
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", *source, *SUFFIXES[Path(name).suffix], name]
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=complaints)  # noqa: S603
        assert process.stdin is not None
        broken = False
        try:
            for frame in frames:
                process.stdin.write(frame.tobytes())
            process.stdin.close()
        except BrokenPipeError:
            broken = True
        except BaseException:
            process.kill()
            raise
        finally:
            code = process.wait()
        if code or broken:
            complaints.seek(0)
            said = complaints.read().decode(errors="replace").split("\n")[0]
            raise VideoError(f"ffmpeg could not write {Path(name).suffix}: {said}")
