"""What a run's folder says, read for its report: bounded, checked, and nothing in it trusted.

The folder may be a stranger's. Text is cut, lists are cut, numbers that are no finite numbers become None, arrays are
read without unpickling and only after their size was checked. What is missing stays empty: the report says then which
command makes it. What is damaged is a `UserError` that names the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from galago.deploy.report.attention import Looked, read_attention
from galago.deploy.report.predictions import SECTIONS, Predictions, read_predictions
from galago.errors import UserError
from galago.run import Run

TEXT, ROWS, RECIPE = 160, 400, 20_000  # characters of a cell, rows of a table, characters of the recipe shown
_RECIPE_BYTES, _JSON_BYTES, _LOG_BYTES = 256_000, 16_000_000, 64_000_000
_ENDLESS = 1e30  # no quantity of a run comes near


class Timing(NamedTuple):
    """One line of latency.json."""

    name: str
    engine: str
    precision: str
    batch: int
    threads: int
    median: float | None  # ms, as the two below
    low: float | None
    high: float | None
    images_per_second: float | None
    file_mb: float | None
    ratio: float | None  # speed against the same engine's fp32 file
    ratio_low: float | None
    ratio_high: float | None


class LayerNote(NamedTuple):
    """One line of layers.json; bits of None mean float."""

    path: str
    type: str
    shape: str
    weight_bits: float | None
    input_bits: float | None
    macs: float | None
    weight_error_db: float | None
    onnxruntime: str
    openvino: str
    note: str


class LayerLoss(NamedTuple):
    """What one layer's rounding costs; accuracies of None were not measured."""

    path: str
    alone: float  # distance of the outputs from those in float, when it alone is quantized
    all_but: float  # likewise, when it alone is not
    alone_accuracy: float | None
    all_but_accuracy: float | None
    snr_db: float | None  # of its own output


class Losses(NamedTuple):
    """sensitivity.json; without rows where there is none."""

    measure: str  # of the distance: kl or mse
    images: float | None
    all: float | None
    all_accuracy: float | None
    float_accuracy: float | None
    rows: list[LayerLoss]


@dataclass(frozen=True)
class Record:
    """A run's folder as plain values. Empty means: not there."""

    folder: Path
    recipe: dict[str, Any]
    recipe_text: str
    info: dict[str, Any]
    base: str  # class path of the network before anything was done to it, from architecture.json
    exported: bool  # whether there is a file for an engine
    history: list[dict[str, Any]]
    metrics: dict[str, dict[str, float]]
    timings: list[Timing]
    image: str  # what was timed, such as 3×32×32
    advice: str
    layers: list[LayerNote]
    losses: Losses
    verification: dict[str, Any]
    trust: dict[str, Any]
    predictions: dict[str, Predictions]
    looked: list[Looked]  # images with the maps of an attention branch

    @property
    def shipped(self) -> str:
        """The part of metrics.json that speaks of what ships: the ONNX file if it was measured, else the next best."""
        return next((section for section in ("onnx", "openvino", "model") if section in self.metrics), "")

    def number(self, name: str) -> float | None:
        """A measured number of what ships; of another form of the network where only that was measured."""
        order = [self.shipped, *SECTIONS]
        return next((self.metrics[part][name] for part in order if name in self.metrics.get(part, {})), None)

    def size(self, form: str) -> float | None:
        """MB of one form of the network: its file, or for a model that has none its weights."""
        numbers = self.metrics.get(form, {})
        stored = numbers.get("weight_bytes")
        found = numbers.get("file_mb", None if stored is None else stored / 1e6)
        return found if found and found > 0 else None

    def single(self) -> list[Timing]:
        """What was timed with the smallest batch and the fewest threads."""
        found = [row for row in self.timings if row.median]
        least = min(((row.batch, row.threads) for row in found), default=None)
        return [row for row in found if (row.batch, row.threads) == least]

    def own(self) -> list[Timing]:
        """Of these, what this run made: its integer files, or float where nothing is quantized."""
        rows = self.single()
        return [row for row in rows if row.precision == "integer"] or [r for r in rows if r.precision == "fp32"]

    def timed(self, engine: str, precision: str) -> Timing | None:
        """One engine's time with the smallest batch."""
        return next((row for row in self.single() if (row.engine, row.precision) == (engine, precision)), None)


def read_record(folder: Path) -> Record:
    """Reads everything a report needs.

    Args:
        folder: of a run.

    Raises:
        UserError: it is no run's folder, or one of its files is damaged or far too large.
    """
    run = Run(folder)
    latency = _mapping(run.folder / "latency.json")
    measured = _mapping(run.metrics)
    start = _mapping(run.architecture).get("model")
    return Record(
        folder=run.folder,
        recipe=_recipe(run),
        recipe_text=run.recipe.read_text()[:RECIPE],
        info=_mapping(run.info),
        base=text(start.get("class_path")) if isinstance(start, dict) else "",
        exported=run.onnx.exists() or run.openvino.exists(),
        history=_history(run.log),
        metrics={part: _numbers(measured[part]) for part in SECTIONS if isinstance(measured.get(part), dict)},
        timings=[_timing(row) for row in _rows(latency.get("rows"), 100)],
        image=text(latency.get("image")),
        advice=text(latency.get("advice"), 400),
        layers=[_layer(row) for row in _rows(_json(run.folder / "layers.json"), ROWS)],
        losses=_losses(_mapping(run.folder / "sensitivity.json")),
        verification=_mapping(run.verification),
        trust=_mapping(run.folder / "trust.json"),
        predictions=read_predictions(run.folder / "predictions"),
        looked=read_attention(run.folder),
    )


def number(value: Any) -> float | None:
    """A number of a size that can be measured, or None; what is far too small for that is 0.

    >>> number(3), number(float("nan")), number("3"), number(True), number(1e-300), number(10**400)
    (3.0, None, None, None, 0.0, None)
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not -_ENDLESS <= value <= _ENDLESS:
        return None
    return float(value) if abs(value) > 1 / _ENDLESS else 0.0


def text(value: Any, limit: int = TEXT) -> str:
    """A short text; lists such as shapes are joined with ×, anything else that is no text is empty.

    >>> text([16, 3, 3, 3]), text({"a": 1}), text("abcdef", limit=4)
    ('16×3×3×3', '', 'abc…')
    """
    if isinstance(value, list):
        value = "×".join(text(part, 20) for part in value[:8])
    elif isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value) if number(value) is not None else ""
    if not isinstance(value, str):
        return ""
    return value if len(value) <= limit else value[: limit - 1] + "…"


def _recipe(run: Run) -> dict[str, Any]:
    _check_size(run.recipe, _RECIPE_BYTES)
    try:
        return run.read_recipe()
    except (ValueError, RecursionError, OSError) as error:  # YAML dates and depths that its own errors do not cover
        raise UserError(f"{run.recipe} is not readable YAML: {str(error).splitlines()[0]}") from error


def _json(path: Path) -> Any:
    _check_size(path, _JSON_BYTES)
    return _parsed(path.read_bytes(), path, "") if path.exists() else None


def _parsed(content: bytes, path: Path, where: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits are a ValueError too
        raise UserError(
            f"{path} is damaged{where}: {str(error).splitlines()[0]}; delete it and run the command that wrote it again"
        ) from error


def _mapping(path: Path) -> dict[str, Any]:
    content = _json(path)
    if content is not None and not isinstance(content, dict):
        raise UserError(f"{path} should hold a mapping, it holds a {type(content).__name__}")
    return content or {}


def _history(path: Path) -> list[dict[str, Any]]:
    """Every whole line of the log. The last one may be cut off by a crash, none before it."""
    _check_size(path, _LOG_BYTES)
    lines = path.read_bytes().splitlines() if path.exists() else []
    found = []
    for place, line in enumerate(lines, 1):
        try:
            found.append(_parsed(line, path, f" in line {place}"))
        except UserError:
            if place < len(lines):
                raise
    return [line for line in found if isinstance(line, dict)]


def _check_size(path: Path, limit: int) -> None:
    if path.exists() and (size := path.stat().st_size) > limit:
        raise UserError(f"{path} has {size / 1e6:.0f} MB; no run writes more than {limit / 1e6:.1f} MB there")


def _rows(content: Any, limit: int) -> list[dict[str, Any]]:
    return [row for row in content[:limit] if isinstance(row, dict)] if isinstance(content, list) else []


def _numbers(section: Mapping[Any, Any]) -> dict[str, float]:
    found = {text(name, 60): number(value) for name, value in list(section.items())[:100]}
    return {name: value for name, value in found.items() if value is not None}


def _timing(row: Mapping[str, Any]) -> Timing:
    name, engine, precision = (text(row.get(key), 60) for key in ("name", "engine", "precision"))
    counts = [int(min(max(number(row.get(key)) or 1, 1), 1e6)) for key in ("batch", "threads")]
    keys = ("median_ms", "p10_ms", "p90_ms", "images_per_second", "file_mb", "ratio", "low", "high")
    values = [value if (value := number(row.get(key))) and value > 0 else None for key in keys]
    return Timing(name or f"{precision}, {engine}", engine, precision, *counts, *values)


def _layer(row: Mapping[str, Any]) -> LayerNote:
    path, kind, shape = (text(row.get(key)) for key in ("path", "type", "shape"))
    weight, given, macs, error = (
        number(row.get(key)) for key in ("weight_bits", "input_bits", "macs", "weight_error_db")
    )
    onnxruntime, openvino, note = (text(row.get(key)) for key in ("onnxruntime", "openvino", "note"))
    return LayerNote(path, kind, shape, weight, given, macs, error, onnxruntime, openvino, note)


def _losses(content: Mapping[str, Any]) -> Losses:
    listed = _rows(content.get("layers"), ROWS)
    measure = "kl" if all(_part(row, "alone", "kl") is not None for row in listed) else "mse"
    found = [_loss(row, measure) for row in listed]
    whole = _part(content, "all", measure)
    return Losses(
        measure=measure,
        images=number(content.get("images")),
        all=None if whole is None else max(whole, 0),
        all_accuracy=_part(content, "all", "accuracy"),
        float_accuracy=_part(content, "float", "accuracy"),
        rows=[loss for loss in found if loss is not None],
    )


def _loss(row: Mapping[str, Any], measure: str) -> LayerLoss | None:
    alone, all_but = (_part(row, side, measure) for side in ("alone", "all_but"))
    if alone is None or all_but is None:
        return None
    own, other = (_part(row, side, "accuracy") for side in ("alone", "all_but"))
    return LayerLoss(text(row.get("path")), max(alone, 0), max(all_but, 0), own, other, number(row.get("snr_db")))


def _part(content: Mapping[str, Any], side: str, name: str) -> float | None:
    numbers = content.get(side)
    return number(numbers.get(name)) if isinstance(numbers, dict) else None
