"""What a comparison of several forms of a network comes to: numbers, changes, and what somebody has to know."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from galago.intervals import Estimate

BEFORE, MODEL = "before", "model"  # the network of another run, and this run's; its files have their engine's name
FORMS = {
    BEFORE: "the network before",
    MODEL: "the trained model",
    "onnx": "the ONNX file",
    "openvino": "OpenVINO's file",
}
FIRST = "accuracy"  # everybody looks at it; what moves more than it does, nobody expects
LEAST = 0.001  # a tenth of a point: no smaller change is worth a word
ALERT = 0.005  # half a point of the calibration error
CALIBRATION = {"ece": "calibration error (ECE)", "ece_scaled": "calibration error after temperature scaling"}
SCORES = {"msp": "confidence", "max_logit": "largest score", "energy": "energy", "entropy": "entropy"}  # of AUROCs
Found = Mapping[str, Mapping[str, Estimate]]  # form of the network → number → estimate


class Change(NamedTuple):
    """What one step of the way made of a number."""

    before: str  # form of the network
    after: str
    metric: str
    estimate: Estimate

    def words(self) -> str:
        """Such as: by +1.2 points (+0.3 to +2.0) from the network before to the trained model."""
        said = f"by {100 * self.estimate.value:+.1f} points"
        if interval := self.estimate.interval():
            said += f" ({100 * interval[0]:+.1f} to {100 * interval[1]:+.1f})"
        said += f" from {FORMS[self.before]} to {FORMS[self.after]}"
        return said.replace("-", "−")

    def tone(self) -> str:
        """Whether it is a change for the better: all numbers that alerts are about are errors, but AUROCs."""
        return "Better" if (self.estimate.value > 0) == self.metric.startswith("auroc_") else "Worse"

    def chance(self) -> str:
        """A remark where the interval holds 0."""
        interval = self.estimate.interval()
        return "" if interval is None or not interval[0] <= 0 <= interval[1] else "; it could be chance"


def told(found: Found) -> dict[str, Any]:
    """Rows, changes and alerts as plain data.

    Args:
        found: numbers of each form of the network, in the order of the way.
    """
    changes = list(changes_of(found))
    return {
        "rows": [
            {"form": form, "metric": metric, **plain(estimate)}
            for form, numbers in found.items()
            for metric, estimate in numbers.items()
        ],
        "changes": [
            {"from": change.before, "to": change.after, "metric": change.metric, **plain(change.estimate)}
            for change in changes
        ],
        "alerts": list(alerts(changes)),
    }


def plain(estimate: Estimate) -> dict[str, float | None]:
    """An estimate as plain data."""
    low, high = estimate.interval() or (None, None)
    return {"value": estimate.value, "low": low, "high": high}


def changes_of(found: Found) -> Iterator[Change]:
    """From the network before to the trained model, and from that to each file."""
    for before, after in [(BEFORE, MODEL), *((MODEL, form) for form in found if form not in (BEFORE, MODEL))]:
        for metric, estimate in found.get(after, {}).items():
            if metric in found.get(before, {}):
                yield Change(before, after, metric, estimate.minus(found[before][metric]))


def alerts(changes: list[Change]) -> Iterator[str]:
    """What somebody has to know: honesty lost or gained, and robustness that moved more than accuracy did."""
    moved = {(one.before, one.after): abs(one.estimate.value) for one in changes if one.metric == FIRST}
    for change in changes:
        size, expected = abs(change.estimate.value), moved.get((change.before, change.after), 0.0)
        if change.metric in CALIBRATION and size > ALERT:
            yield f"{change.tone()}: {CALIBRATION[change.metric]} moved {change.words()}{change.chance()}."
        if (what := watched(change.metric)) and size > max(expected, LEAST):
            said = f"{change.tone()}: {what} moved {change.words()}; accuracy moved by {100 * expected:.1f}"
            yield f"{said}{change.chance()}."


def watched(metric: str) -> str:
    """What a number that should move no more than accuracy is called; empty for all others.

    >>> watched("corruption_error"), watched("auroc_energy_mean"), watched("nll")
    ('error on corrupted images', 'AUROC of known against unknown images, by energy,', '')
    """
    if metric == "corruption_error":
        return "error on corrupted images"
    if metric.startswith("auroc_") and metric.endswith("_mean"):
        score = metric.removeprefix("auroc_").removesuffix("_mean")
        return f"AUROC of known against unknown images, by {SCORES.get(score, score)},"
    return ""


def show(written: Mapping[str, Any]) -> None:
    """Prints the numbers without intervals, a column for each form of the network; then alerts and remarks."""
    table = Table(box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    cells: dict[str, dict[str, str]] = {}
    for row in written["rows"]:
        cells.setdefault(row["metric"], {})[row["form"]] = f"{row['value']:.4f}"
    forms = list(dict.fromkeys(row["form"] for row in written["rows"]))
    for form in forms:
        table.add_column(form, justify="right")
    for metric, values in cells.items():
        table.add_row(metric, *(values.get(form, "") for form in forms))
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    for said in (*written["alerts"], *written["remarks"]):
        console.print(said, markup=False)
