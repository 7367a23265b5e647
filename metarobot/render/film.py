"""Video files: recorded episodes of several tasks side by side, encoded by ffmpeg."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import imageio_ffmpeg
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from metarobot.files import FileError, atomic_path
from metarobot.render.camera import Camera
from metarobot.render.frame_layout import FrameLayout, Panel
from metarobot.render.opengl import VideoError
from metarobot.render.scene import Pixels
from metarobot.tasks.family import Family
from metarobot.tasks.space import Task
from metarobot.types import Floats

GIF_FPS = 12.5
"""Frames a second of a gif, unless asked otherwise."""
LARGEST_MP4_FPS = 30.0
"""Frames a second of an mp4 are at most these, unless asked otherwise."""
HOLD_S = 1.2
"""How long the last picture stays, s."""

GIF_PALETTE_FILTER = (
    "split[a][b];[a]palettegen=stats_mode=diff[p];"
    "[b][p]paletteuse=dither=bayer:bayer_scale=5:diff_mode=rectangle"
)
MP4_OPTIONS = (
    *("-c:v", "libx264"),
    *("-pix_fmt", "yuv420p"),
    *("-crf", "21"),
    *("-preset", "medium"),
    *("-movflags", "+faststart"),
)
GIF_OPTIONS = (
    *("-vf", f"scale='min(960,iw)':-2:flags=lanczos,{GIF_PALETTE_FILTER}"),
    *("-loop", "0"),
)
SUFFIXES: Mapping[str, tuple[str, ...]] = {".mp4": MP4_OPTIONS, ".gif": GIF_OPTIONS}
"""Suffix of a file that can be written -> ffmpeg's options for it."""


@dataclass
class Recording:
    """One episode of one world; lists hold one element a step."""

    states: list[Floats] = field(default_factory=list)
    """States as ``snapshot_state`` copies them."""
    returns: list[float] = field(default_factory=list)
    """Return so far."""
    readouts: list[str] = field(default_factory=list)
    """The family's readouts, as text."""
    over: bool = False
    """Whether the episode has ended."""
    failure: str = ""
    """Why it ended before its time; empty if it did not."""


def frame_steps(
    recordings: Sequence[Sequence[Recording]], control_hz: float, fps: float
) -> list[int]:
    """Return the control step that each frame of the video shows, in real time.

    The last step is held for ``HOLD_S``.
    """
    steps = max(len(recording.states) for row in recordings for recording in row)
    last = steps - 1
    frames = max(1, round(steps / control_hz * fps))
    shown = [min(round(i * control_hz / fps), last) for i in range(frames)]
    held = [last] * round(HOLD_S * fps)
    return shown + held


def compose_frame(
    camera: Camera,
    layout: FrameLayout,
    family: Family,
    tasks: Sequence[Task],
    recordings: Sequence[Sequence[Recording]],
    step: int,
) -> Pixels:
    """Draw the frame of one control step: recordings ``[task][episode]``, a panel each.

    Episodes that ended before keep their last picture.
    """
    rows = []
    for i, (task, episodes) in enumerate(zip(tasks, recordings, strict=True)):
        panels = []
        for k, recording in enumerate(episodes):
            last = len(recording.states) - 1
            now = min(step, last)
            panels.append(
                Panel(
                    picture=camera.picture(task, recording.states[now], key=(i, k)),
                    label=f"episode {k + 1}",
                    returns=recording.returns[: now + 1],
                    readout=recording.readouts[now],
                    failure=recording.failure if now == last else "",
                )
            )
        rows.append(panels)
    return layout.frame(rows, family.horizon)


def with_progress(
    frames: Iterator[Pixels], total: int, name: str, progress: bool
) -> Iterator[Pixels]:
    """Hand on frames while a progress bar counts them, if ``progress`` is set."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not progress) as bar:
        yield from bar.track(frames, total=total, description=f"rendering {name}")


def check_output(out: Path) -> None:
    """Raise ``VideoError`` for a file that cannot be written, before anything is played."""
    if out.suffix not in SUFFIXES:
        raise VideoError(
            f"cannot write a video as {out.name!r}: its suffix must be one of {', '.join(SUFFIXES)}"
        )
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise VideoError(f"cannot write into the folder {out.parent}")


def write_video(out: Path, frames: Iterator[Pixels], fps: float, size: tuple[int, int]) -> None:
    """Encode frames of ``size`` (width, height) into a file, whole or not at all.

    Raises:
        VideoError: The file cannot be written, or ffmpeg failed.
    """
    try:
        with atomic_path(out) as temporary:
            _encode(temporary, frames, fps, size)
    except FileError as e:
        raise VideoError(str(e)) from e


def _encode(path: Path, frames: Iterator[Pixels], fps: float, size: tuple[int, int]) -> None:
    """Pipe frames through ffmpeg into a file."""
    width, height = size
    raw_frames_from_stdin = (
        *("-f", "rawvideo"),
        *("-pix_fmt", "rgb24"),
        *("-s", f"{width}x{height}"),
        *("-r", f"{fps:g}"),
        *("-i", "-"),
    )
    command = [
        imageio_ffmpeg.get_ffmpeg_exe(),
        "-y",
        *("-v", "error"),
        *raw_frames_from_stdin,
        *SUFFIXES[path.suffix],
        str(path),
    ]
    # Errors go to a file: a pipe that nobody reads could fill up and block ffmpeg.
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=errors)  # noqa: S603
        assert process.stdin is not None
        broken_pipe = False
        try:
            for frame in frames:
                process.stdin.write(frame.tobytes())
            process.stdin.close()
        except BrokenPipeError:
            broken_pipe = True  # ffmpeg gave up: its errors say why
        except BaseException:
            process.kill()
            raise
        finally:
            exit_code = process.wait()

        if exit_code or broken_pipe:
            errors.seek(0)
            first_line = errors.read().decode(errors="replace").split("\n")[0]
            raise VideoError(f"ffmpeg could not write {path.suffix}: {first_line}")
