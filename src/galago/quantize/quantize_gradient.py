"""QuantizeGradient: train with gradients in low bits too.

Kim, Lee, Jeon, Moon and Ham, "Toward INT4 Fixed-Point Training via Exploring Quantization Error for Gradients", ECCV
2024, arXiv:2407.12637.

What it does: behind each quantized layer (its bias included, before BatchNorm) stands a gradient quantizer. The forward
pass stays what it is, to the bit. In the backward pass the layer multiplies the rounded gradient with its input and its
weight, which are low-bit as well where `Quantize` made them so; BatchNorm sees the gradient unrounded.

    dL/dx = conv_transpose(G_hat, W_hat),   dL/dW = correlate(x_hat, G_hat),   G_hat = Q_gradient(dL/dy)

Which: `gradient` is a prototype, any `GradientQuantizer`; each layer gets a copy of its own. List this method behind
`Quantize`. In a network without quantized layers it quantizes the gradients of all convolutions and linear layers. When
to use it: to study training in integers; the rounding is simulated, so training gets slower, not faster. Nothing of it
is left when training ends.

Recipe: recipes/quantize/lbt_w4a4g4_resnet20_cifar10.yaml.

Design choices: gradients of the first and the last layer stay float unless `edge_bits` says otherwise, as in the
paper's released configuration. Intervals start from the gradients of the first batch, in a side trip in float32 that
leaves no trace (random state, BatchNorm statistics), with the losses of methods listed behind this one; they move after
the backward pass, once a step. Each process rounds in the range of its own gradients, and all move their intervals
alike. How far rounded gradients are from the true ones, `galago.probes.gradient_error.GradientError` measures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

from rich.table import Table
from torch import nn

from galago.batch import Batch, Step
from galago.data import Data
from galago.errors import UserError
from galago.layers import must_match, swap
from galago.method import Forward, Method
from galago.probe import device_of, normalized
from galago.quantize.gradient_quantizer import (
    GradientQuantizer,
    QuantGradient,
    arriving_gradients,
    gradient_quantizers,
)
from galago.quantize.graph import LAYERS, Graph, look
from galago.quantize.layer import QuantLayer
from galago.quantize.patterns import edge_layers, matches


class Placed(NamedTuple):
    """What became of the gradient of one layer."""

    path: str
    kind: str
    gradient: str  # its quantizer, such as "AdaptiveInterval 4"
    values: int  # elements a training batch
    note: str


class QuantizeGradient(Method):
    """Quantizes the gradients that come back into layers; list it behind `Quantize`.

    Args:
        gradient: prototype of the gradient quantizers.
        layers: patterns of module paths or type names; by default all quantized layers, or all where none is quantized.
        keep: patterns likewise; gradients of everything inside stay float.
        edge_bits: bits of the gradients of the first and the last layer; null leaves both float.
    """

    gradient: GradientQuantizer

    def __init__(
        self,
        gradient: GradientQuantizer,
        layers: Sequence[str] = (),
        keep: Sequence[str] = (),
        edge_bits: int | None = None,
    ) -> None:
        super().__init__()
        self.__dict__.update(gradient=gradient)  # a pattern, not a part: not registered, so that it does not train
        self.layers, self.keep, self.edge_bits = tuple(layers), tuple(keep), edge_bits
        self.started = False
        self._rows: tuple[Placed, ...] = ()

    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        modules = dict(model.named_modules())
        for pattern in (*self.keep, *self.layers):
            must_match(pattern, modules)
        graph = look(model, normalized(data, data.example(), device_of(model)))
        places = layers_of(modules)
        edges = edge_layers(graph, places)
        rows = []
        for path, layer in self._meant(places, modules).items():
            chosen = self._chosen(path, edges)
            rows.append(row(path, layer, chosen, values_of(graph, path) * data.batch_size))
            if chosen is not None:
                wrapped = QuantGradient(layer, chosen.to(device_of(layer)).train(layer.training))
                wrapped.training = layer.training
                for name in [name for name, one in model.named_modules(remove_duplicate=False) if one is layer]:
                    model = swap(model, name, wrapped)
        if not gradient_quantizers(model):
            raise UserError(
                "QuantizeGradient: no layer is left whose gradient to quantize; see layers, keep, edge_bits"
            )
        self._rows = tuple(rows)
        return model

    def _meant(self, places: dict[str, nn.Module], modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
        """The layers whose gradients `layers` and `keep` leave to be quantized."""

        def named(patterns: Sequence[str], path: str, layer: nn.Module) -> bool:
            inner = f"{path}.layer" if isinstance(layer, QuantLayer) else path
            return any(matches(pattern, inner, modules) for pattern in patterns)

        quantized = {path: layer for path, layer in places.items() if isinstance(layer, QuantLayer)}
        wanted = {path: layer for path, layer in places.items() if named(self.layers, path, layer)}
        among = wanted if self.layers else quantized or places
        return {path: layer for path, layer in among.items() if not named(self.keep, path, layer)}

    def _chosen(self, path: str, edges: set[str]) -> GradientQuantizer | None:
        if path not in edges:
            return deepcopy(self.gradient)
        if self.edge_bits is None:
            return None
        own = deepcopy(self.gradient)
        own.bits = self.edge_bits
        return own

    def step(self, batch: Batch, inner: Forward) -> Step:
        """The step itself; before the first, intervals are set from the first batch's gradients."""
        quantizers = {} if self.started else gradient_quantizers(inner.model)
        if quantizers:
            self.started = True
            arrived = arriving_gradients(inner.model, inner.methods, lambda: inner(batch).loss)
            for path, gradient in arrived.items():
                quantizers[path].start(gradient)
        return inner(batch)

    def update(self, model: nn.Module, apply: Callable[[], None]) -> None:
        for quantizer in gradient_quantizers(model).values():
            quantizer.adapt()
        apply()

    def finish(self, model: nn.Module) -> nn.Module:
        """Takes the gradient quantizers away; what was behind them stays in their place."""
        for path, module in reversed(list(model.named_modules(remove_duplicate=False))):
            if isinstance(module, QuantGradient):
                model = swap(model, path, module.layer)
        return model

    def summary(self) -> Table | None:
        """What `prepare` did, as a table."""
        if not self._rows:
            return None
        shown = Table("layer", "type", "gradient", "values a batch", "note", box=None, pad_edge=False)
        for one in self._rows:
            shown.add_row(one.path, one.kind, one.gradient, f"{one.values:,}", one.note)
        return shown

    def get_extra_state(self) -> dict[str, Any]:
        """Whether intervals have been set."""
        return {"started": self.started}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.started = bool(state["started"])


def layers_of(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """All convolutions and linear layers by path; a quantized one as the whole that it is."""
    found: dict[str, nn.Module] = {}
    for path, module in modules.items():
        around = modules.get(path.rpartition(".")[0])
        if isinstance(module, QuantLayer) or (isinstance(module, LAYERS) and not isinstance(around, QuantLayer)):
            found[path] = module
    return found


def values_of(graph: Graph, path: str) -> int:
    """How many numbers a layer gives for one image; 0 where it does not run when the network predicts."""
    return sum(graph.flow.values[number].numel() for given in graph.flow.gave.get(path, []) for number in given)


def row(path: str, layer: nn.Module, chosen: GradientQuantizer | None, values: int) -> Placed:
    """A line of the table."""
    kind = type(layer.layer if isinstance(layer, QuantLayer) else layer).__name__
    if chosen is None:
        return Placed(path, kind, "float", values, "float: first or last layer (edge_bits)")
    few = 0 < chosen.target * values < 1
    note = "small: less than one value a batch to be clipped, gamma stays near 1" if few else ""
    return Placed(path, kind, f"{type(chosen).__name__} {chosen.bits}", values, note)
