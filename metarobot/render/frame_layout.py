"""Words and curves over pictures: the frame of a video that shows episodes of several tasks side by
side.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from metarobot.render.scene import Pixels

_INK, _FAINT, _PAPER, _CARD = (32, 42, 52), (108, 122, 134), (246, 248, 250), (255, 255, 255)
_ACCENT, _GHOST, _RAIL = (232, 96, 28), (176, 190, 200), (222, 229, 234)


@dataclass(frozen=True)
class Panel:
    """One episode at one moment: its picture, and what is said about it."""

    picture: Pixels
    label: str
    returns: Sequence[float]
    """The running return so far, one value a step."""
    readout: str
    mishap: str = ""
    """What ended the episode before its time."""


class TaskRow(NamedTuple):
    """What is said about a task, and between what its running returns lie from first to last."""

    text: str
    low: float
    high: float


class FrameLayout:
    """The layout of a video: a title, then a row of panels a task; all that stays the same is drawn
    once.
    """

    def __init__(
        self, title: str, rows: Sequence[TaskRow], columns: int, size: tuple[int, int]
    ) -> None:
        self.panel_w, self.panel_h = size
        self.unit = max(8, round(size[0] / 24))
        self.gap, self.strip = self.unit, round(2.6 * self.unit)
        self.width = _even(columns * (size[0] + self.gap) + self.gap)
        text_width = self.width - 2 * self.gap
        words = [wrap(row.text, text_width, _font(self.unit)) for row in rows]
        self._rows = rows
        line, self._tops = round(1.4 * self.unit), []
        y = self.gap + round(2.4 * self.unit)
        self._base = Image.new("RGB", (self.width, 20_000), _PAPER)
        ink = ImageDraw.Draw(self._base)
        heading = _fitting(title, text_width, round(1.5 * self.unit))
        ink.text((self.gap, self.gap), title, fill=_INK, font=heading)
        for text in words:
            for part in text:
                ink.text((self.gap, y), part, fill=_FAINT, font=_font(self.unit))
                y += line
            self._tops.append(y + round(0.3 * self.unit))
            y = self._tops[-1] + self.panel_h + self.strip + self.gap
        self.height = _even(y)
        self._base = self._base.crop((0, 0, self.width, self.height))

    def frame(self, rows: Sequence[Sequence[Panel]], horizon: int) -> Pixels:
        """Compose one frame of panels ``rows[task][episode]``; curves share a scale within a
        task.
        """
        image = self._base.copy()
        for row, top, panels in zip(self._rows, self._tops, rows, strict=True):
            curves = [p.returns for p in panels]
            for k, panel in enumerate(panels):
                x = self.gap + k * (self.panel_w + self.gap)
                image.paste(Image.fromarray(panel.picture), (x, top))
                ink = ImageDraw.Draw(image, "RGBA")
                self._words(ink, panel, x, top)
                image.paste(self._curves(row, curves[: k + 1], horizon), (x, top + self.panel_h))
        return np.asarray(image)

    def _words(self, ink: ImageDraw.ImageDraw, panel: Panel, x: int, y: int) -> None:
        pad = self.unit // 2
        self._chip(ink, panel.label, (x + pad, y + pad), bold=True)
        total = panel.returns[-1] if panel.returns else 0.0
        self._chip(
            ink,
            f"return {format_number(total)}",
            (x + self.panel_w - pad, y + pad),
            anchor="right",
            bold=True,
        )
        bottom = y + self.panel_h - pad - round(1.6 * self.unit)
        self._chip(ink, panel.readout, (x + pad, bottom))
        self._chip(ink, panel.mishap, (x + self.panel_w - pad, bottom), anchor="right")

    def _chip(
        self,
        ink: ImageDraw.ImageDraw,
        text: str,
        at: tuple[int, int],
        *,
        anchor: str = "left",
        bold: bool = False,
    ) -> None:
        if not text:
            return
        font = _font(self.unit, bold)
        width, height = font.getlength(text) + self.unit, 1.6 * self.unit
        x = at[0] - width if anchor == "right" else at[0]
        ink.rounded_rectangle(
            (x, at[1], x + width, at[1] + height), self.unit / 3, fill=(255, 255, 255, 205)
        )
        ink.text((x + width / 2, at[1] + height / 2), text, fill=_INK, font=font, anchor="mm")

    def _curves(self, row: TaskRow, curves: Sequence[Sequence[float]], horizon: int) -> Image.Image:
        """Draw the running return, earlier episodes of the task in grey behind it, above a thin bar
        of time.
        """
        fine = 3
        width, height, thick = fine * self.panel_w, fine * self.strip, fine * max(3, self.unit // 5)
        image = Image.new("RGB", (width, height), _CARD)
        ink = ImageDraw.Draw(image)
        low, high = min(row.low, 0.0), max(row.high, 0.0)
        room = height - 3.5 * thick
        scale = room / max(high - low, 1e-9)
        ink.line((0, thick + high * scale, width, thick + high * scale), fill=_RAIL, width=fine)
        for curve in curves:
            line = [
                (width * t / horizon, thick + (high - v) * scale)
                for t, v in enumerate([0.0, *curve])
            ]
            ink.line(
                line,
                fill=_ACCENT if curve is curves[-1] else _GHOST,
                width=fine * max(2, self.unit // 6),
                joint="curve",
            )
        ink.rectangle((0, height - thick, width, height), fill=_RAIL)
        ink.rectangle((0, height - thick, width * len(curves[-1]) / horizon, height), fill=_ACCENT)
        return image.reduce(fine)


def format_number(x: float) -> str:
    """Write a number in few characters, with a true minus sign."""
    rounded = round(x, 0 if abs(x) >= 99.95 else 1) + 0.0  # no minus zero
    text = f"{rounded:.0f}" if abs(x) >= 99.95 else f"{rounded:.1f}"
    return text.replace("-", "−")


def wrap(text: str, width: float, font: ImageFont.FreeTypeFont) -> list[str]:
    """Break a text between its ``  ·  `` separated parts so that each line fits."""
    lines: list[str] = []
    for part in text.split("  ·  "):
        joined = f"{lines[-1]}  ·  {part}" if lines else part
        if lines and font.getlength(joined) <= width:
            lines[-1] = joined
        else:
            lines.append(part)
    return lines


@functools.cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    face = font_manager.FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal")
    return ImageFont.truetype(font_manager.findfont(face), size)


def _fitting(text: str, width: float, size: int) -> ImageFont.FreeTypeFont:
    while size > 8 and _font(size, True).getlength(text) > width:
        size -= 1
    return _font(size, True)


def _even(x: float) -> int:
    return 2 * math.ceil(x / 2)
