"""What shrinking cost: one network's numbers before, another's after, and the difference in plain words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from galago.deploy.report.predictions import Interval, Paired, Predictions, compare
from galago.deploy.report.reading import Record, Timing
from galago.deploy.report.wording import (
    ENGINES,
    FORMS,
    between,
    counted,
    megabytes,
    milliseconds,
    percent,
    signed,
    significant,
    times,
)

ALERT = 0.005  # a change of the expected calibration error that is worth a warning: half a point


class Row(NamedTuple):
    """One figure before and after."""

    what: str
    before: str
    after: str
    difference: str
    words: str
    alert: bool = False


class Cost(NamedTuple):
    """The whole comparison."""

    rows: list[Row]
    paired: Paired | None
    remarks: list[str]
    alerts: list[str]


def what_it_cost(record: Record, against: Record) -> Cost:
    """Compares what ships of one run with what ships of another.

    Args:
        record: after.
        against: before: a float teacher, for instance.
    """
    paired = _paired(record, against)
    rows = [*_scores(record, against, paired), *_sizes(record, against), *_operations(record, against)]
    rows += _speeds(record, against)
    alerts = [row.words for row in rows if row.alert]
    return Cost(rows, paired, _remarks(record, against, paired), alerts)


def answers(record: Record) -> Predictions | None:
    """The stored answers of what ships, or of the next best form."""
    order = [record.shipped, "onnx", "openvino", "model"]
    return next((record.predictions[form] for form in order if form in record.predictions), None)


def _paired(record: Record, against: Record) -> Paired | None:
    before, after = answers(against), answers(record)
    return compare(before, after) if before is not None and after is not None else None


def _scores(record: Record, against: Record, paired: Paired | None) -> Iterator[Row]:
    for name in ("accuracy", "ece", "nll", "brier"):
        before, after = against.number(name), record.number(name)
        if before is None or after is None:
            continue
        interval: Interval | None = getattr(paired, name) if paired else None
        share, decimals = name in ("accuracy", "ece"), 2 if name in ("accuracy", "ece") else 3
        first, then = (percent(value, 2) if share else f"{value:.3f}" for value in (before, after))
        scale = 100 if share else 1
        difference = signed(scale * (after - before), decimals) + (" points" if share else "")
        if interval:
            difference += f" ({between(interval, scale, decimals)})"
        words = _SAYING[name](before, after, interval, paired)
        yield Row(_NAMES[name], first, then, difference, words, name == "ece" and abs(after - before) > ALERT)


def _accuracy_words(before: float, after: float, interval: Interval | None, paired: Paired | None) -> str:
    if paired is None:
        return "the same" if before == after else f"{'fewer' if after < before else 'more'} images right"
    change = paired.only_after - paired.only_before
    said = f"{abs(change)} of {paired.images:,} images {'fewer' if change < 0 else 'more'} right" if change else "equal"
    return f"{said}: {paired.only_before} lost, {paired.only_after} gained (McNemar p = {_chance(paired.p)})"


def _chance(p: float) -> str:
    return "0.001 or less" if p <= 0.001 else significant(p, 2)


def _ece_words(before: float, after: float, interval: Interval | None, paired: Paired | None) -> str:
    change = abs(after - before)
    if change <= ALERT:
        return "its confidence is about as honest as before"
    unsure = " The interval of the difference holds 0: it could be chance." if _open(interval) else ""
    return (
        f"Calibration {'worsened' if after > before else 'improved'} by {100 * change:.1f} points:"
        f" stated confidence is now off by {percent(after)} on average, before by {percent(before)}.{unsure}"
    )


def _open(interval: Interval | None) -> bool:
    return interval is not None and interval.low <= 0 <= interval.high


def _nll_words(before: float, after: float, interval: Interval | None, paired: Paired | None) -> str:
    return _moved(after - before, 0.005, "more surprised by the truth", "less surprised by the truth", interval)


def _brier_words(before: float, after: float, interval: Interval | None, paired: Paired | None) -> str:
    return _moved(after - before, 0.005, "probabilities farther from the truth", "probabilities closer to it", interval)


def _moved(change: float, least: float, more: str, less: str, interval: Interval | None) -> str:
    if abs(change) < least:
        return "about the same"
    return (more if change > 0 else less) + (" (could be chance)" if _open(interval) else "")


_NAMES = {"accuracy": "Accuracy", "ece": "Calibration error (ECE)", "nll": "Surprise (NLL)", "brier": "Brier score"}
_SAYING = {"accuracy": _accuracy_words, "ece": _ece_words, "nll": _nll_words, "brier": _brier_words}


def _sizes(record: Record, against: Record) -> Iterator[Row]:
    before, after = against.size(against.shipped), record.size(record.shipped)
    if before and after:
        first, then = (
            f"{megabytes(value)}, {FORMS[one.shipped]}" for value, one in ((before, against), (after, record))
        )
        yield Row("Size", first, then, _percentage(before, after), times(before / after, "smaller", "larger"))


def _operations(record: Record, against: Record) -> Iterator[Row]:
    names = {"parameters": "Parameters", "macs": "Multiply-accumulates", "bops": "Bit operations"}
    for name, what in names.items():
        before, after = against.number(name), record.number(name)
        if before and after and before > 0 and after > 0:
            words = times(before / after, "fewer", "more")
            yield Row(what, counted(before), counted(after), _percentage(before, after), words)


def _speeds(record: Record, against: Record) -> Iterator[Row]:
    for row in record.own():
        before = _earlier(row, record, against)
        if before is None or not before.median or not row.median:
            continue
        what = f"Latency, {ENGINES.get(row.engine, row.engine)}"
        first, then = (f"{milliseconds(one.median)}, {one.precision}" for one in (before, row))
        words = times(before.median / row.median, "faster", "slower")
        yield Row(what, first, then, _percentage(before.median, row.median), words)


def _earlier(row: Timing, record: Record, against: Record) -> Timing | None:
    """What a time is compared with: the other run's own file; the float form of an equally large network else."""
    found = [
        one for one in against.own() if (one.engine, one.batch, one.threads) == (row.engine, row.batch, row.threads)
    ]
    if found:
        return found[0]
    same = record.number("macs") is not None and record.number("macs") == against.number("macs")
    return record.timed(row.engine, "fp32") if same and row.precision == "integer" else None


def _percentage(before: float, after: float) -> str:
    change = 100 * (after / before - 1)
    return "0 %" if abs(change) < 0.05 else f"{signed(change, 1 if abs(change) < 10 else 0)} %"


def _remarks(record: Record, against: Record, paired: Paired | None) -> list[str]:
    found = []
    if paired is not None:
        found.append(
            f"Intervals in parentheses hold 95 % of 1,000 paired resamples of the same {paired.images:,} test images."
        )
    elif answers(record) is not None and answers(against) is not None:
        found.append("The two runs were measured on different images, so no intervals of the differences are given.")
    else:
        who = against if answers(against) is None else record
        found.append(f"Measure {who.folder} (galago measure --run {who.folder}) for intervals of the differences.")
    if record.timings and against.own():
        found.append("The two runs were timed at different moments; trust small differences of latency little.")
    elif record.timings and any(_earlier(row, record, against) for row in record.own()):
        found.append("The other run was not timed; latency before is that of this network's float file, of equal MACs.")
    return found
