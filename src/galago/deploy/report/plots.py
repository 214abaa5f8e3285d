"""Plots of what came out: accuracy against cost, times, reliability, error against coverage. None for nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from galago.deploy.report.drawing import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    Canvas,
    Figure,
    Scale,
    accuracy_ticks,
    around_log,
    around_shares,
    plainly,
)
from galago.deploy.report.predictions import BINS, Predictions
from galago.deploy.report.reading import Record, Timing, text
from galago.deploy.report.wording import (
    ENGINES,
    FORMS,
    MADE_BY,
    megabytes,
    milliseconds,
    percent,
    reference,
    significant,
)

_SHAPES = {"model": "circle", "onnx": "square", "openvino": "diamond"}
_POINTS = 240  # of a curve: more would not be seen


class Point(NamedTuple):
    """A form of a network between what it costs and what it is worth."""

    cost: float
    accuracy: float
    shape: str
    kind: str
    words: str


def accuracy_against_size(record: Record, against: Record | None) -> Figure | None:
    """A point for every form of the networks whose size and accuracy are known."""
    points: list[Point] = []
    for one, kind, whose in _both(record, against):
        for form, numbers in one.metrics.items():
            size, accuracy = one.size(form), numbers.get("accuracy")
            if size and accuracy is not None:
                words = f"{whose}{FORMS[form]}: {megabytes(size)}, {percent(accuracy)}"
                points.append(Point(size, accuracy, _SHAPES[form], kind, words))
    caption = "Up and to the left is better. A trained model counts with its stored weights, a file with all it holds."
    return _scatter("Accuracy against size", "size on disk, MB", points, caption)


def accuracy_against_latency(record: Record, against: Record | None) -> Figure | None:
    """A point for every file that was both timed and measured."""
    points = [_timed(row, record, "ours", "") for row in record.own()]
    if against:
        rows = against.own() or _same_network_in_float(record, against)
        points += [_timed(row, against, "theirs", f"{reference(against)}: ") for row in rows]
    caption = "Up and to the left is better. Median times; only files whose accuracy was measured."
    if against and not against.own() and len(points) > len(record.own()):
        caption += " The other run was not timed: its points use the time of this network's float file, of equal MACs."
    found = [point for point in points if point is not None]
    return _scatter("Accuracy against latency", f"time for {_batch(record)}, ms", found, caption)


def _batch(record: Record) -> str:
    batch = next((row.batch for row in record.single()), 1)
    return "one image" if batch == 1 else f"a batch of {batch}"


def _both(record: Record, against: Record | None) -> list[tuple[Record, str, str]]:
    return [(record, "ours", ""), *([(against, "theirs", f"{reference(against)}: ")] if against else [])]


def _same_network_in_float(record: Record, against: Record) -> list[Timing]:
    macs = record.number("macs")
    same = macs is not None and macs == against.number("macs") and reference(against) == "float"
    return [row for row in record.single() if row.precision == "fp32"] if same else []


def _timed(row: Timing, record: Record, kind: str, whose: str) -> Point | None:
    form = MADE_BY.get(row.engine, "")
    accuracy = record.metrics.get(form, {}).get("accuracy", record.number("accuracy") if kind == "theirs" else None)
    if accuracy is None or not row.median or not form:
        return None
    words = f"{whose}{ENGINES[row.engine]}, {row.precision}: {milliseconds(row.median)}, {percent(accuracy)}"
    return Point(row.median, accuracy, _SHAPES[form], kind, words)


def _scatter(title: str, cost: str, points: Sequence[Point], caption: str) -> Figure | None:
    if len(points) < 2:
        return None
    canvas = Canvas(height=290 + 17 * len(points))
    x = Scale(*around_log([point.cost for point in points]), LEFT, RIGHT, logarithmic=True)
    low, high = around_shares([point.accuracy for point in points], least=0.01, margin=0.25)
    y = Scale(low, high, BOTTOM, TOP)
    canvas.across(y, *accuracy_ticks(y))
    canvas.below(x, x.ticks(4), plainly, cost)
    canvas.text(LEFT - 38, 14, "accuracy", "title")
    for place, point in enumerate(points):
        canvas.mark(x(point.cost), y(point.accuracy), point.shape, point.kind, point.words)
        height = 293.0 + 17 * place
        canvas.mark(LEFT + 6, height - 4, point.shape, point.kind)
        canvas.text(LEFT + 18, height, point.words, "key")
    return Figure(title, canvas.drawn(f"{title}: {'; '.join(point.words for point in points)}"), caption)


def latency_bars(record: Record) -> list[Figure]:
    """Time by engine and precision: for the smallest batch, and for the largest where there is another."""
    timed = [row for row in record.timings if row.median]
    settings = sorted({(row.batch, row.threads) for row in timed})
    shown = [settings[0], settings[-1]] if len(settings) > 1 else settings
    return [_bars([row for row in timed if (row.batch, row.threads) == setting][:15]) for setting in shown]


def _bars(rows: Sequence[Timing]) -> Figure:
    canvas, left = Canvas(height=26 * len(rows) + 56), 150
    longest = max(max(row.median or 0, row.high or 0) for row in rows)
    x, bottom = Scale(0, longest, left, RIGHT - 52), 20.0 + 26 * len(rows)
    for tick in x.ticks(4):
        canvas.line(x(tick), 12, x(tick), bottom, "grid")
        canvas.text(x(tick), bottom + 14, plainly(tick), "tick", "middle")
    for place, row in enumerate(rows):
        _bar(canvas, x, 18.0 + 26 * place, row, left)
    canvas.line(left, 12, left, bottom, "axis")
    canvas.text((left + RIGHT - 52) / 2, bottom + 29, "milliseconds", "title", "middle")
    threads = f"{rows[0].threads} thread{'s' if rows[0].threads > 1 else ''}"
    batch = "one image" if rows[0].batch == 1 else f"a batch of {rows[0].batch}"
    caption = f"Shorter is better. {threads}; thin lines reach from the 10th to the 90th percentile."
    return Figure(f"Time for {batch}", canvas.drawn(f"Time for {batch} by engine and precision"), caption)


def _bar(canvas: Canvas, x: Scale, y: float, row: Timing, left: float) -> None:
    kind = {"integer": "fill-ours", "bf16": "fill-middle"}.get(row.precision, "fill-plain")
    median = row.median or 0.0
    words = f"{ENGINES.get(row.engine, row.engine)}, {row.precision}"
    canvas.text(left - 8, y + 12, text(words, 24), "key", "end")
    canvas.rectangle(left, y, x(median) - left, 16, kind, f"{row.name}: {milliseconds(median)}")
    if row.low and row.high:
        canvas.line(x(row.low), y + 8, x(row.high), y + 8, "whisker")
    canvas.text(max(x(median), x(row.high or 0)) + 6, y + 12, milliseconds(median), "value")


def reliability_diagram(answers: Predictions, whose: str, kind: str) -> Figure:
    """Stated confidence against the share of right answers, with how many images there are under it."""
    bins, canvas, floor = answers.bins(), Canvas(height=330), 285.0
    x, y = Scale(0, 1, LEFT, RIGHT), Scale(0, 1, BOTTOM, TOP)
    canvas.across(y, [0, 0.25, 0.5, 0.75, 1], lambda tick: percent(tick, 0))
    share, width = bins.images / bins.images.sum(), (RIGHT - LEFT) / BINS
    for place in range(BINS):
        count, sure, right = int(bins.images[place]), float(bins.confidence[place]), float(bins.accuracy[place])
        left = LEFT + place * width + 1
        told = f"{count} images: said {percent(sure)}, right in {percent(right)}"
        if count:
            canvas.rectangle(left, y(right), width - 2, BOTTOM - y(right), f"fill-{kind}", told)
            gap = "sure" if sure > right else f"modest-{kind}"
            canvas.rectangle(left, y(max(sure, right)), width - 2, abs(y(sure) - y(right)), gap, told)
            tall = 26 * float(share[place] / share.max())
            canvas.rectangle(left, floor - tall, width - 2, tall, "fill-plain", told)
    canvas.line(LEFT, BOTTOM, RIGHT, TOP, "diagonal")
    canvas.line(LEFT, BOTTOM, RIGHT, BOTTOM, "axis")
    canvas.text(LEFT - 6, floor - 6, "images", "tick", "end")
    canvas.key([(f"fill-{kind}", "right answers"), ("sure", "too sure"), (f"modest-{kind}", "too modest")], y=14)
    canvas.below(x, [0, 0.25, 0.5, 0.75, 1], lambda tick: percent(tick, 0), "confidence: what the network says", floor)
    error, images = bins.expected_error(), len(answers.target)
    caption = (
        f"Bars that end on the dashed line are honest; an empty box is what was promised and not kept. Expected"
        f" calibration error {percent(error, 2)} on {images:,} images; below, how many fall into each of {BINS} bins."
    )
    return Figure(
        f"Reliability: {whose}", canvas.drawn(f"Reliability diagram of {whose}, ECE {percent(error, 2)}"), caption
    )


def risk_coverage(shown: Sequence[tuple[str, Predictions]]) -> Figure:
    """How often a network is wrong if it leaves out the images that it is least sure of; a curve for each."""
    canvas, curves = Canvas(), {}
    for whose, answers in shown:
        risk = answers.risks()
        kept = range(len(risk) - 1, 0, -max(1, len(risk) // _POINTS))
        curves[whose] = [((i + 1) / len(risk), float(risk[i])) for i in kept if 50 * i >= len(risk)]
    highest = max((error for points in curves.values() for _, error in points), default=0.0)
    x, y = Scale(0, 1, LEFT, RIGHT), Scale(0, 1.05 * highest or 0.01, BOTTOM, TOP)
    canvas.across(y, *accuracy_ticks(y))
    for place, points in enumerate(curves.values()):
        canvas.curve([(x(coverage), y(error)) for coverage, error in points], f"curve-{place}")
    canvas.text(LEFT - 38, 14, "error", "title")
    canvas.key([(f"swatch-{place}", whose) for place, whose in enumerate(curves)], y=14, x=LEFT + 6)
    canvas.below(x, [0, 0.25, 0.5, 0.75, 1], lambda tick: percent(tick, 0), "coverage: images that are answered")
    areas = "; ".join(f"{whose}: {_area(answers)}" for whose, answers in shown)
    caption = (
        f"Left out are the images of which a network is least sure. Lower is better. Area under the curve: {areas}."
    )
    return Figure(
        "Error against coverage", canvas.drawn(f"Error against coverage; area under the curve: {areas}"), caption
    )


def _area(answers: Predictions) -> str:
    ranked = "confidence" if answers.reservation is None else "reservation"
    return f"{significant(float(answers.risks().mean()))} (by {ranked})"
