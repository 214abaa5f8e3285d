"""What is known of a network's channels while one follows them: which are tied to each other, and which have to stay.

Every output channel of every layer is a number, and so is every element of a stored tensor that belongs to a channel (a
bias, BatchNorm's, a shift, a slope). Channels that stand or fall together are tied into one group; a group that has to
stay is held, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from galago.layers import Asked, Call, Flow

Ids = tuple[int, ...]
Place = tuple[str, str]  # where a tensor is stored: path of the module, name


class Ties:
    """Channels by number, those tied to each other in one group; with a reason for each group that is to stay.

    >>> ties = Ties()
    >>> first, second = ties.new(2), ties.new(2)
    >>> ties.tie(first, second)
    >>> ties.hold(second[:1], "it is an example")
    >>> [ties.root(channel) for channel in (*first, *second)], ties.reason(first[0]), ties.reason(first[1])
    ([0, 1, 0, 1], 'it is an example', '')
    """

    def __init__(self) -> None:
        self.parents: list[int] = []
        self.reasons: dict[int, str] = {}

    def new(self, count: int) -> Ids:
        """Channels that were not there before."""
        start = len(self.parents)
        self.parents.extend(range(start, start + count))
        return tuple(range(start, start + count))

    def root(self, channel: int) -> int:
        """The number by which a channel's whole group goes."""
        while self.parents[channel] != channel:
            self.parents[channel] = channel = self.parents[self.parents[channel]]
        return channel

    def tie(self, first: Sequence[int], second: Sequence[int]) -> None:
        """One by one; where either is held, both are."""
        for one, other in zip(first, second, strict=True):
            low, high = sorted((self.root(one), self.root(other)))
            self.parents[high] = low
            if low != high and high in self.reasons:
                self.reasons.setdefault(low, self.reasons.pop(high))

    def hold(self, channels: Iterable[int], reason: str) -> None:
        """These stay; the first reason given is the one told."""
        for channel in channels:
            self.reasons.setdefault(self.root(channel), reason)

    def held(self, count: int, reason: str) -> Ids:
        """New channels that stay."""
        ids = self.new(count)
        self.hold(ids, reason)
        return ids

    def reason(self, channel: int) -> str:
        """Why a channel stays; empty for one that may go."""
        return self.reasons.get(self.root(channel), "")


class Channels(NamedTuple):
    """What is known of a tensor: the channel at each place along one axis."""

    axis: int
    ids: Ids
    silent: bool  # whether values of a channel for which only zeros are stored are zero here


class Product(NamedTuple):
    """A layer that multiplies its input with a stored weight."""

    inputs: Ids  # of each input channel that an output channel reads; none for a depth-wise layer
    outputs: Ids
    axes: tuple[int, int | None]  # of the weight: output channels, input channels where there are any
    kernel: int  # places in its window
    positions: int  # at which the window is laid on an image, over all runs
    normalized: bool  # whether a BatchNorm with a weight alone reads what it gives


class Record:
    """What is known of a network's tensors, numbered as in a recorded run (`galago.layers.flow`).

    Args:
        model: that ran, in evaluation mode, on one image.
        seen: the run.

    Attributes:
        ties: which channels stand and fall together.
        known: channels of tensors, by number.
        places: where tensors are stored, by number.
        stored: axis and channels of the stored tensors that are long in one axis only.
        products: the layers, by where their weight is stored.
        norms: where weights of BatchNorms are stored that normalize known channels.
        transposed: matrices to the stored ones that they are the transposed of, both by number.
    """

    def __init__(self, model: nn.Module, seen: Flow) -> None:
        self.model, self.seen, self.values, self.ties = model, seen, seen.values, Ties()
        self.known: dict[int, Channels] = {}
        self.products: dict[Place, Product] = {}
        self.norms: list[Place] = []
        self.transposed: dict[int, int] = {}
        tensors = [*model.named_parameters(), *model.named_buffers()]
        names = {id(tensor): (name.rpartition(".")[0], name.rpartition(".")[2]) for name, tensor in tensors}
        self.places = {number: names[id(value)] for number, value in seen.values.items() if id(value) in names}
        self.stored: dict[Place, tuple[int, Ids]] = {}
        for number, place in self.places.items():
            long = [axis for axis, size in enumerate(self.values[number].shape) if size > 1]
            if len(long) == 1 and place not in self.stored:
                self.stored[place] = long[0], self.ties.new(self.values[number].numel())
            if place in self.stored:
                self.known[number] = Channels(*self.stored[place], silent=True)

    def gives(self, call: Call, axis: int, ids: Ids, silent: bool) -> None:
        """Notes the channels of what an operation makes; a single one could not go anyway, and fits any."""
        if len(ids) > 1:
            self.known[call.outputs[0]] = Channels(axis, ids, silent)

    def hold(self, numbers: Iterable[int], reason: str) -> None:
        """All channels of these tensors stay."""
        for number in numbers:
            if number in self.known:
                self.ties.hold(self.known[number].ids, reason)

    def give_up(self, call: Call) -> None:
        """Of what an operation reads all stays, and of what it makes nothing is known."""
        where = f" in {call.module}" if call.module else ""
        self.hold(call.inputs, f"what becomes of them in {call.operation}{where} is not followed")

    def again(self, call: Call, asked: Asked, put: dict[int, Tensor]) -> Any:
        """What an operation makes of other tensors in the place of some that it read."""
        numbers = iter(call.inputs)

        def replaced(leaf: Any) -> Any:
            return put.get(next(numbers), leaf) if isinstance(leaf, Tensor) else leaf

        args, kwargs = tree_map(replaced, (asked.args, asked.kwargs))
        return asked.function(*args, **kwargs)

    def channels_of(self, numbers: Sequence[tuple[int, ...]]) -> Channels | None:
        """Of what a module took in or gave out, where it ran once and that is one tensor."""
        return self.known.get(numbers[0][0]) if len(numbers) == 1 and len(numbers[0]) == 1 else None
