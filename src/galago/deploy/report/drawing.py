"""A small kit for plots as inline SVG: scales with readable ticks, and marks whose colors the page's style decides.

Made by hand rather than with a plotting library because the page then has one font, one palette and one print style,
stays small, and every text in a plot is text. All text is escaped: names come from strangers' files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from markupsafe import Markup

WIDTH, HEIGHT = 420, 280
LEFT, RIGHT, TOP, BOTTOM = 44, 408, 30, 240  # the part of a figure that data are drawn in
Words = Callable[[float], str]


class Figure(NamedTuple):
    """A plot with its title and what to see in it."""

    title: str
    drawing: Markup
    caption: str


@dataclass(frozen=True)
class Scale:
    """From values to places in a drawing.

    Args:
        low: the value at `start`.
        high: the value at `end`.
        start: a place.
        end: another place.
        logarithmic: equal factors rather than equal differences are equally long.
    """

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (
            (math.log(x) for x in (self.low, self.high, value))
            if self.logarithmic
            else (
                self.low,
                self.high,
                value,
            )
        )
        return self.start + (self.end - self.start) * (at - low) / ((high - low) or 1)

    def ticks(self, count: int = 5) -> list[float]:
        """Round values within the scale, about `count` of them."""
        found = _log_ticks(self.low, self.high, count) if self.logarithmic else []
        return found if len(found) > 2 else _round_ticks(self.low, self.high, count)


def _round_ticks(low: float, high: float, count: int) -> list[float]:
    """
    >>> _round_ticks(0, 10, 5), _round_ticks(0.88, 0.93, 5)
    ([0.0, 2.0, 4.0, 6.0, 8.0, 10.0], [0.88, 0.89, 0.9, 0.91, 0.92, 0.93])
    """
    rough = (high - low) / count or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(place * step, 12) for place in range(first, last + 1)]


def _log_ticks(low: float, high: float, count: int) -> list[float]:
    """
    >>> _log_ticks(0.1, 1, 5), _log_ticks(1, 1e6, 4)
    ([0.1, 0.2, 0.5, 1.0], [1.0, 100.0, 10000.0, 1000000.0])
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = max(1, math.ceil(math.log10(high / low) / count))
    factors = (1, 2, 5) if math.log10(high / low) * 3 <= count + 2 else (1,)
    values = [factor * 10.0**power for power in powers if power % every == 0 for factor in factors]
    return [float(f"{value:.12g}") for value in values if low * 0.999 <= value <= high * 1.001]


def around(values: Sequence[float], least: float = 0.0, margin: float = 0.15) -> tuple[float, float]:
    """Lower and upper end of a scale that holds these values with some air, and is at least so wide."""
    low, high = min(values), max(values)
    spread = max(high - low, least)
    middle = (low + high) / 2
    return middle - spread * (0.5 + margin), middle + spread * (0.5 + margin)


def around_shares(values: Sequence[float], least: float, margin: float) -> tuple[float, float]:
    """The same for shares, with no empty room above 100 %."""
    low, high = around(values, least, margin)
    return low, min(high, max([1.0, *values]) + 0.03 * (high - low))


def around_log(values: Sequence[float], least: float = 2.0) -> tuple[float, float]:
    """The same for a logarithmic scale."""
    low, high = around([math.log(value) for value in values], math.log(least))
    return math.exp(low), math.exp(high)


def accuracy_ticks(y: Scale) -> tuple[list[float], Words]:
    """Ticks of a scale of accuracies, none above 100 %, and how they are written."""
    ticks = [tick for tick in y.ticks(6) if tick <= 1]
    fine = any(abs(100 * tick - round(100 * tick)) > 1e-6 for tick in ticks)
    return ticks, lambda tick: f"{100 * tick:.{1 if fine else 0}f} %"


def plainly(value: float) -> str:
    """Without zeros at the end, with a true minus sign."""
    return f"{value:g}".replace("-", "−")


class Canvas:
    """Collects marks. `kind` is a class of style.css."""

    def __init__(self, width: int = WIDTH, height: int = HEIGHT) -> None:
        self.width, self.height = width, height
        self.marks: list[Markup] = []

    def add(self, template: str, *values: object) -> None:
        """A mark, its values escaped and its lengths rounded to a tenth of a unit."""
        shown = [round(value, 1) if isinstance(value, float) else value for value in values]
        self.marks.append(Markup(template).format(*shown))

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        self.add('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>', kind, x1, y1, x2, y2)

    def rectangle(self, x: float, y: float, width: float, height: float, kind: str, title: str = "") -> None:
        """Told by its upper left corner; `title` shows up under the pointer."""
        told = Markup("<title>{}</title>").format(title) if title else ""
        template = '<rect class="{}" x="{}" y="{}" width="{}" height="{}">{}</rect>'
        self.add(template, kind, float(x), float(y), float(max(width, 0)), float(max(height, 0)), told)

    def text(self, x: float, y: float, content: str, kind: str = "tick", anchor: str = "start") -> None:
        """`anchor`: which end of the text stands at x: start, middle or end."""
        self.add('<text class="{}" x="{}" y="{}" text-anchor="{}">{}</text>', kind, x, y, anchor, content)

    def curve(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.add('<polyline class="{}" points="{}"/>', f"curve {kind}", path)

    def mark(self, x: float, y: float, shape: str, kind: str, title: str = "", radius: float = 5.0) -> None:
        """`shape`: circle, square or diamond; `radius` is that of a circle."""
        corners = {
            "square": ((-4.5, -4.5), (4.5, -4.5), (4.5, 4.5), (-4.5, 4.5)),
            "diamond": ((0, -6.5), (6.5, 0), (0, 6.5), (-6.5, 0)),
        }
        told = Markup("<title>{}</title>").format(title)
        if shape in corners:
            path = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners[shape])
            self.add('<polygon class="mark {}" points="{}">{}</polygon>', kind, path, told)
        else:
            self.add('<circle class="mark {}" cx="{}" cy="{}" r="{}">{}</circle>', kind, x, y, radius, told)

    def key(self, entries: Sequence[tuple[str, str]], y: float = 12, x: float = LEFT) -> None:
        """What the colors mean, in a line: (kind, words) each."""
        for kind, words in entries:
            self.rectangle(x, y - 8, 10, 9, kind)
            self.text(x + 14, y, words, "key")
            x += 14 + 5.9 * len(words) + 14

    def across(self, y: Scale, ticks: Sequence[float], words: Words, end: float = RIGHT) -> None:
        """Grid lines from left to right with their values at the left."""
        for tick in ticks:
            self.line(LEFT, y(tick), end, y(tick), "grid")
            self.text(LEFT - 6, y(tick) + 3.5, words(tick), "tick", "end")

    def below(self, x: Scale, ticks: Sequence[float], words: Words, title: str, y: float = BOTTOM) -> None:
        """The lower axis with its values and what they are."""
        self.line(LEFT, y, RIGHT, y, "axis")
        for tick in ticks:
            self.line(x(tick), y, x(tick), y + 4, "axis")
            self.text(x(tick), y + 15, words(tick), "tick", "middle")
        self.text((LEFT + RIGHT) / 2, y + 31, title, "title", "middle")

    def drawn(self, description: str) -> Markup:
        """The finished drawing; `description` is what is read out to those who cannot see it."""
        template = '<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>'
        return Markup(template).format(self.width, self.height, description, Markup("").join(self.marks))
