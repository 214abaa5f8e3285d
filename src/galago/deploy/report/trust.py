"""Trust, as trust.json tells it: what somebody has to know, numbers of every form of the network, corruptions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from galago.deploy.report.drawing import RIGHT, Canvas, Figure, Scale
from galago.deploy.report.reading import ROWS, number, text
from galago.deploy.report.wording import MISSING, percent, signed, significant
from galago.verdicts import SCORES

FORMS = {"before": "before", "model": "trained model", "onnx": "ONNX file", "openvino": "OpenVINO file"}
NAMES = {
    "accuracy": "Accuracy",
    "ece": "Calibration error (ECE)",
    "nll": "Surprise (NLL, nats)",
    "temperature": "Best temperature",
    "ece_scaled": "ECE after temperature scaling",
    "nll_scaled": "NLL after temperature scaling",
    "aurc_confidence": "Area under error against coverage",
    "corruption_error": "Error on corrupted images",
    "corruption_ece": "ECE on corrupted images",
}
NORMS = {"linf": "L∞", "l2": "L2"}
CORRUPTION = "corruption_error_"
SHARES = {"accuracy", "ece", "mce", "error", "auroc", "aupr", "fpr95"}  # told in percent


class Number(NamedTuple):
    """A measured number with its interval, where it has one."""

    value: float
    low: float | None
    high: float | None


class Line(NamedTuple):
    """A row of the table: what each form of the network has, and the change that shrinking made."""

    what: str
    values: list[str]
    change: str
    chance: bool  # the interval of the change holds 0


class Trust(NamedTuple):
    """What the page shows; nothing of it where trust was not measured."""

    forms: list[str]
    lines: list[Line]  # those that everybody wants to see
    others: list[Line]
    alerts: list[str]
    remarks: list[str]
    figures: list[Figure]
    settings: str


def trust(content: Mapping[str, Any]) -> Trust | None:
    """Everything the page shows of trust.json, bounded and checked; None where there is nothing."""
    numbers = _numbers(content.get("rows"), "form")
    forms = [form for form in FORMS if form in numbers]
    if not forms:
        return None
    changes = _numbers(content.get("changes"), "to").get("model", {})
    metrics = dict.fromkeys(metric for form in forms for metric in numbers[form])
    first = [metric for metric in metrics if metric in NAMES or _mean_auroc(metric) or metric.endswith("_pgd_accuracy")]
    lines = {metric: _line(metric, [numbers[form].get(metric) for form in forms], changes) for metric in metrics}
    figure = errors_by_corruption(numbers)
    return Trust(
        forms=[FORMS[form] for form in forms],
        lines=[lines[metric] for metric in first],
        others=[line for metric, line in lines.items() if metric not in first],
        alerts=_texts(content.get("alerts")),
        remarks=_texts(content.get("remarks")),
        figures=[figure] if figure else [],
        settings=_settings(content),
    )


def _mean_auroc(metric: str) -> bool:
    return metric in {f"auroc_{score}_mean" for score in SCORES}


def _numbers(rows: Any, key: str) -> dict[str, dict[str, Number]]:
    """Form of the network → number → value and interval."""
    found: dict[str, dict[str, Number]] = {}
    for row in rows[: 8 * ROWS] if isinstance(rows, list) else []:
        if isinstance(row, dict) and (value := number(row.get("value"))) is not None:
            form, metric = text(row.get(key), 20), text(row.get("metric"), 60)
            found.setdefault(form, {})[metric] = Number(value, number(row.get("low")), number(row.get("high")))
    return found


def _texts(listed: Any) -> list[str]:
    return [text(said, 400) for said in listed[:50]] if isinstance(listed, list) else []


def _settings(content: Mapping[str, Any]) -> str:
    images, rounds = (number(content.get(key)) for key in ("images", "rounds"))
    severities = content.get("severities")
    said = f"{images:,.0f} test images" if images else ""
    if isinstance(severities, list) and severities:
        said += f"; corruptions of severity {', '.join(text(one, 4) for one in severities[:5])}"
    return said + (f"; intervals hold 95 % of {rounds:,.0f} resamples of the images." if rounds else "")


def _share(metric: str) -> bool:
    """Whether a number is a share of images or of certainty, told in percent."""
    return not SHARES.isdisjoint(metric.split("_"))


def _line(metric: str, values: Sequence[Number | None], changes: Mapping[str, Number]) -> Line:
    share = _share(metric)
    shown = [MISSING if one is None else percent(one.value, 2) if share else significant(one.value) for one in values]
    change = changes.get(metric)
    if change is None:
        return Line(_called(metric), shown, "", False)
    scale, decimals = (100, 2) if share else (1, 3)
    said = signed(scale * change.value, decimals) + (" points" if share else "")
    if change.low is None or change.high is None:
        return Line(_called(metric), shown, said, False)
    said += f" ({signed(scale * change.low, decimals)} to {signed(scale * change.high, decimals)})"
    return Line(_called(metric), shown, said, change.low <= 0 <= change.high)


def _called(metric: str) -> str:
    if _mean_auroc(metric):
        return f"AUROC of known against unknown, by {SCORES[metric.removeprefix('auroc_').removesuffix('_mean')]}"
    if metric.endswith("_pgd_accuracy"):
        norm, _, size = metric.removesuffix("_pgd_accuracy").partition("_")
        return f"Accuracy under attack (PGD, {NORMS.get(norm, norm)} {size})"
    return NAMES.get(metric, metric.replace("_", " "))


def errors_by_corruption(numbers: Mapping[str, Mapping[str, Number]]) -> Figure | None:
    """A pair of bars for each type of corruption, before and after."""
    after = numbers.get("model", {})
    before = numbers.get("before", {})
    types = [metric.removeprefix(CORRUPTION) for metric in after if metric.startswith(CORRUPTION)][:24]
    if not types:
        return None
    tall = 26 if before else 15
    canvas, left, bottom = Canvas(height=tall * len(types) + 70), 132, 26.0 + tall * len(types)
    x = Scale(0, 1, left, RIGHT)
    for tick in (0, 0.25, 0.5, 0.75, 1):
        canvas.line(x(tick), 22, x(tick), bottom, "grid")
        canvas.text(x(tick), bottom + 14, percent(tick, 0), "tick", "middle")
    for place, kind in enumerate(types):
        y = 26.0 + tall * place
        canvas.text(left - 8, y + tall / 2, kind.replace("_", " "), "key", "end")
        pair = [("fill-theirs", "before", before), ("fill-ours", "after", after)][0 if before else 1 :]
        for row, (fill, when, found) in enumerate(pair):
            if (one := found.get(CORRUPTION + kind)) is not None:
                told = f"{kind.replace('_', ' ')}, {when}: {percent(one.value)}"
                canvas.rectangle(left, y + 11 * row, x(min(max(one.value, 0), 1)) - left, 9, fill, told)
    canvas.key([("fill-theirs", "before"), ("fill-ours", "after")][0 if before else 1 :], y=14, x=left)
    canvas.line(left, 22, left, bottom, "axis")
    canvas.text((left + RIGHT) / 2, bottom + 29, "wrong answers", "title", "middle")
    caption = "Share of wrong answers on corrupted test images, averaged over severities. Shorter is better."
    return Figure("Errors by corruption", canvas.drawn("Errors by type of corruption, before and after"), caption)
