"""Video files: recorded episodes of several tasks side by side, through ffmpeg."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import imageio_ffmpeg
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from metarobot.render.camera import Camera
from metarobot.render.frame_layout import FrameLayout, Panel
from metarobot.render.opengl import VideoError
from metarobot.render.scene import Pixels
from metarobot.tasks.family import Family
from metarobot.tasks.space import Task
from metarobot.types import Floats

GIF_FPS = 12.5
MOST_FPS = 30.0
HOLD_S = 1.2
"""How long the last picture stays, s."""

_GIF_FILTER = "split[a][b];[a]palettegen=stats_mode=diff[p];[b][p]paletteuse=dither=bayer:bayer_scale=5:diff_mode=rectangle"
SUFFIXES: Mapping[str, tuple[str, ...]] = {
    ".mp4": (
        "-c:v",
        "libx264",
        "-pix_fmt",
        "yuv420p",
        "-crf",
        "21",
        "-preset",
        "medium",
        "-movflags",
        "+faststart",
    ),
    ".gif": ("-vf", f"scale='min(960,iw)':-2:flags=lanczos,{_GIF_FILTER}", "-loop", "0"),
}
"""Kinds of file that can be written -> how ffmpeg is told to."""


@dataclass
class Recording:
    """One episode of one world as it was lived, a step an element."""

    states: list[Floats] = field(default_factory=list)
    returns: list[float] = field(default_factory=list)
    readouts: list[str] = field(default_factory=list)
    over: bool = False
    mishap: str = ""


def frame_steps(takes: Sequence[Sequence[Recording]], control_hz: float, fps: float) -> list[int]:
    """Return the step that each frame of the video shows, the last one held for a moment."""
    steps = max(len(take.states) for row in takes for take in row)
    played = max(1, round(steps / control_hz * fps))
    return [min(round(i * control_hz / fps), steps - 1) for i in range(played)] + [
        steps - 1
    ] * round(HOLD_S * fps)


def compose_frame(
    camera: Camera,
    sheet: FrameLayout,
    family: Family,
    tasks: Sequence[Task],
    takes: Sequence[Sequence[Recording]],
    t: int,
) -> Pixels:
    rows = []
    for i, (task, row) in enumerate(zip(tasks, takes, strict=True)):
        panels = []
        for k, take in enumerate(row):
            now = min(t, len(take.states) - 1)
            picture = camera.picture(task, take.states[now], key=(i, k))
            mishap = take.mishap if now == len(take.states) - 1 else ""
            panels.append(
                Panel(
                    picture, f"episode {k + 1}", take.returns[: now + 1], take.readouts[now], mishap
                )
            )
        rows.append(panels)
    return sheet.frame(rows, family.horizon)


def with_progress(
    frames: Iterator[Pixels], total: int, name: str, progress: bool
) -> Iterator[Pixels]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
    )
    with Progress(*columns, TimeRemainingColumn(), disable=not progress) as bar:
        yield from bar.track(frames, total=total, description=f"rendering {name}")


def check_output(out: Path) -> None:
    if out.suffix not in SUFFIXES:
        raise VideoError(
            f"cannot write a video as {out.name!r}: its suffix must be one of {', '.join(SUFFIXES)}"
        )
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise VideoError(f"cannot write into the folder {out.parent}")


def write_video(out: Path, frames: Iterator[Pixels], fps: float, size: tuple[int, int]) -> None:
    """Pipe frames through ffmpeg into a file beside ``out``, and rename it only when it is
    whole.
    """
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
    source = (
        "-f",
        "rawvideo",
        "-pix_fmt",
        "rgb24",
        "-s",
        f"{size[0]}x{size[1]}",
        "-r",
        f"{fps:g}",
        "-i",
        "-",
    )
    command = [
        imageio_ffmpeg.get_ffmpeg_exe(),
        "-y",
        "-v",
        "error",
        *source,
        *SUFFIXES[Path(name).suffix],
        name,
    ]
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
