"""A plan of which quantizers go where, and how it is carried out on a network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from functools import partial
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
from galago.quantize.settle import scaled_by_output

LITTLE = 0.01  # share of values whose loss is not worth a word


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

    def warnings(self, model: nn.Module) -> dict[str, str]:
        """What is to be said, by path, of layers and streams of the quantized network that lose negative values, and of
        layers that no integer engine computes as they are.
        """
        paths = {id(module): path for path, module in self.modules.items()}
        found: dict[str, str] = {}
        for module in model.modules():
            if isinstance(module, QuantLayer | QuantOutput) and module.cut_off > LITTLE:
                inner: nn.Module = module
                while isinstance(inner, QuantLayer | QuantOutput):
                    inner = inner.layer
                kind = module.input_quantizer if isinstance(module, QuantLayer) else module.output_quantizer
                found[paths[id(inner)]] = (
                    f"{module.cut_off:.0%} of what reaches its {type(kind).__name__} is negative and becomes 0; where"
                    " that matters use one that holds both signs (MinMax, LSQ), by `edge_input` or a rule"
                )
            if isinstance(module, QuantLayer) and module.weight_quantizer and not scaled_by_output(module):
                found[paths[id(module.layer)]] = (
                    "float in the file: its weight has a scale for each input channel; give it one scale"
                    " (`per_channel: false`) by a rule"
                )
        return found

    def rows(self, warned: Mapping[str, str] | None = None) -> Iterator[Row]:
        """Layers and streams in the order of execution, then what stays float besides.

        Args:
            warned: what else is to be said of a layer, by path.
        """
        order = {path: index for index, path in enumerate(self.graph.flow.gave)}
        for path in sorted(
            dict.fromkeys((*self.choices, *self.streams.places)), key=lambda path: order.get(path, len(order))
        ):
            row = self._row(path)
            yield row._replace(note="; ".join(filter(None, (row.note, (warned or {}).get(path)))))
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
        UserError: a layer was not reached, so that the network must know it under a name that could not be replaced, or
            a weight or what comes in is not finite.
    """
    modes = {module: module.training for module in model.modules()}
    new = {path: module for path, module in model.named_modules() if isinstance(module, QuantLayer | QuantOutput)}
    handles = []
    for path, module in new.items():
        check_weight(path, module.layer)
        handles.append(module.register_forward_pre_hook(partial(check_taken, path)))
        handles.append(module.register_forward_hook(partial(check_given, path)))
        module.observing = True
    try:
        model.train(training)(inputs)
    finally:
        for handle in handles:
            handle.remove()
        for part, mode in modes.items():
            part.training = mode
    if asleep := [path for path, module in new.items() if module.observing]:
        raise UserError(
            f"the network did not use {asleep[0]} once it was quantized (it may hold the layer in a plain list,"
            f" or choose by the values it sees which layers to run); add {asleep[0]!r} to `keep`"
        )


def check_taken(path: str, module: nn.Module, taken: tuple[object, ...]) -> None:
    """Refuses values that are not finite: a forward pre-hook, once the path is given.

    Raises:
        UserError: naming the layer.
    """
    if any(isinstance(value, Tensor) and not value.isfinite().all() for value in taken):
        raise UserError(
            f"{path}: what comes into it holds NaN or infinite values, on which no range can be set;"
            " look at the training images, and at the weights and statistics of the layers before it"
        )


def check_given(path: str, module: nn.Module, taken: object, given: Tensor) -> None:
    """Refuses a result that is not finite: a forward hook, once the path is given.

    Raises:
        UserError: naming the layer.
    """
    if not given.isfinite().all():
        raise UserError(
            f"{path}: what it gives out holds NaN or infinite values, on which no range can be set;"
            " look at its weights and statistics"
        )


def check_weight(path: str, layer: nn.Module) -> None:
    """Refuses a layer whose weight or bias is not finite, which no range could hold.

    Raises:
        UserError: naming it.
    """
    for name, tensor in layer._parameters.items():
        if tensor is not None and not tensor.isfinite().all():
            bad = int((~tensor.isfinite()).sum())
            raise UserError(
                f"{path}: {bad} of the {tensor.numel()} numbers of its {name} are NaN or infinite;"
                " start from weights of a training that did not diverge"
            )
