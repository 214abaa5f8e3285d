"""verify.json as two tables: the verdict on each comparison, and the codes layer by layer."""

from __future__ import annotations

from typing import Any, NamedTuple

from galago.deploy.report.reading import ROWS, Record, number, text
from galago.deploy.report.summary import checks
from galago.deploy.report.wording import MISSING, percent, significant

CHECKED = {
    "integer": "integer network against trained model",
    "onnxruntime": "ONNX Runtime against integer network",
    "openvino": "OpenVINO against integer network",
}
Codes = tuple[str, str, str]  # equal, within one step, largest difference in steps


class Parity(NamedTuple):
    """One comparison as it is shown."""

    what: str
    passed: bool
    agreement: str
    metric: str
    largest: str
    codes: str
    first: str


def verdicts(record: Record) -> list[Parity]:
    """A line for each comparison that was made."""
    return [_verdict(CHECKED[name], part) for name, part in checks(record)]


def codes(record: Record) -> list[tuple[str, list[Codes]]]:
    """A line for each layer, with a triple for each comparison, in the order of `verdicts`."""
    tables = [{text(row.get("layer")): row for row in _rows(part)} for _, part in checks(record)]
    names = dict.fromkeys(name for table in tables for name in table)
    return [(name, [_triple(table.get(name, {})) for table in tables]) for name in names]


def _verdict(what: str, part: dict[str, Any]) -> Parity:
    difference = number(part.get("metric_difference"))
    return Parity(
        what=what,
        passed=part.get("passed") is True,
        agreement=percent(number(part.get("agreement")), 2),
        metric=MISSING if difference is None else f"{100 * difference:.2f} points",
        largest=significant(number(part.get("largest_difference")), 2),
        codes=_all_codes(_rows(part)),
        first=text(part.get("first_diverging")),
    )


def _all_codes(rows: list[dict[str, Any]]) -> str:
    equal, steps = ([value for row in rows if (value := number(row.get(key))) is not None] for key in _KEYS)
    said = [f"{_floored(min(equal))} or more a layer"] if equal else []
    return ", ".join([*said, *([f"off by {max(steps):g} at most"] if steps else [])]) or MISSING


_KEYS = ("equal", "largest_steps")


def _floored(share: float) -> str:
    """Rounded down, so that "or more" is true."""
    return f"{int(share * 1e4 + 1e-6) / 100:.2f} %"


def _triple(row: dict[str, Any]) -> Codes:
    equal, within = (percent(number(row.get(key)), 3) for key in ("equal", "within_one"))
    steps = number(row.get("largest_steps"))
    return equal, within, MISSING if steps is None else f"{steps:g}"


def _rows(part: dict[str, Any]) -> list[dict[str, Any]]:
    listed = part.get("layers")
    return [row for row in listed[:ROWS] if isinstance(row, dict)] if isinstance(listed, list) else []
