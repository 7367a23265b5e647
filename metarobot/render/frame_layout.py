"""Layout of a video frame: pictures of several tasks and episodes, with text and curves."""

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

TEXT_RGB = (32, 42, 52)
TASK_TEXT_RGB = (108, 122, 134)
PAGE_RGB = (246, 248, 250)
CHART_RGB = (255, 255, 255)
CHART_LINE_RGB = (222, 229, 234)
CURVE_RGB = (232, 96, 28)
EARLIER_CURVE_RGB = (176, 190, 200)
LABEL_RGBA = (255, 255, 255, 205)

CHART_OVERSAMPLE = 3
"""Charts are drawn this many times finer, then averaged, for smooth lines."""
LARGEST_HEIGHT_PX = 20_000
"""Height of the page before it is cut to what is on it."""
SMALLEST_FONT_PX = 8


@dataclass(frozen=True)
class Panel:
    """One episode at one control step: its picture, and what is written over it."""

    picture: Pixels
    """``(height, width, 3)`` uint8."""
    label: str
    """Name of the episode."""
    returns: Sequence[float]
    """Return so far, one value a step."""
    readout: str
    """The family's readouts, as text."""
    failure: str = ""
    """Why the episode ended before its time; empty if it did not, or not yet."""


class TaskRow(NamedTuple):
    """A task in words, and the range of its episodes' returns so far."""

    text: str
    low: float
    high: float


class FrameLayout:
    """The layout of a video: a title, then a row of panels for each task.

    What stays the same in all frames is drawn once.
    """

    def __init__(
        self, title: str, rows: Sequence[TaskRow], columns: int, size: tuple[int, int]
    ) -> None:
        """Lay out ``columns`` panels of ``size`` (width, height) pixels in each row."""
        self.panel_w, self.panel_h = size
        self.font_px = max(SMALLEST_FONT_PX, round(self.panel_w / 24))
        self.gap = self.font_px
        self.chart_h = round(2.6 * self.font_px)
        self.width = _next_even(columns * (self.panel_w + self.gap) + self.gap)
        self._rows = rows
        self._tops: list[int] = []
        """Upper edge of each row's panels, pixels from the top."""

        text_width = self.width - 2 * self.gap
        page = Image.new("RGB", (self.width, LARGEST_HEIGHT_PX), PAGE_RGB)
        draw = ImageDraw.Draw(page)

        title_font = _font_to_fit(title, text_width, round(1.5 * self.font_px))
        draw.text((self.gap, self.gap), title, fill=TEXT_RGB, font=title_font)
        y = self.gap + round(2.4 * self.font_px)

        line_height = round(1.4 * self.font_px)
        for row in rows:
            for line in wrap(row.text, text_width, _font(self.font_px)):
                draw.text((self.gap, y), line, fill=TASK_TEXT_RGB, font=_font(self.font_px))
                y += line_height
            top = y + round(0.3 * self.font_px)
            self._tops.append(top)
            y = top + self.panel_h + self.chart_h + self.gap

        self.height = _next_even(y)
        self._page = page.crop((0, 0, self.width, self.height))

    def frame(self, rows: Sequence[Sequence[Panel]], horizon: int) -> Pixels:
        """Compose one frame of panels ``rows[task][episode]``, ``(height, width, 3)`` uint8.

        The charts of one task share their scale; time runs from 0 to ``horizon`` steps.
        """
        image = self._page.copy()
        for task_row, top, panels in zip(self._rows, self._tops, rows, strict=True):
            curves = [panel.returns for panel in panels]
            for k, panel in enumerate(panels):
                left = self.gap + k * (self.panel_w + self.gap)
                image.paste(Image.fromarray(panel.picture), (left, top))
                draw = ImageDraw.Draw(image, "RGBA")
                self._draw_labels(draw, panel, left, top)
                chart = self._chart(task_row, curves[: k + 1], horizon)
                image.paste(chart, (left, top + self.panel_h))
        return np.asarray(image)

    def _draw_labels(self, draw: ImageDraw.ImageDraw, panel: Panel, left: int, top: int) -> None:
        """Write into the four corners of a panel."""
        margin = self.font_px // 2
        right = left + self.panel_w - margin
        bottom = top + self.panel_h - margin - round(1.6 * self.font_px)
        total = panel.returns[-1] if panel.returns else 0.0
        total_text = f"return {format_number(total)}"

        upper_left = (left + margin, top + margin)
        upper_right = (right, top + margin)
        self._draw_label(draw, panel.label, upper_left, bold=True)
        self._draw_label(draw, total_text, upper_right, align_right=True, bold=True)
        self._draw_label(draw, panel.readout, (left + margin, bottom))
        self._draw_label(draw, panel.failure, (right, bottom), align_right=True)

    def _draw_label(
        self,
        draw: ImageDraw.ImageDraw,
        text: str,
        corner: tuple[int, int],
        *,
        align_right: bool = False,
        bold: bool = False,
    ) -> None:
        """Write text on a translucent rectangle whose upper left (or right) corner is given."""
        if not text:
            return
        font = _font(self.font_px, bold)
        width = font.getlength(text) + self.font_px
        height = 1.6 * self.font_px
        x = corner[0] - width if align_right else corner[0]
        y = corner[1]
        draw.rounded_rectangle((x, y, x + width, y + height), self.font_px / 3, fill=LABEL_RGBA)
        centre = (x + width / 2, y + height / 2)
        draw.text(centre, text, fill=TEXT_RGB, font=font, anchor="mm")

    def _chart(self, row: TaskRow, curves: Sequence[Sequence[float]], horizon: int) -> Image.Image:
        """Draw the return so far, above a thin bar of time.

        The last curve is the episode's own; those before are earlier episodes of the task, in grey.
        """
        width = CHART_OVERSAMPLE * self.panel_w
        height = CHART_OVERSAMPLE * self.chart_h
        bar = CHART_OVERSAMPLE * max(3, self.font_px // 5)
        line_width = CHART_OVERSAMPLE * max(2, self.font_px // 6)
        image = Image.new("RGB", (width, height), CHART_RGB)
        draw = ImageDraw.Draw(image)

        # The scale always includes a return of 0, marked by a line.
        low = min(row.low, 0.0)
        high = max(row.high, 0.0)
        scale = (height - 3.5 * bar) / max(high - low, 1e-9)  # pixels a unit of return

        zero_y = bar + high * scale
        draw.line((0, zero_y, width, zero_y), fill=CHART_LINE_RGB, width=CHART_OVERSAMPLE)

        own = curves[-1]
        for curve in curves:
            points = []
            for step, value in enumerate([0.0, *curve]):
                points.append((width * step / horizon, bar + (high - value) * scale))
            colour = CURVE_RGB if curve is own else EARLIER_CURVE_RGB
            draw.line(points, fill=colour, width=line_width, joint="curve")

        elapsed = width * len(own) / horizon
        draw.rectangle((0, height - bar, width, height), fill=CHART_LINE_RGB)
        draw.rectangle((0, height - bar, elapsed, height), fill=CURVE_RGB)
        return image.reduce(CHART_OVERSAMPLE)


def format_number(x: float) -> str:
    """Write a number in few characters, with a true minus sign: one decimal below 100."""
    decimals = 0 if abs(x) >= 99.95 else 1
    rounded = round(x, decimals) + 0.0  # adding 0 makes minus zero plus zero
    return f"{rounded:.{decimals}f}".replace("-", "−")


def wrap(text: str, width: float, font: ImageFont.FreeTypeFont) -> list[str]:
    """Break a text into lines that fit, between parts that ``  ·  `` separates."""
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


def _font_to_fit(text: str, width: float, size: int) -> ImageFont.FreeTypeFont:
    """Return the bold font of ``size``, or a smaller one in which the text fits."""
    while size > SMALLEST_FONT_PX and _font(size, True).getlength(text) > width:
        size -= 1
    return _font(size, True)


def _next_even(x: float) -> int:
    """Round up to an even number: video codecs take no odd sizes."""
    return 2 * math.ceil(x / 2)
