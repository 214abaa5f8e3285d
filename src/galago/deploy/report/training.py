"""Plots of the training: losses, learning rate, and what the validation images said after each epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from galago.deploy.report.drawing import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    Canvas,
    Figure,
    Scale,
    accuracy_ticks,
    around_shares,
    plainly,
)
from galago.deploy.report.reading import Record, number, text
from galago.deploy.report.wording import percent, reference, significant

_POINTS = 240  # of a curve: more would not be seen


def _steps(value: float) -> str:
    return f"{value / 1000:g} k" if value >= 1000 else f"{value:g}"


def loss_curves(record: Record) -> Figure | None:
    """Each loss over the steps of training, and the learning rate under them."""
    lines = [line for line in record.history if line.get("kind") == "step" and number(line.get("step")) is not None]
    names = [name for name in dict.fromkeys(key for line in lines[:50] for key in line) if name not in _NOT_LOSSES]
    names = names[:1] if len(names) == 2 else names[:4]  # one loss alone equals their sum
    curves = {name: _series(lines, name) for name in names}
    curves = {name: points for name, points in curves.items() if len(points) > 1}
    if not curves:
        return None
    canvas, floor = Canvas(height=330), 285.0
    x = Scale(0, max(points[-1][0] for points in curves.values()), LEFT, RIGHT)
    y = Scale(0, 1.05 * (_high(curves) or 1), BOTTOM, TOP)
    canvas.across(y, y.ticks(5), plainly)
    for place, points in enumerate(curves.values()):
        canvas.curve([(x(step), max(y(loss), TOP - 6.0)) for step, loss in _thinned(points)], f"curve-{place}")
    if rates := _series(lines, "learning_rate"):
        top = max(rate for _, rate in rates) or 1
        canvas.curve([(x(step), floor - 26 * rate / top) for step, rate in _thinned(rates)], "curve-rate")
        canvas.text(RIGHT, floor - 30, f"learning rate, at most {significant(top, 2)}", "tick", "end")
    canvas.key([(f"swatch-{place}", text(name, 18)) for place, name in enumerate(curves)], y=14)
    canvas.below(x, x.ticks(5), _steps, "optimizer step", floor)
    caption = "Training losses, weighted as they are minimized, and how the learning rate went."
    return Figure("Losses while training", canvas.drawn("Training losses over optimizer steps"), caption)


_NOT_LOSSES = ("kind", "epoch", "step", "learning_rate")


def _high(curves: dict[str, list[tuple[float, float]]]) -> float:
    """Most of the highest curve: the first steps may lie above the picture."""
    return max(sorted(loss for _, loss in points)[int(0.985 * (len(points) - 1))] for points in curves.values())


def accuracy_curve(record: Record, against: Record | None) -> Figure | None:
    """Accuracy on the validation images after each epoch."""
    lines = [line for line in record.history if line.get("kind") == "epoch"]
    points = [(epoch + 1, value) for epoch, value in _series(lines, "accuracy", "epoch")]
    if len(points) < 2:
        return None
    canvas, floor = Canvas(height=330), 285.0
    before = against.number("accuracy") if against else None
    shown = sorted(value for _, value in points)
    low, high = around_shares(shown[len(shown) // 20 :] + ([before] if before else []), least=0.02, margin=0.1)
    x, y = Scale(points[0][0], points[-1][0], LEFT, RIGHT), Scale(low, high, BOTTOM, TOP)
    canvas.across(y, *accuracy_ticks(y))
    canvas.curve([(x(epoch), min(y(value), BOTTOM + 4.0)) for epoch, value in _thinned(points)], "curve-0")
    if before is not None:
        canvas.line(LEFT, y(before), RIGHT, y(before), "level")
    best = max(points, key=lambda point: point[1])
    canvas.mark(x(best[0]), y(best[1]), "circle", "ours", f"best: {percent(best[1])} in epoch {best[0]:.0f}")
    errors = [(epoch + 1, value) for epoch, value in _series(lines, "ece", "epoch")]
    if len(errors) > 1 and (worst := max(value for _, value in errors)) > 0:
        canvas.curve([(x(e), floor - 26 * v / worst) for e, v in _thinned(errors)], "curve-rate")
        canvas.text(RIGHT, floor - 30, f"calibration error, at most {percent(worst)}", "tick", "end")
    entries = [("swatch-0", "validation images")]
    beside = [("swatch-level", f"{reference(against)}, test images")] if against and before is not None else []
    canvas.key(entries + beside, y=14)
    canvas.below(x, [t for t in x.ticks(6) if t == int(t)], lambda t: f"{t:.0f}", "epoch", floor)
    caption = f"Best epoch: {best[0]:.0f}, with {percent(best[1])} of the validation images right."
    return Figure("Accuracy while training", canvas.drawn("Validation accuracy by epoch"), caption)


def _series(lines: Sequence[dict[str, Any]], name: str, along: str = "step") -> list[tuple[float, float]]:
    pairs = [(number(line.get(along)), number(line.get(name))) for line in lines]
    return sorted((x, y) for x, y in pairs if x is not None and y is not None)


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most so many points, each the mean of its neighbors."""
    size = -(-len(points) // _POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]
