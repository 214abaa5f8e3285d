"""Finding where a network can be given more channels (`galago.distill.widen.Junction`), and why not elsewhere.

The network runs once on an image and what feeds what is read off (`galago.layers.flow`), however it is written. A
convolution can grow where its result goes, through nothing that mixes channels, into one further convolution or linear
layer. What a residual addition joins has to have as many channels on both sides, and what two layers read would have to
grow in both: inside a residual block only the convolutions before the last one can grow. Each place that is found is
tried on a copy: with the new channels in place the network has to give what it gave before.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from itertools import islice
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from galago.distill.widen import Junction, first_filters, widen
from galago.errors import UserError
from galago.layers import Call, Flow, find, flow, innermost, tap
from galago.probe import evaluating
from galago.quantize.fold import FoldedNorm

CLOSE = 1e-4  # of the largest score: sums of more terms, of which the new ones are zero, are rounded differently
SHOWN = 3  # reasons in a message
# Operations that make each channel of its own values alone.
EACH_CHANNEL = frozenset((
    "relu", "hardtanh", "clamp", "clamp_min", "leaky_relu", "elu", "silu", "gelu", "mish", "hardswish", "hardsigmoid",
    "sigmoid", "tanh", "max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d", "mean",
    "view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "squeeze", "clone", "contiguous", "alias", "detach",
    "native_dropout", "constant_pad_nd",
))  # fmt: skip


def junctions(
    model: nn.Module, image: Tensor, channels: int, compared: Sequence[str] = ()
) -> tuple[list[Junction], dict[str, str]]:
    """The places where channels can be added, in the order of execution; of other convolutions, why they cannot grow.

    Args:
        model: left as it was; wrappers are looked through.
        image: normalized, 1×C×H×W.
        channels: how many are to be added at once.
        compared: paths of layers whose outputs have to keep their shape.

    Returns:
        Junctions, and reasons by path of the convolution.
    """
    bare = without_wrappers(copy.deepcopy(model)).eval()
    seen, modules = flow(bare, image), dict(bare.named_modules())
    ran = [path for path in seen.gave if isinstance(modules[path], nn.Conv2d)]
    places, reasons = [], {}
    for path in ran:
        found = _followed(seen, modules, path)
        if isinstance(found, str) or (why := _obstacle(model, found, image, channels, compared)):
            reasons[path] = found if isinstance(found, str) else why
        else:
            places.append(found)
    return places, reasons


def allowed(places: Sequence[Junction], reasons: Mapping[str, str], patterns: Sequence[str]) -> list[Junction]:
    """The places whose convolution has a path that a pattern means; all of them without patterns.

    Raises:
        UserError: there is none, or none for one of the patterns.
    """
    for pattern in patterns:
        if not any(fnmatchcase(place.layer, pattern) for place in places):
            why = next((f": {path}: {why}" for path, why in reasons.items() if fnmatchcase(path, pattern)), "")
            raise UserError(f"Planting: layers: {pattern!r} matches no convolution that can grow{why}")
    if not places:
        why = "; ".join(f"{path}: {reason}" for path, reason in islice(reasons.items(), SHOWN))
        raise UserError(f"Planting: no layer of this network can grow ({why or 'it has no convolution'})")
    return [p for p in places if not patterns or any(fnmatchcase(p.layer, pattern) for pattern in patterns)]


def without_wrappers(model: nn.Module) -> nn.Module:
    """The network with every wrapped layer in its wrapper's place. Changes the given one.

    >>> from galago.layers import Wrapper
    >>> without_wrappers(nn.Sequential(Wrapper(nn.ReLU())))
    Sequential(
      (0): ReLU()
    )
    """
    bare: nn.Module = innermost(model)
    for name, child in bare.named_children():
        setattr(bare, name, without_wrappers(child))
    return bare


def _followed(seen: Flow, modules: dict[str, nn.Module], path: str) -> Junction | str:
    """The junction that begins at a convolution, or why there is none."""
    layer: Any = modules[path]
    if layer.groups > 1:
        return "it computes in groups of channels"
    if len(seen.gave[path]) != 1:
        return f"it runs {len(seen.gave[path])} times in one pass"
    number, norm, leaving = seen.gave[path][0][0], None, {out for given in seen.gave[""] for out in given}
    pixels = math.prod(seen.values[number].shape[2:])
    while True:
        calls = seen.consumers(number)
        if number in leaving:
            return "the network gives out its result"
        if len(calls) != 1:
            return f"{len(calls)} operations read its result"
        call, reader = calls[0], modules[calls[0].module]
        if isinstance(reader, nn.Conv2d | nn.Linear):
            return _junction(seen, call, reader, Junction(path, norm, call.module, 1, pixels, 1), number)
        if "batch_norm" in call.operation and norm is None and _grows(reader, layer.out_channels):
            norm = call.module
        elif call.operation not in EACH_CHANNEL or not _has_channels(seen.values[call.outputs[0]], layer.out_channels):
            return f"{_words(call)} reads its result"
        number = call.outputs[0]


def _words(call: Call) -> str:
    sums = {"add": "an addition", "cat": "a concatenation", "mul": "a product"}
    what = "a normalization" if "norm" in call.operation else sums.get(call.operation, f"`{call.operation}`")
    return f"{what} in {call.module or 'the network itself'}"


def _has_channels(value: Tensor, width: int) -> bool:
    """Whether a tensor still has the channels in their order: as its second axis, or flattened with their pixels."""
    return value.shape[1] == width if value.ndim > 2 else value.ndim == 2 and value.shape[1] % width == 0


def _grows(norm: nn.Module, width: int) -> bool:
    """Whether a normalization is PyTorch's own BatchNorm over these channels, with statistics."""
    plain = isinstance(norm, _BatchNorm) and type(norm).forward is _BatchNorm.forward
    return plain and getattr(norm, "running_mean", None) is not None and getattr(norm, "num_features", 0) == width


def _junction(seen: Flow, call: Call, reader: Any, found: Junction, number: int) -> Junction | str:
    """The junction with what is known of its reader."""
    given, made = seen.values[number], seen.values[call.outputs[0]]
    if isinstance(reader, nn.Conv2d):
        if reader.groups > 1:
            return f"{call.module}, which reads it, computes in groups of channels"
        return found._replace(reader_pixels=math.prod(made.shape[2:]))
    if given.ndim != 2:
        return f"{call.module}, which reads it, is a linear layer on maps"
    width = seen.values[seen.gave[found.layer][0][0]].shape[1]
    return found._replace(columns=given.shape[1] // width)


@torch.no_grad()
def _obstacle(model: nn.Module, place: Junction, image: Tensor, channels: int, compared: Sequence[str]) -> str:
    """Why a wider copy of the network is not as good as the network; empty if it is."""
    if place.norm is not None and isinstance(find(model, place.norm), FoldedNorm):
        return f"{place.norm} is folded"  # and keeps numbers of its own for each channel
    network = copy.deepcopy(model)
    filters = first_filters(innermost(find(network, place.layer)).weight, channels, torch.Generator().manual_seed(0))
    with evaluating(network), ExitStack() as watching:
        taps = {path: watching.enter_context(tap(network, path)) for path in compared}
        before, shapes = network(image), {path: seen.value.shape for path, seen in taps.items()}
        widen(network, place, filters)
        try:
            after, reached = network(image), {path: seen.value.shape for path, seen in taps.items()}
            _train_once(network, image)
        except (RuntimeError, ValueError, IndexError, AssertionError):
            return "the network does not run with more channels here"
    for path in compared:
        if reached[path] != shapes[path]:
            return f"{path}, which a lesson compares, would have other channels"
    return "" if _close(before, after) else "more channels here would change what the network says"


def _train_once(network: nn.Module, image: Tensor) -> None:
    """A pass in training mode, in which parts may run that do not run otherwise; draws no random numbers."""
    with torch.random.fork_rng([image.device] if image.device.type == "cuda" else []):
        network.train()(torch.cat([image, image]))


def _close(before: Any, after: Any) -> bool:
    pairs = zip(tree_leaves(before), tree_leaves(after), strict=True)
    return all(bool((a - b).abs().max() <= CLOSE * a.abs().max()) for a, b in pairs)


def added_parameters(model: nn.Module, place: Junction, channels: int) -> int:
    """What n more channels cost: `n c k² + 2 n + n c' k'²`; no 2 n where there is no BatchNorm, n more for a bias."""
    layer, reader = (innermost(find(model, path)) for path in (place.layer, place.reader))
    norm = None if place.norm is None else innermost(find(model, place.norm))
    own = [layer.bias, *(() if norm is None else (norm.weight, norm.bias))]
    each = layer.weight[0].numel() + sum(tensor is not None for tensor in own)
    return channels * (int(each) + _read(reader, place))


def added_macs(model: nn.Module, place: Junction, channels: int) -> int:
    """What n more channels cost in multiply-accumulates an image."""
    layer, reader = (innermost(find(model, path)) for path in (place.layer, place.reader))
    return channels * (int(layer.weight[0].numel()) * place.pixels + _read(reader, place) * place.reader_pixels)


def _read(reader: Any, place: Junction) -> int:
    """Weights of the reader for one channel."""
    outputs, _, *window = reader.weight.shape
    return int(outputs * place.columns * math.prod(window))


def table(model: nn.Module, places: Sequence[Junction], reasons: Mapping[str, str], channels: int) -> Table:
    """Where channels can be added and what they cost, and why not elsewhere, for the terminal."""
    made = Table("layer", "channels", "next layer", "parameters", "multiply-accumulates", "remark")
    for place in places:
        costs = (f"+{cost(model, place, channels):,}" for cost in (added_parameters, added_macs))
        width = innermost(find(model, place.layer)).out_channels
        made.add_row(place.layer, f"{width} + {channels}", place.reader, *costs, "")
    for path, why in reasons.items():
        made.add_row(path, "", "", "", "", f"cannot grow: {why}", style="yellow")
    return made
