"""Branches: copies of a network's last layers, trained side by side behind the trunk that they share.

A user names the layer where branching begins. It and every layer with weights or statistics that runs after it (found
by running the network once) are replaced by a `Parallel`, which holds one copy of the layer for each branch. In
training the first of them sends the batch through all of its copies and lays the results one behind another on the
batch dimension; those that come later take them apart again, a part for each copy. What stands between two of them
and has no weights (pooling, ReLU, reshaping) works on all branches at once, however the model is written. The trunk
runs once. In evaluation mode the first branch alone runs: the plain network.

Chosen here: the first branch keeps the weights that the network has, so that it begins where a trained network ended;
the others are drawn anew, by the rule of the published code for convolutions (`drawn_anew`). Quantizers are copied
with their layers, and the ranges of the new ones are set on the new weights and on one training batch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_map

from galago.data import Data
from galago.errors import UserError
from galago.layers import Wrapper, find, flow, swap
from galago.probe import device_of, evaluating, normalized
from galago.quantize.layer import QuantLayer, QuantOutput
from galago.quantize.quantizer import Quantizer


class Parallel(Wrapper):
    """Stands in a layer's place, with further copies of it, one for each branch beside the first.

    Args:
        layer: the first branch's; its parameters stay the same objects.
        count: how many branches there are.
        forks: the batch comes from the trunk and goes to every branch; else it holds all branches' batches already.
        together: all branches run in evaluation mode, too.
    """

    def __init__(self, layer: nn.Module, count: int = 2, forks: bool = False, together: bool = False) -> None:
        super().__init__(layer)
        self.count, self.forks, self.together = count, forks, together
        self.others = nn.ModuleList(without_hooks(copy.deepcopy(layer)) for _ in range(count - 1))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.training or self.together):
            return self.layer(*args, **kwargs)
        given = [(args, kwargs)] * self.count if self.forks else apart((args, kwargs), self.count)
        copies = (self.layer, *self.others)
        outputs = [layer(*own, **named) for layer, (own, named) in zip(copies, given, strict=True)]
        return tree_map(lambda *parts: torch.cat(parts), *outputs)


def apart(tree: Any, count: int) -> list[Any]:
    """The parts of tensors N·B×…, which lie one behind another, as N trees of tensors B×….

    >>> apart(torch.arange(6), 2)
    [tensor([0, 1, 2]), tensor([3, 4, 5])]
    """

    def part(number: int, one: Any) -> Any:
        return one.reshape(count, -1, *one.shape[1:])[number] if isinstance(one, Tensor) else one

    return [tree_map(partial(part, number), tree) for number in range(count)]


def without_hooks(network: nn.Module) -> nn.Module:
    """The same, after whoever watches the original has been taken off this copy of it."""
    for module in network.modules():
        module._forward_hooks.clear()
    return network


class Fork(NamedTuple):
    """Where a network can be branched."""

    places: list[str]  # paths of the layers that each branch has its own of, in order of execution
    trunk: Tensor  # what comes into the first of them


def fork_at(model: nn.Module, path: str, images: Tensor) -> Fork:
    """The outermost layers with weights or statistics that run from `path` on.

    Args:
        model: as it is written.
        path: where branching begins.
        images: normalized, N×C×H×W.

    Raises:
        UserError: there is no such layer, it does not run, or nothing with weights runs from there on.
    """
    layer = find(model, path)
    with evaluating(model):
        seen = flow(model, images)
    begin = next(name for name, module in model.named_modules() if module is layer)
    order = list(seen.received)
    if not begin or begin not in order:
        raise UserError(f"branch_at: {path!r} does not run when the network predicts; name a layer that does")
    places: list[str] = []
    for name in order[order.index(begin) :]:
        inside = any(name.startswith(f"{place}.") for place in places)
        if not inside and has_state(model.get_submodule(name)):
            places.append(name)
    if not places:
        raise UserError(f"branch_at: no layer with weights runs from {path!r} on; name an earlier one")
    if len(seen.received[places[0]]) > 1:
        raise UserError(f"branch_at: {places[0]!r} runs more than once in a pass; name a layer that runs once")
    return Fork(places, seen.values[seen.received[places[0]][0][0]])


def has_state(module: nn.Module) -> bool:
    """Whether there are weights, statistics or ranges."""
    return any(True for _ in chain(module.parameters(), module.buffers()))


def branch(model: nn.Module, places: Sequence[str], count: int, together: bool) -> list[nn.Module]:
    """Puts a `Parallel` at each place, with fresh weights for the branches beside the first; gives all these layers."""
    fresh: list[nn.Module] = []
    for place in places:
        layer = model.get_submodule(place)
        parallel = Parallel(layer, count, place == places[0], together)
        parallel.training = layer.training
        for name in [name for name, one in model.named_modules(remove_duplicate=False) if one is layer]:
            swap(model, name, parallel)
        fresh += parallel.others
    for layer in fresh:
        drawn_anew(layer)
    return fresh


@torch.no_grad()
def drawn_anew(network: nn.Module) -> None:
    """Convolutions from N(0, 2 / (k_h k_w C_out)), C_out not divided by the groups; all else as PyTorch begins it.

    Parameters that belong to no layer of PyTorch (a layer scale, a quantizer's range) stay.

    >>> layer = nn.Conv2d(32, 128, 3, groups=32, bias=False)
    >>> drawn_anew(layer)
    >>> bool((layer.weight.std() - (2 / (9 * 128)) ** 0.5).abs() < 0.005)
    True
    """
    for part in network.modules():
        if isinstance(part, _ConvNd):
            part.weight.normal_(std=math.sqrt(2 / (math.prod(part.kernel_size) * part.out_channels)))
            if part.bias is not None:
                part.bias.zero_()
        elif not isinstance(part, Wrapper) and callable(begin := getattr(part, "reset_parameters", None)):
            begin()


@torch.no_grad()
def set_ranges(model: nn.Module, fresh: Sequence[nn.Module], data: Data) -> None:
    """Sets the quantizers of fresh layers on their weights, and on what a training step would bring them.

    Args:
        model: all of it, with its `Parallel`s. Everything but the fresh layers stays as it is.
        fresh: layers of it.
        data: whose first training batch is used.
    """
    quantized = [part for part in parts_of(fresh) if isinstance(part, QuantLayer | QuantOutput)]
    if not quantized:
        return
    for part in quantized:
        part.observing = True
        if isinstance(part, QuantLayer) and part.weight_quantizer is not None:
            part.weight_quantizer.initialize(part.layer.get_parameter("weight"))
    ranges = {id(one) for part in parts_of(fresh) if isinstance(part, Quantizer) for one in part.buffers()}
    kept = [(one, one.clone()) for one in model.buffers() if id(one) not in ranges]
    with evaluating(model):  # which brings back each part's mode
        model.train()(first_batch(data, device_of(model)))
    for buffer, before in kept:
        buffer.copy_(before)


def first_batch(data: Data, device: torch.device) -> Tensor:
    """The first training batch, normalized.

    Raises:
        UserError: there is none.
    """
    for batch in data.train():
        return normalized(data, batch.input, device)
    raise UserError("the data give no training batch to set ranges on; make batch_size smaller")


def parts_of(networks: Sequence[nn.Module]) -> Iterator[nn.Module]:
    """Every module of several networks."""
    return chain.from_iterable(network.modules() for network in networks)
