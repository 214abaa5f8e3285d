"""Where quantizers can stand in a network as it is written: behind which modules.

Read from one recorded forward pass (`galago.quantize.graph`): the modules that should give out 8-bit integers so that
an engine never has to step back into float between two integer layers.

ONNX Runtime fuses a convolution into integers only if its result, after BatchNorm and ReLU, goes into a quantizer
and nowhere else, and an addition only if everything around it is quantized. A layer that is alone in reading a tensor
quantizes it already; everywhere else a stream is needed: before a fork, around a residual addition, a concatenation or
a pooling, in front of an activation that only float can compute (hard-swish) and of a layer that compares its input
with thresholds instead of rounding it (N2UQ, RSign). Linear layers need none: engines let an integer product end in
float.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from typing import NamedTuple

from torch import nn

from galago.layers import Call
from galago.quantize.graph import ACTIVATIONS, CONVOLUTIONS, JOINS, MAXIMA, MEANS, MOVES, RECTIFIERS, Graph


class Missed(NamedTuple):
    """A place that wanted a stream and could not get one."""

    module: str
    operation: str
    why: str


class Streams:
    """Which modules should give out quantized values.

    Args:
        graph: the recorded pass.
        integer: paths of the layers whose weight and input are both quantized, with the layer's type.
        forbidden: says whether a module must be left alone.
        comparing: paths of the layers whose input quantizer compares, which no engine fuses with what it reads.

    Attributes:
        places: path of each module to the number of the tensor that it gives out.
        missed: what stays float for want of a place.
        whole: numbers of the tensors whose values are integers times a scale.
        near: numbers of the tensors that are one activation away from that.
        joined: numbers of the sums and concatenations that an engine computes in integers.
    """

    def __init__(
        self,
        graph: Graph,
        integer: dict[str, type[nn.Module]],
        forbidden: Callable[[str], bool] = lambda path: False,
        comparing: Set[str] = frozenset(),
    ) -> None:
        self.graph, self.integer, self.forbidden, self.comparing = graph, integer, forbidden, comparing
        self.places: dict[str, int] = {}
        self.missed: list[Missed] = []
        self.whole: set[int] = set()
        self.near: set[int] = set()
        self.joined: set[int] = set()
        for call in graph.flow.calls:
            self._visit(call)

    def _visit(self, call: Call) -> None:
        """Decides about what one operation makes. Operations come in order, so what they read is decided."""
        layer = self.integer.get(call.module)
        if call.operation == "convolution" and layer is not None and issubclass(layer, CONVOLUTIONS):
            made = self.graph.flow.gave[call.module][0][0]
            self._settle(call, made, [self.graph.normalized(made) or made], always=True)
        elif call.operation in JOINS and len(call.inputs) > 1:
            self._join(call)
        elif call.inputs and call.inputs[0] in self.whole:
            self._follow(call)

    def _follow(self, call: Call) -> None:
        """What becomes of integers in an operation on one tensor."""
        if call.operation in MOVES | RECTIFIERS | MAXIMA:
            self.whole.update(call.outputs)
        elif call.operation in ACTIVATIONS:
            self.near.update(call.outputs)
        if call.operation in MEANS | MAXIMA and self.graph.flow.values[call.inputs[0]].ndim > 3:
            self._settle(call, call.outputs[0], [call.outputs[0]])

    def _join(self, call: Call) -> None:
        """An addition, product or concatenation is computed in integers if all it reads is, or can be made so.

        A product of two activations (squeeze and excitation behind hard-swish) is not worth two more streams.
        """
        ready = self.whole if call.operation == "mul" else self.whole | self.near
        if ready.isdisjoint(call.inputs) or not self._worthwhile(call.outputs[0]):
            return
        wanting = {number: self._before(number) for number in call.inputs if number not in self.whole}
        for number, giver in wanting.items():
            if giver is None:
                self.missed.append(Missed(call.module, call.operation, self._lost(number)))
                return
        for number, giver in wanting.items():
            self.places.setdefault(str(giver), number)
            self.whole.add(number)
        if self._settle(call, call.outputs[0], [call.outputs[0]]):
            self.joined.add(call.outputs[0])

    def _lost(self, number: int) -> str:
        """Why a tensor that is joined with others cannot be kept in integers."""
        maker = self.graph.makers.get(number)
        if number not in self.graph.alive or maker is None:
            return "float: one of the two is stored in the network or is its input"
        return f"float: no module gives out the {maker.operation} of {maker.module or 'the network'} that it reads"

    def _settle(self, call: Call, made: int, before: list[int], always: bool = False) -> bool:
        """Puts a stream on a result where one is needed: behind its ReLU, or as near to that as a module ends.

        False if one is needed and there is no place for it.
        """
        last = before[-1]
        while (further := self.graph.rectified(last)) is not None:
            before = [*before, last := further]
        if not self._needed(last, always):
            return True
        for number in [last, *self._moves(last), *reversed([made, *before][:-1])]:
            if giver := self._giver(number):
                self.places.setdefault(giver, number)
                self.whole.add(number)
                return True
        self.missed.append(Missed(call.module, call.operation, "float: no module gives out its result"))
        return False

    def _needed(self, number: int, always: bool) -> bool:
        calls, leaves = self.graph.reading(number)
        alone = len(calls) == 1 and calls[0].module in self.integer.keys() - self.comparing
        return not leaves and not alone and (always or self._worthwhile(number))

    def _worthwhile(self, number: int) -> bool:
        """Whether any reader computes in integers; LayerNorm, for one, does not."""
        number = self.graph.rectified(number) or number
        arithmetic = JOINS | MEANS | MAXIMA
        return any(c.module in self.integer or c.operation in arithmetic for c in self.graph.reading(number).calls)

    def _giver(self, number: int) -> str | None:
        return next((path for path in self.graph.givers.get(number, []) if not self.forbidden(path)), None)

    def _before(self, number: int) -> str | None:
        """The module that gives out this tensor, unless it also is what the network gives out."""
        return None if self.graph.reading(number).leaves else self._giver(number)

    def _moves(self, number: int) -> Iterator[int]:
        further = self.graph.moved(number)
        while further is not None:
            yield further
            further = self.graph.moved(further)
