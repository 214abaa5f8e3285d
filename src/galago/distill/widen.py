"""Widening layers of a network in place: what is added, and how nothing but that is trained.

A `Junction` is a convolution and the one layer that reads its result, with at most a BatchNorm and operations on each
channel alone between them. `widen` gives the convolution n more filters, the BatchNorm n more entries and the reader
the inputs that belong to them. The reader's new weights are zero, so the network computes what it did before:

    W_l: c_l × c × k × k  →  (c_l + n) × c × k × k       W_next: c' × c_l × …  →  c' × (c_l + n) × …,  new part 0

The modules stay the same objects and only their tensors are replaced, so hooks and wrappers stay where they are; the
grown network is an ordinary network at any time. A quantizer of the convolution's weight grows with it: entries of the
old channels stay, those of the new ones are what the quantizer sets on their filters.

The old part of a grown tensor is held still in three ways at once: it gets no gradient, it is put back behind the
optimizer's step whatever momentum and decay have done to it, and its BatchNorm entries normalize with their stored
statistics while the new ones use the batch's.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from galago.layers import Wrapper, find, innermost, removing
from galago.quantize.layer import QuantLayer

MOMENTUM = 0.1  # of new BatchNorm entries whose layer averages over all batches alike


class Junction(NamedTuple):
    """Where channels can be added."""

    layer: str  # path of the convolution that gives them
    norm: str | None  # path of the BatchNorm between the two
    reader: str  # path of the convolution or linear layer that takes them
    columns: int  # inputs of the reader for each channel: 1, or all pixels of a map that is flattened
    pixels: int  # of the map that the convolution gives
    reader_pixels: int  # of the map that the reader gives


class Part:
    """A tensor of a layer, before and after entries were added at its end along one axis.

    Args:
        layer: whose parameter or buffer it is.
        name: of the parameter or buffer.
        axis: along which it grew.
        added: the new entries.
    """

    def __init__(self, layer: nn.Module, name: str, axis: int, added: Tensor) -> None:
        self.layer, self.name, self.axis = layer, name, axis
        self.old: Tensor = getattr(layer, name)
        self.kept = self.old.shape[axis]
        self.new = _joined(self.old.detach(), added.to(self.old), axis)
        if isinstance(self.old, nn.Parameter):
            self.new = nn.Parameter(self.new)
            self.new.register_hook(self._gradient)  # type: ignore[no-untyped-call]

    def frozen(self, tensor: Tensor) -> Tensor:
        """The old part of a tensor of this shape."""
        return tensor.narrow(self.axis, 0, self.kept)

    def _gradient(self, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        self.frozen(gradient).zero_()
        return gradient


def _joined(old: Tensor, added: Tensor, axis: int) -> Tensor:
    """Both in one, laid out in memory as the old one is."""
    joined = torch.cat([old, added], axis)
    last = old.ndim == 4 and not old.is_contiguous() and old.is_contiguous(memory_format=torch.channels_last)
    return joined.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


class Plant:
    """Channels added at one junction: a change of the network that can be taken back and made again.

    Args:
        parts: the tensors that grew.
        sizes: attributes of layers that say how wide they are, and what is added to each.
        norm: the BatchNorm that grew.
    """

    def __init__(self, parts: list[Part], sizes: list[tuple[nn.Module, str, int]], norm: nn.Module | None) -> None:
        self.parts, self.sizes, self.norm = parts, sizes, norm

    @property
    def learned(self) -> list[Part]:
        """The parts that are parameters."""
        return [part for part in self.parts if isinstance(part.new, nn.Parameter)]

    def put(self) -> None:
        """Makes the network wider."""
        for part in self.parts:
            setattr(part.layer, part.name, part.new)
        for layer, name, added in self.sizes:
            setattr(layer, name, getattr(layer, name) + added)

    def take_out(self) -> None:
        """Brings back the tensors that were there before, the same objects."""
        for part in self.parts:
            setattr(part.layer, part.name, part.old)
        for layer, name, added in self.sizes:
            setattr(layer, name, getattr(layer, name) - added)

    def learn_alone(self, model: nn.Module) -> None:
        """From now on no parameter of the model but these is trained, and of these only what is new."""
        model.requires_grad_(False)
        for part in self.learned:
            part.new.requires_grad_(True)

    @contextmanager
    def held(self) -> Iterator[None]:
        """The old part of each parameter is bit for bit the same after the `with` as before."""
        before = [part.frozen(part.new.detach()).clone() for part in self.learned]
        yield
        with torch.no_grad():
            for part, values in zip(self.learned, before, strict=True):
                part.frozen(part.new).copy_(values)

    @contextmanager
    def normalizing(self, model: nn.Module) -> Iterator[None]:
        """For a training step: no BatchNorm but the new entries looks at the batch.

        Not compiled: compiled code does not see that hooks come and go.
        """
        norms = [norm for norm in model.modules() if isinstance(norm, _BatchNorm) and norm.training]
        for norm in norms:
            norm.training = False
        hooks = [] if self.norm is None else [self.norm.register_forward_hook(self._by_batch)]
        try:
            with removing(hooks), torch.compiler.set_stance("force_eager"):
                yield
        finally:
            for norm in norms:
                norm.training = True

    def _by_batch(self, norm: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        kept = next(part.kept for part in self.parts if part.layer is norm)
        momentum = MOMENTUM if norm.momentum is None else norm.momentum
        weight, bias = (None if tensor is None else tensor[kept:] for tensor in (norm.weight, norm.bias))
        statistics = (
            norm.running_mean[kept:],
            norm.running_var[kept:],
        )  # views: what is learned of them is written there
        new = nn.functional.batch_norm(inputs[0][:, kept:], *statistics, weight, bias, True, momentum, norm.eps)
        return torch.cat([output[:, :kept], new], 1)


def first_filters(weight: Tensor, channels: int, generator: torch.Generator) -> Tensor:
    """`Normal(0, sqrt(2 / (c k²)))`, n×c×k×k.

    Args:
        weight: of the convolution, …×c×k×k.
        channels: n.
        generator: draws the numbers, on the CPU.
    """
    deviation = math.sqrt(2 / weight[0].numel())
    return torch.randn(channels, *weight.shape[1:], generator=generator) * deviation


def widen(model: nn.Module, junction: Junction, filters: Tensor) -> Plant:
    """Adds channels in place; what the network computes stays as it was.

    Args:
        model: as it is, or with quantizers around its layers.
        junction: where.
        filters: of the new channels, n×c×k×k.
    """
    layer, reader = (innermost(find(model, path)) for path in (junction.layer, junction.reader))
    norm = None if junction.norm is None else innermost(find(model, junction.norm))
    added = len(filters)
    parts = [Part(layer, "weight", 0, filters)]
    if layer.bias is not None:
        parts.append(Part(layer, "bias", 0, torch.zeros(added)))
    if norm is not None:
        first = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}
        there = [name for name in first if getattr(norm, name) is not None]
        parts += [Part(norm, name, 0, torch.full((added,), first[name])) for name in there]
    weight = reader.get_parameter("weight")
    zeros = torch.zeros(len(weight), added * junction.columns, *weight.shape[2:])
    parts.append(Part(reader, "weight", 1, zeros))
    parts += _of_quantizers(find(model, junction.layer), parts[0].new.detach())
    plant = Plant(parts, _sizes(layer, norm, reader, added, junction.columns), norm)
    plant.put()
    return plant


def _sizes(
    layer: nn.Module, norm: nn.Module | None, reader: nn.Module, added: int, columns: int
) -> list[tuple[nn.Module, str, int]]:
    taken = "in_channels" if isinstance(reader, nn.Conv2d) else "in_features"
    normalized = [] if norm is None else [(norm, "num_features", added)]
    return [(layer, "out_channels", added), *normalized, (reader, taken, added * columns)]


def _of_quantizers(layer: nn.Module, weight: Tensor) -> Iterator[Part]:
    """What a quantizer keeps for each channel of the weight."""
    while isinstance(layer, Wrapper):
        if isinstance(layer, QuantLayer) and layer.weight_quantizer is not None:
            fresh = copy.deepcopy(layer.weight_quantizer)
            fresh.initialize(weight)
            there = dict(layer.weight_quantizer.named_modules())
            for path, module in fresh.named_modules():
                for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                    old = getattr(there[path], name)
                    if tensor.shape != old.shape:
                        yield Part(there[path], name, 0, tensor.detach()[len(old) :])
        layer = layer.layer
