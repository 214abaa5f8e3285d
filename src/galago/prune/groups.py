"""Channel groups: which channels of a network stand and fall together, and what has to be cut where one goes.

A group is one channel of a residual stream with all that writes to it and reads it, or one channel between two layers.
`galago.prune.survey.survey` finds the groups of any network; here is what it finds, as plain data that a pruner works
with: `cuts` say which stored tensors a group's channels lie in, `gates` where its strength can be read (factors of
BatchNorms; filters of layers that none follows), `layers` what each layer reads and makes. In all of them a group is
its number, and `ALWAYS` (-1) stands for a channel that cannot be removed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from galago.layers import find, innermost
from galago.probe import device_of
from galago.prune.ties import Ids, Record
from galago.sizes import Narrows

ALWAYS = -1
OUTPUTS, INPUTS = ("out_channels", "out_features"), ("in_channels", "in_features")
BOTH, ELEMENTS = ("out_channels", "in_channels", "groups"), ("num_features", "num_parameters")


class Cut(NamedTuple):
    """An axis of a stored tensor, whose slices belong to channels."""

    module: str
    name: str
    axis: int
    groups: Tensor  # of each slice
    sizes: tuple[str, ...]  # attributes of the module that tell how many slices there are
    made: bool  # whether these channels are made here, and not only read


class Gate(NamedTuple):
    """Where the strength of channels can be read: the size of each slice of a stored tensor."""

    module: str
    name: str
    axis: int
    groups: Tensor


class Layer(NamedTuple):
    """A layer that multiplies, with what its cost depends on."""

    path: str
    inputs: Tensor  # group of each input channel that an output channel reads; one, always there, if depth-wise
    outputs: Tensor  # group of each output channel
    kernel: int  # places in its window
    positions: int  # at which the window is laid on an image


class Adapting(NamedTuple):
    """A layer that has to be told which channels are left (`galago.sizes.Narrows`)."""

    path: str
    taken: Tensor
    given: Tensor


@dataclass(frozen=True)
class Groups:
    """The channel groups of a network.

    Attributes:
        count: how many there are.
        cuts: every axis of a stored tensor that belongs to channels of groups.
        gates: where the strength of groups can be read.
        owners: group of every gate's every slice, one after another, on the network's device; `count` if there is none.
        layers: all layers that multiply, in the order of execution.
        adapting: layers that have to be told.
        maps: of each module that gives a map, N×C×H×W, its channels.
        whole: reason for each layer, by path, whose output channels all have to stay.
    """

    count: int
    cuts: tuple[Cut, ...]
    gates: tuple[Gate, ...]
    owners: Tensor
    layers: tuple[Layer, ...]
    adapting: tuple[Adapting, ...]
    maps: dict[str, Tensor]
    whole: dict[str, str]

    def reasons(self) -> str:
        """What is left whole and why, for a person to read."""
        paths: dict[str, list[str]] = {}
        for path, reason in self.whole.items():
            paths.setdefault(reason, []).append(path)
        return "; ".join(f"{_names(layers)} ({reason})" for reason, layers in paths.items())


def _names(paths: Sequence[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{len(paths)} layers such as {paths[0]}"


def strengths(model: nn.Module, groups: Groups) -> Tensor:
    """g of each group: the largest size of its gates, |γ| of BatchNorms and norms of filters. G, differentiable.

    Of equal gates each gets its share of the gradient; otherwise the largest gets all of it.
    """
    sizes = []
    for gate in groups.gates:
        tensor: Tensor = getattr(innermost(find(model, gate.module)), gate.name)
        sizes.append(tensor.movedim(gate.axis, 0).flatten(1).norm(dim=1) if tensor.ndim > 1 else tensor.abs())
    every = torch.cat(sizes)
    # slices of no group go to one more, which is left out
    return every.new_zeros(groups.count + 1).scatter_reduce(0, groups.owners, every, "amax")[:-1]


def grouped(record: Record) -> tuple[Groups, list[int]]:
    """The groups of what was followed; with a channel of each, by which `record.ties` knows it."""
    ties, products = record.ties, record.products
    gated = [(place, *record.stored[place]) for place in record.norms]
    gated += [(place, one.axes[0], one.outputs) for place, one in products.items() if not one.normalized]
    roots = sorted({ties.root(channel) for _, _, ids in gated for channel in ids} - ties.reasons.keys())
    number = {root: index for index, root in enumerate(roots)}

    def of(ids: Ids) -> Tensor:
        return torch.tensor([number.get(ties.root(channel), ALWAYS) for channel in ids], dtype=torch.long)

    alone = torch.tensor([ALWAYS])
    gates = [Gate(*place, axis, of(ids)) for place, axis, ids in gated if bool((of(ids) != ALWAYS).any())]
    owners = torch.cat([alone[:0], *(gate.groups for gate in gates)])
    return Groups(
        count=len(roots),
        cuts=tuple(cut for cut in _cuts(record, of) if bool((cut.groups != ALWAYS).any())),
        gates=tuple(gates),
        owners=owners.where(owners != ALWAYS, len(roots)).to(device_of(record.model)),
        layers=tuple(
            Layer(path, of(one.inputs) if one.inputs else alone, of(one.outputs), one.kernel, one.positions)
            for (path, _), one in products.items()
        ),
        adapting=tuple(_adapting(record, of)),
        maps=_maps(record, of),
        whole={
            path: ties.reason(one.outputs[0]) or "nothing tells how strong its channels are"
            for (path, _), one in products.items()
            if bool((of(one.outputs) == ALWAYS).all())
        },
    ), roots


def _cuts(record: Record, of: Callable[[Ids], Tensor]) -> Iterator[Cut]:
    taken = set()
    for (module, name), one in record.products.items():
        (outputs, inputs), separable = one.axes, not one.inputs
        yield Cut(module, name, outputs, of(one.outputs), BOTH if separable else OUTPUTS, made=True)
        if inputs is not None:
            yield Cut(module, name, inputs, of(one.inputs), INPUTS, made=False)
        taken.add((module, name))
    for (module, name), (axis, ids) in record.stored.items():
        if (module, name) not in taken:
            yield Cut(module, name, axis, of(ids), ELEMENTS, made=True)


def _adapting(record: Record, of: Callable[[Ids], Tensor]) -> Iterator[Adapting]:
    for path, given in record.seen.gave.items():
        taken, made = (record.channels_of(numbers) for numbers in (record.seen.received[path], given))
        if path and isinstance(innermost(find(record.model, path)), Narrows) and taken is not None and made is not None:
            yield Adapting(path, of(taken.ids), of(made.ids))


def _maps(record: Record, of: Callable[[Ids], Tensor]) -> dict[str, Tensor]:
    found = {path: record.channels_of(numbers) for path, numbers in record.seen.gave.items()}
    return {
        path: of(channels.ids)
        for path, channels in found.items()
        if channels is not None and channels.axis == 1 and record.values[record.seen.gave[path][0][0]].ndim == 4
    }
