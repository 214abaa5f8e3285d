"""Plots of the layers: their bits, how far rounding moved their weights, and what that costs the network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from galago.deploy.report.drawing import BOTTOM, LEFT, RIGHT, TOP, Canvas, Figure, Scale, around, plainly
from galago.deploy.report.reading import LayerLoss, LayerNote, Losses
from galago.deploy.report.wording import percent, significant


def layer_bits(layers: Sequence[LayerNote]) -> Figure | None:
    """Bits of weights and inputs, layer by layer; nothing where all are float."""
    if all(layer.weight_bits is None and layer.input_bits is None for layer in layers):
        return None
    canvas, x, width = Canvas(), Scale(0, len(layers), LEFT, RIGHT), (RIGHT - LEFT) / len(layers)
    most = max([layer.weight_bits or 0 for layer in layers] + [layer.input_bits or 0 for layer in layers] + [4])
    y = Scale(0, min(most, 32) + 1, BOTTOM, TOP)
    canvas.across(y, [t for t in y.ticks(5) if t == int(t)], lambda tick: f"{tick:.0f}")
    for place, layer in enumerate(layers):
        bits = "float" if layer.weight_bits is None else f"{layer.weight_bits:g} bits"
        told, left = f"{place + 1} {layer.path}: weights {bits}", x(place) + 0.08 * width
        height = y.high if layer.weight_bits is None else min(layer.weight_bits, y.high)
        kind = "fill-float" if layer.weight_bits is None else "fill-ours"
        canvas.rectangle(left, y(height), 0.84 * width, BOTTOM - y(height), kind, told)
        if layer.input_bits is not None:
            level = y(min(layer.input_bits, y.high))
            canvas.line(left, level, left + 0.84 * width, level, "step")
    _numbered(canvas, x, len(layers))
    entries = [("fill-ours", "weights"), ("swatch-step", "inputs")]
    floats = sum(layer.weight_bits is None for layer in layers)
    canvas.key([*entries, *([("fill-float", "float")] if floats else [])], y=14)
    caption = "Bits of the weights (bars) and of what each layer reads (lines). Numbers are those of the table below."
    return Figure("Bits of each layer", canvas.drawn("Bits of each layer"), caption)


def layer_errors(layers: Sequence[LayerNote]) -> Figure | None:
    """How far rounding moved the weights, layer by layer."""
    errors = [(place, layer) for place, layer in enumerate(layers) if layer.weight_error_db is not None]
    if not errors:
        return None
    canvas, x = Canvas(), Scale(0, len(layers), LEFT, RIGHT)
    low, high = around([layer.weight_error_db or 0 for _, layer in errors] + [0], least=10, margin=0.08)
    y = Scale(low if any((layer.weight_error_db or 0) < 0 for _, layer in errors) else 0, high, BOTTOM, TOP)
    canvas.across(y, y.ticks(5), plainly)
    radius = min(5.0, max(2.0, 0.4 * (RIGHT - LEFT) / len(layers)))
    for place, layer in errors:
        told = f"{place + 1} {layer.path}: {layer.weight_error_db:.1f} dB"
        middle, level = x(place + 0.5), y(layer.weight_error_db or 0)
        canvas.line(middle, y(0), middle, level, "stem")
        canvas.mark(middle, level, "circle", "ours small", told, radius)
    _numbered(canvas, x, len(layers))
    canvas.text(LEFT - 38, 14, "dB", "title")
    worst = min(errors, key=lambda error: error[1].weight_error_db or 0)
    caption = (
        f"Signal to rounding noise of the weights; higher is closer to float, and each bit is worth about 6 dB."
        f" Lowest: layer {worst[0] + 1}, {worst[1].path}, {significant(worst[1].weight_error_db)} dB."
    )
    return Figure("Rounding error of each layer", canvas.drawn("Weight error of each layer in dB"), caption)


def losses_alone(losses: Losses, layers: Sequence[LayerNote]) -> Figure | None:
    """How far the outputs move when each layer is the only quantized one."""
    places = _placed(losses, layers)
    if not places:
        return None
    bars = [Bar(place, loss, loss.alone, loss.alone_accuracy) for place, loss in places.items()]
    worst = max(places, key=lambda place: places[place].alone)
    caption = (
        f"{MEASURES[losses.measure]}, when this layer alone is quantized and all others are float"
        f"{_seen(losses)}. Most: {_called(worst, places[worst])}, {significant(places[worst].alone, 2)}."
    )
    return _bars("Each layer quantized alone", bars, losses.measure, None, caption)


def losses_all_but(losses: Losses, layers: Sequence[LayerNote]) -> Figure | None:
    """How far the outputs move when each layer is the only one in float; a line shows all quantized."""
    places = _placed(losses, layers)
    if not places:
        return None
    bars = [Bar(place, loss, loss.all_but, loss.all_but_accuracy) for place, loss in places.items()]
    best = min(places, key=lambda place: places[place].all_but)
    accuracy = f" and accuracy {percent(losses.all_accuracy)}" if losses.all_accuracy is not None else ""
    before = f" ({percent(losses.float_accuracy)} in float)" if accuracy and losses.float_accuracy is not None else ""
    caption = (
        f"The same, when this layer alone stays float. The line is the whole network, with"
        f" {significant(losses.all, 2)}{accuracy}{before}; bars that end below it would win something back."
        f" Most: {_called(best, places[best])}, {significant(places[best].all_but, 2)}."
    )
    return _bars("Each layer alone left in float", bars, losses.measure, losses.all, caption)


MEASURES = {
    "kl": "KL divergence of the class probabilities from those in float, in nats",
    "mse": "Mean squared difference of the outputs from those in float",
}
STREAMS = "streams"


def _placed(losses: Losses, layers: Sequence[LayerNote]) -> dict[int, LayerLoss]:
    """Each layer's loss at its number in the table of layers, less one; what is not in it follows."""
    order = {layer.path: place for place, layer in enumerate(layers)}
    others = [loss for loss in losses.rows if loss.path not in order]
    placed = {order[loss.path]: loss for loss in losses.rows if loss.path in order}
    return placed | {len(layers) + place: loss for place, loss in enumerate(others)}


def _called(place: int, loss: LayerLoss) -> str:
    return "the streams" if loss.path == STREAMS else f"layer {place + 1}, {loss.path}"


def _seen(losses: Losses) -> str:
    return f"; {losses.images:,.0f} validation images" if losses.images else ""


class Bar(NamedTuple):
    """A layer's bar: where, whose, how high."""

    place: int
    loss: LayerLoss
    value: float
    accuracy: float | None

    def words(self) -> str:
        number = "" if self.loss.path == STREAMS else f"{self.place + 1} "
        said = f"{number}{self.loss.path}: {significant(self.value)}"
        said += f", accuracy {percent(self.accuracy)}" if self.accuracy is not None else ""
        return said + (f", own output {self.loss.snr_db:.1f} dB" if self.loss.snr_db is not None else "")


def _bars(title: str, bars: Sequence[Bar], measure: str, level: float | None, caption: str) -> Figure:
    count = max(bar.place for bar in bars) + 1
    canvas, x, width = Canvas(), Scale(0, count, LEFT, RIGHT), (RIGHT - LEFT) / count
    y = Scale(0, 1.06 * max([bar.value for bar in bars] + [level or 0]) or 1, BOTTOM, TOP)
    canvas.across(y, y.ticks(5), plainly)
    for bar in bars:
        kind = "fill-middle" if bar.loss.path == STREAMS else "fill-ours"
        left, top = x(bar.place) + 0.08 * width, y(bar.value)
        canvas.rectangle(left, top, 0.84 * width, BOTTOM - top, kind, bar.words())
    if level is not None:
        canvas.line(LEFT, y(level), RIGHT, y(level), "level")
    _numbered(canvas, x, count)
    streams = [("fill-middle", "all streams")] if any(bar.loss.path == STREAMS for bar in bars) else []
    whole = [("swatch-level", "all quantized")] if level is not None else []
    canvas.key([("fill-ours", "layers"), *streams, *whole], y=14)
    canvas.text(LEFT - 38, 14, measure.upper(), "title")
    return Figure(title, canvas.drawn(f"{title}: {measure.upper()} by layer"), caption)


def _numbered(canvas: Canvas, x: Scale, layers: int) -> None:
    """An axis of layers, numbered from one at the middle of each one's place."""
    shifted = Scale(0.5, layers + 0.5, x.start, x.end)
    ticks = sorted({1, *(int(t) for t in shifted.ticks(8) if t >= 1 and t == int(t))} if layers > 1 else {1})
    canvas.below(shifted, [float(t) for t in ticks if t == 1 or t > layers * 0.06], lambda t: f"{t:.0f}", "layer")
