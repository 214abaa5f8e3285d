"""Plots of what each layer's rounding costs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from galago.deploy.report.layers import losses_all_but, losses_alone
from galago.deploy.report.reading import read_record

Write = Callable[..., Path]


def changed(run: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    path = run / "sensitivity.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return run


def figures(run: Path) -> list[Any]:
    record = read_record(run)
    return [draw(record.losses, record.layers) for draw in (losses_alone, losses_all_but)]


def bars(drawing: str) -> dict[str, float]:
    """The height of each bar by what it says under the pointer."""
    found = re.findall(r'<rect class="fill-\w+"[^>]* height="([\d.]+)"><title>(.*?)</title>', drawing)
    return {words: float(height) for height, words in found}


def test_each_layer_has_a_bar_of_the_height_of_its_loss(write_run: Write) -> None:
    alone, all_but = (bars(figure.drawing) for figure in figures(write_run("student")))
    assert len(alone) == len(all_but) == 21
    words = "7 layer1.6.conv1: 0.0120, accuracy 89.4 %, own output 20.0 dB"
    assert max(alone, key=alone.__getitem__) == words
    assert alone[words] == pytest.approx(6 * alone["1 conv1: 0.00200, accuracy 89.9 %, own output 20.0 dB"], abs=0.4)
    assert [words for words in alone if words.startswith("streams: 0.00100, accuracy") and "dB" not in words]
    assert min(all_but, key=all_but.__getitem__).startswith("7 layer1.6.conv1: 0.0880")


def test_captions_name_the_extremes_and_the_whole(write_run: Write) -> None:
    alone, all_but = (figure.caption for figure in figures(write_run("student")))
    assert "256 validation images. Most: layer 7, layer1.6.conv1, 0.012." in alone
    assert "with 0.10 and accuracy 85.0 % (90.0 % in float)" in all_but
    assert "Most: layer 7, layer1.6.conv1, 0.088." in all_but


def test_numbers_are_those_of_the_table_of_layers(write_run: Write) -> None:
    run = changed(write_run("student"), lambda content: content["layers"].reverse())
    assert any(words.startswith("7 layer1.6.conv1") for words in bars(figures(run)[0].drawing))


def test_without_probabilities_the_squared_error_is_drawn(write_run: Write) -> None:
    def only_squares(content: dict[str, Any]) -> None:
        for row in content["layers"]:
            del row["alone"]["kl"]

    figure = figures(changed(write_run("student"), only_squares))[0]
    assert figure.caption.startswith("Mean squared difference")
    assert any(words.startswith("7 layer1.6.conv1: 0.480") for words in bars(figure.drawing))


def test_a_run_without_the_probe_has_no_such_plot(write_run: Write) -> None:
    run = write_run("student")
    (run / "sensitivity.json").unlink()
    assert figures(run) == [None, None]
    assert figures(write_run("teacher", bits=None)) == [None, None]


def test_a_network_that_loses_nothing_is_drawn_all_the_same(write_run: Write) -> None:
    def nothing(content: dict[str, Any]) -> None:
        for row in [content["all"], *(row[side] for row in content["layers"] for side in ("alone", "all_but"))]:
            row["kl"] = -1e-17

    for figure in figures(changed(write_run("student"), nothing)):
        assert set(bars(figure.drawing).values()) == {0.0}
