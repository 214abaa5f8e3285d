"""MixedPrecision: a width for each layer, as many bits where they matter and few where they do not.

Cai, Yao, Dong, Gholami, Mahoney and Keutzer, "ZeroQ: A Novel Zero Shot Quantization Framework", CVPR 2020,
arXiv:2001.00281, whose measure of sensitivity this is; the images are real ones here, and the choice is exact.

How much a layer l suffers at b bits is how far the network's answers move when it alone is rounded and all else is
float. Losses of several layers are taken to add up, and the widths with the least sum that a budget allows are chosen:

    Omega_l(b) = mean KL(softmax(y) || softmax(y_l,b))
    minimize  sum_l Omega_l(b_l)   subject to   sum_l cost_l(b_l) <= budget
    cost_l(b) = weights_l b  (mean_weight_bits)   or   MACs_l b_weight b_input  (mean_bit_operations)

When to use it: a size or a count of operations is given, and the same width everywhere costs too much accuracy; between
the widths 2 and 4, where layers differ most. At 8 bits nothing is lost and nothing to win. List it behind `Quantize`,
whose widths it replaces, and before methods that choose roundings. It costs (layers x widths) passes over the
calibration images before training, and nothing afterwards; engines run every width below 8 bits at the same speed, so
what it saves is size.

Recipe: recipes/quantize/mixed_w4_resnet20_cifar10.yaml.

Design choices: sensitivities are measured with roundings to the nearest in the range that costs least squared error,
not with the layer's own quantizer: they should not depend on where ranges start that training moves. An input gets
the width of its layer's weight (`inputs: false` leaves inputs as `Quantize` made them). The budget counts the weights
of all quantized layers; the first and last layer keep their width unless `edges` says otherwise. Each chosen layer gets
fresh quantizers of the kind it had; then all ranges are set anew on the same images. An output of one column has no
distribution: there the squared error, relative to the output's size, takes the divergence's place. Widths are 2 to 8;
with `Quantize`'s `reduce_range` leave 8 out, which would bring its 8-bit weights back.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor, nn

from galago.console import watched
from galago.data import Data
from galago.errors import UserError
from galago.layers import must_match
from galago.method import Method
from galago.probe import device_of, evaluating, normalized, shared
from galago.quantize.budget import cheapest
from galago.quantize.calibration import first_inputs, undisturbed
from galago.quantize.graph import look
from galago.quantize.layer import QuantLayer
from galago.quantize.patterns import edge_layers, matches
from galago.quantize.plan import initialize
from galago.quantize.quantizer import Quantizer
from galago.quantize.rest import Restable, rest, wake
from galago.quantize.rounding import weight_quantized, weight_quantizer_of
from galago.quantize.sensitivity import Facts, divergence, known, original, rounded, states

FLOAT = 32


class MixedPrecision(Method):
    """Chooses the width of each quantized layer under a budget; list it behind `Quantize`.

    Args:
        mean_weight_bits: budget: bits of a weight on average over all quantized layers (4: an eighth of float32).
        mean_bit_operations: budget in its place: bits of a weight times bits of an input, on average over all
            multiplications of the quantized layers (16: as with 4 bits everywhere).
        widths: to choose from, 2 to 8.
        inputs: whether a layer's input gets the width of its weight.
        edges: whether to choose for the first and last layers too.
        keep: patterns of module paths or type names; layers inside keep the width that they have.
        batches: how many training batches sensitivities are measured and ranges set on.
        post_training: set ranges in evaluation mode, as `Quantize` does if told so.
    """

    def __init__(
        self,
        mean_weight_bits: float | None = None,
        mean_bit_operations: float | None = None,
        widths: Sequence[int] = (2, 3, 4, 6, 8),
        inputs: bool = True,
        edges: bool = False,
        keep: Sequence[str] = (),
        batches: int = 1,
        post_training: bool = False,
    ) -> None:
        super().__init__()
        if (mean_weight_bits is None) == (mean_bit_operations is None):
            raise UserError("MixedPrecision: give one budget, mean_weight_bits or mean_bit_operations")
        if not widths or not all(2 <= bits <= 8 for bits in widths):
            raise UserError(f"MixedPrecision: widths is {list(widths)}; give one or more from 2 to 8")
        if batches < 1:
            raise UserError(
                f"MixedPrecision: batches is {batches}, which leaves no images to measure on; give 1 or more"
            )
        self.mean_weight_bits, self.mean_bit_operations = mean_weight_bits, mean_bit_operations
        self.widths, self.inputs, self.edges = tuple(widths), inputs, edges
        self.keep, self.batches, self.post_training = tuple(keep), batches, post_training
        self.chosen: dict[str, int] = {}  # path of the layer to its bits
        self.rows: list[list[Any]] = []  # path, weights, MACs, bits, a loss a width
        self.outcome = ""

    def get_extra_state(self) -> dict[str, Any]:
        return {"chosen": self.chosen, "rows": self.rows, "outcome": self.outcome}

    def set_extra_state(self, state: Any) -> None:
        self.chosen, self.rows, self.outcome = dict(state["chosen"]), list(state["rows"]), str(state["outcome"])

    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        """Measures and chooses, or on resume takes the widths of before; then gives them to the layers.

        Raises:
            UserError: nothing is quantized, a pattern matches nothing, or no choice stays within the budget.
        """
        weight_quantized(model)
        layers = {path: layer for path, _, layer in original(model) if layer is not None}
        statistics = [m for m in model.modules() if not isinstance(m, Quantizer | Restable) and m._buffers]
        with undisturbed([*statistics, *(layer.layer for layer in layers.values())]), torch.no_grad():
            torch.manual_seed(data.seed)
            images = first_inputs(data, self.batches, device_of(model))
            if not self.chosen:
                with evaluating(model), states(model):
                    rest(model)
                    self._choose(model, layers, self._kept(model, data), images)
            for path, bits in self.chosen.items():
                set_width(layers[path], bits, self.inputs)
            with states(model):
                wake(model)
                initialize(model, images, training=not self.post_training)
        return model

    def summary(self) -> Table | None:
        """What was chosen, with the loss that each width would bring."""
        if not self.rows:
            return None
        columns = ("layer", "weights", "MACs", "bits", *(f"loss at {bits}" for bits in self.widths))
        made = Table(*columns, caption=self.outcome)
        for path, weights, macs, bits, *losses in self.rows:
            made.add_row(path, f"{weights:,}", f"{macs:,}", str(bits), *(f"{loss:.2g}" for loss in losses))
        return made

    def _kept(self, model: nn.Module, data: Data) -> set[str]:
        """Paths of the layers whose width is not to be chosen."""
        modules = {path: module for path, module, _ in original(model)}
        for pattern in self.keep:
            must_match(pattern, modules)
        kept = {path for path in modules if path and any(matches(pattern, path, modules) for pattern in self.keep)}
        if self.edges:
            return kept
        found: dict[str, nn.Module] = {
            p: module for p, module in model.named_modules() if isinstance(module, QuantLayer)
        }
        graph = look(model, normalized(data, data.example(), device_of(model)))
        edges = {id(found[path]) for path in edge_layers(graph, found)}
        return kept | {path for path, _, layer in original(model) if id(layer) in edges}

    def _choose(self, model: nn.Module, layers: dict[str, QuantLayer], kept: set[str], images: Tensor) -> None:
        facts = known(model, layers, images)
        free = [path for path in facts if path not in kept and layers[path].weight_quantizer is not None]
        if not free:
            raise UserError("MixedPrecision finds no layer whose width it may choose; set edges: true, or keep fewer")
        ledger = self._ledger(facts, free)
        budget, y = ledger.left(), model(images)
        losses = [
            [self._loss(model, facts[path], bits, images, y) for bits in self.widths]
            for path in watched(free, "sensitivity of layers")
        ]
        losses = shared(losses)
        options = cheapest(losses, ledger.costs, budget)
        for path, option, row in zip(free, options, losses, strict=True):
            self.chosen[path] = self.widths[option]
            self.rows.append([path, facts[path].weights, facts[path].macs, self.widths[option], *row])
        self.outcome = ledger.told(options, losses, self.widths)

    def _loss(self, model: nn.Module, fact: Facts, bits: int, images: Tensor, y: Tensor) -> float:
        with rounded(fact, bits, self.inputs and fact.layer.input_quantizer is not None):
            return divergence(y, model(images))

    def _ledger(self, facts: dict[str, Facts], free: Sequence[str]) -> Ledger:
        costs = [[self._cost(facts[path], bits) for bits in self.widths] for path in free]
        fixed = sum(self._cost(fact, None) for path, fact in facts.items() if path not in free)
        if self.mean_weight_bits is not None:
            whole = sum(fact.weights for fact in facts.values())
            return Ledger("mean_weight_bits", self.mean_weight_bits, whole, fixed, costs)
        assert self.mean_bit_operations is not None
        whole = sum(fact.macs for fact in facts.values())
        return Ledger("mean_bit_operations", self.mean_bit_operations, whole, fixed, costs)

    def _cost(self, fact: Facts, bits: int | None) -> int:
        """What a layer takes of the budget at a width; at the one it has for None."""
        weight, own = (
            FLOAT if q is None else q.bits for q in (fact.layer.weight_quantizer, fact.layer.input_quantizer)
        )
        if bits is not None:
            weight, own = bits, bits if self.inputs and fact.layer.input_quantizer is not None else own
        return fact.weights * weight if self.mean_weight_bits is not None else fact.macs * weight * own


class Ledger(NamedTuple):
    """What may be spent, and what each choice costs."""

    name: str  # of the budget
    mean: float  # of `whole` units
    whole: int  # weights, or multiplications, of all layers
    fixed: int  # what the layers that keep their width cost
    costs: list[list[int]]  # of each width of each layer to choose for

    def left(self) -> int:
        """What the layers to choose for may cost together.

        Raises:
            UserError: less than they do at the fewest bits.
        """
        least, budget = sum(map(min, self.costs)), math.floor(self.mean * self.whole + 1e-6) - self.fixed
        if budget < least:
            smallest = math.ceil(1000 * (self.fixed + least) / self.whole) / 1000
            raise UserError(
                f"MixedPrecision: {self.name} is {self.mean:g}, but with these widths, and the layers that keep theirs,"
                f" the least is {smallest:g}"
            )
        return budget

    def told(self, options: Sequence[int], losses: Sequence[Sequence[float]], widths: Sequence[int]) -> str:
        """What a choice comes to, and what the single width whose cost is nearest to the budget would."""
        near = min(range(len(widths)), key=lambda option: abs(sum(row[option] for row in self.costs) - self.left()))
        spent, lost = (
            [sum(row[o] for row, o in zip(each, which, strict=True)) for which in (options, [near] * len(each))]
            for each in (self.costs, losses)
        )
        means = [(self.fixed + each) / self.whole for each in spent]
        chosen = f"{self.name} {means[0]:.4g} of at most {self.mean:g}, losses add up to {lost[0]:.3g}"
        return f"{chosen}; with {widths[near]} bits in all of these layers {means[1]:.4g} and {lost[1]:.3g}"


def set_width(layer: QuantLayer, bits: int, inputs: bool) -> None:
    """Gives a layer fresh quantizers of the kinds it has; the input's range is set when it is next observed."""
    weight = layer.layer.get_parameter("weight")
    fresh = of_width(weight_quantizer_of(layer), bits).to(weight.device)
    fresh.initialize(weight.detach())
    layer.weight_quantizer = fresh
    if inputs and layer.input_quantizer is not None:
        layer.input_quantizer = of_width(layer.input_quantizer, bits).to(weight.device)


def of_width(quantizer: Quantizer, bits: int) -> Quantizer:
    """A quantizer made anew from the same arguments, with other bits.

    Raises:
        UserError: it cannot have this width.
    """
    arguments = {name: getattr(quantizer, name) for name in inspect.signature(type(quantizer)).parameters}
    return type(quantizer)(**{**arguments, "bits": bits}).train(quantizer.training)
