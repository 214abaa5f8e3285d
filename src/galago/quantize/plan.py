"""A plan of which quantizers go where, and how it is carried out on a network."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from galago.errors import UserError
from galago.layers import swap
from galago.probe import device_of
from galago.quantize.graph import Graph
from galago.quantize.inventory import Row, float_operations, missed_streams, named, sized
from galago.quantize.layer import QuantLayer, QuantOutput
from galago.quantize.placement import Streams
from galago.quantize.quantizer import Quantizer


class Choice(NamedTuple):
    """The quantizers of one layer, not shared with any other, or why it has none."""

    weight: Quantizer | None = None
    input: Quantizer | None = None
    why: str = ""


class Plan:
    """What is going to be done to a network."""

    def __init__(
        self,
        graph: Graph,
        modules: dict[str, nn.Module],
        choices: dict[str, Choice],
        streams: Streams,
        stream: Quantizer | None,
    ) -> None:
        self.graph, self.modules, self.choices = graph, modules, choices
        self.streams, self.stream = streams, stream

    def applied(self, model: nn.Module) -> nn.Module:
        """The same model with its layers wrapped, innermost first, under every name that they have."""
        names: dict[nn.Module, list[str]] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            names.setdefault(module, []).append(path)
        for original in sorted(names, key=lambda module: -max(map(depth, names[module]))):
            wrapped = self._wrapped(names[original][0], original)
            if wrapped is not original:
                for name in names[original]:
                    model = swap(model, name, wrapped)
        return model

    def _wrapped(self, path: str, module: nn.Module) -> nn.Module:
        weight, own, _ = self.choices.get(path, Choice())
        made = self.streams.places.get(path)
        wrapped: nn.Module = module
        if weight or own:
            device = device_of(module)
            weight, own = (q and q.to(device).train(module.training) for q in (weight, own))
            wrapped = QuantLayer(module, weight, own).to(device)
            wrapped.training = module.training
        if made is not None and self.stream is not None:
            device = self.graph.flow.values[made].device
            wrapped = QuantOutput(wrapped, deepcopy(self.stream).to(device).train(module.training))
            wrapped.training = module.training
        return wrapped

    def rows(self) -> Iterator[Row]:
        """Layers and streams in the order of execution, then what stays float besides."""
        order = {path: index for index, path in enumerate(self.graph.flow.gave)}
        for path in sorted(
            dict.fromkeys((*self.choices, *self.streams.places)), key=lambda path: order.get(path, len(order))
        ):
            yield self._row(path)
        yield from missed_streams(self.streams, set(self.choices))
        yield from float_operations(self.graph, self.streams, set(self.choices))

    def _row(self, path: str) -> Row:
        choice, number = self.choices.get(path), self.streams.places.get(path)
        stream = named(self.stream) if number is not None else ""
        kind = type(self.modules[path]).__name__
        if choice is None:
            assert number is not None
            return Row(path, kind, sized(self.graph.flow.values[number]), "", "", stream, "")
        weight = getattr(self.modules[path], "weight", None)
        shape = sized(weight) if isinstance(weight, Tensor) else ""
        half = "float: only its weight is quantized" if choice.input is None else "float: only its input is quantized"
        why = choice.why or ("" if choice.weight and choice.input else half)
        return Row(path, kind, shape, named(choice.weight), named(choice.input), stream, why)


def depth(path: str) -> int:
    """How many modules a path leads through."""
    return path.count(".") + bool(path)


@torch.no_grad()
def initialize(model: nn.Module, inputs: Tensor, training: bool = True) -> None:
    """Sets every range in one pass, layer after layer. Modes are left as they were.

    Args:
        model: with its quantizers in place.
        inputs: normalized images.
        training: whether BatchNorm uses these images' statistics, as in a training step, or those it has.

    Raises:
        UserError: a layer was not reached, so that the network must know it under a name that could not be replaced.
    """
    modes = {module: module.training for module in model.modules()}
    new = {path: module for path, module in model.named_modules() if isinstance(module, QuantLayer | QuantOutput)}
    for module in new.values():
        module.observing = True
    model.train(training)(inputs)
    for part, mode in modes.items():
        part.training = mode
    if asleep := [path for path, module in new.items() if module.observing]:
        raise UserError(
            f"the network did not use {asleep[0]} once it was quantized (it may hold the layer in a plain list);"
            f" add {asleep[0]!r} to `keep`"
        )
