"""The part of the page that tells what shrinking did to trust."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from galago.deploy.report.report import write_report
from galago.deploy.report.trust import Trust, trust

Write = Callable[..., Path]


def content(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "trust.json").read_text())
    return found


def told(run: Path) -> Trust:
    found = trust(content(run))
    assert found is not None
    return found


def page(run: Path) -> str:
    shown = re.sub(r"<style>.*?</style>", " ", write_report(run).read_text(), flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", shown)).replace("\u00a0", " ").split())


def test_numbers_that_everybody_wants_come_first_and_none_is_lost(write_run: Write) -> None:
    found = told(write_run("student"))
    assert [line.what for line in found.lines] == [
        "Accuracy",
        "Calibration error (ECE)",
        "Error on corrupted images",
        "AUROC of known against unknown, by energy",
        "Surprise (NLL, nats)",
        "Accuracy under attack (PGD, L∞ 0.0314)",
    ]
    assert [line.what for line in found.others] == ["mce", "corruption error fog", "corruption error glass blur"]


def test_shares_are_told_in_percent_and_changes_in_points(write_run: Write) -> None:
    found = told(write_run("student"))
    lines = {line.what: line for line in found.lines}
    assert lines["Accuracy"].values == ["91.00 %", "89.18 %", "89.18 %", "89.18 %"]
    assert lines["Accuracy"].change == "−1.80 points (−3.00 to −1.00)"
    assert not lines["Accuracy"].chance
    assert lines["Calibration error (ECE)"].chance, "its interval holds 0"
    assert lines["Surprise (NLL, nats)"].values[0] == "0.310"


def test_the_page_shows_alerts_remarks_settings_and_a_bar_for_each_corruption(write_run: Write) -> None:
    run = write_run("student")
    said = page(run)
    for words in (
        "Worse: error on corrupted images moved by +3.0 points.",
        "A remark.",
        "1,000 test images; corruptions of severity 1, 3, 5; intervals hold 95 % of 200 resamples",
        "Changes in gray could be chance.",
        "all 9 numbers",
    ):
        assert words in said
    (figure,) = told(run).figures
    assert re.findall(r"<title>(.*?)</title>", figure.drawing) == [
        "fog, before: 20.0 %",
        "fog, after: 19.6 %",
        "glass blur, before: 50.0 %",
        "glass blur, after: 49.0 %",
    ]


def test_without_a_network_before_there_are_no_changes(write_run: Write) -> None:
    run = write_run("student")
    alone = content(run)
    alone["rows"] = [row for row in alone["rows"] if row["form"] == "model"]
    alone["changes"] = []
    (run / "trust.json").write_text(json.dumps(alone))
    assert told(run).forms == ["trained model"]
    assert "change by shrinking" not in page(run)


def test_what_was_not_measured_says_by_which_command_it_is(write_run: Write) -> None:
    assert "galago trust --run" in page(write_run("teacher", bits=None))


@pytest.mark.parametrize(
    "damage",
    [
        {"rows": 3, "changes": {}, "alerts": "x", "remarks": None},
        {"rows": [1, {"form": "model"}, {"form": "stranger", "metric": "a", "value": 1}], "severities": "all"},
        {"rows": [{"form": "model", "metric": "<b>", "value": 1e308, "low": "x", "high": None}], "images": "many"},
    ],
)
def test_whatever_a_strangers_file_holds_the_page_is_written(write_run: Write, damage: dict[str, Any]) -> None:
    run = write_run("student")
    (run / "trust.json").write_text(json.dumps(content(run) | damage))
    assert "<b>" not in write_report(run).read_text().replace("<b>runs", "").replace("<b>/", "")
