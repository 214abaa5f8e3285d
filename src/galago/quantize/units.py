"""Units: the parts of a quantized network that a post-training method mends one after another.

A unit is a residual or an inverted residual block, or a layer on its own, with the BatchNorm and the activation behind
it. It takes one tensor and gives one, so it can be run alone on what it took in once.

Units are found in one recorded forward pass in float (`galago.quantize.graph`), not by the names of classes: a block is
the smallest module in which branches meet again, by an addition or a concatenation. Modules of a block's class are
blocks too (inverted residuals without a shortcut). A block within a block belongs to it, unless such inner blocks hold
most of its layers: then they are the units. Where branches meet outside of any module that takes one tensor and gives
one, layers are mended one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn

from galago.layers import Call
from galago.quantize.graph import ACTIVATIONS, RECTIFIERS, Graph, look
from galago.quantize.layer import QuantLayer
from galago.quantize.plan import depth
from galago.quantize.rest import Restable, rest, restable, wake

MEETINGS = frozenset(("add", "cat"))


class Unit(NamedTuple):
    """A part of a network that is mended at once."""

    paths: tuple[str, ...]  # modules that run one after another: a block or a layer, its BatchNorm, its activation
    layers: tuple[str, ...]  # the quantized layers in it, in the order of execution
    takes: int  # the tensor that goes in, and the one that comes out, in the recorded pass
    gives: int

    @property
    def name(self) -> str:
        """The path of the block or of the layer."""
        return self.paths[0]

    def parts(self, model: nn.Module) -> nn.Sequential:
        """The unit as a network of its own; the modules are the same objects."""
        return nn.Sequential(*(model.get_submodule(path) for path in self.paths))

    def quant_layers(self, model: nn.Module) -> dict[str, QuantLayer]:
        """Its quantized layers, by path in the whole network."""
        found = {path: model.get_submodule(path) for path in self.layers}
        return {path: layer for path, layer in found.items() if isinstance(layer, QuantLayer)}


def units(model: nn.Module, example: Tensor, blocks: bool = True) -> list[Unit]:
    """The units of a quantized network in the order of execution; each quantized layer is in exactly one.

    Args:
        model: with layers wrapped by `Quantize`.
        example: a normalized input; run once.
        blocks: whether the layers of a block are one unit; otherwise each layer is one.
    """
    with resting(model, True):
        graph = look(model, example)
    modules = dict(model.named_modules())
    order = {path: index for index, path in enumerate(graph.flow.received)}
    layers = [path for path in order if isinstance(modules[path], QuantLayer)]
    held = _blocks(graph, modules, layers) if blocks else {}
    alone = set(layers).difference(*held.values())
    heads = held | {path: [path] for path in alone}
    made = [_unit(graph, modules, _outside(path, modules), heads[path]) for path in heads]
    return sorted(made, key=lambda unit: order[unit.name])


def _unit(graph: Graph, modules: dict[str, nn.Module], path: str, layers: Sequence[str]) -> Unit:
    """A block or a layer with what follows it alone and element by element."""
    paths, number = [path], graph.flow.gave[path][0][0]
    while (behind := _behind(graph, modules, number)) is not None:
        paths.append(behind)
        number = graph.flow.gave[behind][0][0]
    # A stream further out, which is no part of the unit, gives the same tensor in float but another when quantized.
    streams = [p for p in graph.givers.get(number, []) if isinstance(modules[p], Restable)]
    known = all(_inside(stream, paths[-1]) for stream in streams)
    return Unit(tuple(paths), tuple(layers), graph.flow.received[path][0][0], number if known else -1)


def _behind(graph: Graph, modules: dict[str, nn.Module], number: int) -> str | None:
    """The module that alone reads a tensor, if all it does is to normalize with fixed statistics and to activate."""
    readers = graph.read(number)
    path = readers[0].module if readers and number not in graph.leaving else ""
    calls = [call for call in _calls(graph, path) if not graph.alive.isdisjoint(call.inputs)]
    if not path or not _takes_one(graph, path) or any(not _inside(call.module, path) for call in readers):
        return None
    simple = all("batch_norm" in c.operation or c.operation in RECTIFIERS | ACTIVATIONS for c in calls)
    return _outside(path, modules) if simple and graph.flow.received[path][0][0] == number else None


def _blocks(graph: Graph, modules: dict[str, nn.Module], layers: Sequence[str]) -> dict[str, list[str]]:
    """Modules in which branches meet, and others of their classes, with the quantized layers in each; none nested."""
    found: dict[str, list[str]] = {}
    for call in graph.flow.calls:
        if call.operation in MEETINGS and len(graph.alive.intersection(call.inputs)) > 1:
            around = (call.module.rsplit(".", up)[0] for up in range(depth(call.module)))
            if (home := next((path for path in around if _is_block(graph, modules, path, layers)), None)) is not None:
                found[home] = _in(home, layers)
    kinds = {type(modules[path]) for path in found}
    for path, module in modules.items():
        if type(module) in kinds and _is_block(graph, modules, path, layers):
            found[path] = _in(path, layers)
    kept: list[str] = []
    for path in sorted(found, key=depth):
        inner = {layer for other in found if other != path and _inside(other, path) for layer in found[other]}
        if 2 * len(inner) <= len(found[path]) and not any(_inside(path, other) for other in kept):
            kept.append(path)
    return {path: found[path] for path in kept}


def _is_block(graph: Graph, modules: dict[str, nn.Module], path: str, layers: Sequence[str]) -> bool:
    """Whether a module holds quantized layers, takes one tensor, gives one, and reads nothing else of the network."""
    container = type(modules[path]).__module__.startswith("torch.nn.") or isinstance(modules[path], Restable)
    if not path or container or not _in(path, layers) or path in graph.odd or not _takes_one(graph, path):
        return False
    calls = _calls(graph, path)
    own = {*graph.flow.received[path][0], *(number for call in calls for number in call.outputs)}
    return all(number in own or number not in graph.alive for call in calls for number in call.inputs)


def _takes_one(graph: Graph, path: str) -> bool:
    """Whether a module runs once, on one tensor, and gives one."""
    runs = [*graph.flow.received.get(path, []), *graph.flow.gave.get(path, [])]
    return len(runs) == 2 and all(len(run) == 1 for run in runs)


def _outside(path: str, modules: dict[str, nn.Module]) -> str:
    """The path of the outermost quantizing wrapper around a module, or its own where there is none."""
    while path.endswith(".layer") and isinstance(modules[path.removesuffix(".layer")], Restable):
        path = path.removesuffix(".layer")
    return path


def _calls(graph: Graph, path: str) -> list[Call]:
    return [call for call in graph.flow.calls if _inside(call.module, path)]


def _inside(path: str, other: str) -> bool:
    return path == other or path.startswith(f"{other}.")


def _in(path: str, layers: Sequence[str]) -> list[str]:
    return [layer for layer in layers if _inside(layer, path)]


@contextmanager
def resting(model: nn.Module, asleep: bool) -> Iterator[None]:
    """The network computes in float, or in quantized values, as long as the `with` lasts."""
    before = [(module, module.resting) for module in restable(model)]
    (rest if asleep else wake)(model)
    try:
        yield
    finally:
        for module, was in before:
            module.resting = was
