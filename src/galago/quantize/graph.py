"""A network as a graph of operations, from one recorded forward pass: nothing is traced symbolically, nothing changed.

Answers what `Quantize` has to know of a network before it touches it: who reads a tensor, which modules give it out,
and whether a layer may be computed with a quantized weight and input (`obstacle`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from galago.layers import Call, Flow, flow

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LAYERS = (*CONVOLUTIONS, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)

# Operations that hand values on without computing any: integers stay the integers they were.
MOVES = frozenset((
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "channel_shuffle", "clone", "constant_pad_nd",
    "contiguous", "detach", "expand", "flatten", "narrow", "native_dropout", "permute", "pixel_shuffle",
    "pixel_unshuffle", "reshape", "roll", "select", "slice", "split", "split_with_sizes", "squeeze", "t",
    "transpose", "unbind", "unsqueeze", "upsample_nearest1d", "upsample_nearest2d", "view",
))  # fmt: skip
RECTIFIERS = frozenset(("relu", "hardtanh", "clamp", "clamp_min"))
MAXIMA = frozenset(("max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool2d"))
MEANS = frozenset(("avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "mean"))
JOINS = frozenset(("add", "cat", "mul"))
ACTIVATIONS = frozenset(
    ("leaky_relu", "_prelu_kernel", "hardswish", "silu", "gelu", "elu", "mish", "tanh", "sigmoid", "hardsigmoid")
)
PRODUCTS = frozenset(("convolution", "addmm", "mm", "bmm", "linear"))


class Reading(NamedTuple):
    """Who reads a tensor in the end, looking through operations that only move values."""

    calls: tuple[Call, ...]
    leaves: bool  # it is (part of) what the network gives out


class Graph:
    """A recorded forward pass, indexed for the questions asked here.

    Args:
        flow: of the network in evaluation mode.
        odd: paths of modules that take or give anything but one plain tensor.
    """

    def __init__(self, flow: Flow, odd: frozenset[str] = frozenset()) -> None:
        self.flow, self.odd = flow, odd
        self.readers: dict[int, list[Call]] = {}
        self.makers: dict[int, Call] = {}
        for call in flow.calls:
            for number in dict.fromkeys(call.inputs):
                self.readers.setdefault(number, []).append(call)
            for number in set(call.outputs) - set(call.inputs):
                self.makers.setdefault(number, call)
        self.leaving = {number for given in flow.gave.get("", []) for number in given}
        self.numbers = {id(value): number for number, value in flow.values.items()}
        self.alive = self._alive()
        self.givers: dict[int, list[str]] = {}  # in the order in which the modules gave it out
        for path, given in flow.gave.items():
            if path and len(given) == 1 and len(given[0]) == 1 and path not in odd:
                self.givers.setdefault(given[0][0], []).append(path)

    def _alive(self) -> set[int]:
        """The numbers of all floating-point tensors that depend on the network's input."""
        alive = {number for taken in self.flow.received.get("", []) for number in taken}
        for call in self.flow.calls:
            if not alive.isdisjoint(call.inputs):
                alive |= {number for number in call.outputs if self.flow.values[number].is_floating_point()}
        return alive

    def read(self, number: int) -> list[Call]:
        """The operations that take this tensor in."""
        return self.readers.get(number, [])

    def reading(self, number: int) -> Reading:
        """Who reads a tensor in the end."""
        calls: list[Call] = []
        leaves, waiting = False, [number]
        while waiting:
            current = waiting.pop()
            leaves |= current in self.leaving
            for call in self.read(current):
                if call.operation in MOVES:
                    waiting += [made for made in call.outputs if made != current]
                else:
                    calls.append(call)
        return Reading(tuple(dict.fromkeys(calls)), leaves)

    def then(self, number: int, wanted: Callable[[str], bool]) -> int | None:
        """What the only reader of a tensor makes of it, if that is a wanted operation and the tensor goes first."""
        read = self.read(number)
        if len(read) != 1 or number in self.leaving or not wanted(read[0].operation) or read[0].inputs[0] != number:
            return None
        return read[0].outputs[0]

    def normalized(self, number: int) -> int | None:
        """The BatchNorm's result, where one alone follows."""
        return self.then(number, lambda operation: "batch_norm" in operation)

    def rectified(self, number: int) -> int | None:
        """The ReLU's result, where one alone follows."""
        return self.then(number, RECTIFIERS.__contains__)

    def moved(self, number: int) -> int | None:
        """The same values under another shape, where nothing else reads the first."""
        return self.then(number, MOVES.__contains__)


def look(model: nn.Module, example: Tensor) -> Graph:
    """Runs a model once in evaluation mode and records what happens; the model stays as it was."""
    modes = {module: module.training for module in model.modules()}
    odd: set[str] = set()

    def watch(path: str) -> Callable[[nn.Module, object, object, object], None]:
        def hook(module: nn.Module, args: object, kwargs: object, output: object) -> None:
            single = isinstance(args, tuple) and len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
            if not isinstance(output, Tensor) or (isinstance(module, LAYERS) and not single):
                odd.add(path)

        return hook

    handles = [m.register_forward_hook(watch(path), with_kwargs=True) for path, m in model.named_modules()]
    try:
        return Graph(flow(model.eval(), example), frozenset(odd))
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training


def obstacle(graph: Graph, path: str, layer: nn.Module) -> str:
    """Why a layer cannot be computed with a quantized weight and input; empty if it can.

    It must run once, on one tensor, and its stored weight must go as it is into its one product.
    """
    weight = layer._parameters.get("weight")
    runs = graph.flow.gave.get(path, [])
    if weight is None:
        return "its weight is computed from other parameters"
    read = graph.read(graph.numbers.get(id(weight), -1))
    if not runs and read:
        return f"its weight is read by {read[0].module or 'the network'} directly, not through the layer"
    if not runs:
        return "it does not run when the network predicts"
    if len(runs) > 1:
        return f"it runs {len(runs)} times in one pass, each time on other values"
    if path in graph.odd:
        return "it is called with more than one tensor"
    if any(call.module != path for call in read):
        return f"its weight is shared with {next(call.module for call in read if call.module != path)}"
    if len(read) != 1 or read[0].operation not in {"t", "transpose", *PRODUCTS}:
        return "it computes another weight from the one it stores"
    return "" if _gives_its_product(graph, path, layer) else "it computes more than its product"


def _gives_its_product(graph: Graph, path: str, layer: nn.Module) -> bool:
    """Whether what a layer gives out is its product, at most reshaped and with its bias added."""
    bias = graph.numbers.get(id(layer._parameters.get("bias")))
    maker = graph.makers.get(graph.flow.gave[path][0][0])
    while maker is not None and (maker.operation in MOVES or (maker.operation == "add" and bias in maker.inputs)):
        maker = graph.makers.get(maker.inputs[0])
    return maker is not None and maker.module == path and maker.operation in PRODUCTS
