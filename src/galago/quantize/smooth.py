"""SmoothQuant: outliers of a few channels move from activations, where they cost most, into weights.

Xiao, Lin, Seznec, Wu, Demouth and Han, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
Language Models", ICML 2023, arXiv:2211.10438.

Behind a LayerNorm some channels are far larger than others, and one range for all leaves the others few levels. The
norm's gain and bias are divided by a factor for each channel, and the weights of the linear layers that read it
multiplied by it; the float network answers as before.

    sigma_j = max|X_j|^alpha / max|W_:,j|^(1 - alpha)           W over all layers that read X
    gain_j, bias_j <- (gain_j, bias_j) / sigma_j,   W_:,j <- W_:,j sigma_j

When to use it: vision transformers and ConvNeXt, 8 bits and below, with one range for a tensor of activations. For
networks of convolutions and BatchNorm `Equalize` does the same. List it before `Quantize`; it costs one pass over a
few images. Networks without LayerNorm stay as they are.

Recipe: recipes/quantize/smooth_w8a8_vit_digits.yaml.

Design choices: a norm takes part if linear layers alone read it, at most through choosing a token or averaging them.
Where a channel is always 0, or all weights that read it are, the factor is 1; otherwise it is at least 1e-5, as in the
public code. Images are seen in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor, nn

from galago.data import Data
from galago.errors import UserError
from galago.layers import find
from galago.method import Method
from galago.probe import device_of, normalized
from galago.quantize.calibration import first_inputs
from galago.quantize.graph import Graph, look, obstacle
from galago.quantize.layer import QuantLayer

SMALLEST = 1e-5
# Operations that leave every value in its channel, the last axis, if that keeps its size.
ALONG_TOKENS = frozenset(("select", "slice", "mean", "clone", "contiguous", "alias", "detach", "view", "_unsafe_view"))


def migration(activations: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """`sigma = max|X|^alpha / max|W|^(1 - alpha)` for each channel.

    Args:
        activations: the largest size of each channel.
        weights: the largest size of the weights that read each channel.
        alpha: how much of the difficulty moves into the weights.

    >>> migration(torch.tensor([16.0, 0.0]), torch.tensor([1.0, 2.0]), alpha=0.5)
    tensor([4., 1.])
    """
    found = (activations.pow(alpha) / weights.pow(1 - alpha)).clamp_min(SMALLEST)
    return torch.where((activations > 0) & (weights > 0), found, 1.0)


class Place(NamedTuple):
    """A LayerNorm and the linear layers that read it."""

    norm: str
    readers: tuple[str, ...]
    why_not: str = ""


class Row(NamedTuple):
    """What became of a LayerNorm."""

    norm: str
    readers: str
    before: float  # widest channel of what it gives out over its median one
    after: float
    note: str


class Smooth(Method):
    """Evens out the channels behind LayerNorms; list it before `Quantize`.

    Args:
        alpha: how much of the difficulty moves into the weights: 0 none, 1 all of it.
        batches: of training images that the channels' sizes are measured on.
    """

    done: Tensor

    def __init__(self, alpha: float = 0.5, batches: int = 1) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise UserError(f"Smooth: alpha is {alpha:g}, but must be from 0 to 1")
        if batches < 1:
            raise UserError(f"Smooth: batches is {batches}, which leaves no images to measure on; give 1 or more")
        self.alpha, self.batches = alpha, batches
        self.register_buffer("done", torch.zeros(()))
        self._rows: tuple[Row, ...] | None = None  # nothing was done yet, or in the run that is resumed

    @torch.no_grad()
    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        if quantized := [path for path, module in model.named_modules() if isinstance(module, QuantLayer)]:
            raise UserError(f"{quantized[0]} is quantized already; list Smooth before Quantize")
        if self.done:  # resumed: the checkpoint brings the smoothed weights
            return model
        device = device_of(model)
        found = list(places(model, look(model, normalized(data, data.example(), device))))
        chosen = [place.norm for place in found if not place.why_not]
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(data.seed)
            sizes = channel_sizes(model, chosen, first_inputs(data, self.batches, device)) if chosen else {}
        self._rows = tuple(smoothed(model, place, sizes.get(place.norm), self.alpha) for place in found)
        self.done.fill_(1)
        return model

    def rows(self) -> tuple[Row, ...]:
        """What became of each LayerNorm, in the order of execution."""
        return self._rows or ()

    def summary(self) -> object | None:
        """A table of the norms."""
        if not self._rows:
            return None if self._rows is None else "Smooth: there is no LayerNorm, nothing changed"
        table = Table("norm", "read by", "widest / median", "smoothed", "remark")
        for row in self._rows:
            spreads = ("", "") if row.note else (f"{row.before:.2f}", f"{row.after:.2f}")
            table.add_row(row.norm, row.readers, *spreads, row.note)
        return table


def places(model: nn.Module, graph: Graph) -> Iterator[Place]:
    """Every LayerNorm that runs, in the order of execution."""
    for path in graph.flow.gave:
        norm = find(model, path)
        if isinstance(norm, nn.LayerNorm):
            readers, why = readers_of(model, graph, path)
            alone = len(graph.flow.gave[path]) == 1 and len(norm.normalized_shape) == 1
            why = why or ("" if norm.weight is not None else "left: it has no gain")
            yield Place(path, readers, why if alone else "left: it runs several times, or over several axes")


def readers_of(model: nn.Module, graph: Graph, path: str) -> tuple[tuple[str, ...], str]:
    """The linear layers that read what a LayerNorm gives, or who forbids to change it."""
    started = graph.flow.gave[path][0][0]
    channels = graph.flow.values[started].shape[-1]
    found: dict[str, None] = {}
    waiting = [started]
    while waiting:
        number = waiting.pop()
        if number in graph.leaving:
            return (), "left: the network gives it out"
        for call in graph.read(number):
            layer = find(model, call.module)
            linear = isinstance(layer, nn.Linear) and graph.flow.received[call.module][0] == (number,)
            if linear and layer.in_features == channels and not obstacle(graph, call.module, layer):
                found[call.module] = None
            elif call.operation in ALONG_TOKENS and graph.flow.values[call.outputs[0]].shape[-1:] == (channels,):
                waiting.append(call.outputs[0])
            else:
                return (), f"left: {call.module or 'the network'} ({call.operation}) reads it too"
    return tuple(found), "" if found else "left: nothing reads it"


def channel_sizes(model: nn.Module, norms: list[str], inputs: Tensor) -> dict[str, Tensor]:
    """The largest size of each channel that LayerNorms give out, by path."""
    sizes: dict[str, Tensor] = {}

    def measure(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            sizes[path] = output.abs().flatten(0, -2).amax(0)

        return hook

    modes = {module: module.training for module in model.modules()}
    with ExitStack() as hooks:
        for path in norms:
            hooks.callback(find(model, path).register_forward_hook(measure(path)).remove)
        model.eval()(inputs)
    for module, training in modes.items():
        module.training = training
    return sizes


def smoothed(model: nn.Module, place: Place, size: Tensor | None, alpha: float) -> Row:
    """Moves the outliers of one norm into the weights that read it."""
    readers = ", ".join(place.readers)
    if size is None:
        return Row(place.norm, readers, 0.0, 0.0, place.why_not)
    weights = [find(model, path).get_parameter("weight") for path in place.readers]
    widest = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    sigma = migration(size.double(), widest.double(), alpha)
    norm = find(model, place.norm)
    for tensor in (norm.get_parameter("weight"), norm._parameters.get("bias")):
        if tensor is not None:
            tensor.copy_(tensor.double() / sigma)
    for weight in weights:
        weight.copy_(weight.double() * sigma)
    return Row(place.norm, readers, spread(size), spread(size.double() / sigma), "")


def spread(size: Tensor) -> float:
    """How much larger the largest channel is than the median one."""
    return float(size.max() / size.median().clamp_min(1e-12))
