"""Quantize: train a network with the rounding that an integer engine will do.

What it does: every convolution and linear layer computes with a quantized weight and a quantized input, in the place
and with the parameters of the layer that was there, so that any network trains this way as it is written. Where one
integer layer's result does not go straight into another's quantizer (residual additions, forks, concatenations), or
into one that compares instead of rounding, a `stream` quantizer keeps it in integers, without which ONNX Runtime
computes in float there; OpenVINO can do without.

    y = layer(Q_input(x); Q_weight(W))          Q_stream(y) where several read y

Which method: `weight` and `input` are prototypes, any `Quantizer`; each layer gets copies of its own. Cost: a training
step of ResNet-20 takes about 1.1 times as long as in float with `compile`, 1.2 to 1.5 times without (N2UQ: 1.7 and 6).

Design choices: the first and last layers have 8 bits by default, as LSQ has them; EWGS and DAQ leave them float
(`edge_bits: null`). EWGS's interval does not suit images, which are negative too: give it `edge_weight` and
`edge_input` of another kind. "First" is every layer that reads the network's input, "last" every one that makes its
output. Ranges are set in one pass over the first training batches, in training mode, each layer seeing what the layers
before it give when quantized. BatchNorm statistics and the random state are as before afterwards.

Recipes: `recipes/demo/student.yaml`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import Tensor, nn

from galago.data import Data
from galago.errors import UserError
from galago.layers import must_match
from galago.method import Method
from galago.probe import device_of, normalized
from galago.quantize.calibration import first_inputs
from galago.quantize.graph import LAYERS, Graph, look, obstacle
from galago.quantize.inventory import Row, table
from galago.quantize.layer import QuantLayer
from galago.quantize.patterns import edge_layers, matches
from galago.quantize.placement import Streams
from galago.quantize.plan import Choice, Plan, check_weight, initialize
from galago.quantize.quantizer import Quantizer
from galago.quantize.settle import settle_biases


@dataclass(frozen=True)
class Rule:
    """What some layers get instead of the common quantizers. What a rule does not give stays float.

    Args:
        layers: a pattern of module paths or type names (`layer4.*`, `Linear`); all layers inside a module that
            matches are meant.
        bits: of copies of the common weight and input quantizers; none, with no quantizer of its own: float.
        weight: a weight quantizer of its own.
        input: an input quantizer of its own.
    """

    layers: str
    bits: int | None = None
    weight: Quantizer | None = None
    input: Quantizer | None = None


class Quantize(Method):
    """Quantizes layers, and the streams between them, before training.

    Args:
        weight: prototype of the weights' quantizers; none leaves weights float.
        input: prototype of the layers' input quantizers; none leaves inputs float.
        edge_bits: bits of the first and the last layer; null leaves both float.
        edge_weight: prototype for these two layers' weights, in place of the common one at `edge_bits`.
        edge_input: prototype for these two layers' inputs, likewise.
        rules: for layers that differ; the first that matches decides, and goes before `edge_bits`.
        keep: patterns of module paths or type names (`head`, `SqueezeExcite`); everything inside stays float.
        stream: prototype of the quantizers of what modules give out, 8 bits as a rule; none leaves results float.
        batches: how many training batches the ranges are set on.
        post_training: set ranges in evaluation mode, as the network computes when it is not trained any more; else in
            training mode, as it will compute in the first step.
        reduce_range: 7 bits for weights that would have 8 and meet 8-bit inputs, so that the sums of older x86
            processors cannot overflow (`galago.probes.saturation`) and the file has one accuracy everywhere.
    """

    weight: Quantizer | None
    input: Quantizer | None
    stream: Quantizer | None
    edge_weight: Quantizer | None
    edge_input: Quantizer | None

    def __init__(
        self,
        weight: Quantizer | None = None,
        input: Quantizer | None = None,
        edge_bits: int | None = 8,
        edge_weight: Quantizer | None = None,
        edge_input: Quantizer | None = None,
        rules: Sequence[Rule] = (),
        keep: Sequence[str] = (),
        stream: Quantizer | None = None,
        batches: int = 1,
        post_training: bool = False,
        reduce_range: bool = False,
    ) -> None:
        super().__init__()
        if stream is not None and stream.normalized:
            raise UserError(f"stream: {type(stream).__name__} changes the size of values; use min-max or LSQ there")
        if batches < 1:
            raise UserError(f"batches: {batches} leaves no images to set ranges on; give 1 or more")
        # Prototypes are patterns, not parts: not registered, so that they neither train nor enter checkpoints.
        self.__dict__.update(weight=weight, input=input, stream=stream, edge_weight=edge_weight, edge_input=edge_input)
        self.edge_bits, self.rules, self.keep, self.batches = edge_bits, tuple(rules), tuple(keep), batches
        self.post_training, self.reduce_range = post_training, reduce_range
        self._rows: tuple[Row, ...] = ()
        self._example: Tensor | None = None

    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        plan = self.plan(model, data)
        device = device_of(model)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(data.seed)
            inputs = first_inputs(data, self.batches, device)
            self._example = inputs[:1]
            statistics = [(buffer, buffer.clone()) for buffer in model.buffers()]
            model = plan.applied(model)
            try:
                initialize(model, inputs, training=not self.post_training)
            finally:
                for buffer, before in statistics:
                    buffer.copy_(before)
        self._rows = tuple(plan.rows(warned=plan.warnings(model)))
        return model

    def finish(self, model: nn.Module) -> nn.Module:
        """Ranges no longer follow what they see, and biases settle on what integers hold; the quantizers stay."""
        if self._example is not None:
            settle_biases(model.eval(), self._example.to(device_of(model)))
        return model.eval()

    def check(self, model: nn.Module, data: Data) -> list[Row]:
        """What `prepare` would do to a model, and every construct that would stay float. Changes nothing."""
        return list(self.plan(model, data).rows())

    def summary(self) -> Table | None:
        """What `prepare` did, as a table."""
        return table(self._rows) if self._rows else None

    def rows(self) -> tuple[Row, ...]:
        """What `prepare` did, a row a layer, stream and float operation, in the order of execution."""
        return self._rows

    def plan(self, model: nn.Module, data: Data) -> Plan:
        """Decides about every layer and stream.

        Raises:
            UserError: a pattern matches nothing, the network is quantized already, a quantizer does not have the bits
                it is given, or a weight is not finite.
        """
        if twice := [path for path, module in model.named_modules() if isinstance(module, QuantLayer)]:
            raise UserError(f"{twice[0]} is quantized already; start from the float network, or leave Quantize out")
        modules = dict(model.named_modules())
        for pattern in (*self.keep, *(rule.layers for rule in self.rules)):
            must_match(pattern, modules)
        graph = look(model, normalized(data, data.example(), device_of(model)))
        layers: dict[str, nn.Module] = {path: module for path, module in modules.items() if isinstance(module, LAYERS)}
        edges = edge_layers(graph, layers)
        choices = {
            path: Choice(why=f"float: {why}")
            if (why := obstacle(graph, path, layer))
            else self._choose(path, modules, edges)
            for path, layer in layers.items()
        }
        for path, choice in choices.items():
            if choice.weight or choice.input:
                check_weight(path, layers[path])
        for choice in choices.values() if self.reduce_range else ():
            if choice.weight and choice.input and choice.weight.bits == choice.input.bits == 8:
                choice.weight.bits = 7
        return Plan(graph, modules, choices, self._streams(graph, modules, choices), self.stream)

    def _choose(self, path: str, modules: dict[str, nn.Module], edges: set[str]) -> Choice:
        """The quantizers of a layer: `keep`, then the first rule that matches, then the edges, then the prototypes."""
        for pattern in self.keep:
            if matches(pattern, path, modules):
                return Choice(why=f"float: keep says {pattern!r}")
        for rule in self.rules:
            if matches(rule.layers, path, modules):
                where = f"the rule for {rule.layers!r}"
                weight = deepcopy(rule.weight) or with_bits(self.weight, rule.bits, where, "its `weight`")
                own = deepcopy(rule.input) or with_bits(self.input, rule.bits, where, "its `input`")
                return Choice(weight, own, "" if weight or own else f"float: the rule for {rule.layers!r} says so")
        if path not in edges:
            return Choice(deepcopy(self.weight), deepcopy(self.input))
        weight = deepcopy(self.edge_weight) or with_bits(self.weight, self.edge_bits, "edge_bits", "`edge_weight`")
        own = deepcopy(self.edge_input) or with_bits(self.input, self.edge_bits, "edge_bits", "`edge_input`")
        return Choice(weight, own, "" if weight or own else "float: first or last layer (edge_bits)")

    def _streams(self, graph: Graph, modules: dict[str, nn.Module], choices: dict[str, Choice]) -> Streams:
        integer = {
            p: type(modules[p]) for p, choice in choices.items() if choice.weight and choice.input and self.stream
        }
        comparing = {path for path, choice in choices.items() if choice.input and not choice.input.rounds}
        return Streams(
            graph, integer, lambda path: any(matches(pattern, path, modules) for pattern in self.keep), comparing
        )


def with_bits(prototype: Quantizer | None, bits: int | None, where: str, instead: str) -> Quantizer | None:
    """A copy of a quantizer, not initialized yet, with other bits; None (float) where either is.

    Args:
        prototype: what is copied.
        bits: of the copy.
        where: what in the recipe asks for these bits.
        instead: what to give another kind of quantizer by.

    Raises:
        UserError: the quantizer's own check refuses these bits.
    """
    if prototype is None or bits is None:
        return None
    own = deepcopy(prototype)
    own.bits = bits
    names = [name for name in inspect.signature(type(own)).parameters if hasattr(own, name)]
    try:
        if "bits" in names:  # whoever makes one of these bits is told which there are
            type(own)(**{name: getattr(own, name) for name in names})
    except UserError as error:
        raise UserError(f"{where}: {error}; give {instead} another kind, or other bits") from error
    return own
