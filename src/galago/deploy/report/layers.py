"""Plots of the layers: their bits, and how far rounding moved their weights."""

from __future__ import annotations

from collections.abc import Sequence

from galago.deploy.report.drawing import BOTTOM, LEFT, RIGHT, TOP, Canvas, Figure, Scale, around, plainly
from galago.deploy.report.reading import LayerNote
from galago.deploy.report.wording import significant


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


def _numbered(canvas: Canvas, x: Scale, layers: int) -> None:
    """An axis of layers, numbered from one at the middle of each one's place."""
    shifted = Scale(0.5, layers + 0.5, x.start, x.end)
    ticks = sorted({1, *(int(t) for t in shifted.ticks(8) if t >= 1 and t == int(t))} if layers > 1 else {1})
    canvas.below(shifted, [float(t) for t in ticks if t == 1 or t > layers * 0.06], lambda t: f"{t:.0f}", "layer")
