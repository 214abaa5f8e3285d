"""Equalize: cross-layer equalization, so that one range fits all channels of a weight.

Nagel, van Baalen, Blankevoort and Welling, "Data-Free Quantization Through Weight Equalization and Bias Correction",
ICCV 2019, arXiv:1906.04721, sections 4.1 and 4.2.

Where a convolution feeds only one other, through an activation with `f(c x) = c f(x)`, a channel may be made c times as
large by the first and c times as small by the second. The factor that makes the channel's weights span the same in both
is applied to every such pair until nothing changes; the float network answers as before.

    r1_i = max|W1_i|,   r2_i = max|W2_:,i|,   c_i = sqrt(r1_i r2_i) / r1_i
    W1_i, b1_i <- c_i (W1_i, b1_i),   W2_:,i <- W2_:,i / c_i          then r1_i = r2_i

When to use it: with one range for a whole weight (`per_channel: false`) at 8 bits, above all for depth-wise
convolutions (MobileNet), which lose everything without; with a range a channel it changes little. It needs no images
and takes seconds. List it before `Quantize`; networks without such pairs stay as they are.

Recipe: recipes/quantize/ptq_w8a8_mobilenet_v2_cifar10.yaml.

Design choices: BatchNorm is folded into the first layer of each pair only. Elsewhere it stays, since weights are
rounded before it here, where it costs nothing. What is left of a folded one is a bias (`FoldedNorm`), also if training
goes on. Channels whose weights are a millionth of the largest or less in either layer stay as they are (the paper:
zero). Max and average pooling between the two do no harm. Pairs do not reach across sums and concatenations. `absorb`
moves what a ReLU lets pass almost always, `c = max(0, beta - 3 |gamma|)`, into the second layer's bias; only where that
layer pads no border with zeros, which would not shift along.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from rich.table import Table
from torch import Tensor, nn

from galago.data import Data
from galago.errors import UserError
from galago.layers import Call, find, swap
from galago.method import Method
from galago.probe import device_of, normalized
from galago.quantize.fold import FoldedNorm, fold_norm, following_norm
from galago.quantize.graph import CONVOLUTIONS, Graph, look, obstacle
from galago.quantize.layer import QuantLayer
from galago.quantize.quantizer import along

HOMOGENEOUS = frozenset(("relu", "leaky_relu", "_prelu_kernel", "alias", "clone", "contiguous", "detach")) | {
    "max_pool2d_with_indices",
    "avg_pool2d",
    "_adaptive_avg_pool2d",
}
CLIPS = frozenset(("hardtanh", "clamp"))  # what ReLU6 is
DEAD = 1e-6


def rows_span(weight: Tensor) -> Tensor:
    """`r1`: the largest weight of each output channel."""
    return weight.abs().flatten(1).amax(1)


def columns_span(weight: Tensor, groups: int = 1) -> Tensor:
    """`r2`: the largest weight that reads each input channel, over all outputs and taps."""
    return _by_input(weight, groups).abs().amax((1, 3)).flatten()


def divide_columns(weight: Tensor, c: Tensor, groups: int = 1) -> Tensor:
    """`W2_:,i / c_i` for each input channel."""
    return (_by_input(weight, groups) / c.view(groups, 1, -1, 1)).view_as(weight)


def equalizing(r1: Tensor, r2: Tensor) -> Tensor:
    """`c = sqrt(r1 r2) / r1`, and 1 for channels that are dead in either layer.

    >>> equalizing(torch.tensor([4.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 2.0]))
    tensor([0.5000, 1.0000, 1.0000])
    """
    alive = (r1 > DEAD * r1.max()) & (r2 > DEAD * r2.max())
    return torch.where(alive, (r1 * r2).sqrt() / torch.where(alive, r1, 1.0), 1.0)


def _by_input(weight: Tensor, groups: int) -> Tensor:
    """Groups × outputs of a group × inputs of a group × taps."""
    return weight.reshape(groups, len(weight) // groups, weight.shape[1], -1)


class Pair(NamedTuple):
    """Two convolutions, the first of which nothing reads but the second."""

    first: str
    second: str
    norm: str | None  # path of the BatchNorm that only reads the first
    behind: str | None  # and of that behind the second
    between: tuple[Call, ...]  # from there to the second
    why_not: str = ""


class Row(NamedTuple):
    """What became of a pair."""

    first: str
    second: str
    channels: int
    before: float  # widest channel of the first over its median one
    after: float
    note: str


class Equalize(Method):
    """Makes channels of consecutive convolutions span the same range; list it before `Quantize`.

    Args:
        absorb: also move what a ReLU almost always lets pass into the next layer's bias; not exact.
        replace_relu6: take ReLU for ReLU6 between two layers, which changes what exceeds 6; otherwise such pairs stay.
        sweeps: over all pairs, at most; it ends early once nothing changes.
    """

    def __init__(self, absorb: bool = False, replace_relu6: bool = True, sweeps: int = 20) -> None:
        super().__init__()
        if sweeps < 1:
            raise UserError(f"Equalize: sweeps is {sweeps}, but must be at least 1")
        self.absorb, self.replace_relu6, self.sweeps = absorb, replace_relu6, sweeps
        self._rows: tuple[Row, ...] = ()

    @torch.no_grad()
    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        if quantized := [path for path, module in model.named_modules() if isinstance(module, QuantLayer)]:
            raise UserError(f"{quantized[0]} is quantized already; list Equalize before Quantize")
        graph = look(model, normalized(data, data.example(), device_of(model)))
        found = list(pairs(model, graph, self.replace_relu6))
        chosen = [pair for pair in found if not pair.why_not]
        for pair in chosen:
            model = prepared(model, pair)
        before = {pair.first: spread(weight_of(model, pair.first)) for pair in chosen}
        factors = equalized(model, chosen, self.sweeps)
        for pair in chosen:
            scale_bias(model, pair, factors[pair.first])
        absorbed = {pair.first for pair in chosen if self.absorb and absorb_bias(model, pair)}
        self._rows = tuple(_row(model, pair, before, absorbed) for pair in found)
        return model

    def rows(self) -> tuple[Row, ...]:
        """What became of each pair, in the order of execution."""
        return self._rows

    def summary(self) -> object:
        """A table of the pairs."""
        if not self._rows:
            return "Equalize: no convolution is read by just one other, nothing changed"
        table = Table("first", "second", "channels", "widest / median", "equalized", "remark")
        for row in self._rows:
            spreads = (f"{row.before:.2f}", f"{row.after:.2f}") if row.after else ("", "")
            table.add_row(row.first, row.second, str(row.channels), *spreads, row.note)
        return table


def pairs(model: nn.Module, graph: Graph, replace_relu6: bool) -> Iterator[Pair]:
    """Every pair of convolutions that could be equalized, in the order of execution, and why some are not."""
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, CONVOLUTIONS)}
    usable = {path for path, layer in layers.items() if not obstacle(graph, path, layer)}
    for path in (path for path in graph.flow.gave if path in usable):
        norm = following_norm(model, graph.flow, path)
        made = graph.flow.gave[path][0][0]
        start = made if norm is None else graph.normalized(made)
        between, second = reader(graph, made if start is None else start)
        if second in usable:
            why = next(filter(None, (_clip_stays(model, graph, call, replace_relu6) for call in between)), "")
            if norm is not None and not why and len(_names(model, norm)) > 1:
                why = f"{norm} has several names"
            yield Pair(path, second, norm, following_norm(model, graph.flow, second), between, why)


def reader(graph: Graph, number: int) -> tuple[tuple[Call, ...], str]:
    """The operations from a tensor to the convolution that alone reads it, and that one's path; empty if none does."""
    between: list[Call] = []
    while number not in graph.leaving:
        read = graph.read(number)
        if len(read) != 1 or read[0].inputs[0] != number:
            break
        if read[0].operation == "convolution":
            return tuple(between), read[0].module
        if read[0].operation not in HOMOGENEOUS | CLIPS:
            break
        between.append(read[0])
        number = read[0].outputs[0]
    return (), ""


def _clip_stays(model: nn.Module, graph: Graph, call: Call, replace: bool) -> str:
    """Why an operation between two layers forbids to scale; empty if it does not, or not when replaced."""
    if call.operation not in CLIPS:
        return ""
    module = find(model, call.module)
    if not isinstance(module, nn.ReLU6):
        return f"left: {call.module or 'the network'} clips, and is no ReLU6 module"
    if len(graph.flow.gave[call.module]) > 1 or len(_names(model, call.module)) > 1:
        return f"left: {call.module} clips at 6 in several places"
    return "" if replace else "left: ReLU6 (replace_relu6 is false)"


def _names(model: nn.Module, path: str) -> list[str]:
    module = find(model, path)
    return [name for name, other in model.named_modules(remove_duplicate=False) if other is module]


def prepared(model: nn.Module, pair: Pair) -> nn.Module:
    """The model with the first layer's BatchNorm folded into it, and ReLU in place of ReLU6 behind it."""
    for call in pair.between:
        if call.operation in CLIPS:
            model = swap(model, call.module, nn.ReLU(inplace=bool(find(model, call.module).inplace)))
    return model if pair.norm is None else fold_norm(model, pair.first, pair.norm)


def equalized(model: nn.Module, chosen: list[Pair], sweeps: int) -> dict[str, Tensor]:
    """Equalizes the weights of all pairs; gives the factor of each first layer's output channels, float64."""
    paths = dict.fromkeys(path for pair in chosen for path in (pair.first, pair.second))
    weights = {path: weight_of(model, path).double() for path in paths}
    factors = {pair.first: torch.ones_like(rows_span(weights[pair.first])) for pair in chosen}
    for _ in range(sweeps):
        change = 0.0
        for pair in chosen:
            groups = groups_of(model, pair.second)
            c = equalizing(rows_span(weights[pair.first]), columns_span(weights[pair.second], groups))
            weights[pair.first] = weights[pair.first] * along(c, weights[pair.first], 0)
            weights[pair.second] = divide_columns(weights[pair.second], c, groups)
            factors[pair.first] *= c
            change = max(change, float((c - 1).abs().max()))
        if change < 2e-7:
            break
    for path, weight in weights.items():
        find(model, path).get_parameter("weight").copy_(weight)
    return factors


def scale_bias(model: nn.Module, pair: Pair, factor: Tensor) -> None:
    """Makes what the first layer adds as much larger as its weights."""
    held: list[Tensor | None] = [find(model, pair.first)._parameters.get("bias")]
    if (left := folded(model, pair.norm)) is not None:
        held += [left.mean, left.deviation, left.layer._parameters.get("bias"), left.layer.get_buffer("running_mean")]
    for tensor in held:
        if tensor is not None:
            tensor.copy_(tensor.double() * factor)


def absorb_bias(model: nn.Module, pair: Pair) -> bool:
    """Moves what always passes from the first layer's bias into the second's; False where that cannot be done."""
    left, second = folded(model, pair.norm), find(model, pair.second)
    assert isinstance(second, CONVOLUTIONS)
    padded = isinstance(second.padding, str) or any(second.padding)
    rectified = [call.operation in CLIPS | {"relu"} for call in pair.between]
    bias, behind = second._parameters.get("bias"), folded(model, pair.behind)
    if left is None or padded or rectified != [True] or (bias is None and pair.behind is None):
        return False
    passes = (left.mean - 3 * left.deviation).double().clamp_min(0.0)
    weight = _by_input(second.get_parameter("weight").double(), groups := groups_of(model, pair.second))
    added = (weight * passes.view(groups, 1, -1, 1)).sum((2, 3)).flatten()
    if bias is not None:
        bias.add_(added)
    else:
        norm = find(model, str(pair.behind)) if behind is None else behind.layer
        norm.get_buffer("running_mean").sub_(added)
    left.mean.sub_(passes)
    left.layer.get_buffer("running_mean").add_(passes)
    return True


def folded(model: nn.Module, norm: str | None) -> FoldedNorm | None:
    """What is left of the BatchNorm at a path; None where it was not folded."""
    for path in () if norm is None else (norm, norm.rpartition(".")[0]):
        if isinstance(left := find(model, path), FoldedNorm):
            return left
    return None


def weight_of(model: nn.Module, path: str) -> Tensor:
    """The weight of the layer at a path."""
    return find(model, path).get_parameter("weight").detach()


def groups_of(model: nn.Module, path: str) -> int:
    """In how many groups of channels the convolution at a path computes."""
    return int(getattr(find(model, path), "groups", 1))


def spread(weight: Tensor) -> float:
    """How much wider the widest output channel is than the median one."""
    spans = rows_span(weight)
    return float(spans.max() / spans.median().clamp_min(1e-12))


def _row(model: nn.Module, pair: Pair, before: dict[str, float], absorbed: set[str]) -> Row:
    channels = len(weight_of(model, pair.first))
    if pair.why_not:
        return Row(pair.first, pair.second, channels, 0.0, 0.0, pair.why_not)
    replaced = any(call.operation in CLIPS for call in pair.between)
    notes = ["ReLU6 is ReLU now"] * replaced + ["bias absorbed"] * (pair.first in absorbed)
    after = spread(weight_of(model, pair.first))
    return Row(pair.first, pair.second, channels, before[pair.first], after, ", ".join(notes))
