"""Where a module that adds noise goes in a network, quantized or not, and what has to follow when it is there.

Noise belongs in front of the quantizer of an activation, as whatever a layer computes does: around the layer, and
inside the quantizer of what the layer gives out. Quantizers therefore come first, and their ranges, which were set
without noise, are set again. Used by `galago.distill.noise_injection`, `galago.distill.parametric_noise` and
`galago.regularize.residual`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import nn

from galago.data import Data
from galago.errors import UserError
from galago.layers import Flow, Wrapper, find, must_match, swap
from galago.probe import device_of, normalized
from galago.quantize.fold import normalizes_then_activates
from galago.quantize.layer import QuantLayer, QuantOutput
from galago.quantize.quantizer import Quantizer


class Place(NamedTuple):
    """One layer of a network."""

    name: str  # its path as if nothing were wrapped
    paths: tuple[str, ...]  # where it stands now with what is wrapped around it; several where it is shared
    layer: nn.Module  # itself


def places(model: nn.Module) -> list[Place]:
    """Every layer, the network itself first, each in front of what lies in it; parts of wrappers are no layers.

    >>> [(place.name, place.paths) for place in places(nn.Sequential(Wrapper(nn.Sequential(nn.ReLU()))))]
    [('', ('',)), ('0', ('0',)), ('0.0', ('0.layer.0',))]
    """
    found: dict[nn.Module, Place] = {}
    for name, path, layer in _walk(model, "", ""):
        known = found.get(layer)
        found[layer] = Place(name, (path,), layer) if known is None else known._replace(paths=(*known.paths, path))
    return list(found.values())


def _walk(module: nn.Module, name: str, path: str) -> Iterator[tuple[str, str, nn.Module]]:
    inner = path
    while isinstance(module, Wrapper):
        module, inner = module.layer, joined(inner, "layer")
    yield name, path, module
    for child, part in module.named_children():
        yield from _walk(part, joined(name, child), joined(inner, child))


def depth(path: str) -> int:
    """How many modules a path leads through."""
    return path.count(".") + bool(path)


def joined(path: str, name: str) -> str:
    """A path one module further down."""
    return f"{path}.{name}" if path else name


def chosen(model: nn.Module, patterns: Sequence[str]) -> list[Place]:
    """The layers whose path or type name matches a pattern; of timm's BatchNormAct what follows its normalization.

    Raises:
        UserError: a pattern matches nothing.
    """
    layers, names = {place.name: place.layer for place in places(model)}, set[str]()
    for pattern in patterns:
        must_match(pattern, layers)
    for name, layer in layers.items():
        if any(fnmatchcase(said, pattern) for said in (name, type(layer).__name__) for pattern in patterns):
            names.add(f"{name}.drop" if normalizes_then_activates(layer) else name)
    return [place for place in places(model) if place.name in names]


def channels_given(seen: Flow, found: Sequence[Place]) -> dict[Place, int]:
    """How many channels each layer gives out, of those that ran.

    Raises:
        UserError: a layer gives something else, or none ran.
    """
    channels = {}
    for place in found:
        if not (gave := seen.gave.get(place.paths[0])):
            continue
        shapes = [seen.values[number].shape for number in gave[0]]
        if len(shapes) != 1 or len(shapes[0]) not in (2, 4):
            said = " and ".join("×".join(map(str, shape)) for shape in shapes)
            raise UserError(f"{place.name} gives {said}, to which no noise can be added; name layers that give N×C×H×W")
        channels[place] = shapes[0][1]
    if not channels:
        raise UserError("no layer to which noise is to be added runs when the network predicts; name others")
    return channels


def wrap(model: nn.Module, chosen: Sequence[Place], make: Callable[[Place, nn.Module], Wrapper]) -> nn.Module:
    """The network with a new wrapper at each place, innermost first, inside the quantizers of what layers give out.

    Args:
        model: changed in place, unless the network itself is wrapped.
        chosen: where.
        make: gives the wrapper of a place around what is there.
    """
    for place in sorted(chosen, key=lambda place: -max(map(depth, place.paths))):
        inside = [inside_streams(model, path) for path in place.paths]
        old = find(model, inside[0])
        new = make(place, old).to(device_of(old)).train(old.training)
        for path in inside:
            model = swap(model, path, new)
    return model


def inside_streams(model: nn.Module, path: str) -> str:
    """Where to wrap what stands at a path, so that it stays inside the quantizer of what it gives out."""
    while isinstance(find(model, path), QuantOutput):
        path = joined(path, "layer")
    return path


def unwrapped(model: nn.Module, kind: type[Wrapper]) -> nn.Module:
    """The network without any wrapper of a kind; other wrappers stay."""
    for path, module in reversed(list(model.named_modules(remove_duplicate=False))):
        if isinstance(module, kind):
            model = swap(model, path, module.layer)
    return model


def quantized(model: nn.Module) -> list[QuantLayer | QuantOutput]:
    """Every part of the network that quantizes an activation or a weight."""
    return [module for module in model.modules() if isinstance(module, QuantLayer | QuantOutput)]


def require_quantizers_first(model: nn.Module, before: bool, whose: str) -> None:
    """Compares what a network is with what it was when noise was put into it.

    Args:
        model: as it is going to train.
        before: whether it was quantized when the method prepared it.
        whose: the method.

    Raises:
        UserError: it was quantized afterwards, so that quantizers stand where noise should come first.
    """
    if quantized(model) and not before:
        raise UserError(
            f"{whose} is listed before Quantize, which then quantizes what the noise is added to; list it behind"
        )


@torch.no_grad()
def set_ranges_again(model: nn.Module, data: Data) -> None:
    """Sets the range of every quantized activation on the first training batch, as the network computes now.

    In training mode, as it will compute in the first step. Ranges of weights, BatchNorm's statistics, modes and the
    random state are left as they were; so are quantizers that rest.
    """
    if not (awake := [part for part in quantized(model) if part.resting is None]):
        return
    ranges = {id(b) for part in model.modules() if isinstance(part, Quantizer) for b in part.buffers()}
    statistics = [(buffer, buffer.clone()) for buffer in model.buffers() if id(buffer) not in ranges]
    modes = [(module, module.training) for module in model.modules()]
    device = device_of(model)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(data.seed)
        for part in awake:
            part.observing = True
        model.train()(normalized(data, next(iter(data.train())).input, device))
    for module, training in modes:
        module.training = training
    for buffer, before in statistics:
        buffer.copy_(before)
